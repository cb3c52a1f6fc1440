"""Configuration of a sweep, read from YAML and checked before any model loads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any

from ...budget.plan import BudgetPlan
from ...config import RankKVConfig
from ...errors import ConfigError, InputError
from ...models.texts import PYTHON_DOCS
from ...selection import get_selector
from ...utils.files import shorten
from ..settings import NAMED_STRATEGIES
from ..tasks import get_task
from .yaml_values import (
    check_bool,
    check_integer,
    check_mapping,
    check_ratio,
    check_string,
    check_yaml_size,
    explain,
    load_yaml,
    take_list,
)

#: Names that stand for options of the cache.  Any other name is a budget strategy with its default options.
NAMED_ALLOCATIONS: Mapping[str, Mapping[str, Any]] = {
    **NAMED_STRATEGIES,
    "whole": {"strategy": "proportional", "scope": "full", "aggregation": "mean"},
}
_CACHE_OPTIONS = {item.name for item in fields(RankKVConfig)} - {"selector", "compression_ratio", "budget"}
_TASK_KEYS = ("task", "label", "lengths", "count", "text", "question_aware", "chat")
#: Where a task comes from: the package, lm-evaluation-harness, or the file of a benchmark.
BUILT_IN, HARNESS, DATA = "built-in", "harness", "data"
_DATA_OPTIONS = ("max_length", "max_new_tokens")


@dataclass(frozen=True)
class SweepModel:
    """Hold the arguments of :func:`rankkv.load_model` for one model."""

    name: str
    dtype: str | None = None
    device_map: str | None = None


@dataclass(frozen=True)
class SweepTask:
    """Hold one task with its context lengths (tokens), samples per length and options.

    ``text`` is the argument of :func:`rankkv.load_texts`.  ``source`` is "built-in", "harness" (``task`` is a task of
    lm-evaluation-harness) or "data" (``task`` is the path of a benchmark's file).  ``chat`` is None for a file: the
    benchmark decides.
    """

    label: str
    task: str
    lengths: tuple[int, ...] = (1024,)
    count: int = 10
    text: str = PYTHON_DOCS
    question_aware: bool = False
    chat: bool | None = False
    options: Mapping[str, Any] = field(default_factory=dict)
    source: str = BUILT_IN


@dataclass(frozen=True)
class SweepMethod:
    """Hold all options of a cache but the ratio: a selector, an allocation, and further options."""

    name: str
    selector: str
    allocation: str
    selector_options: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def build_options(self, ratio: float) -> dict[str, Any]:
        """Return the options of :class:`~rankkv.RankKVCache` at one ratio."""
        selector = get_selector(self.selector, **self.selector_options)
        return {**self.options, "selector": selector, "compression_ratio": ratio}


@dataclass(frozen=True)
class SweepConfig:
    """Hold a whole sweep: every model on every task with every method at every ratio, for every seed.

    Attributes
    ----------
    models, tasks, methods : tuple
        Models, tasks and methods; all combinations run.
    ratios : tuple of float
        Fractions of the KV cache kept, in (0, 1].
    seeds : tuple of int
        Seeds; each draws its own samples.
    blank : bool
        If True, also measure the guess rate, which takes one more prefill per sample.
    """

    models: tuple[SweepModel, ...]
    tasks: tuple[SweepTask, ...]
    methods: tuple[SweepMethod, ...]
    ratios: tuple[float, ...]
    seeds: tuple[int, ...] = (0,)
    blank: bool = True

    @property
    def setting_count(self) -> int:
        """Number of settings, which is the number of compressed caches per sample."""
        return len(self.methods) * len(self.ratios)

    def list_settings(self) -> dict[str, tuple[SweepMethod, float]]:
        """Return every method with every ratio, by the setting's name."""
        return {
            f"{method.name} @ {ratio:g}": (method, ratio)
            for method, ratio in product(self.methods, self.ratios)
        }

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain JSON types."""
        record = asdict(self)
        for task in record["tasks"]:
            # Folders written before other sources existed name none.
            if task["source"] == BUILT_IN:
                del task["source"]
        return record


def read_sweep_config(path: str | Path) -> SweepConfig:
    """Read and check a sweep's YAML file.

    ``tasks`` and ``ratios`` are required, and ``methods``, or ``selectors`` with ``allocations``.

    - ``models``: names, or mappings of ``name``, ``dtype`` and ``device_map``; default ``embedded``.
    - ``tasks``: names, or mappings of ``task`` and optionally ``label``, ``lengths``, ``count``, ``text``,
      ``question_aware``, ``chat`` and options of the task.  ``harness`` in place of ``task`` names a task of
      lm-evaluation-harness (with ``include_path``, a folder of its YAML files), ``data`` the file of a benchmark
      (with ``max_length`` and ``max_new_tokens``).
    - ``selectors`` and ``allocations``: names, or mappings of ``name`` and options; all pairs of both run.
    - ``methods``: mappings of ``name``, ``selector``, ``allocation`` and options of the cache; they are not crossed.
    - ``ratios``: fractions of the KV cache kept, in (0, 1].
    - ``seeds``: integers of at least 0; default 0.
    - ``blank``: true (the default) to measure the guess rate.

    Parameters
    ----------
    path : str or Path
        The YAML file.

    Returns
    -------
    SweepConfig
        The checked sweep.

    Raises
    ------
    InputError
        If the file cannot be read or is not YAML.
    ConfigError
        If a key is unknown, missing, doubled or has a value outside its range; the message names key and value.
    MissingDependencyError
        If PyYAML is not installed.
    """
    path = Path(path)
    try:
        check_yaml_size(path.stat().st_size, str(path))
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the sweep file {str(path)!r}: {error}; give a UTF-8 file.") from error
    try:
        return parse_sweep_config(load_yaml(text, str(path)))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def parse_sweep_config(record: Any) -> SweepConfig:
    """Check the content of a sweep's YAML file, described at :func:`read_sweep_config`.

    Raises
    ------
    ConfigError
        As :func:`read_sweep_config`.

    Examples
    --------
    >>> config = parse_sweep_config({"tasks": [{"task": "needle"}], "selectors": ["snapkv"],
    ...     "allocations": ["uniform", "default"], "ratios": [0.1, 0.3]})
    >>> list(config.list_settings())[:2], config.setting_count
    (['snapkv + uniform @ 0.1', 'snapkv + uniform @ 0.3'], 4)
    """
    known = [item.name for item in fields(SweepConfig)] + ["selectors", "allocations"]
    given = check_mapping(record, "the sweep", known)
    ratios = tuple(check_ratio(value, f"ratios[{i}]") for i, value in enumerate(take_list(given, "ratios")))
    methods = tuple(_parse_methods(given))
    config = SweepConfig(
        models=tuple(_parse_models(take_list(given, "models", ["embedded"]))),
        tasks=tuple(_parse_tasks(take_list(given, "tasks"))),
        methods=methods,
        ratios=ratios,
        seeds=tuple(
            check_integer(value, f"seeds[{i}]", 0) for i, value in enumerate(take_list(given, "seeds", [0]))
        ),
        blank=check_bool(given.get("blank", True), "blank"),
    )
    for key, names in (
        ("models", [model.name for model in config.models]),
        ("tasks", [task.label for task in config.tasks]),
        ("methods", [method.name for method in methods]),
        ("ratios", ratios),
        ("seeds", config.seeds),
    ):
        doubled = next((name for name in names if list(names).count(name) > 1), None)
        if doubled is not None:
            remedy = {"tasks": "give each a different label", "methods": "give each a different name"}
            raise ConfigError(f"{key} holds {doubled!r} twice: {remedy.get(key, 'remove one')}.")
    for method, ratio in product(methods, ratios):
        _check_method(method, ratio)
    return config


# -- models, tasks and methods -----------------------------------------------------------------------


def _parse_models(items: Sequence[Any]) -> list[SweepModel]:
    models = []
    for place, item in enumerate(items):
        where = f"models[{place}]"
        known = [entry.name for entry in fields(SweepModel)]
        given = {"name": item} if isinstance(item, str) else check_mapping(item, where, known)
        values = {key: check_string(value, f"{where}.{key}") for key, value in given.items()}
        if "name" not in values:
            raise ConfigError(
                f"{where} is {shorten(item)} without a name: give a hub id, a folder, a GGUF file or embedded."
            )
        models.append(SweepModel(**values))
    return models


def _parse_tasks(items: Sequence[Any]) -> list[SweepTask]:
    tasks = []
    for place, item in enumerate(items):
        where = f"tasks[{place}]"
        given = {"task": item} if isinstance(item, str) else check_mapping(item, where)
        named = [key for key in ("task", HARNESS, DATA) if key in given]
        if len(named) > 1:
            raise ConfigError(f"{where} has {named[0]} and {named[1]}: give one of them.")
        if named and named[0] != "task":
            tasks.append(_parse_outside_task(given, named[0], where))
            continue
        task = explain(f"{where}.task", get_task, given.get("task"))
        defaults = SweepTask(task.name, task.name)
        lengths = take_list(
            {"lengths": given.get("lengths", list(defaults.lengths))}, "lengths", where=f"{where}."
        )
        tasks.append(
            SweepTask(
                label=check_string(given.get("label", task.name), f"{where}.label"),
                task=task.name,
                lengths=tuple(
                    check_integer(value, f"{where}.lengths[{i}]", 1) for i, value in enumerate(lengths)
                ),
                count=check_integer(given.get("count", defaults.count), f"{where}.count", 1),
                text=check_string(given.get("text", defaults.text), f"{where}.text"),
                question_aware=check_bool(given.get("question_aware", False), f"{where}.question_aware"),
                chat=check_bool(given.get("chat", False), f"{where}.chat"),
                options={key: value for key, value in given.items() if key not in _TASK_KEYS},
            )
        )
    return tasks


def _parse_outside_task(given: Mapping[str, Any], source: str, where: str) -> SweepTask:
    """Parse a task of lm-evaluation-harness, or the file of a benchmark."""
    known = {
        HARNESS: (HARNESS, "label", "lengths", "count", "question_aware", "include_path"),
        DATA: (DATA, "label", "count", "question_aware", "chat", *_DATA_OPTIONS),
    }
    given = check_mapping(given, where, known[source])
    name = check_string(given[source], f"{where}.{source}")
    lengths = take_list({"lengths": given.get("lengths", [4096])}, "lengths", where=f"{where}.")
    chat = given.get("chat")
    options: dict[str, Any] = {
        key: check_integer(given[key], f"{where}.{key}", 1) for key in _DATA_OPTIONS if key in given
    }
    if "include_path" in given:
        options["include_path"] = check_string(given["include_path"], f"{where}.include_path")
    return SweepTask(
        label=check_string(given.get("label", Path(name).name.split(".")[0]), f"{where}.label"),
        task=name,
        lengths=tuple(check_integer(value, f"{where}.lengths[{i}]", 1) for i, value in enumerate(lengths)),
        count=check_integer(given.get("count", SweepTask.count), f"{where}.count", 1),
        question_aware=check_bool(given.get("question_aware", False), f"{where}.question_aware"),
        chat=None if chat is None else check_bool(chat, f"{where}.chat"),
        options=options,
        source=source,
    )


def _parse_methods(given: Mapping[str, Any]) -> list[SweepMethod]:
    crossed = "selectors" in given or "allocations" in given
    if not crossed and "methods" not in given:
        raise ConfigError(
            "the sweep has no method: give selectors and allocations, which are crossed, or methods."
        )
    methods = []
    if crossed:
        selectors = [
            _parse_named(item, f"selectors[{i}]") for i, item in enumerate(take_list(given, "selectors"))
        ]
        allocations = [
            _parse_named(item, f"allocations[{i}]") for i, item in enumerate(take_list(given, "allocations"))
        ]
        for (selector, selector_options), (allocation, options) in product(selectors, allocations):
            name = _name_method(selector, selector_options, allocation)
            chosen = _resolve_allocation(allocation, options)
            methods.append(SweepMethod(name, selector, allocation, selector_options, chosen))
    for place, item in enumerate(take_list(given, "methods", [])):
        where = f"methods[{place}]"
        own = dict(check_mapping(item, where))
        selector, selector_options = _parse_named(own.pop("selector", "snapkv"), f"{where}.selector")
        allocation, options = _parse_named(own.pop("allocation", "auto"), f"{where}.allocation")
        name = own.pop("name", _name_method(selector, selector_options, allocation))
        name = check_string(name, f"{where}.name")
        chosen = {**_resolve_allocation(allocation, options), **own}
        methods.append(SweepMethod(name, selector, allocation, selector_options, chosen))
    return methods


def _parse_named(item: Any, where: str) -> tuple[str, dict[str, Any]]:
    """Return the name and the options of ``name`` or of ``{name: ..., option: ...}``."""
    if isinstance(item, str):
        return item, {}
    given = dict(check_mapping(item, where))
    return check_string(given.pop("name", None), f"{where}.name"), given


def _resolve_allocation(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the cache that an allocation stands for."""
    # If the options name a strategy, the allocation's name is only a label.
    if options and ("strategy" in options or name in NAMED_ALLOCATIONS):
        return {**NAMED_ALLOCATIONS.get(name, {}), **options}
    return {**NAMED_ALLOCATIONS.get(name, {"strategy": name}), **options}


def _name_method(selector: str, options: Mapping[str, Any], allocation: str) -> str:
    """Return the default name of a method, such as ``snapkv(kernel_size=7) + uniform``."""
    listed = ", ".join(f"{key}={value}" for key, value in options.items())
    return f"{selector}({listed}) + {allocation}" if listed else f"{selector} + {allocation}"


def _check_method(method: SweepMethod, ratio: float) -> None:
    """Raise a ConfigError if a method cannot run at a ratio."""
    unknown = sorted(set(method.options) - _CACHE_OPTIONS)
    if unknown:
        raise ConfigError(
            f"the method {method.name!r} has the unknown option {unknown[0]}={shorten(method.options[unknown[0]])}; "
            f"the options in a sweep are: {', '.join(sorted(_CACHE_OPTIONS))}."
        )
    where = f"the method {method.name!r} at ratio {ratio:g}"
    config = explain(where, lambda: RankKVConfig(**method.build_options(ratio)))
    explain(where, BudgetPlan.check, config)
    if config.prefill != "single":
        raise ConfigError(
            f"{where} has prefill={config.prefill!r} but must have 'single', because all settings share the prefill."
        )
