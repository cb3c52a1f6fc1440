"""Exceptions that RankKV raises; each message names the value, the bound and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RankKVError(Exception):
    """Base class of all errors raised by RankKV."""


class ConfigError(RankKVError, ValueError):
    """An option has a value outside its range."""


class BudgetError(RankKVError, ValueError):
    """No budgets satisfy the total and the bounds; the message gives the numbers."""


class InputError(RankKVError, ValueError):
    """The prompt, file or tensor cannot be used."""


class DegenerateAttentionError(RankKVError, ValueError):
    """Attention weights or ranks are negative or not finite, so no rank can be computed."""


class UnknownNameError(RankKVError, ValueError):
    """A selector, strategy, scope or aggregation is not registered."""

    @classmethod
    def of(cls, kind: str, name: object, known: Iterable[str]) -> UnknownNameError:
        """Build the error for ``name``, with the known names and the closest match.

        Parameters
        ----------
        kind : str
            Kind of the name, in the singular ("selector", "strategy", ...).
        name : object
            The unknown name.
        known : iterable of str
            All registered names.

        Examples
        --------
        >>> str(UnknownNameError.of("selector", "snapvk", ["h2o", "snapkv"]))
        "unknown selector 'snapvk'; did you mean 'snapkv'? Known: h2o, snapkv."
        """
        names = sorted(known)
        close = difflib.get_close_matches(str(name), names, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        return cls(f"unknown {kind} {name!r}{hint} Known: {', '.join(names)}.")


class UnsupportedModelError(RankKVError, TypeError):
    """The model has no KV cache to compress, or its attention cannot be observed."""


class CacheStateError(RankKVError, RuntimeError):
    """The cache's state does not allow the operation, such as restoring evicted tokens."""


class ProfileError(RankKVError, ValueError):
    """A profile is damaged, belongs to another model, or is needed but unknown."""


class ProcessGroupError(RankKVError, RuntimeError):
    """Cooperating processes do not match in number, devices or results."""


class FloorError(RankKVError, ValueError):
    """A task cannot measure anything: the uncompressed model scores at guess level."""


class MissingDependencyError(RankKVError, ImportError):
    """An optional package is not installed; the message gives the one command that installs it."""


class SourceUnavailableError(RankKVError, OSError):
    """A model or data set cannot be reached: the hub does not answer, or the file does not exist."""


class OutputError(RankKVError, OSError):
    """A file cannot be written: no permission, a full disk, or a folder in its place."""
