"""Parts of a task: its questions, its drafts of samples, and the text that contexts are cut from."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ...errors import InputError


@dataclass(frozen=True)
class Question:
    """Hold one question about a context, with its answers.

    Attributes
    ----------
    text : str
        The question, which follows the context.
    lead : str
        Beginning of the answer, so that a model without a chat template can complete it.
    answers : tuple of str
        Strings that a right answer contains, in any order.
    said : str
        The right answer as it follows ``lead``; its likelihood is measured.
    """

    text: str
    lead: str
    answers: tuple[str, ...]
    said: str


@dataclass(frozen=True)
class Draft:
    """Hold the parts of one sample, without the chat template: a task's function returns it.

    Attributes
    ----------
    context : list of int
        Token ids to compress.
    questions : sequence of Question
        Asked one by one.  If there are none, ``continuation`` is scored instead.
    blank : list of int, optional
        Token ids of a similar context without the answers.  Right answers after it are guesses.
    continuation : list of int
        Token ids that follow the context.
    depth : float, optional
        Position of the hidden fact in [0, 1]: 0 is the beginning, 1 the end.
    """

    context: list[int]
    questions: Sequence[Question] = ()
    blank: list[int] | None = None
    continuation: list[int] = field(default_factory=list)
    depth: float | None = None


@dataclass(frozen=True)
class Task:
    """Define a task: the function that makes its samples, their metric and its source.

    Parameters
    ----------
    name : str
        Key in :data:`rankkv.evaluation.tasks.TASKS`.
    make : callable
        ``make(haystack, place, **options)`` returns a :class:`Draft`.  All random numbers come from ``place.draw``.
    metric : str
        ``"recall"``: share of the answers that the greedy output contains.  ``"loss"``: mean negative log-likelihood
        of the continuation, nats per token.  Or a key of :data:`rankkv.evaluation.benchmarks.METRICS`.
    source : str
        Paper or definition.
    defaults : mapping
        Values of ``make``'s options for this task; a caller may override them.
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
    """Identify one sample: its number, its length and its own random generator.

    Attributes
    ----------
    index : int
        The sample's number among those of its length, from 0.
    count : int
        Samples of this length.
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
    """Tokenize a text once, and cut contexts of an exact length from it.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        Tokenizer of the measured model.
    text : str
        Any text that does not contain the hidden facts already.
    """

    def __init__(self, tokenizer: Any, text: str) -> None:
        self.tokenizer = tokenizer
        self.text = text
        self.ids = self.encode(text)

    @cached_property
    def sentence_ends(self) -> frozenset[int]:
        """Ids of the tokens that end a sentence or a line."""
        # Decode each distinct id once: a text repeats most of its tokens.
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
        """Raise an InputError if a context of that many tokens cannot be cut from the text."""
        if len(self.ids) < tokens or tokens < 1:
            raise InputError(
                f"a context of {tokens} tokens must have from 1 to {len(self.ids)} tokens, the length of the haystack: "
                "give another length or a longer text."
            )

    def cut(self, tokens: int, place: SampleSpec) -> list[int]:
        """Return ``tokens`` consecutive ids from a random position of the text."""
        self.check_room(tokens)
        start = place.draw.randint(0, len(self.ids) - tokens)
        return self.ids[start : start + tokens]

    def hide(self, facts: Iterable[tuple[str, float]], place: SampleSpec) -> list[int]:
        """Insert facts into a random stretch of the text, at ends of sentences near their depths.

        Parameters
        ----------
        facts : iterable of (str, float)
            Each fact with its depth in [0, 1]: 0 is the beginning, 1 the end.
        place : SampleSpec
            Gives the length of the result, facts included, and the random generator.

        Returns
        -------
        list of int
            ``place.length`` token ids.

        Raises
        ------
        InputError
            If the facts are longer than the context, or the text is too short.
        """
        encoded = [(depth, self.encode(fact)) for fact, depth in facts]
        room = place.length - sum(len(ids) for _, ids in encoded)
        if room < 1:
            raise InputError(
                f"a context of {place.length} tokens must be longer than its facts, which have {place.length - room}: "
                "give a longer context."
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
        """Return the nearest end of a sentence within 24 tokens, or the wanted position itself."""
        if 0 < wanted < len(hay):
            for spot in sorted(
                range(max(1, wanted - 24), min(len(hay), wanted + 25)), key=lambda at: abs(at - wanted)
            ):
                if hay[spot - 1] in self.sentence_ends:
                    return spot
        return wanted
