"""Files of no single benchmark: kvpress' evaluation rows, conversations and plain texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import InputError
from ...utils.files import shorten
from ...utils.records import Record
from .base import DataItem, DataQuestion, load_templates, take_text, take_texts

#: Metric and output length of a row whose task no benchmark has.
DEFAULT_METRIC, DEFAULT_NEW_TOKENS = "qa_f1", 64
#: Most tokens of an assistant's message that are scored.
MESSAGE_TOKENS = 256
_ROLES = ("system", "user", "assistant")


def build_kvpress_row(record: Record, task: str) -> list[DataItem]:
    """Build the item of one row of kvpress' evaluation, whose context holds the instructions already."""
    name = str(record.fields.get("task") or task)
    answers = take_texts(record, "answer" if "answer" in record.fields else "answers")
    classes = take_texts(record, "all_classes") if record.fields.get("all_classes") else ()
    length = record.fields.get("max_new_tokens")
    first_line = name in load_templates("longbench") and load_templates("longbench")[name].first_line
    question = DataQuestion(
        take_text(record, "question"),
        answers,
        find_metric(name),
        length if isinstance(length, int) and length > 0 else DEFAULT_NEW_TOKENS,
        take_text(record, "answer_prefix"),
        classes,
        first_line,
    )
    return [DataItem(name, "", take_text(record, "context"), (question,), record.where)]


def find_metric(task: str) -> str:
    """Return the metric of a task of any benchmark.

    Examples
    --------
    >>> find_metric("niah_single_1"), find_metric("gov_report"), find_metric("my_task")
    ('string_match_all', 'rouge_l', 'qa_f1')
    """
    if task.startswith(("niah", "vt", "cwe", "fwe")):
        return "string_match_all"
    if task in ("qa_1", "qa_2"):
        return "string_match_part"
    for benchmark in ("longbench", "infinitebench", "scbench"):
        templates = load_templates(benchmark)
        if task in templates and templates[task].metric:
            return templates[task].metric
    return DEFAULT_METRIC


def build_conversation(record: Record, task: str) -> list[DataItem]:
    """Build the item of a conversation: its last answer is scored after the turns before it.

    The earlier turns and the last question are compressed together.

    Raises
    ------
    InputError
        If a message has no role and text, or no assistant's message follows a user's.
    """
    messages = record.fields["messages"]
    if not isinstance(messages, list):
        raise InputError(f'{record.where}: "messages" must be a list, not {shorten(messages)}.')
    turns = [_read_message(message, record.where) for message in messages]
    while turns and turns[-1]["role"] != "assistant":
        turns.pop()
    if len(turns) < 2 or turns[-2]["role"] != "user":
        raise InputError(
            f"{record.where}: no assistant's message follows a user's, so there is no answer to score: add one."
        )
    question = DataQuestion("", (turns[-1]["content"],), "loss", MESSAGE_TOKENS)
    return [DataItem(task, "", turns[-2]["content"], (question,), record.where, messages=tuple(turns[:-2]))]


def _read_message(message: Any, where: str) -> Mapping[str, str]:
    """Return role and text of a message; the parts of a list are joined."""
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        content = "".join(part for part in parts if isinstance(part, str))
    if not isinstance(content, str) or message.get("role") not in _ROLES:
        raise InputError(
            f'{where}: a message must have a "role" ({", ".join(_ROLES)}) and a text under "content", not '
            f"{shorten(message)}."
        )
    return {"role": message["role"], "content": content}


def build_text(record: Record, task: str) -> list[DataItem]:
    """Build the item of a plain text, whose end is scored after its beginning."""
    return [DataItem(task, "", take_text(record, "text"), (), record.where, chat=False)]
