"""Samples of benchmark items: prompts as token ids, split where the compressed part ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NoReturn

from ...errors import ConfigError, InputError
from ..tasks.base import Haystack, Question, Task
from ..tasks.samples import Frame, Prompt, Sample
from .base import DataItem, DataQuestion
from .metrics import get_metric

#: Where the question stands: compressed with the context, or asked after the compression.
PLACEMENTS = ("after", "before")
#: Tokens that are scored at the end of a plain text.
CONTINUATION_TOKENS = 128
_FEWEST_CONTEXT_TOKENS = 64


@dataclass(frozen=True)
class BenchmarkSamples:
    """Hold the samples of benchmark items, and what was done to them.

    Attributes
    ----------
    samples : list of Sample
        For :func:`~rankkv.evaluation.evaluate_task`.
    cut_contexts, cut_tokens : int
        Contexts that were longer than allowed, and the tokens that they lost from their middle.
    too_short : int
        Plain texts that were left out because they are too short to be continued.
    chat : dict of str to bool
        Maps each task to True if the chat template is used.
    """

    samples: list[Sample]
    cut_contexts: int
    cut_tokens: int
    too_short: int
    chat: dict[str, bool]


def make_benchmark_samples(
    items: Sequence[DataItem],
    tokenizer: Any,
    *,
    question: str = "after",
    chat: bool | None = None,
    max_length: int | None = None,
    context_length: int | None = None,
    text_length: int = 1024,
    seed: int = 0,
) -> BenchmarkSamples:
    """Turn benchmark items into samples.

    A prompt that is longer than ``max_length`` loses its middle, as in LongBench: the first and the last half of the
    allowed tokens stay.

    Parameters
    ----------
    items : sequence of DataItem
        From :func:`load_benchmark`.
    tokenizer : PreTrainedTokenizerBase
        Tokenizer of the measured model.
    question : {"after", "before"}
        "after": the context alone is compressed, then the question is asked.  "before": both are compressed; only the
        prompt's last token is fed afterwards, so that the first token of the answer reads the compressed cache too.
    chat : bool, optional
        True or False uses the chat template for all items or for none.  None follows the benchmark, if the tokenizer
        has a template.
    max_length : int, optional
        Most tokens of the prompt.
    context_length : int, optional
        Most tokens of prompt and output together, the model's.
    text_length : int, default 1024
        Tokens of the context of a plain text; the 128 tokens behind it are scored.
    seed : int
        Written into the rows.

    Returns
    -------
    BenchmarkSamples
        One sample for each item; plain texts that are too short are left out.

    Raises
    ------
    ConfigError
        If ``question`` is neither of the two, or the template is required and not there.
    InputError
        If a prompt does not fit without its document, or no item is left.
    """
    if question not in PLACEMENTS:
        raise ConfigError(f"question={question!r} must be 'after' or 'before' the compression.")
    has_template = bool(getattr(tokenizer, "chat_template", None))
    encoder = Haystack(tokenizer, "")
    frames: dict[bool, Frame] = {}
    found = BenchmarkSamples([], 0, 0, 0, {})
    samples: list[Sample] = []
    counts: dict[str, int] = {}
    cut_contexts = cut_tokens = too_short = 0
    for item in items:
        uses_chat = has_template and item.chat if chat is None else chat
        if item.messages and not has_template:
            raise ConfigError(
                f"{item.where} is a conversation, which needs a tokenizer with a chat template: give an "
                "instruction-tuned model."
            )
        if uses_chat not in frames:
            frames[uses_chat] = Frame(encoder, uses_chat)
        make = _make_sample if item.questions else _make_continuation
        index = counts.get(item.task, 0)
        allowed = _count_allowed(item, max_length, context_length)
        sample = make(item, encoder, frames[uses_chat], allowed, text_length, index, seed)
        if sample is None:
            too_short += 1
            continue
        counts[item.task] = index + 1
        found.chat[item.task] = uses_chat
        cut_contexts += sample.cut_tokens > 0
        cut_tokens += sample.cut_tokens
        samples += [sample] if question == "after" or not item.questions else _compress_questions(sample)
    if not samples:
        raise InputError(
            f"none of the {too_short} texts has {_FEWEST_CONTEXT_TOKENS + CONTINUATION_TOKENS} tokens: give longer "
            "texts."
        )
    return replace(
        found, samples=samples, cut_contexts=cut_contexts, cut_tokens=cut_tokens, too_short=too_short
    )


def _count_allowed(item: DataItem, max_length: int | None, context_length: int | None) -> int | None:
    """Return the most tokens of an item's prompt; None if there is no bound."""
    output = max((question.max_new_tokens for question in item.questions), default=0)
    bounds = [] if max_length is None else [max_length]
    if context_length is not None:
        bounds.append(context_length - output)
    return min(bounds, default=None)


