"""Samples of a task: seeds, lengths, and the prompt's frame around context and question."""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...errors import ConfigError, InputError
from .base import Draft, Haystack, Question, SampleSpec, Task

#: Stands for the context while a chat template is filled, to find what comes before and after it.
_CONTEXT_MARK, _QUESTION_MARK = "\u27e6context\u27e7", "\u27e6question\u27e7"


@dataclass(frozen=True)
class Prompt:
    """Hold what follows a compressed context: a question, and the answer that is scored.

    Attributes
    ----------
    question_ids : tuple of int
        Fed before the answer; empty where the question is compressed with the context, or there is none.
    answer_ids : tuple of int
        Teacher-forced for the likelihood.
    answers : tuple of str
        Looked for in the greedy output; empty for a plain continuation.
    """

    question_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Sample:
    """One context to compress, and what is asked of it.

    Attributes
    ----------
    task : Task
        The task.
    name : str
        Unique among the samples of a task and seed, such as ``"1024-003"``.
    index, length, seed : int
        Number among those of its length, tokens of the context asked for, and the seed.
    context_ids : tuple of int
        What is prefilled and compressed; with ``question_aware`` it ends with the question.
    blank_ids : tuple of int or None
        The same without the answer, for the guess rate.
    prompts : tuple of Prompt
        Asked one by one of the one compressed context.
    question_aware : bool
        Whether the question is compressed with the context.
    depth : float or None
        Where a single fact stands.
    """

    task: Task
    name: str
    index: int
    length: int
    seed: int
    context_ids: tuple[int, ...]
    blank_ids: tuple[int, ...] | None
    prompts: tuple[Prompt, ...]
    question_aware: bool
    depth: float | None


