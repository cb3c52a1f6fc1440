"""Other libraries' programs, where those libraries are missing."""

from __future__ import annotations

import importlib.util

import pytest

from rankkv.errors import MissingDependencyError


@pytest.mark.skipif(importlib.util.find_spec("kvpress") is not None, reason="kvpress is installed")
def test_a_missing_kvpress_is_named_with_the_command_that_installs_it():
    with pytest.raises(MissingDependencyError, match=r'RankKVPress needs .*pip install "kvpress==0\.5\.5"'):
        from rankkv.integrations.kvpress import RankKVPress  # noqa: F401


def test_an_unknown_name_is_an_attribute_error():
    from rankkv.integrations import kvpress

    with pytest.raises(AttributeError, match="no attribute 'RankKVPres'"):
        kvpress.RankKVPres  # noqa: B018
