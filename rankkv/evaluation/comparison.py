"""Comparison of settings: paired differences between rows of a task, and checks that the task measures the cache."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from ..errors import FloorError, InputError
from .statistics import Estimate, compute_mean
from .task_runner import BLANK, FULL

Row = Mapping[str, Any]
_Context = tuple[Any, ...]


class IdenticalOutputsWarning(UserWarning):
    """Warn that two settings keep different shares of the cache but give the same outputs and likelihoods."""


@dataclass(frozen=True)
class Comparison:
    """Hold the results of one setting on one task.

    Attributes
    ----------
    task, setting, metric : str
        Names of the task, the setting and the metric.
    higher_is_better : bool
        True if a larger score is better.
    score : Estimate
        Mean over contexts, with its interval.
    to_full : Estimate or None
        Paired difference of the score to the full cache's; None for the full cache itself or without its rows.
    to_uniform : Estimate or None
        Paired difference of the score to uniform budgets with the same selector and ratio; None for uniform budgets
        themselves or without their rows.
    answer_loss : float or None
        Mean negative log-likelihood of the right answer, nats per token.
    kept_share : float or None
        Tokens kept over tokens of the full cache; a share of bytes if tokens were not counted.
    bytes_share : float or None
        Bytes of the cache, positions and scores included, over bytes of the full cache.
    chance : float or None
        Score of a random choice, if the task has one.
    """

    task: str
    setting: str
    metric: str
    higher_is_better: bool
    score: Estimate
    to_full: Estimate | None
    to_uniform: Estimate | None
    answer_loss: float | None
    kept_share: float | None
    bytes_share: float | None = None
    chance: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON-ready values."""
        return asdict(self)


