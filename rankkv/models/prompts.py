"""Token ids of a context and of its questions, so that the context can be compressed before any question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, InputError
from .texts import encode_plain

# Number of markers to try: a template may show one twice, or the text may contain it.
_MARKER_TRIES = 8


@dataclass(frozen=True)
class SplitPrompt:
    """A prompt in two parts: the context shared by all questions, and each question.

    Attributes
    ----------
    context_ids : Tensor
        ``[1, token]``: everything before the question.
    question_ids : list of Tensor
        ``[1, token]`` each: a question, the end of the turn, and the beginning of the answer.
    dropped_tokens : int
        Tokens cut off the end of a context that was longer than allowed.
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
    """Tokenize a context and its questions separately, split where the question begins.

    The ids of a context do not depend on the questions, so one compressed cache serves them all.  ``context_ids`` and
    then one of ``question_ids`` is the whole prompt.  Special tokens come from one source only: the chat template if
    it is used, else the tokenizer.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        The model's tokenizer.
    context : str
        The document.
    questions : sequence of str, default ("",)
        Questions about it; with an empty one the model continues after the context.
    answer_prefix : str, default ""
        Beginning of every answer.
    system_prompt : str, optional
        A system message before the context; needs a chat template.
    use_chat_template : bool, optional
        None uses the template if the tokenizer has one.
    template_options : mapping, optional
        Variables of the template, such as ``{"enable_thinking": True}``; thinking is off by default.
    max_context_length : int, optional
        Most tokens of the context; a longer one loses its end.

    Returns
    -------
    SplitPrompt
        Ids of both parts.

    Raises
    ------
    ConfigError
        If a template is required that the tokenizer does not have, or the bound is below 1.
    InputError
        If a text is not a string, the context is blank, or the template does not show it once and unchanged.

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
        raise InputError(
            f"the context must be a text with at least one character that is not white space, got {_describe(context)}."
        )
    for name, text in [("answer_prefix", answer_prefix), *(("a question", item) for item in questions)]:
        if not isinstance(text, str):
            raise InputError(f"{name} must be a text, got {_describe(text)}.")
    if not questions:
        raise InputError("questions is empty: give at least one, or omit the argument.")
    if max_context_length is not None and (
        isinstance(max_context_length, bool)
        or not isinstance(max_context_length, int)
        or max_context_length < 1
    ):
        raise ConfigError(f"max_context_length={max_context_length!r} must be an integer of at least 1.")
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if use_chat_template and not has_template:
        raise ConfigError(
            "use_chat_template=True, but the tokenizer has no chat template: set tokenizer.chat_template, or omit the "
            "option."
        )
    if has_template and use_chat_template is not False:
        before, after = _render(tokenizer, context, system_prompt, dict(template_options or {}))
        context_ids = encode_plain(tokenizer, before)
    elif system_prompt is not None:
        raise ConfigError(
            "system_prompt needs a chat template, and none is used: write it at the beginning of the context."
        )
    else:
        # Without a template the answer starts on a new line.
        after = "\n"
        context_ids = _find_beginning(tokenizer, context) + encode_plain(tokenizer, context)
    dropped = 0 if max_context_length is None else max(0, len(context_ids) - max_context_length)
    kept = context_ids[: len(context_ids) - dropped]
    question_ids = [encode_plain(tokenizer, question + after + answer_prefix) for question in questions]
    if not all(question_ids):
        raise InputError(
            "a question is empty and nothing follows it, so there is no token to continue from: give a question "
            "or an answer_prefix."
        )
    return SplitPrompt(
        context_ids=torch.tensor([kept], dtype=torch.long),
        question_ids=[torch.tensor([ids], dtype=torch.long) for ids in question_ids],
        dropped_tokens=dropped,
    )


def find_turn_end(tokenizer: Any) -> str:
    """Return the text between a user's message and the answer: the chat template's, else a new line.

    Raises
    ------
    InputError
        If the chat template refuses a plain conversation.
    """
    if not getattr(tokenizer, "chat_template", None):
        return "\n"
    return _render(tokenizer, "context", None, {})[1]


def _find_beginning(tokenizer: Any, text: str) -> list[int]:
    """Return the special tokens that this tokenizer writes before a text, without those after it."""
    # Special tokens after the text would end the prompt.
    plain = encode_plain(tokenizer, text)
    marked = list(tokenizer(text, verbose=False)["input_ids"])
    extra = len(marked) - len(plain)
    starts = [start for start in range(extra + 1) if marked[start : start + len(plain)] == plain]
    return marked[: starts[0]] if starts else []


def _render(
    tokenizer: Any, context: str, system_prompt: str | None, options: dict[str, Any]
) -> tuple[str, str]:
    """Return the template's text before the question, and its text after it."""
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    options = {"enable_thinking": False, **options}
    for attempt in range(_MARKER_TRIES):
        # Letters only: templates may strip white space and their own marks from a message.
        marker = f"RankKVQuestionGoesHere{'X' * attempt}"
        if marker in context or marker in (system_prompt or ""):
            continue
        # The question is a paragraph of its own.
        messages = [*system, {"role": "user", "content": f"{context}\n\n{marker}"}]
        try:
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **options
            )
        except Exception as error:
            # Jinja's exceptions and the template's own have no common base class.
            raise InputError(
                f"the chat template refuses this conversation ({error}); give use_chat_template=False, or omit the "
                "system prompt."
            ) from error
        if text.count(marker) == 1:
            before, _, after = text.partition(marker)
            if context.strip() in before:
                return before, after
    raise InputError(
        "the chat template does not show the context once, followed by the question, so the context cannot be "
        "compressed before the question; give use_chat_template=False."
    )


def _describe(value: Any) -> str:
    return "a blank one" if isinstance(value, str) else type(value).__name__
