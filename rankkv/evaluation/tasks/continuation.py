"""Continuation perplexity: how well the text that follows is predicted from its context."""

from __future__ import annotations

from ...errors import ConfigError, InputError
from .base import Draft, Haystack, SampleSpec


def make_continuation(haystack: Haystack, place: SampleSpec, *, continuation: int = 128) -> Draft:
    """Cut a context and what follows it; samples are spread evenly over the text and share no token.

    The blank context is another part of the text, as far away as there is: a loss that is no better with the true
    context than with it says nothing about the cache.

    Parameters
    ----------
    haystack : Haystack
        Any text of at least ``count * (length + continuation)`` tokens.
    place : SampleSpec
        Which sample.
    continuation : int, default 128
        Tokens that follow the context; the first is predicted by the context alone and not scored.

    Raises
    ------
    ConfigError
        If ``continuation`` is below 2.
    InputError
        If the text has no room for all samples side by side.
    """
    if continuation < 2:
        raise ConfigError(f"continuation={continuation} must be at least 2 tokens: the first is not scored.")
    size, ids = place.length + continuation, haystack.ids
    room = len(ids) // place.count
    if room < size:
        raise InputError(
            f"a haystack of {len(ids)} tokens has no room for {place.count} samples of {size}: lower the count, the "
            "length or the continuation, or give more text."
        )
    start = place.index * room + place.draw.randint(0, room - size)
    context, following = ids[start : start + place.length], ids[start + place.length : start + size]
    # The same distance around a ring, so that neither the context nor what follows it is in the blank one.
    twice, far = ids + ids, start + size + (len(ids) - size - place.length) // 2
    blank = twice[far : far + place.length] if len(ids) >= size + place.length else None
    return Draft(context, continuation=following, blank=blank)
