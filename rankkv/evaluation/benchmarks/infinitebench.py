"""InfiniteBench (arXiv:2402.13718) and SCBench (arXiv:2412.10319), which asks several questions per context."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ...errors import InputError
from ...utils.files import shorten
from ...utils.records import Record
from .base import DataItem, DataQuestion, Template, get_template, take_text, take_texts

_LETTERS = "ABCD"
_NOT_SCORED = ("scbench_repoqa", "scbench_repoqa_and_kv")


def build_infinitebench(record: Record, task: str) -> list[DataItem]:
    """Build the item of one InfiniteBench entry."""
    template = get_template("infinitebench", task, record.where)
    head, question = _ask(record, template, task)
    chance = 0.25 if "options" in record.fields and "choice" in template.metric else None
    document = take_text(record, "context")
    return [DataItem(task, head, document, (question,), record.where, template.chat, chance)]


def build_scbench(record: Record, task: str) -> list[DataItem]:
    """Build the items of one SCBench entry: the turns of each kind, asked one by one of the same context.

    Raises
    ------
    InputError
        If it has no turn, or its metric runs more than a comparison of texts.
    """
    if task in _NOT_SCORED:
        raise InputError(
            f"{record.where}: {task} is scored by a parser of its repositories, which RankKV does not have: give "
            "another file of SCBench."
        )
    get_template("scbench", task, record.where)
    turns = record.fields["multi_turns"]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise InputError(
            f'{record.where}: "multi_turns" must be a list of turns with "input" and "answer", not {shorten(turns)}.'
        )
    document = take_text(record, "context" if "context" in record.fields else "input")
    parts: dict[str, tuple[str, list[DataQuestion]]] = {}
    for number, turn in enumerate(turns, start=1):
        # Mixed files name the kind of each turn.
        kind = str(turn.get("task") or task)
        template = get_template("scbench", kind, record.where)
        prompt = get_template("scbench", task, record.where).prompt
        template = Template(prompt, template.metric, template.max_new_tokens, template.chat)
        one = Record(f"turn {number} of {record.where}", turn)
        head, question = _ask(one, template, kind)
        # The first turn's head counts: all turns share the compressed context.
        parts.setdefault(kind, (head, []))[1].append(question)
    return [
        DataItem(
            task if kind == task else f"{task}:{kind.removeprefix('scbench_')}",
            head,
            document,
            tuple(questions),
            record.where,
            chance=0.25 if questions[0].metric == "choice" else None,
        )
        for kind, (head, questions) in parts.items()
    ]


def _ask(record: Record, template: Template, task: str) -> tuple[str, DataQuestion]:
    """Return the prompt before the document, and the question."""
    references = take_texts(record, "answer")
    fields: dict[str, Any] = {"input": take_text(record, "input")}
    fields |= _find_fields(fields["input"], template.prompt, record)
    options = record.fields.get("options")
    if "{A}" in template.prompt:
        if not isinstance(options, list) or len(options) != len(_LETTERS):
            raise InputError(f'{record.where}: "options" must be a list of four, not {shorten(options)}.')
        fields |= dict(zip(_LETTERS, options, strict=True))
        references = _name_choice(references, [str(option) for option in options])
    head, rest = template.split(fields)
    return head, template.ask(rest, references)


def _name_choice(references: tuple[str, ...], options: list[str]) -> tuple[str, ...]:
    """Return the right option's text and letter; the file gives either or both."""
    right = references[0]
    if right in options:
        return right, _LETTERS[options.index(right)]
    return (options[_LETTERS.index(right)], right) if right in _LETTERS else references


def _find_fields(question: str, prompt: str, record: Record) -> Mapping[str, str]:
    """Return what a prompt repeats from its question: a function call, or the number that is sought."""
    if "{func_call}" in prompt:
        call = _find(r"func_[0-9]+\(-?[0-9]+\)", question, record)
        return {"func_call": call, "func": call.partition("(")[0]}
    if "{prefix}" in prompt:
        # InfiniteBench: "The largest number of the list is"; SCBench: "The top 2 largest number is".
        target = _find(r"The \w+ number|The .+(?= is)", question, record)
        return {"prefix": f"What is {target.lower()} in the following list?"}
    return {}


def _find(pattern: str, question: str, record: Record) -> str:
    found = re.search(pattern, question)
    if found is None:
        raise InputError(
            f"{record.where}: the question does not name what the prompt must repeat: {shorten(question)}."
        )
    return found.group()
