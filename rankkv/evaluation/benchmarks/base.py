"""Parts of a benchmark: items with their document and questions, templates, and the shape of a file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from ...errors import InputError, UnknownNameError
from ...utils.files import shorten
from ...utils.records import Record


@dataclass(frozen=True)
class DataQuestion:
    """Hold one question of an item, with what scores its answer.

    Attributes
    ----------
    text : str
        What follows the document in the prompt: separators, question and instructions.
    references : tuple of str
        Right answers.  The first one's likelihood is measured.
    metric : str
        Key in :data:`~rankkv.evaluation.benchmarks.METRICS`; "loss" scores the likelihood alone.
    max_new_tokens : int
        Most tokens of the output.
    lead : str
        Beginning of the answer; with a chat template it stands in the model's turn.
    classes : tuple of str
        Names that a classification chooses from.
    first_line : bool
        True if only the first line of the output is scored.
    """

    text: str
    references: tuple[str, ...]
    metric: str
    max_new_tokens: int
    lead: str = ""
    classes: tuple[str, ...] = ()
    first_line: bool = False


@dataclass(frozen=True)
class DataItem:
    """Hold one document with its questions.

    Attributes
    ----------
    task : str
        Name of the task; scores are averaged over its items.
    head : str
        Instructions before the document.
    document : str
        What is compressed with the head, cut in the middle if too long, and left out for the guess rate.
    questions : tuple of DataQuestion
        Each is asked after the same document.  If there are none, the end of the document is scored.
    where : str
        Place in the file, for messages.
    chat : bool
        True if the benchmark uses the chat template.
    chance : float, optional
        Score of a random choice, if the task has one.
    messages : tuple of mapping
        Earlier turns of a conversation, before the document.
    """

    task: str
    head: str
    document: str
    questions: tuple[DataQuestion, ...]
    where: str
    chat: bool = True
    chance: float | None = None
    messages: tuple[Mapping[str, str], ...] = ()


@dataclass(frozen=True)
class Shape:
    """Define how the entries of one benchmark's files look.

    Attributes
    ----------
    name : str
        Name that the output shows.
    fields : tuple of str
        Fields that an entry must have.
    build : callable
        ``build(record, task)`` returns the items of an entry.  ``task`` is the file's name without its ending.
    """

    name: str
    fields: tuple[str, ...]
    build: Callable[[Record, str], Sequence[DataItem]]


@dataclass(frozen=True)
class Template:
    """Hold the prompt, metric and output length that a benchmark publishes for one task."""

    prompt: str
    metric: str
    max_new_tokens: int
    chat: bool = True
    first_line: bool = False

    def split(self, fields: Mapping[str, Any]) -> tuple[str, str]:
        """Return the prompt before the document and after it, with the fields filled in."""
        head, _, rest = self.prompt.partition("{context}")

        def fill(part: str) -> str:
            return re.sub(r"\{(\w+)\}", lambda found: str(fields[found.group(1)]), part)

        return fill(head), fill(rest)

    def ask(
        self, text: str, references: Sequence[str], classes: Sequence[str] = (), lead: str = ""
    ) -> DataQuestion:
        """Return a question with this template's metric and output length."""
        return DataQuestion(
            text,
            tuple(references),
            self.metric,
            self.max_new_tokens,
            lead,
            tuple(classes),
            self.first_line,
        )


@cache
def load_templates(benchmark: str) -> dict[str, Template]:
    """Load the templates of a benchmark by task.

    Examples
    --------
    >>> load_templates("longbench")["hotpotqa"].metric
    'qa_f1'
    """
    text = resources.files(__package__).joinpath("templates.json").read_text(encoding="utf-8")
    return {name: Template(**entry) for name, entry in json.loads(text)[benchmark].items()}


def get_template(benchmark: str, task: str, where: str) -> Template:
    """Return the template of a task.

    Raises
    ------
    UnknownNameError
        If the benchmark has no such task.
    """
    templates = load_templates(benchmark)
    if task not in templates:
        raise UnknownNameError(
            f"{where}: {UnknownNameError.of('task', task, templates)} Name the file after its task, or give "
            "--data-task."
        )
    return templates[task]


def take_text(record: Record, name: str) -> str:
    """Return a field that must be a string.

    Raises
    ------
    InputError
        If it is missing or not a string.
    """
    value = record.fields.get(name)
    if not isinstance(value, str):
        raise InputError(f"{record.where}: the field {name!r} must be a string, not {shorten(value)}.")
    return value


def take_texts(record: Record, name: str) -> tuple[str, ...]:
    """Return a field that must be a string, a number or a list of these, as strings.

    Raises
    ------
    InputError
        If it is missing or empty.
    """
    value = record.fields.get(name)
    values = list(value) if isinstance(value, list | tuple) else [value]
    # Some files nest the list once more.
    if len(values) == 1 and isinstance(values[0], list):
        values = values[0]
    if not values or not all(isinstance(one, str | int | float) for one in values):
        raise InputError(
            f"{record.where}: the field {name!r} must be a text or a list of texts, not {shorten(value)}."
        )
    return tuple(str(one) for one in values)


def name_task(stem: str, name: str) -> str:
    """Return a task's name: the file's if it begins with the data set's name, as in ``qasper_e``.

    Examples
    --------
    >>> name_task("qasper_e", "qasper"), name_task("test", "qasper")
    ('qasper_e', 'qasper')
    """
    return stem if stem.startswith(name) else name


def find_stem(path: Path) -> str:
    """Return the name of a file without its endings.

    Examples
    --------
    >>> find_stem(Path("data/qasper.jsonl.gz"))
    'qasper'
    """
    return path.name.split(".")[0] or path.name
