"""Tokens of contexts: the beginning of a conversation that no later message changes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..utils.files import shorten
from .errors import RequestError

# What may follow a context: each begins with another kind of token.
_PROBES = ("A", " a", "1", "\n", "(", "é")
# Tokens at the end of a context that may depend on what follows.
_LOOSE_TOKENS = 16
_ROLES = ("system", "developer", "user", "assistant", "tool")
_TEXT_PARTS = ("text", "input_text", "output_text")


def check_messages(messages: object, *, may_be_empty: bool = False) -> list[dict[str, Any]]:
    """Return the messages of a request if they are messages of text.

    Raises
    ------
    RequestError
        If they are not a list of messages, or hold something other than text.

    Examples
    --------
    >>> check_messages([{"role": "user", "content": "Hello"}])
    [{'role': 'user', 'content': 'Hello'}]
    """
    if not isinstance(messages, list) or not (messages or may_be_empty):
        raise RequestError(
            f"messages must be a list with at least one message, got {shorten(messages)}.", param="messages"
        )
    for place, message in enumerate(messages):
        where = f"messages[{place}]"
        if not isinstance(message, dict):
            raise RequestError(f"{where} must be an object with role and content.", param=where)
        if message.get("role") not in _ROLES:
            raise RequestError(
                f"{where}.role is {shorten(message.get('role'))}: give one of {', '.join(_ROLES)}.",
                param=f"{where}.role",
            )
        calls = message.get("tool_calls")
        _check_content(message.get("content"), f"{where}.content", may_be_missing=bool(calls))
        if calls is not None:
            _check_calls(calls, f"{where}.tool_calls")
    return messages


def _check_content(content: object, where: str, *, may_be_missing: bool) -> None:
    if isinstance(content, str) or (content is None and may_be_missing):
        return
    if not isinstance(content, list):
        raise RequestError(
            f"{where} must be a text or a list of text parts, got {shorten(content)}.", param=where
        )
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in _TEXT_PARTS or not isinstance(part.get("text"), str):
            raise RequestError(
                f"{where} has a part of type {shorten(kind)}: this server reads text parts alone, "
                '{"type": "text", "text": ...}.',
                param=where,
            )


def _check_calls(calls: object, where: str) -> None:
    for call in calls if isinstance(calls, list) else [None]:
        function = (call.get("function") or call) if isinstance(call, dict) else None
        arguments = function.get("arguments") if isinstance(function, dict) else None
        try:
            if isinstance(arguments, str):
                arguments = json.loads(arguments)
        except ValueError:
            arguments = None
        if not isinstance(arguments, dict):
            raise RequestError(
                f"{where} must be a list of calls with a function and its arguments as a JSON object.",
                param=where,
            )


def join_messages(content: dict[str, Any], messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    r"""Return the whole conversation of a stored context and the messages that follow it.

    A text context is the beginning of the first user message: the question is a paragraph of its own behind it.

    Raises
    ------
    RequestError
        If the first message after a text is not the user's.

    Examples
    --------
    >>> join_messages({"text": "Water boils."}, [{"role": "user", "content": "When?"}])
    [{'role': 'user', 'content': 'Water boils.\n\nWhen?'}]
    """
    if "messages" in content:
        return [*content["messages"], *messages]
    if not messages or messages[0]["role"] != "user":
        raise RequestError(
            "the first message after a context of text must have the role user, since it continues that text: POST "
            "the context as messages to begin with another role.",
            param="messages[0].role",
        )
    question = messages[0].get("content")
    if isinstance(question, list):
        question = " ".join(part["text"] for part in question)
    return [{"role": "user", "content": f"{content['text']}\n\n{question}"}, *messages[1:]]


def encode_context(
    tokenizer: Any, content: dict[str, Any], to_plain: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]
) -> np.ndarray:
    """Return the tokens of a context that every conversation with it begins with, ``[token]``.

    The whole conversation is tokenized with several continuations.  What is common to all is the context.  So the
    tokens of a named request, of a request that carries everything, and of plain generation are the same.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        The model's tokenizer.
    content : dict
        ``{"text": str}`` or ``{"messages": list}``.
    to_plain : callable
        Conversion of messages to the form that chat templates take.

    Raises
    ------
    RequestError
        If the chat template refuses the conversation, or shows something before it that changes later.
    """
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if not has_template and "messages" in content:
        raise RequestError(
            "this model has no chat template, so a context of messages is not possible: give text, and ask by "
            "/v1/completions.",
            param="messages",
        )
    if not has_template:
        found = [list(tokenizer(content["text"] + probe)["input_ids"]) for probe in (*_PROBES, "\n\nA")]
        whole = len(tokenizer(content["text"])["input_ids"])
    else:
        found = [_encode_chat(tokenizer, to_plain(messages)) for messages in _continue(content)]
        if "messages" in content:
            # What follows may have another role, so the header of a user's message is not part of the context.
            found.append(_encode_chat(tokenizer, to_plain(content["messages"]), add_generation_prompt=False))
            whole = len(found[-1])
        else:
            whole = len(tokenizer(content["text"], add_special_tokens=False)["input_ids"])
    common = _find_common(found)
    if common < max(1, whole - _LOOSE_TOKENS):
        raise RequestError(
            f"only {common} of the {whole} tokens of this context stay the same whatever follows, because the chat "
            "template writes something before it: give the context in another form."
        )
    return np.asarray(found[0][:common], dtype=np.int64)


def _continue(content: dict[str, Any]) -> list[list[dict[str, Any]]]:
    # After a user's message or a tool's result some templates take the assistant's message alone.
    last = content["messages"][-1]["role"] if "messages" in content else "user of the text"
    role = "assistant" if last in ("user", "tool") else "user"
    return [join_messages(content, [{"role": role, "content": probe}]) for probe in _PROBES]


def _encode_chat(
    tokenizer: Any, messages: list[dict[str, Any]], add_generation_prompt: bool = True
) -> list[int]:
    try:
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=True
        )
    except Exception as error:
        # Jinja's exceptions and the template's own have no common base class.
        raise refuse_conversation(error) from error
    return list(encoded["input_ids"])


def refuse_conversation(error: Exception) -> RequestError:
    """Return the refusal for an exception of a chat template."""
    return RequestError(
        f"the chat template of this model refuses the conversation ({shorten(str(error))}): give the roles and fields "
        "that it takes.",
        param="messages",
    )


def _find_common(sequences: Sequence[Sequence[int]]) -> int:
    """Return the length of the longest common beginning."""
    shortest = min(len(sequence) for sequence in sequences)
    rows = np.asarray([sequence[:shortest] for sequence in sequences])
    equal = (rows == rows[0]).all(axis=0)
    return int(shortest if equal.all() else equal.argmin())
