"""Samples of a task: contexts and questions as token ids, with or without a chat template."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...errors import ConfigError, InputError
from .base import Draft, Haystack, Question, SampleSpec, Task

#: Placeholders in a chat template: they show which text stands before the context and after the question.
_CONTEXT_MARK, _QUESTION_MARK = "\u27e6context\u27e7", "\u27e6question\u27e7"


@dataclass(frozen=True)
class Prompt:
    """Hold what follows a compressed context: a question, and the answer that is scored.

    Attributes
    ----------
    question_ids : tuple of int
        Fed before the answer.  Empty if the question is compressed with the context, or there is none.
    answer_ids : tuple of int
        The right answer; its likelihood is measured with teacher forcing.
    answers : tuple of str
        Strings to find in the greedy output; empty for a plain continuation.
    scorer : callable, optional
        ``scorer(output)`` returns the score of the greedy output; by default the share of ``answers`` found.
    max_new_tokens : int, optional
        Most tokens of the greedy output; by default a few more than the right answer has.
    """

    question_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    answers: tuple[str, ...]
    scorer: Callable[[str], float] | None = None
    max_new_tokens: int | None = None


@dataclass(frozen=True)
class Sample:
    """Hold one context to compress, and the questions about it.

    Attributes
    ----------
    task : Task
        The task.
    name : str
        Unique among the samples of a task and seed, such as ``"1024-003"``.
    index : int
        Number among the samples of its length, from 0.
    length : int
        Tokens of the context, without the chat template.
    seed : int
        Seed of the sample.
    context_ids : tuple of int
        Token ids to prefill and compress; with ``question_aware`` they end with the question.
    blank_ids : tuple of int or None
        The same without the answer, for the guess rate.
    prompts : tuple of Prompt
        Questions, each asked after the same compressed context.
    question_aware : bool
        True if the question is compressed with the context.
    depth : float or None
        Position of a single hidden fact in [0, 1].
    cut_tokens : int
        Tokens that a context from a file lost, because it was too long.
    chance : float or None
        Score of a random choice, if the task has one.
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
    cut_tokens: int = 0
    chance: float | None = None


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
        Tokenizer of the measured model.
    haystack : str or Haystack
        Any text.  Pass a :class:`Haystack` to tokenize it once for several tasks.
    lengths : sequence of int, default (1024,)
        Tokens of the contexts, without the chat template.
    count : int, default 20
        Samples of each length.
    seed : int, default 0
        Seed of all random choices.
    question_aware : bool, default False
        If True, the question is compressed with the context, so it stands in the observation window, and each
        question is a sample of its own.  If False, only the context is compressed and the question follows.
    chat : bool, default False
        If True, use the tokenizer's chat template.  The beginning of the answer stands after it.
    **options
        Options of the task.

    Returns
    -------
    list of Sample
        ``count`` per length; more if ``question_aware`` and a context has several questions.

    Raises
    ------
    ConfigError
        If a number is below 1, the task has no such option, or the tokenizer has no chat template.
    InputError
        If the haystack is too short, or ``question_aware`` and an answer is one token, which no cache predicts.

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
        raise ConfigError(f"count={count} and each of lengths={list(lengths)} must be at least 1.")
    _check_options(task, options)
    if not isinstance(haystack, Haystack):
        haystack = Haystack(tokenizer, haystack)
    frame = Frame(haystack, chat)
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
    """Yield one sample per question, with the question appended to the context."""
    for number, prompt in enumerate(sample.prompts):
        question = prompt.question_ids
        if len(prompt.answer_ids) < 2:
            raise InputError(
                f"the answer of sample {sample.name} of {sample.task.name!r} is one token, but question_aware=True "
                "needs at least 2, because the prefill predicts the first without the cache: use "
                "question_aware=False or a longer answer."
            )
        yield replace(
            sample,
            name=sample.name if len(sample.prompts) == 1 else f"{sample.name}-{number}",
            context_ids=sample.context_ids + question,
            blank_ids=None if sample.blank_ids is None else sample.blank_ids + question,
            prompts=(replace(prompt, question_ids=()),),
        )


def list_options(task: Task) -> dict[str, Any]:
    """List a task's options with their defaults.

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
            f"the task {task.name!r} has no option {', '.join(unknown)}; its options are: {listed}."
        )


class Frame:
    """Put the text around context and question: a chat template, or the tokenizer's special tokens.

    Attributes
    ----------
    before : list of int
        Token ids before the context.
    after : str
        Text between the question and the beginning of the answer.
    """

    def __init__(self, haystack: Haystack, chat: bool) -> None:
        self._haystack, self._chat = haystack, chat
        tokenizer = haystack.tokenizer
        if not chat:
            # Without a template only special tokens, such as BOS, stand before the context. Find them around an "a".
            plain, framed = haystack.encode("a"), list(tokenizer("a", verbose=False)["input_ids"])
            starts = [at for at in range(len(framed)) if framed[at : at + len(plain)] == plain]
            self.before, self.after = framed[: starts[0]] if starts else [], ""
            return
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError(
                "chat=True needs a tokenizer with a chat template: leave chat out, or use an instruction-tuned model."
            )
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": _CONTEXT_MARK + _QUESTION_MARK}],
            tokenize=False,
            add_generation_prompt=True,
        )
        before, mark, self.after = text.partition(_CONTEXT_MARK + _QUESTION_MARK)
        if not mark:
            raise InputError(
                "the chat template changes the text of the message, so the context cannot be found in it: leave chat "
                "out."
            )
        self.before = haystack.encode(before)

    def build_prompts(self, draft: Draft) -> Iterator[Prompt]:
        """Yield a draft's questions as token ids, or its continuation if it has no question."""
        if not draft.questions:
            yield Prompt((), tuple(draft.continuation), ())
        for question in draft.questions:
            yield self.build(question, self.after)

    def build(self, question: Question, after: str) -> Prompt:
        """Return a question as token ids; ``after`` is the template's text between question and answer."""
        lead = after + question.lead.lstrip() if after else question.lead
        asked = self._haystack.encode(question.text + lead)
        whole = self._haystack.encode(question.text + lead + question.said)
        # A token may span the end of the question and the beginning of the answer: it belongs to the answer.
        same = next((at for at, (a, b) in enumerate(zip(asked, whole, strict=False)) if a != b), len(asked))
        return Prompt(tuple(whole[:same]), tuple(whole[same:]), question.answers)
