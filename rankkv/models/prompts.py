"""A context and the questions about it as token ids, so that the context can be compressed before any question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, InputError

#: How often another mark is tried where a template shows the first one twice, or the text holds it.
_TRIES = 8


@dataclass(frozen=True)
class SplitPrompt:
    """A prompt in two parts: what is the same for all questions, and what each question adds.

    Attributes
    ----------
    context_ids : Tensor
        ``[1, token]``: all that stands before the question.
    question_ids : list of Tensor
        ``[1, token]`` each: a question, the end of the turn, and the beginning of the answer.
    dropped_tokens : int
        Tokens cut off the end of the context, because it was longer than allowed.
    """

    context_ids: Tensor
    question_ids: list[Tensor]
    dropped_tokens: int = 0


def split_prompt(
    tokenizer: Any,
    context: str,
    questions: Sequence[str] = ("",),
    answer_prefix: str = "",
    *,
    system_prompt: str | None = None,
    use_chat_template: bool | None = None,
    template_options: Mapping[str, Any] | None = None,
    max_context_length: int | None = None,
) -> SplitPrompt:
    """Tokenize a context and its questions apart, at the place where the question begins.

    The ids of a context do not depend on the questions, so one compressed cache serves them all, and
    ``context_ids`` followed by one of ``question_ids`` is the prompt as a whole.  Special tokens come from one source
    only: from the chat template where there is one, else from the tokenizer.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        The model's tokenizer.
    context : str
        The document.
    questions : sequence of str, default ("",)
        What is asked about it; an empty one lets the model go on after the context.
    answer_prefix : str, default ""
        How every answer begins.
    system_prompt : str, optional
        A system message before the context; needs a chat template.
    use_chat_template : bool, optional
        None uses the template where the tokenizer has one.
    template_options : mapping, optional
        Variables of the template, such as ``{"enable_thinking": True}``; thinking is off unless it is asked for.
    max_context_length : int, optional
        Most tokens of the context; what is longer loses its end.

    Returns
    -------
    SplitPrompt
        Ids of both parts.

    Raises
    ------
    ConfigError
        If a template is asked for that the tokenizer does not have, or the bound is below 1.
    InputError
        If a text is no string, the context is blank, or the template does not show it once and whole.

    Examples
    --------
    >>> from rankkv import load_model
    >>> _, tokenizer = load_model("embedded")
    >>> prompt = split_prompt(tokenizer, "Water boils at 100 degrees.", ["When does water boil?"])
    >>> print(tokenizer.decode(prompt.question_ids[0][0]))
    When does water boil?<|im_end|>
    <|im_start|>assistant
    <BLANKLINE>
    """
    if not isinstance(context, str) or not context.strip():
        raise InputError(f"the context must be a text that is not blank, got {_describe(context)}.")
    for name, text in [("answer_prefix", answer_prefix), *(("a question", item) for item in questions)]:
        if not isinstance(text, str):
            raise InputError(f"{name} must be a text, got {_describe(text)}.")
    if not questions:
        raise InputError("there is no question: give at least one, or leave the argument out.")
    if max_context_length is not None and (
        isinstance(max_context_length, bool)
        or not isinstance(max_context_length, int)
        or max_context_length < 1
    ):
        raise ConfigError(f"max_context_length={max_context_length!r} must be an integer of at least 1.")
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if use_chat_template and not has_template:
        raise ConfigError(
            "use_chat_template=True, but the tokenizer has no chat template: set tokenizer.chat_template, or leave it "
            "out."
        )
    if has_template and use_chat_template is not False:
        before, after = _render(tokenizer, context, system_prompt, dict(template_options or {}))
        context_ids = _encode(tokenizer, before)
    elif system_prompt is not None:
        raise ConfigError(
            "system_prompt needs a chat template, and none is used: write it at the beginning of the context."
        )
    else:
        # A line of its own for the answer, as after a heading.
        after = "\n"
        context_ids = _find_beginning(tokenizer, context) + _encode(tokenizer, context)
    dropped = 0 if max_context_length is None else max(0, len(context_ids) - max_context_length)
    kept = context_ids[: len(context_ids) - dropped]
    question_ids = [_encode(tokenizer, question + after + answer_prefix) for question in questions]
    if not all(question_ids):
        raise InputError(
            "a question is empty and nothing is written after it, so there is no token to answer: ask something, "
            "or give an answer_prefix."
        )
    return SplitPrompt(
        context_ids=torch.tensor([kept], dtype=torch.long),
        question_ids=[torch.tensor([ids], dtype=torch.long) for ids in question_ids],
        dropped_tokens=dropped,
    )


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _find_beginning(tokenizer: Any, text: str) -> list[int]:
    """Return the special tokens this tokenizer writes before a text; those it writes after it would end the prompt."""
    plain = _encode(tokenizer, text)
    marked = list(tokenizer(text, verbose=False)["input_ids"])
    extra = len(marked) - len(plain)
    starts = [start for start in range(extra + 1) if marked[start : start + len(plain)] == plain]
    return marked[: starts[0]] if starts else []


def _render(
    tokenizer: Any, context: str, system_prompt: str | None, options: dict[str, Any]
) -> tuple[str, str]:
    """Return the template's text up to the question, and what follows it."""
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    options = {"enable_thinking": False, **options}
    for attempt in range(_TRIES):
        # Of letters only, since templates may cut white space and marks of their own out of a message.
        mark = f"RankKVQuestionGoesHere{'X' * attempt}"
        if mark in context or mark in (system_prompt or ""):
            continue
        # A line of its own, like the question in a letter.
        messages = [*system, {"role": "user", "content": f"{context}\n\n{mark}"}]
        try:
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **options
            )
        except Exception as error:
            # Jinja's and the template's own exceptions share no base class of transformers.
            raise InputError(
                f"the chat template refuses this conversation ({error}); give use_chat_template=False, or leave the "
                "system prompt out."
            ) from error
        if text.count(mark) == 1:
            before, _, after = text.partition(mark)
            if context.strip() in before:
                return before, after
    raise InputError(
        "the chat template does not show the context and the question once and one after the other, so the context "
        "cannot be compressed before the question; give use_chat_template=False."
    )


def _describe(value: Any) -> str:
    return "a blank one" if isinstance(value, str) else type(value).__name__