def _make_sample(
    item: DataItem,
    encoder: Haystack,
    frame: Frame,
    allowed: int | None,
    text_length: int,
    index: int,
    seed: int,
) -> Sample:
    """Make the sample of an item whose questions follow its document."""
    before, after = frame.before, frame.after
    if item.messages:
        before, after = _render_turns(item, encoder)
    before = before + encoder.encode(item.head)
    document = encoder.encode(item.document)
    prompts = [_build_prompt(question, frame, after) for question in item.questions]
    if item.messages and any(turn["role"] != "system" for turn in item.messages):
        # The last user message is the question to the turns before it.
        asked = tuple(document)
        document = []
        prompts = [replace(prompt, question_ids=asked + prompt.question_ids) for prompt in prompts]
    document, cut = _cut_middle(item, before, document, prompts, allowed)
    return Sample(
        task=_make_task(item),
        name=f"{index:04d}",
        index=index,
        length=len(before) + len(document),
        seed=seed,
        context_ids=tuple(before + document),
        blank_ids=tuple(before) if before and document else None,
        prompts=tuple(prompts),
        question_aware=False,
        depth=None,
        cut_tokens=cut,
        chance=item.chance,
    )


def _make_task(item: DataItem) -> Task:
    metric = item.questions[0].metric if item.questions else "loss"
    return Task(item.task, _refuse, metric, "a file")


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise ConfigError(
        "the samples of this task come from a file: use load_benchmark and make_benchmark_samples."
    )


def _build_prompt(question: DataQuestion, frame: Frame, after: str) -> Prompt:
    """Tokenize a question and its first reference, and bind its metric."""
    lead = question.lead
    ending = (question.text + after + lead)[-1:]
    said = _say(question)
    # Prompts end in "Answer:" or in white space.
    glue = "" if ending.isspace() or not ending.isascii() or not ending else " "
    built = frame.build(Question(question.text, lead, question.references, glue + said), after)
    most = max(64, question.max_new_tokens)
    scorer = None if question.metric == "loss" else partial(_score, question)
    answers = () if question.metric == "loss" else question.references
    return replace(
        built,
        answer_ids=built.answer_ids[:most],
        answers=answers,
        scorer=scorer,
        max_new_tokens=question.max_new_tokens,
    )


def _say(question: DataQuestion) -> str:
    """Return the right answer as a model would say it."""
    if question.metric == "stated_choice":
        return f"The correct answer is ({question.references[0]})"
    if question.metric.startswith("choice"):
        return question.references[-1]
    if question.metric == "string_match_all":
        return ", ".join(question.references)
    return question.references[0]


def _score(question: DataQuestion, output: str) -> float:
    if question.first_line:
        output = output.lstrip("\n").split("\n")[0]
    return get_metric(question.metric).compute(output, question.references, question.classes)


def _render_turns(item: DataItem, encoder: Haystack) -> tuple[list[int], str]:
    """Return the ids of the earlier turns, and the template's text after the last user message."""
    mark = "\u27e6message\u27e7"
    text = encoder.tokenizer.apply_chat_template(
        [*item.messages, {"role": "user", "content": mark}], tokenize=False, add_generation_prompt=True
    )
    before, found, after = text.partition(mark)
    if not found:
        raise InputError(
            f"{item.where}: the chat template changes the text of the message, so it cannot be split there: give "
            "another model."
        )
    return encoder.encode(before), after


def _cut_middle(
    item: DataItem,
    before: Sequence[int],
    document: list[int],
    prompts: Sequence[Prompt],
    allowed: int | None,
) -> tuple[list[int], int]:
    """Return the document without its middle if the prompt is too long, and the number of tokens cut."""
    if allowed is None:
        return document, 0
    tail = max(len(prompt.question_ids) for prompt in prompts)
    room = allowed - len(before) - tail
    if len(document) <= room:
        return document, 0
    if room < 1:
        raise InputError(
            f"{item.where}: the prompt may have {allowed:,} tokens and has {len(before) + tail:,} without its "
            "document: give a greater --max-length, or fewer --max-new-tokens."
        )
    # Half of the allowed tokens are the beginning of the prompt, half its end.
    front = min(max(allowed // 2 - len(before), 0), room)
    return document[:front] + document[len(document) - (room - front) :], len(document) - room


def _make_continuation(
    item: DataItem,
    encoder: Haystack,
    frame: Frame,
    allowed: int | None,
    text_length: int,
    index: int,
    seed: int,
) -> Sample | None:
    """Make the sample of a plain text: its beginning, and the tokens behind it; None if it is too short."""
    ids = encoder.encode(item.document)
    length = min(text_length, len(ids) - CONTINUATION_TOKENS)
    if allowed is not None:
        length = min(length, allowed - CONTINUATION_TOKENS)
    if length < _FEWEST_CONTEXT_TOKENS:
        return None
    continuation = tuple(ids[length : length + CONTINUATION_TOKENS])
    return Sample(
        task=_make_task(item),
        name=f"{index:04d}",
        index=index,
        length=length,
        seed=seed,
        context_ids=tuple(frame.before + ids[:length]),
        blank_ids=None,
        prompts=(Prompt((), continuation, ()),),
        question_aware=False,
        depth=None,
    )


def _compress_questions(sample: Sample) -> Iterator[Sample]:
    """Yield one sample per question, compressed with it but for the last token."""
    for number, prompt in enumerate(sample.prompts):
        asked = prompt.question_ids
        yield replace(
            sample,
            name=sample.name if len(sample.prompts) == 1 else f"{sample.name}-{number}",
            context_ids=sample.context_ids + asked[:-1],
            blank_ids=None if sample.blank_ids is None else sample.blank_ids + asked[:-1],
            prompts=(replace(prompt, question_ids=asked[-1:]),),
            question_aware=True,
        )
