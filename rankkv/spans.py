"""Spans of tokens that are kept whatever their score: a system prompt, instructions, a tool description."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .errors import ConfigError


def check_spans(protect: Any) -> tuple[tuple[int, int], ...]:
    """Return spans ``(start, stop)`` of real tokens (padding not counted), as a tuple of tuples.

    Parameters
    ----------
    protect : iterable of (int, int), or None
        Half-open spans, ``0 <= start < stop``.

    Raises
    ------
    ConfigError
        If an entry is no such pair.

    Examples
    --------
    >>> check_spans([(0, 12)])
    ((0, 12),)
    """
    if protect is None:
        return ()
    spans = list(protect) if isinstance(protect, Iterable) and not isinstance(protect, str) else [protect]
    for span in spans:
        numbers = isinstance(span, Sequence) and len(span) == 2 and all(type(bound) is int for bound in span)
        if not numbers or not 0 <= span[0] < span[1]:
            raise ConfigError(
                f"protect={protect!r}: {span!r} is not a span; give pairs (start, stop) of token indices with "
                "0 <= start < stop, such as protect=[(0, 24)] for a system prompt of 24 tokens."
            )
    return tuple((int(start), int(stop)) for start, stop in spans)


def count_spanned(protect: Sequence[tuple[int, int]], length: int) -> int:
    """Count the tokens that lie in at least one of the spans ``(start, stop)`` among ``length`` tokens.

    Examples
    --------
    >>> count_spanned([(0, 4), (2, 6)], length=5)
    5
    """
    return len({index for start, stop in protect for index in range(start, min(stop, length))})