def make_samples(
    task: Task,
    tokenizer: Any,
    haystack: str | Haystack,
    *,
    lengths: Sequence[int] = (1024,),
    count: int = 20,
    seed: int = 0,
    question_aware: bool = False,
    chat: bool = False,
    **options: Any,
) -> list[Sample]:
    """Make the samples of a task; the same arguments give the same samples.

    Parameters
    ----------
    task : Task
        From :func:`~rankkv.evaluation.tasks.get_task`.
    tokenizer : PreTrainedTokenizerBase
        Of the model that is measured.
    haystack : str or Haystack
        Any text; a Haystack is tokenized once for several tasks.
    lengths : sequence of int, default (1024,)
        Tokens of the contexts, the frame around them not counted.
    count : int, default 20
        Samples of each length.
    seed : int, default 0
        Of everything that is drawn.
    question_aware : bool, default False
        Whether the question is part of what is compressed, so that it stands in the observation window: one sample
        for each question.  Otherwise the context alone is compressed and the question comes after.
    chat : bool, default False
        Whether context and question stand in the tokenizer's chat template, the beginning of the answer after it.
    **options
        Of the task.

    Returns
    -------
    list of Sample
        ``count`` for each length; more where questions are compressed one by one.

    Raises
    ------
    ConfigError
        If a number is below 1, the task has no such option, or the tokenizer has no chat template.
    InputError
        If the haystack is too short, or an answer of one token would be predicted before any cache is read.

    Examples
    --------
    >>> from rankkv.evaluation.tasks import get_task
    >>> from rankkv.models.texts import python_docs_text
    >>> from rankkv.models.loading import load_model
    >>> _, tokenizer = load_model("embedded")  # doctest: +SKIP
    >>> samples = make_samples(get_task("needle"), tokenizer, python_docs_text(), count=5)  # doctest: +SKIP
    >>> [sample.depth for sample in samples]  # doctest: +SKIP
    [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    if count < 1 or not lengths or min(lengths) < 1:
        raise ConfigError(f"count={count} and lengths={list(lengths)} must be at least 1.")
    _check_options(task, options)
    if not isinstance(haystack, Haystack):
        haystack = Haystack(tokenizer, haystack)
    frame = _Frame(haystack, chat)
    samples: list[Sample] = []
    for length in lengths:
        for index in range(count):
            draw = random.Random(f"{task.name} {seed} {length} {index}")
            place = SampleSpec(index, count, length, draw)
            draft = task.make(haystack, place, **{**task.defaults, **options})
            sample = Sample(
                task=task,
                name=f"{length}-{index:03d}",
                index=index,
                length=length,
                seed=seed,
                context_ids=tuple(frame.before + draft.context),
                blank_ids=None if draft.blank is None else tuple(frame.before + draft.blank),
                prompts=tuple(frame.build_prompts(draft)),
                question_aware=question_aware,
                depth=draft.depth,
            )
            samples += _compress_questions(sample) if question_aware else [sample]
    return samples


def _compress_questions(sample: Sample) -> Iterator[Sample]:
    """Yield the sample with each question moved behind its context."""
    for number, prompt in enumerate(sample.prompts):
        question = prompt.question_ids
        if len(prompt.answer_ids) < 2:
            raise InputError(
                f"the answer of sample {sample.name} of {sample.task.name!r} is one token, which the prefill itself "
                "predicts when the question is compressed with the context: no cache would be read. Take "
                "question_aware=False, or a longer answer."
            )
        yield replace(
            sample,
            name=sample.name if len(sample.prompts) == 1 else f"{sample.name}-{number}",
            context_ids=sample.context_ids + question,
            blank_ids=None if sample.blank_ids is None else sample.blank_ids + question,
            prompts=(replace(prompt, question_ids=()),),
        )


def list_options(task: Task) -> dict[str, Any]:
    """Return a task's options and their defaults.

    Examples
    --------
    >>> from rankkv.evaluation.tasks import get_task
    >>> list_options(get_task("perplexity"))
    {'continuation': 128}
    """
    return {
        name: task.defaults.get(name, parameter.default)
        for name, parameter in inspect.signature(task.make).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }


def _check_options(task: Task, given: dict[str, Any]) -> None:
    known = list_options(task)
    unknown = sorted(set(given) - set(known))
    if unknown:
        listed = ", ".join(known) or "none"
        raise ConfigError(
            f"the task {task.name!r} has no option {', '.join(unknown)}; its options: {listed}."
        )


class _Frame:
    """Return the texts before a context and between question and answer."""

    def __init__(self, haystack: Haystack, chat: bool) -> None:
        self._haystack, self._chat = haystack, chat
        tokenizer = haystack.tokenizer
        if not chat:
            plain, framed = haystack.encode("a"), list(tokenizer("a", verbose=False)["input_ids"])
            starts = [at for at in range(len(framed)) if framed[at : at + len(plain)] == plain]
            self.before, self._after = framed[: starts[0]] if starts else [], ""
            return
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError(
                "the tokenizer has no chat template: leave chat out, or take an instruction-tuned model."
            )
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": _CONTEXT_MARK + _QUESTION_MARK}],
            tokenize=False,
            add_generation_prompt=True,
        )
        before, mark, self._after = text.partition(_CONTEXT_MARK + _QUESTION_MARK)
        if not mark:
            raise InputError(
                "the chat template changes the text it is given, so the context cannot be told from it."
            )
        self.before = haystack.encode(before)

    def build_prompts(self, draft: Draft) -> Iterator[Prompt]:
        """Yield the questions of a draft in tokens, or its continuation."""
        if not draft.questions:
            yield Prompt((), tuple(draft.continuation), ())
        for question in draft.questions:
            yield self._build(question)

    def _build(self, question: Question) -> Prompt:
        lead = self._after + question.lead.lstrip() if self._chat else question.lead
        asked = self._haystack.encode(question.text + lead)
        whole = self._haystack.encode(question.text + lead + question.said)
        # A tokenizer may join the end of the question and the beginning of the answer: then that is answered too.
        same = next((at for at, (a, b) in enumerate(zip(asked, whole, strict=False)) if a != b), len(asked))
        return Prompt(tuple(whole[:same]), tuple(whole[same:]), question.answers)
