"""Comparison of settings: paired differences between rows of a task, and the check against guessing."""

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
_Unit = tuple[Any, ...]


class IdenticalOutputsWarning(UserWarning):
    """Two settings that keep different shares of the cache gave the same output and likelihood everywhere."""


@dataclass(frozen=True)
class Comparison:
    """One setting on one task.

    Attributes
    ----------
    task, setting, metric : str
        Which, and what is measured.
    higher_is_better : bool
        Whether a larger score is a better one.
    score : Estimate
        Mean over contexts, with its interval.
    to_full, to_uniform : Estimate or None
        Paired difference of the score to that of the full cache, and of uniform budgets with the same selector and
        ratio, with their intervals; None for these themselves, or where there is no partner.
    answer_loss : float or None
        Mean negative log-likelihood of the right answer, nats a token.
    kept_share : float or None
        Tokens kept of those of the full cache; bytes, where tokens were not counted.
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

    Rows of the same context (several questions compressed with it one by one) count as one.

    Parameters
    ----------
    rows : iterable of mapping
        From :func:`~rankkv.evaluation.evaluate_task`, of any tasks and seeds.
    uniform_of : mapping, optional
        Setting to the setting with uniform budgets that it is compared with.
    confidence, seed
        Of the bootstrap intervals over contexts.

    Returns
    -------
    list of Comparison
        By task, then ``"full"``, the settings in the order of their rows, and ``"blank"``.

    Raises
    ------
    InputError
        If two settings that are compared were not run on the same contexts.

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
                    to_full=_relate(settings, name, FULL, confidence, seed),
                    to_uniform=_relate(settings, name, partner, confidence, seed),
                    answer_loss=_mean_of(own, "answer_loss"),
                    kept_share=_share(own),
                )
            )
    return found


def check_floor(rows: Iterable[Row], confidence: float = 0.95, seed: int = 0) -> dict[str, Estimate]:
    """Check that every task can tell a good cache from a bad one: the full cache must do better than guessing.

    Guessing is the score of the same questions after a context without the answers.

    Parameters
    ----------
    rows : iterable of mapping
        With those of the settings ``"full"`` and ``"blank"``.
    confidence, seed
        Of the interval of the paired difference, whose bound must be on the right side of zero.

    Returns
    -------
    dict of str to Estimate
        By task, how much better the full cache is than guessing; tasks without a guess rate are left out.

    Raises
    ------
    FloorError
        If a task's full cache is not better than guessing, or, where there is no guess rate, never right.
    """
    margins = {}
    for task, settings in _group(rows).items():
        if FULL not in settings:
            continue
        full, higher = settings[FULL], settings[FULL][0]["higher_is_better"]
        mean = fmean(_average(full, "score").values())
        if BLANK not in settings:
            if higher and mean <= 0.0:
                raise FloorError(_explain(task, mean, "no answer at all is right", len(full)))
            continue
        difference = compute_mean(_pair(full, settings[BLANK]), confidence, seed)
        gain = (
            difference
            if higher
            else Estimate(-difference.mean, -difference.high, -difference.low, difference.samples)
        )
        if gain.low <= 0.0:
            guess = fmean(_average(settings[BLANK], "score").values())
            raise FloorError(_explain(task, mean, f"guessing gives {guess:.3f}, a gain of {gain}", len(full)))
        margins[task] = gain
    return margins


def find_identical(
    rows: Iterable[Row], settings: Mapping[str, Mapping[str, Any]], warn: bool = True
) -> list[tuple[str, str, str]]:
    """Find settings that differ in the share kept alone, and yet give the same output and likelihood everywhere.

    The usual cause is a cache that is never read, or a prompt shorter than what every layer keeps.

    Parameters
    ----------
    rows : iterable of mapping
        From :func:`~rankkv.evaluation.evaluate_task`.
    settings : mapping
        Name of each setting, and its options.  The full cache counts as one with all kept.
    warn : bool, default True
        Whether to give an :class:`IdenticalOutputsWarning` for each pair.

    Returns
    -------
    list of (str, str, str)
        Task and the two settings.
    """
    found = []
    for task, by_setting in _group(rows).items():
        seen = {
            name: [(_unit(row), row["sample"], row.get("output"), row.get("answer_loss")) for row in own]
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
            f"task {task!r}: {a} and {b} gave the same outputs and likelihoods on every sample, but are to keep "
            "different shares of the cache: is the context longer than what every layer keeps, and is the cache read?",
            IdenticalOutputsWarning,
            stacklevel=2,
        )
    return found


def _differ_in_share(a: Mapping[str, Any] | None, b: Mapping[str, Any] | None) -> bool:
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
    tasks: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        tasks.setdefault(row["task"], {}).setdefault(row["setting"], []).append(row)
    return tasks


def _unit(row: Row) -> _Unit:
    return row.get("length"), row.get("seed"), row["index"]


def _average(rows: Iterable[Row], column: str) -> dict[_Unit, float]:
    """Return the mean of a column by context."""
    values: dict[_Unit, list[float]] = {}
    for row in rows:
        values.setdefault(_unit(row), []).append(float(row[column]))
    return {unit: fmean(found) for unit, found in values.items()}


def _relate(
    settings: Mapping[str, Sequence[Row]], name: str, other: str, confidence: float, seed: int
) -> Estimate | None:
    if other == name or other not in settings:
        return None
    return compute_mean(_pair(settings[name], settings[other]), confidence, seed)


def _pair(own: Iterable[Row], other: Iterable[Row]) -> list[float]:
    a, b = _average(own, "score"), _average(other, "score")
    if set(a) != set(b):
        raise InputError(
            f"two settings have {len(a)} and {len(b)} contexts, {len(set(a) & set(b))} of them the same: a paired "
            "difference needs the same contexts in both; let the run finish."
        )
    return [a[unit] - b[unit] for unit in a]


def _mean_of(rows: Sequence[Row], column: str) -> float | None:
    values = [row[column] for row in rows if row.get(column) is not None]
    return fmean(values) if values else None


def _share(rows: Sequence[Row]) -> float | None:
    kept = (
        ("kept_tokens", "full_tokens") if rows[0].get("full_tokens") else ("cache_bytes", "full_cache_bytes")
    )
    shares = [row[kept[0]] / row[kept[1]] for row in rows if row.get(kept[1])]
    return fmean(shares) if shares else None


def _explain(task: str, score: float, why: str, samples: int) -> str:
    return (
        f"task {task!r} cannot tell a good cache from a bad one: with the full cache the score is {score:.3f} over "
        f"{samples} samples, and {why}. Take a larger model, its chat template, an easier task or shorter contexts, or "
        "more samples."
    )
