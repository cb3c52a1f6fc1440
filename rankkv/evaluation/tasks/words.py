"""Word counting tasks: find the most frequent words of a long list."""

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
    """List words of the text, a few often and all others seldom, and ask for the frequent ones.

    A frequent word comes ``repeats`` times, or less if the frequent words would fill more than half of the context.
    Any other word comes ``1 / contrast`` times as often, but at least once.  In the blank context all words come
    equally often.

    Parameters
    ----------
    haystack : Haystack
        Source of the words.
    place : SampleSpec
        The sample to make.
    common : int, default 10
        Number of frequent words; the question asks for them.
    repeats : int, default 30
        Upper bound of a frequent word's count.
    contrast : int, default 10
        Count of a frequent word over the count of any other word.

    Raises
    ------
    ConfigError
        If ``common`` or ``repeats`` is below 1, or ``contrast`` below 2.
    InputError
        If the context is too short for a contrast, or the text has too few words.

    References
    ----------
    C.-P. Hsieh et al., arXiv:2404.06654, section 3 (common words extraction).  The paper's prompt shows a solved
    example first.
    """
    if common < 1 or repeats < 1 or contrast < 2:
        raise ConfigError(
            f"common={common} and repeats={repeats} must be at least 1, and contrast={contrast} at least 2."
        )
    draw = place.draw
    words = _draw_words(haystack, draw)
    if not words:
        raise InputError("the haystack has no word of 4 to 10 lower-case letters: give another text.")
    # Tokens per listed word depend on the tokenizer. Measure them on 64 words, then on a list of about full size.
    fit = 64
    for _ in range(2):
        fit = int(0.98 * place.length * fit / len(haystack.encode(_number(draw.choices(words, k=fit))))) or 1
    often = min(repeats, fit // (2 * common))
    if often < 2:
        raise InputError(
            f"a context of {place.length} tokens holds about {fit} words, so common={common} words with "
            f"repeats={repeats} cannot come twice each in half of it: give a longer context, lower common, or raise "
            "repeats."
        )
    seldom = max(1, often // contrast)
    rest = (fit - often * common) // seldom
    if len(words) < common + rest:
        raise InputError(
            f"the haystack has {len(words)} different words of 4 to 10 letters and must have {common + rest}: give "
            "more text."
        )
    asked, others = words[:common], words[common : common + rest]
    listed = asked * often + others * seldom
    even = _spread_evenly(words[: common + rest], len(listed), draw)
    return _list_words(haystack, place, listed, even, asked, _number)


def make_frequent_words(
    haystack: Haystack, place: SampleSpec, *, frequent: int = 3, exponent: float = 2.0, kinds: int = 40
) -> Draft:
    """List made-up words whose counts follow a power law, and ask for the most frequent ones.

    The k-th word's count is proportional to ``k ** -exponent``, at least 1, and the counts fill the context.

    Parameters
    ----------
    haystack : Haystack
        Only its tokenizer is used.
    place : SampleSpec
        The sample to make.
    frequent : int, default 3
        Number of words that the question asks for.
    exponent : float, default 2.0
        Exponent of the power law.
    kinds : int, default 40
        Number of different words.

    Raises
    ------
    ConfigError
        If a number is not positive, or ``frequent`` is not below ``kinds``.
    InputError
        If the context is too short for ``kinds`` words.

    References
    ----------
    C.-P. Hsieh et al., arXiv:2404.06654, section 3 (frequent words extraction).  In the paper the most frequent word
    is noise, and the number of different words grows with the length.
    """
    if not 0 < frequent < kinds or exponent <= 0.0:
        raise ConfigError(
            f"frequent={frequent} must lie between 0 and kinds={kinds}, and exponent={exponent} must be positive."
        )
    draw = place.draw
    made: dict[str, None] = {}
    while len(made) < kinds:
        made["".join(draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(3))] = None
    words = list(made)
    listed = words
    for _ in range(3):
        # Tokens per word differ, and frequent words weigh most. Measure the list itself, and repeat: it changes.
        fit = int(0.98 * place.length * len(listed) / len(haystack.encode(" ".join(listed))))
        if fit < 3 * kinds:
            raise InputError(
                f"a context of {place.length} tokens holds about {fit} made-up words, but kinds={kinds} need "
                f"{3 * kinds}: give a longer context, or lower kinds."
            )
        scale = (fit - kinds) / sum(rank**-exponent for rank in range(1, kinds + 1))
        counts = [1 + int(scale * rank**-exponent) for rank in range(1, kinds + 1)]
        listed = [word for word, count in zip(words, counts, strict=True) for _ in range(count)]
    # The blank list has each word equally often, so its mean length per word differs: measure it again.
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
    """Shuffle both lists of words, cut them to the context's length, and ask for the frequent words."""
    contexts = []
    for words in (listed, even):
        place.draw.shuffle(words)
        # The number of words is an estimate, 2 % low. Drop whole words if the list is still too long.
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
            f"a context of {length} tokens is too short: the words in question must come more often than all others; "
            "give a longer context."
        )


def _number(words: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1))


def _draw_words(haystack: Haystack, draw: random.Random) -> list[str]:
    words = sorted(set(re.findall(r"\b[a-z]{4,10}\b", haystack.text)))
    draw.shuffle(words)
    return words
