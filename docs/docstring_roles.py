"""The docstrings' reStructuredText roles, such as ``:class:``, as plain code for the site."""

from __future__ import annotations

import re

from griffe import Extension

ROLE = re.compile(r":(?:class|func|meth|data|attr|mod|exc):`~?(?:[\w.]*\.)?(\w+)`")


class DocstringRoles(Extension):
    """Turn every role into the last part of the name it points to."""

    def on_instance(self, *, obj, **kwargs):
        """Rewrite the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(r"`\1`", obj.docstring.value)
