"""RULER (arXiv:2404.06654): the prompt is split where the task's question begins."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ...errors import InputError
from ...utils.records import Record
from .base import DataItem, DataQuestion, take_text, take_texts


@dataclass(frozen=True)
class _Kind:
    """Hold where a task's question begins, how its answer begins, and what scores it."""

    question: str
    lead: str
    metric: str
    max_new_tokens: int


_KINDS = {
    "niah": _Kind(r"What (is|are all) the special magic ", r" ?The special magic ", "string_match_all", 128),
    "vt": _Kind(r"Question: Find all variables that are assigned ", r" ?Answer:", "string_match_all", 30),
    "cwe": _Kind(r"Question: What are the \d+ most common words ", r" ?Answer:", "string_match_all", 120),
    "fwe": _Kind(r"Question: Do not provide any explanation\. ", r" ?Answer:", "string_match_all", 50),
    "qa": _Kind(
        r"Answer the question based on the given documents\. ", r" ?Answer:(?! the)", "string_match_part", 32
    ),
}


def build_ruler(record: Record, task: str) -> list[DataItem]:
    """Build the item of one RULER entry.

    Raises
    ------
    InputError
        If the prompt has no question of RULER.
    """
    prompt = take_text(record, "input")
    kind, start = _find_question(prompt)
    if kind is None:
        raise InputError(
            f'{record.where}: the "input" ends in no question of RULER ({", ".join(_KINDS)}), so it cannot be split: '
            "give the file as RULER's prepare.py writes it."
        )
    found = _KINDS[kind]
    body, question = prompt[:start], prompt[start:]
    lead = record.fields.get("answer_prefix")
    if isinstance(lead, str) and lead:
        question = question.removesuffix(lead)
    else:
        # The beginning of the answer ends the prompt.
        leads = list(re.finditer(found.lead, question))
        place = leads[-1].start() if leads else len(question)
        question, lead = question[:place], question[place:]
    # The first line tells the model what to do.
    head, newline, document = body.partition("\n")
    asked = DataQuestion(question, take_texts(record, "outputs"), found.metric, found.max_new_tokens, lead)
    name = task if task.startswith(tuple(_KINDS)) else kind
    return [DataItem(name, head + newline, document, (asked,), record.where)]


def _find_question(prompt: str) -> tuple[str | None, int]:
    """Return the kind of the last question in a prompt, and where it begins.

    Examples
    --------
    >>> _find_question("Some text. What is the special magic number for x? The special magic number for x is")
    ('niah', 11)
    """
    last: tuple[str | None, int] = (None, -1)
    for name, kind in _KINDS.items():
        for match in re.finditer(kind.question, prompt):
            if match.start() > last[1]:
                last = (name, match.start())
    return last
