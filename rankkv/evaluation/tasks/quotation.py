"""Quotation task: go on with a passage of the text from its first words."""

from __future__ import annotations

from ...errors import ConfigError, InputError
from .base import Draft, Haystack, Question, SampleSpec


def make_quotations(
    haystack: Haystack, place: SampleSpec, *, questions: int = 3, shown: int = 12, asked: int = 8
) -> Draft:
    """Give the first words of passages of the text and ask how each goes on.

    The context is cut into as many parts of equal length as there are questions, and each part gives one passage.  A
    passage begins where a sentence or a line begins, and its first words and its rest end with a whole word.  In the
    blank context the rest of each passage is left out, and the text that follows fills the end.

    Parameters
    ----------
    haystack : Haystack
        Any text.
    place : SampleSpec
        The sample to make.
    questions : int, default 3
        Passages asked for, one by one.
    shown : int, default 12
        Smallest number of tokens of a passage that the question shows.
    asked : int, default 8
        Smallest number of tokens that follow them and are the answer.

    Raises
    ------
    ConfigError
        If an option is below 1.
    InputError
        If the text is too short, or a part of the context has no passage of that kind.

    References
    ----------
    This project.
    """
    for name, value in (("questions", questions), ("shown", shown), ("asked", asked)):
        if value < 1:
            raise ConfigError(f"{name}={value} must be at least 1.")
    # What is left out of the blank context is replaced by as many tokens; a passage may be a few tokens longer.
    spare = questions * (asked + _EXTRA_TOKENS)
    ids = haystack.cut(place.length + spare, place)
    part = place.length // questions
    spans = [
        _find_passage(haystack, ids, number * part, (number + 1) * part, shown, asked, place)
        for number in range(questions)
    ]
    left_out = {token for _, middle, stop in spans for token in range(middle, stop)}
    blank = [token for at, token in enumerate(ids) if at not in left_out][: place.length]
    decode = haystack.tokenizer.decode
    made = []
    for start, middle, stop in spans:
        rest = decode(ids[middle:stop])
        made.append(
            Question(
                "\n\nGo on with the passage of the text above that begins with the following words.",
                f" {decode(ids[start:middle]).strip()}",
                (rest.strip(),),
                rest.rstrip(),
            )
        )
    return Draft(ids[: place.length], made, blank)


#: Tokens that a passage may be longer than asked for, so that it ends with a whole word.
_EXTRA_TOKENS = 8


def _find_passage(
    haystack: Haystack, ids: list[int], first: int, last: int, shown: int, asked: int, place: SampleSpec
) -> tuple[int, int, int]:
    """Return where a passage between two tokens begins, where its answer begins, and where it ends."""
    decode = haystack.tokenizer.decode

    def find_word(begin: int) -> int | None:
        """Return the next token that begins with a space, as far as a passage may be longer."""
        ends = range(begin, min(begin + _EXTRA_TOKENS, last))
        return next((at for at in ends if decode([ids[at]])[:1].isspace()), None)

    starts = [
        at for at in range(max(1, first), last - shown - asked) if ids[at - 1] in haystack.sentence_ends
    ]
    place.draw.shuffle(starts)
    whole = decode(ids)
    for start in starts:
        middle = find_word(start + shown)
        stop = None if middle is None else find_word(middle + asked)
        if middle is None or stop is None:
            continue
        begins, rest = decode(ids[start:middle]).strip(), decode(ids[middle:stop]).strip()
        # Each must stand in the text once, or another passage answers too.
        if (
            begins
            and rest
            and "\ufffd" not in begins + rest
            and whole.count(begins) == whole.count(rest) == 1
        ):
            return start, middle, stop
    raise InputError(
        f"tokens {first} to {last} of the context hold no passage of {shown} + {asked} tokens that begins where a "
        "sentence or a line begins and stands there once: give another text, fewer questions or a longer context."
    )
