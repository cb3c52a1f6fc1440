"""Aggregation: which words of a long list come most often."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence

from ...errors import ConfigError, InputError
from .base import Draft, Haystack, Question, SampleSpec


def make_common_words(
    haystack: Haystack, place: SampleSpec, *, common: int = 10, repeats: int = 30, contrast: int = 10
) -> Draft:
    """List words of the text, a few of them often and all others seldom, and ask for the frequent ones.

    The frequent words come ``repeats`` times, or as often as fills half of the context, the others a ``contrast``-th
    of that, but at least once.  In the blank context all words, those asked for included, come equally often.

    Parameters
    ----------
    haystack : Haystack
        Words are drawn from it.
    place : SampleSpec
        Which sample.
    common : int, default 10
        Words asked for.
    repeats : int, default 30
        Most times that each of them comes.
    contrast : int, default 10
        How many times more often than any other word.

    Raises
    ------
    ConfigError
        If a number is below 1, or ``contrast`` below 2.
    InputError
        If the context is too short for a contrast, or the text has too few words.

    References
    ----------
    C.-P. Hsieh et al., arXiv:2404.06654, section 3 (common words extraction); there an example is solved first.
    """
    if common < 1 or repeats < 1 or contrast < 2:
        raise ConfigError(
            f"common={common} and repeats={repeats} must be at least 1, contrast={contrast} at least 2."
        )
    draw = place.draw
    words = _draw_words(haystack, draw)
    if not words:
        raise InputError("the haystack has no word of 4 to 10 lower-case letters to list: give another text.")
    # Measured, since numbers and words make more or fewer tokens with each tokenizer: first roughly, then at size.
    fit = 64
    for _ in range(2):
        fit = int(0.98 * place.length * fit / len(haystack.encode(_number(draw.choices(words, k=fit))))) or 1
    often = min(repeats, fit // (2 * common))
    if often < 2:
        raise InputError(
            f"a context of {place.length} tokens lists about {fit} words, too few for {common} that come more often "
            "than the others: give a longer one, or lower common."
        )
    seldom = max(1, often // contrast)
    rest = (fit - often * common) // seldom
    if len(words) < common + rest:
        raise InputError(
            f"the haystack has {len(words)} different words of 4 to 10 letters, but {common + rest} are needed: give "
            "more text."
        )
    asked, others = words[:common], words[common : common + rest]
    listed = asked * often + others * seldom
    even = _spread_evenly(words[: common + rest], len(listed), draw)
    return _list_words(haystack, place, listed, even, asked, _number)


def make_frequent_words(
    haystack: Haystack, place: SampleSpec, *, frequent: int = 3, exponent: float = 2.0, kinds: int = 40
) -> Draft:
    """List made-up words whose counts fall as a power of their place, and ask for the most frequent ones.

    The k-th word comes in proportion to ``k ** -exponent`` and at least once, until the context is full.

    Parameters
    ----------
    haystack : Haystack
        Gives the tokenizer only.
    place : SampleSpec
        Which sample.
    frequent : int, default 3
        Words asked for.
    exponent : float, default 2.0
        Of the power law.
    kinds : int, default 40
        Different words.

    Raises
    ------
    ConfigError
        If a number is not positive, or ``frequent`` not below ``kinds``.
    InputError
        If the context is too short for ``kinds`` words.

    References
    ----------
    C.-P. Hsieh et al., arXiv:2404.06654, section 3 (frequent words extraction); there the first word of the law is
    noise, and its number of kinds grows with the length.
    """
    if not 0 < frequent < kinds or exponent <= 0.0:
        raise ConfigError(
            f"frequent={frequent} must be positive and below kinds={kinds}, and exponent={exponent} positive."
        )
    draw = place.draw
    made: dict[str, None] = {}
    while len(made) < kinds:
        made["".join(draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(3))] = None
    words = list(made)
    listed = words
    for _ in range(3):
        # Words make more or fewer tokens, and the frequent ones weigh most: measured as they will be listed.
        fit = int(0.98 * place.length * len(listed) / len(haystack.encode(" ".join(listed))))
        if fit < 3 * kinds:
            raise InputError(
                f"a context of {place.length} tokens holds about {fit} made-up words, too few for kinds={kinds}: give "
                "a longer one, or fewer kinds."
            )
        scale = (fit - kinds) / sum(rank**-exponent for rank in range(1, kinds + 1))
        counts = [1 + int(scale * rank**-exponent) for rank in range(1, kinds + 1)]
        listed = [word for word, count in zip(words, counts, strict=True) for _ in range(count)]
    # All kinds together have another mean length than the frequent ones.
    room = int(0.98 * place.length * kinds / len(haystack.encode(" ".join(words))))
    even = _spread_evenly(words, room, draw)
    return _list_words(haystack, place, listed, even, words[:frequent], " ".join)


def _list_words(
    haystack: Haystack,
    place: SampleSpec,
    listed: list[str],
    even: list[str],
    asked: Sequence[str],
    join: Callable[[Sequence[str]], str],
) -> Draft:
    contexts = []
    for words in (listed, even):
        place.draw.shuffle(words)
        # The lengths above are estimates, kept a little low: what is still too long is cut at a word.
        while len(ids := haystack.encode(join(words))) > place.length:
            words = words[: len(words) - max(1, (len(ids) - place.length) // 8)]
        contexts.append(ids)
        if words and len(contexts) == 1:
            _check_order(words, asked, place.length)
    question = Question(
        f"\n\nWhich {len(asked)} words come most often in the list above?",
        f" The {len(asked)} words that come most often are",
        tuple(asked),
        " " + ", ".join(asked),
    )
    return Draft(contexts[0], [question], contexts[1])


def _spread_evenly(words: list[str], count: int, draw: random.Random) -> list[str]:
    return words * (count // len(words)) + draw.sample(words, count % len(words))


def _check_order(words: Sequence[str], asked: Sequence[str], length: int) -> None:
    counts = Counter(words)
    others = max((count for word, count in counts.items() if word not in asked), default=0)
    if min(counts[word] for word in asked) <= others:
        raise InputError(
            f"a context of {length} tokens is too short for the words asked for to come more often than all others: "
            "give a longer one."
        )


def _number(words: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1))


def _draw_words(haystack: Haystack, draw: random.Random) -> list[str]:
    words = sorted(set(re.findall(r"\b[a-z]{4,10}\b", haystack.text)))
    draw.shuffle(words)
    return words
