"""Parts of a task: questions, samples, and the haystack that contexts are cut from."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ...errors import InputError


@dataclass(frozen=True)
class Question:
    """One thing asked of a context.

    Attributes
    ----------
    text : str
        Follows the context.
    lead : str
        Begins the answer, so that a model without a chat template completes it too.
    answers : tuple of str
        What a right answer contains, in any order.
    said : str
        The right answer as it would follow ``lead``, whose likelihood is measured.
    """

    text: str
    lead: str
    answers: tuple[str, ...]
    said: str


@dataclass(frozen=True)
class Draft:
    """Hold the parts of a sample before the prompt's frame is put around them: the result of a task's function.

    Attributes
    ----------
    context : list of int
        Token ids that are compressed.
    questions : sequence of Question
        Asked one by one; for a plain continuation there is none, and ``continuation`` is scored.
    blank : list of int, optional
        A context of the same kind without the answers: what is right of it is guessed.
    continuation : list of int
        Token ids that follow the context.
    depth : float, optional
        Where the fact stands, 0 for the beginning and 1 for the end.
    """

    context: list[int]
    questions: Sequence[Question] = ()
    blank: list[int] | None = None
    continuation: list[int] = field(default_factory=list)
    depth: float | None = None


@dataclass(frozen=True)
class Task:
    """One task: a function that makes samples, how they are scored, and where the task comes from.

    Parameters
    ----------
    name : str
        Key in :data:`rankkv.evaluation.tasks.TASKS`.
    make : callable
        ``make(haystack, place, **options)`` returns a :class:`Draft`; all chance comes from ``place.draw``.
    metric : {"recall", "loss"}
        ``"recall"``: share of the answers that the greedy output contains; ``"loss"``: mean negative log-likelihood
        of what follows, nats a token.
    source : str
        Paper or definition.
    defaults : mapping
        Options bound in the registry, which a caller may override.
    """

    name: str
    make: Callable[..., Draft]
    metric: str
    source: str
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def higher_is_better(self) -> bool:
        """True if a larger score is better."""
        return self.metric != "loss"


@dataclass(frozen=True)
class SampleSpec:
    """Identify one sample: its number, its length and its own random seed.

    Attributes
    ----------
    index, count : int
        The sample's number of how many of this length.
    length : int
        Tokens of the context.
    draw : random.Random
        Seeded by task, seed, length and index, so a sample does not depend on the others.
    """

    index: int
    count: int
    length: int
    draw: random.Random


class Haystack:
    """Tokens of any text, from which contexts of an exact length are cut.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        Of the model that is measured.
    text : str
        Any text; what is hidden in it must not stand in it already.
    """

    def __init__(self, tokenizer: Any, text: str) -> None:
        self.tokenizer = tokenizer
        self.text = text
        self.ids = self.encode(text)

    @cached_property
    def sentence_ends(self) -> frozenset[int]:
        """Ids of the tokens behind which a sentence or a line is over."""
        distinct = sorted(set(self.ids))
        texts = self.tokenizer.batch_decode([[token] for token in distinct])
        return frozenset(
            token
            for token, text in zip(distinct, texts, strict=True)
            if text.rstrip(" ").endswith((".", "!", "?", "\n"))
        )

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without special tokens."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def check_room(self, tokens: int) -> None:
        """Raise an InputError if the text has fewer tokens than are wanted."""
        if len(self.ids) < tokens or tokens < 1:
            raise InputError(
                f"a context of {tokens} tokens is wanted, but the haystack has {len(self.ids)}: give a length of at "
                "least 1 token, and a text that is longer."
            )

    def cut(self, tokens: int, place: SampleSpec) -> list[int]:
        """Return so many tokens from a place of the text drawn by chance."""
        self.check_room(tokens)
        start = place.draw.randint(0, len(self.ids) - tokens)
        return self.ids[start : start + tokens]

    def hide(self, facts: Iterable[tuple[str, float]], place: SampleSpec) -> list[int]:
        """Hide facts in a stretch of the text, in the order of their depths, at ends of sentences.

        Parameters
        ----------
        facts : iterable of (str, float)
            Each with its depth, 0 for the beginning and 1 for the end.
        place : SampleSpec
            ``place.length`` tokens come out, whatever the facts' own length.

        Returns
        -------
        list of int
            Token ids.

        Raises
        ------
        InputError
            If the facts are longer than the context, or the text is too short.
        """
        encoded = [(depth, self.encode(fact)) for fact, depth in facts]
        room = place.length - sum(len(ids) for _, ids in encoded)
        if room < 1:
            raise InputError(
                f"a context of {place.length} tokens has no room for facts of {place.length - room} and anything "
                "around them: give a longer one."
            )
        hay = self.cut(room, place)
        spots = sorted(
            (self._find_break(hay, round(depth * room)), number) for number, (depth, _) in enumerate(encoded)
        )
        context: list[int] = []
        before = 0
        for spot, number in spots:
            context += hay[before:spot] + encoded[number][1]
            before = spot
        return context + hay[before:]

    def _find_break(self, hay: Sequence[int], wanted: int) -> int:
        """Return the end of a sentence within 24 tokens of the wanted position, or that position itself."""
        if 0 < wanted < len(hay):
            for spot in sorted(
                range(max(1, wanted - 24), min(len(hay), wanted + 25)), key=lambda at: abs(at - wanted)
            ):
                if hay[spot - 1] in self.sentence_ends:
                    return spot
        return wanted
