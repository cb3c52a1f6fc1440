"""Registry of the evaluation tasks, which need no download: name to a function that makes samples."""

from __future__ import annotations

from ...errors import ConfigError, UnknownNameError
from ...utils.registry import add_entry, remove_entry
from .base import Draft, Haystack, Question, SampleSpec, Task
from .continuation import make_continuation
from .needles import make_needles
from .quotation import make_quotations
from .samples import Prompt, Sample, list_options, make_samples
from .tracking import make_tracking
from .words import make_common_words, make_frequent_words

_RULER = "arXiv:2404.06654"

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("perplexity", make_continuation, "loss", "loss of the text that follows"),
        Task(
            "needle",
            make_needles,
            "recall",
            "Kamradt 2023, a grid of depths",
            {"depths": (0.0, 0.25, 0.5, 0.75, 1.0)},
        ),
        Task("niah_single", make_needles, "recall", _RULER),
        Task("niah_multikey", make_needles, "recall", _RULER, {"keys": 4}),
        Task("niah_multivalue", make_needles, "recall", _RULER, {"values": 4}),
        Task("niah_multiquery", make_needles, "recall", _RULER, {"keys": 4, "queries": 4}),
        Task("quotation", make_quotations, "recall", "passages of the text itself"),
        Task("variable_tracking", make_tracking, "recall", _RULER),
        Task("common_words", make_common_words, "recall", _RULER),
        Task("frequent_words", make_frequent_words, "recall", _RULER),
        Task(
            "multi_question",
            make_needles,
            "recall",
            "several questions to one compressed context",
            {"keys": 4, "queries": 4, "together": False},
        ),
    )
}
_BUILT_IN = frozenset(TASKS)


def get_task(name: str | Task) -> Task:
    """Return the task of a name; a :class:`Task` is returned as it is.

    Raises
    ------
    UnknownNameError
        If no task of that name is registered.

    Examples
    --------
    >>> get_task("needle").metric
    'recall'
    """
    if isinstance(name, Task):
        return name
    if name not in TASKS:
        raise UnknownNameError.of("task", name, TASKS)
    return TASKS[name]


def register_task(task: Task) -> Task:
    """Add a task to the registry, so that its name works like a built-in one.

    Raises
    ------
    ConfigError
        If ``task`` is not a :class:`Task`, or its name is taken or not a Python name.

    Examples
    --------
    >>> def make_nothing(haystack, place):
    ...     return Draft(haystack.cut(place.length, place), [Question(" Which?", " It is", ("x",), " x")])
    >>> register_task(Task("nothing", make_nothing, "recall", "this example")).name
    'nothing'
    >>> unregister_task("nothing")
    """
    if not isinstance(task, Task):
        raise ConfigError(f"{task!r} must be a Task: wrap your function in Task(name, make, metric, source).")
    add_entry(TASKS, "task", task.name, task)
    return task


def unregister_task(name: str) -> None:
    """Remove a task that :func:`register_task` added.

    Raises
    ------
    UnknownNameError
        If no such task was added; built-in tasks cannot be removed.
    """
    remove_entry(TASKS, "task", name, _BUILT_IN)


__all__ = [
    "TASKS",
    "Draft",
    "Haystack",
    "Prompt",
    "Question",
    "Sample",
    "SampleSpec",
    "Task",
    "get_task",
    "list_options",
    "make_samples",
    "register_task",
    "unregister_task",
]
