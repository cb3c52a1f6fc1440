"""Perplexity task: contexts and the text that follows them."""

from __future__ import annotations

from ...errors import ConfigError, InputError
from .base import Draft, Haystack, SampleSpec


def make_continuation(haystack: Haystack, place: SampleSpec, *, continuation: int = 128) -> Draft:
    """Cut a context and its continuation from the text.

    Samples are spread evenly over the text and share no token.  The blank context is the most distant part of the
    text.  If the loss after it is as low as after the true context, the sample does not test the cache.

    Parameters
    ----------
    haystack : Haystack
        Any text of at least ``count * (length + continuation)`` tokens.
    place : SampleSpec
        The sample to make.
    continuation : int, default 128
        Tokens that follow the context.  The first is not scored: it is predicted before any cache is read.

    Raises
    ------
    ConfigError
        If ``continuation`` is below 2.
    InputError
        If the text has no room for all samples side by side.
    """
    if continuation < 2:
        raise ConfigError(
            f"continuation={continuation} must be at least 2 tokens, because the first is not scored."
        )
    size, ids = place.length + continuation, haystack.ids
    room = len(ids) // place.count
    if room < size:
        raise InputError(
            f"a haystack of {len(ids)} tokens has no room for {place.count} samples of {size} tokens: give more text, "
            "or lower the count, the length or the continuation."
        )
    start = place.index * room + place.draw.randint(0, room - size)
    context, following = ids[start : start + place.length], ids[start + place.length : start + size]
    # Take the text as a ring and go as far from the sample as possible: the blank context must not overlap it.
    twice, far = ids + ids, start + size + (len(ids) - size - place.length) // 2
    blank = twice[far : far + place.length] if len(ids) >= size + place.length else None
    return Draft(context, continuation=following, blank=blank)
