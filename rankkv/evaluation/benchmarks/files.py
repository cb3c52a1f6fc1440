"""Benchmark files as published: their shape is recognised by their fields."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import ConfigError, InputError
from ...utils.files import shorten
from ...utils.records import Record, list_data_files, read_records
from .base import DataItem, Shape, find_stem
from .general import build_conversation, build_kvpress_row, build_text
from .infinitebench import build_infinitebench, build_scbench
from .longbench import build_longbench, build_longbench_v2
from .metrics import get_metric
from .ruler import build_ruler

#: Shapes in the order in which an entry is compared with them: those with more fields first.
SHAPES: tuple[Shape, ...] = (
    Shape("SCBench", ("multi_turns",), build_scbench),
    Shape(
        "LongBench v2",
        ("context", "question", "choice_A", "choice_B", "choice_C", "choice_D", "answer"),
        build_longbench_v2,
    ),
    Shape("kvpress rows", ("context", "question", "answer_prefix"), build_kvpress_row),
    Shape("LongBench", ("context", "input", "answers"), build_longbench),
    Shape("InfiniteBench", ("context", "input", "answer"), build_infinitebench),
    Shape("RULER", ("input", "outputs"), build_ruler),
    Shape("conversations", ("messages",), build_conversation),
    Shape("texts", ("text",), build_text),
)


@dataclass(frozen=True)
class Benchmark:
    """Hold the items of data files.

    Attributes
    ----------
    items : list of DataItem
        In the order of the files.
    shapes : dict of str to str
        Maps each file to the name of its shape.
    digest : str
        Identifies the items; equal files give equal digests.
    """

    items: list[DataItem]
    shapes: dict[str, str]
    digest: str

    @property
    def tasks(self) -> dict[str, list[DataItem]]:
        """Items by task, in the order of the files."""
        tasks: dict[str, list[DataItem]] = {}
        for item in self.items:
            tasks.setdefault(item.task, []).append(item)
        return tasks


def load_benchmark(
    path: str | Path, *, limit: int | None = None, task: str | None = None, max_new_tokens: int | None = None
) -> Benchmark:
    """Load benchmark files as published.

    The shape is recognised by the fields of the first entry: LongBench, LongBench v2, RULER, InfiniteBench, SCBench,
    rows of kvpress' evaluation, conversations ("messages") and plain texts ("text").

    Parameters
    ----------
    path : str or Path
        A ``.jsonl``, ``.json``, ``.csv``, ``.tsv``, ``.parquet`` or ``.txt`` file, also with ``.gz``, or a folder.
    limit : int, optional
        Use at most this many contexts of each file, the first ones.
    task : str, optional
        Name of the task, for a file whose name does not say it.
    max_new_tokens : int, optional
        Most tokens of an output, in place of the benchmark's own number.

    Returns
    -------
    Benchmark
        At least one item.

    Raises
    ------
    ConfigError
        If a number is below 1.
    InputError
        If a file has an unknown shape, or an entry lacks something; the message names it.
    MissingDependencyError
        If a metric needs a package that is not installed; the message gives the command that installs it.
    SourceUnavailableError
        If the path does not exist.

    Examples
    --------
    >>> import json, tempfile
    >>> file = Path(tempfile.mkdtemp()) / "hotpotqa.jsonl"
    >>> _ = file.write_text(json.dumps({"context": "Paris is in France.", "input": "Where is Paris?",
    ...     "answers": ["France"], "dataset": "hotpotqa"}))
    >>> found = load_benchmark(file)
    >>> found.shapes[str(file)], found.items[0].questions[0].metric
    ('LongBench', 'qa_f1')
    """
    for name, value in (("limit", limit), ("max_new_tokens", max_new_tokens)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value} must be at least 1, or None.")
    items: list[DataItem] = []
    shapes: dict[str, str] = {}
    for file in list_data_files(path):
        shape, found = _load_file(file, limit, task or find_stem(file))
        taken = {item.task for item in items}
        # RULER has files of one name in folders by length.
        found = [
            replace(item, task=f"{file.parent.name}/{item.task}") if item.task in taken else item
            for item in found
        ]
        shapes[str(file)] = shape
        items += found
    if max_new_tokens is not None:
        items = [_limit_output(item, max_new_tokens) for item in items]
    for metric in {question.metric for item in items for question in item.questions} - {"loss"}:
        get_metric(metric).check_packages()
    digest = hashlib.sha256(repr(items).encode()).hexdigest()[:16]
    return Benchmark(items, shapes, digest)


def _load_file(path: Path, limit: int | None, task: str) -> tuple[str, list[DataItem]]:
    """Return the name of a file's shape, and its items."""
    shape: Shape | None = None
    items: list[DataItem] = []
    for record in read_records(path):
        shape = shape or recognise_shape(record)
        missing = [name for name in shape.fields if name not in record.fields]
        if missing:
            raise InputError(f"{record.where} has no field {missing[0]!r}, which {shape.name} has.")
        for item in shape.build(record, task):
            if items and _have_same_context(items[-1], item):
                items[-1] = replace(items[-1], questions=items[-1].questions + item.questions)
            else:
                items.append(item)
        # One more entry than asked for, because it may belong to the last context.
        if limit is not None and len(items) > limit * len({item.task for item in items}):
            break
    if shape is None:
        raise InputError(f"{str(path)!r} has no entry: give a file with at least one.")
    return shape.name, _take_first(items, limit)


def _have_same_context(one: DataItem, other: DataItem) -> bool:
    """Return True if two items in a row are questions to the same context."""
    return (
        bool(one.document)
        and bool(other.questions)
        and (one.task, one.head, one.document, one.messages)
        == (other.task, other.head, other.document, other.messages)
    )


def _take_first(items: Sequence[DataItem], limit: int | None) -> list[DataItem]:
    """Return the first items of each task."""
    counts: dict[str, int] = {}
    taken = []
    for item in items:
        counts[item.task] = counts.get(item.task, 0) + 1
        if limit is None or counts[item.task] <= limit:
            taken.append(item)
    return taken


def _limit_output(item: DataItem, most: int) -> DataItem:
    questions = tuple(replace(question, max_new_tokens=most) for question in item.questions)
    return replace(item, questions=questions)


def recognise_shape(record: Record) -> Shape:
    """Return the shape of a file from one of its entries.

    Raises
    ------
    InputError
        If no shape has these fields; the message lists the known ones.
    """
    for shape in SHAPES:
        if all(_is_given(record.fields.get(name)) for name in shape.fields):
            return shape
    known = "; ".join(f"{shape.name} ({', '.join(shape.fields)})" for shape in SHAPES)
    raise InputError(
        f"{record.where} has the fields {shorten(', '.join(map(str, record.fields)))}, which is none of the known "
        f"shapes: {known}."
    )


def _is_given(value: Any) -> bool:
    return value is not None
