"""Needle tasks: access codes hidden in a long text, some of them asked for."""

from __future__ import annotations

import random
from collections.abc import Sequence

from ...errors import ConfigError
from .base import Draft, Haystack, Question, SampleSpec

NEEDLE = " The access code for {place} is {code}."
_COLOURS = (
    "amber", "black", "bronze", "copper", "crimson", "golden", "green", "grey", "indigo", "ivory", "orange", "purple",
    "scarlet", "silver", "turquoise", "violet", "white", "yellow",
)  # fmt: skip
_ROOMS = (
    "archive", "attic", "bridge", "cellar", "chapel", "corridor", "gallery", "garden", "gate", "harbour", "kitchen",
    "laboratory", "library", "office", "stable", "studio", "theatre", "tower", "tunnel", "workshop",
)  # fmt: skip


def make_needles(
    haystack: Haystack,
    place: SampleSpec,
    *,
    keys: int = 1,
    values: int = 1,
    queries: int = 1,
    together: bool = True,
    digits: int = 5,
    depths: Sequence[float] | None = None,
) -> Draft:
    """Hide access codes in a text and ask for some of them.

    ``keys`` rooms have ``values`` codes each, and ``queries`` of the rooms are asked about.

    - single needle: 1 key, 1 value, 1 query;
    - multi-key: many keys, 1 query;
    - multi-value: 1 key with many values;
    - multi-query: many keys, all in one question.

    The blank context keeps the codes of the rooms that no question asks about.

    Parameters
    ----------
    haystack : Haystack
        Any text without access codes.
    place : SampleSpec
        The sample to make.
    keys : int, default 1
        Rooms with codes.
    values : int, default 1
        Codes of each room.
    queries : int, default 1
        Rooms that are asked about, at most ``keys``.
    together : bool, default True
        If True, one question asks for all codes.  If False, each room has its own question to the same compressed
        context.
    digits : int, default 5
        Digits of a code.
    depths : sequence of float, optional
        Depths in [0, 1] of a single needle, taken in turn from sample to sample.  By default all depths are random.

    Raises
    ------
    ConfigError
        If a number is below 1, ``queries`` is above ``keys``, ``digits`` is below 2, a depth lies outside [0, 1], or
        depths are given for several needles.
    InputError
        If the context is too short for the needles, or the text for the context.

    References
    ----------
    C.-P. Hsieh et al., *RULER: What's the Real Context Size of Your Long-Context Language Models?*,
    arXiv:2404.06654, section 3 (NIAH); G. Kamradt, *Needle In A Haystack*, 2023, for the grid of depths.
    """
    _check(keys, values, queries, digits, depths)
    draw = place.draw
    names = _draw_places(keys, draw)
    codes = _draw_codes(keys * values, digits, draw)
    held = {name: codes[number * values : (number + 1) * values] for number, name in enumerate(names)}
    if depths is not None:
        at = [depths[place.index % len(depths)]]
    else:
        at = [draw.random() for _ in codes]
    # Expect the codes in the order of the text: a model that copies them keeps that order.
    order = sorted(range(len(codes)), key=at.__getitem__)
    owners = [name for name in names for _ in range(values)]
    facts = [(NEEDLE.format(place=owners[number], code=codes[number]), at[number]) for number in order]
    asked = names[:queries]
    # The same generator state cuts both contexts from about the same part of the text.
    state = draw.getstate()
    context = haystack.hide(facts, place)
    draw.setstate(state)
    others = [fact for fact, number in zip(facts, order, strict=True) if owners[number] not in asked]
    blank = haystack.hide(others, place)
    standing = {name: [codes[number] for number in order if owners[number] == name] for name in held}
    questions = [_ask(asked, standing)] if together else [_ask([name], standing) for name in asked]
    return Draft(context, questions, blank, depth=at[0] if len(codes) == 1 else None)


def _ask(asked: Sequence[str], standing: dict[str, list[str]]) -> Question:
    codes = [code for name in asked for code in standing[name]]
    names = _join(asked)
    verb, noun = ("is", "code") if len(codes) == 1 else ("are", "codes")
    order = ", in this order," if len(asked) > 1 else ""
    return Question(
        f"\n\nWhat {verb} the access {noun} for {names}{order} in the text above?",
        f" The access {noun} for {names} {verb}",
        tuple(codes),
        f" {_join(codes)}",
    )


def _join(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _draw_places(count: int, draw: random.Random) -> list[str]:
    known = [f"the {colour} {room}" for colour in _COLOURS for room in _ROOMS]
    if count > len(known):
        raise ConfigError(f"keys={count} must be at most {len(known)}, the number of room names.")
    return draw.sample(known, count)


def _draw_codes(count: int, digits: int, draw: random.Random) -> list[str]:
    codes: dict[str, None] = {}
    while len(codes) < count:
        codes["".join(draw.choices("123456789", k=digits))] = None
    return list(codes)


def _check(keys: int, values: int, queries: int, digits: int, depths: Sequence[float] | None) -> None:
    for name, value in (("keys", keys), ("values", values), ("queries", queries)):
        if value < 1:
            raise ConfigError(f"{name}={value} must be at least 1.")
    if queries > keys:
        raise ConfigError(f"queries={queries} must be at most keys={keys}, the number of rooms with a code.")
    if digits < 2 or 9**digits < 2 * keys * values:
        raise ConfigError(
            f"digits={digits} must be at least 2 and allow twice the {keys * values} codes that are drawn: raise "
            "digits, because short codes are guessed too often."
        )
    if depths is not None and (keys > 1 or values > 1):
        raise ConfigError(
            f"depths need keys=1 and values=1, but keys={keys} and values={values}: leave depths out."
        )
    if depths is not None and not (depths and all(0.0 <= depth <= 1.0 for depth in depths)):
        raise ConfigError(
            f"depths {list(depths)} must be one number or more in [0, 1]: 0 is the beginning, 1 the end."
        )
