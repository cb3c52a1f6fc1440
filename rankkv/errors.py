"""Every exception RankKV raises: each message names the value, the bound and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RankKVError(Exception):
    """Base class of all errors raised by RankKV."""


class ConfigError(RankKVError, ValueError):
    """An option has a value outside its range."""


class BudgetError(RankKVError, ValueError):
    """No budgets can satisfy the total and the bounds; the message carries the numbers."""


class InputError(RankKVError, ValueError):
    """The prompt, file or tensor given cannot be used."""


class DegenerateAttentionError(RankKVError, ValueError):
    """Attention weights or ranks are not finite, or negative, so no rank can be computed from them."""


class UnknownNameError(RankKVError, ValueError):
    """A selector, strategy, scope or aggregation is not registered."""

    @classmethod
    def of(cls, kind: str, name: object, known: Iterable[str]) -> UnknownNameError:
        """Build the error for ``name``, listing the known names and the closest match.

        Parameters
        ----------
        kind : str
            What was looked up, in the singular ("selector", "strategy", ...).
        name : object
            The name that was asked for.
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
    """The model has no KV cache to compress, or an attention that cannot be observed."""


class CacheStateError(RankKVError, RuntimeError):
    """The cache is asked for something its state does not allow, such as restoring evicted tokens."""


class ProfileError(RankKVError, ValueError):
    """A profile is damaged, belongs to another model, or is wanted where none is known."""


class ProcessGroupError(RankKVError, RuntimeError):
    """Processes that work together do not fit: their number, their devices, or what each was given."""


class FloorError(RankKVError, ValueError):
    """A task measures nothing: the uncompressed model is at guess level."""


class MissingDependencyError(RankKVError, ImportError):
    """A package behind an extra is not installed; the message gives the one command that installs it."""


class SourceUnavailableError(RankKVError, OSError):
    """A model or data set cannot be reached: the hub does not answer, or the file is not there."""


class OutputError(RankKVError, OSError):
    """A file cannot be written: no permission, a full disk, or a folder in its place."""