def compare_settings(
    rows: Iterable[Row],
    uniform_of: Mapping[str, str] | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> list[Comparison]:
    """Compute each setting's mean, and its paired differences to the full cache and to uniform budgets.

    Rows of the same context are averaged first: with question-aware samples a context has several.

    Parameters
    ----------
    rows : iterable of mapping
        From :func:`~rankkv.evaluation.evaluate_task`, of any tasks and seeds.
    uniform_of : mapping, optional
        Maps each setting to its setting with uniform budgets.
    confidence, seed
        Level and seed of the bootstrap intervals over contexts.

    Returns
    -------
    list of Comparison
        Grouped by task: ``"full"``, the settings in the order of their rows, then ``"blank"``.

    Raises
    ------
    InputError
        If two compared settings were not run on the same contexts.

    Examples
    --------
    >>> row = {"task": "t", "length": 8, "seed": 0, "metric": "recall", "higher_is_better": True}
    >>> rows = [{**row, "index": i, "setting": s, "score": v}
    ...     for s, scores in {"full": [1, 1], "0.2": [1, 0]}.items() for i, v in enumerate(scores)]
    >>> [str(found.to_full) for found in compare_settings(rows)]
    ['None', '-0.500 [-1.000, 0.000]']
    """
    found = []
    for task, settings in _group(rows).items():
        order = [FULL, *(name for name in settings if name not in (FULL, BLANK)), BLANK]
        for name in [name for name in order if name in settings]:
            own = settings[name]
            partner = (uniform_of or {}).get(name, name)
            found.append(
                Comparison(
                    task=task,
                    setting=name,
                    metric=own[0]["metric"],
                    higher_is_better=own[0]["higher_is_better"],
                    score=compute_mean(list(_average(own, "score").values()), confidence, seed),
                    to_full=_compute_difference(settings, name, FULL, confidence, seed),
                    to_uniform=_compute_difference(settings, name, partner, confidence, seed),
                    answer_loss=_average_known(own, "answer_loss"),
                    kept_share=_compute_kept_share(own),
                    bytes_share=_compute_bytes_share(own),
                    chance=_average_known(own, "chance"),
                )
            )
    return found


@dataclass(frozen=True)
class TaskSummary:
    """Hold the results of one setting over several tasks.

    Attributes
    ----------
    setting : str
        Name of the setting.
    tasks : int
        Number of tasks whose score is better if higher.
    mean : float
        Mean of the tasks' scores; each task counts once.
    mean_to_full : float or None
        Mean of the differences to the full cache; None for the full cache itself.
    worst_to_full : float or None
        Lowest of these differences.
    worst_task : str or None
        Task of the lowest difference.
    """

    setting: str
    tasks: int
    mean: float
    mean_to_full: float | None
    worst_to_full: float | None
    worst_task: str | None


def summarize_tasks(comparisons: Iterable[Comparison]) -> list[TaskSummary]:
    """Compute each setting's mean over tasks and its worst task.

    Tasks that are scored by a loss are left out, because their scores have another unit.

    Returns
    -------
    list of TaskSummary
        One for each setting that ran on all of these tasks, guessing left out; empty for fewer than two tasks.

    Examples
    --------
    >>> row = {"length": 8, "seed": 0, "index": 0, "metric": "recall", "higher_is_better": True}
    >>> scores = {"a": (1.0, 0.5), "b": (0.8, 0.7)}
    >>> rows = [{**row, "task": task, "setting": setting, "score": score}
    ...     for task, both in scores.items() for setting, score in zip(("full", "0.2"), both)]
    >>> found = summarize_tasks(compare_settings(rows))[1]
    >>> found.worst_task, found.worst_to_full, round(found.mean_to_full, 3)
    ('a', -0.5, -0.3)
    """
    by_setting: dict[str, dict[str, Comparison]] = {}
    for one in comparisons:
        if one.higher_is_better and one.setting != BLANK:
            by_setting.setdefault(one.setting, {})[one.task] = one
    tasks = {task for found in by_setting.values() for task in found}
    if len(tasks) < 2:
        return []
    summaries = []
    for setting, found in by_setting.items():
        if set(found) != tasks:
            continue
        differences = {task: one.to_full.mean for task, one in found.items() if one.to_full is not None}
        worst = min(differences, key=lambda task: differences[task]) if differences else None
        summaries.append(
            TaskSummary(
                setting=setting,
                tasks=len(tasks),
                mean=fmean(one.score.mean for one in found.values()),
                mean_to_full=fmean(differences.values()) if differences else None,
                worst_to_full=None if worst is None else differences[worst],
                worst_task=worst,
            )
        )
    return summaries


def check_floor(rows: Iterable[Row], confidence: float = 0.95, seed: int = 0) -> dict[str, Estimate]:
    """Check that the full cache does better than guessing on every task.

    Guessing is the score of the same questions after a context without the answers.  If the full cache is no better,
    the task cannot tell a good cache from a bad one.

    Parameters
    ----------
    rows : iterable of mapping
        Rows of the settings ``"full"`` and ``"blank"``; others are ignored.
    confidence, seed
        Level and seed of the paired difference's interval.  Its lower bound must be above zero.

    Returns
    -------
    dict of str to Estimate
        Gain of the full cache over guessing, by task.  Tasks without a guess rate are left out.

    Raises
    ------
    FloorError
        If a task's full cache is not better than guessing, or is never right if there is no guess rate.
    """
    margins = {}
    for task, settings in _group(rows).items():
        if FULL not in settings:
            continue
        full, higher = settings[FULL], settings[FULL][0]["higher_is_better"]
        mean = fmean(_average(full, "score").values())
        if BLANK not in settings:
            if higher and mean <= 0.0:
                raise FloorError(_explain_floor(task, mean, "no answer at all is right", len(full)))
            continue
        difference = compute_mean(_subtract_paired(full, settings[BLANK]), confidence, seed)
        gain = (
            difference
            if higher
            else Estimate(-difference.mean, -difference.high, -difference.low, difference.samples)
        )
        if gain.low <= 0.0:
            guess = fmean(_average(settings[BLANK], "score").values())
            raise FloorError(
                _explain_floor(task, mean, f"guessing gives {guess:.3f}, a gain of {gain}", len(full))
            )
        margins[task] = gain
    return margins


def find_identical(
    rows: Iterable[Row], settings: Mapping[str, Mapping[str, Any]], warn: bool = True
) -> list[tuple[str, str, str]]:
    """Find settings that differ only in the share kept, but give the same output and likelihood on every sample.

    The usual cause is a cache that is never read, or a prompt shorter than every layer's budget.

    Parameters
    ----------
    rows : iterable of mapping
        From :func:`~rankkv.evaluation.evaluate_task`.
    settings : mapping
        Maps each setting's name to its options.  The full cache counts as a setting that keeps everything.
    warn : bool, default True
        If True, give an :class:`IdenticalOutputsWarning` for each pair.

    Returns
    -------
    list of (str, str, str)
        The task and the two settings of each pair.
    """
    found = []
    for task, by_setting in _group(rows).items():
        seen = {
            name: [
                (_get_context(row), row["sample"], row.get("output"), row.get("answer_loss")) for row in own
            ]
            for name, own in by_setting.items()
            if name == FULL or name in settings
        }
        for a, b in itertools.combinations(seen, 2):
            if _differ_in_share(settings.get(a), settings.get(b)) and sorted(seen[a], key=str) == sorted(
                seen[b], key=str
            ):
                found.append((task, a, b))
    for task, a, b in found if warn else []:
        warnings.warn(
            f"task {task!r}: {a} and {b} keep different shares of the cache but gave the same outputs and likelihoods "
            "on every sample: make the context longer than every layer's budget, and check that the cache is read.",
            IdenticalOutputsWarning,
            stacklevel=2,
        )
    return found


def _differ_in_share(a: Mapping[str, Any] | None, b: Mapping[str, Any] | None) -> bool:
    """Return True if two settings differ in the share kept and in nothing else; None is the full cache."""
    shares = [
        (1.0, None) if one is None else (one.get("compression_ratio"), one.get("budget")) for one in (a, b)
    ]
    if shares[0] == shares[1]:
        return False
    if a is None or b is None:
        return True
    rest = [{k: v for k, v in one.items() if k not in ("compression_ratio", "budget")} for one in (a, b)]
    return rest[0] == rest[1]


def _group(rows: Iterable[Row]) -> dict[str, dict[str, list[Row]]]:
    """Group rows by task and setting."""
    tasks: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        tasks.setdefault(row["task"], {}).setdefault(row["setting"], []).append(row)
    return tasks


def _get_context(row: Row) -> _Context:
    """Return what identifies a row's context within its task."""
    return row.get("length"), row.get("seed"), row["index"]


def _average(rows: Iterable[Row], column: str) -> dict[_Context, float]:
    """Return the mean of a column by context."""
    values: dict[_Context, list[float]] = {}
    for row in rows:
        values.setdefault(_get_context(row), []).append(float(row[column]))
    return {context: fmean(found) for context, found in values.items()}


def _compute_difference(
    settings: Mapping[str, Sequence[Row]], name: str, other: str, confidence: float, seed: int
) -> Estimate | None:
    """Compute the paired difference of a setting's score to another's; None without another."""
    if other == name or other not in settings:
        return None
    return compute_mean(_subtract_paired(settings[name], settings[other]), confidence, seed)


def _subtract_paired(own: Iterable[Row], other: Iterable[Row]) -> list[float]:
    """Return the difference of the scores for each context, which both settings must have."""
    a, b = _average(own, "score"), _average(other, "score")
    if set(a) != set(b):
        raise InputError(
            f"two settings have {len(a)} and {len(b)} contexts, {len(set(a) & set(b))} of them the same: a paired "
            "difference needs the same contexts in both, so let the run finish."
        )
    return [a[context] - b[context] for context in a]


def _average_known(rows: Sequence[Row], column: str) -> float | None:
    """Return the mean of a column over the rows that have it."""
    values = [row[column] for row in rows if row.get(column) is not None]
    return fmean(values) if values else None


def _compute_kept_share(rows: Sequence[Row]) -> float | None:
    """Compute the mean share of tokens kept, or of bytes if the rows count no tokens."""
    if rows[0].get("full_tokens"):
        return _compute_share(rows, "kept_tokens", "full_tokens")
    return _compute_share(rows, "cache_bytes", "full_cache_bytes")


def _compute_bytes_share(rows: Sequence[Row]) -> float | None:
    """Compute the mean share of bytes, with those beside keys and values."""
    counted = [
        {**row, "cache_bytes": row["cache_bytes"] + (row.get("metadata_bytes") or 0)}
        for row in rows
        if row.get("cache_bytes") is not None
    ]
    return _compute_share(counted, "cache_bytes", "full_cache_bytes")


def _compute_share(rows: Sequence[Row], part: str, whole: str) -> float | None:
    """Compute the mean of one column over another; None if no row has both."""
    shares = [row[part] / row[whole] for row in rows if row.get(whole)]
    return fmean(shares) if shares else None


def _explain_floor(task: str, score: float, why: str, samples: int) -> str:
    return (
        f"task {task!r} cannot tell a good cache from a bad one: the full cache scores {score:.3f} over {samples} "
        f"samples, and {why}. Use a larger model, its chat template, an easier task, shorter contexts or more samples."
    )
