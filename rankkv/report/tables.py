"""Curves from rows: mean, interval and paired differences of every method at every share kept, and doubts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ..errors import FloorError
from ..evaluation.comparison import Comparison, check_floor, compare_settings, find_identical
from ..evaluation.settings import UNIFORM
from ..evaluation.statistics import Estimate
from ..evaluation.task_runner import BLANK, FULL
from ..plots import name_model

Row = Mapping[str, Any]
#: Depth and length of a fact to the mean score there.
Grid = dict[tuple[float, int], float]


@dataclass(frozen=True)
class Point:
    """Result of one method at one ratio: fraction requested, fraction kept (floors may raise it), and scores."""

    ratio: float
    kept: float
    found: Comparison


@dataclass(frozen=True)
class TaskQuality:
    """All methods on one task for one model.

    Attributes
    ----------
    model, label, metric, higher_is_better
        Model, task, and the metric of its scores.
    full, blank : Comparison or None
        The full cache, and the full cache of a context without the answer, which shows guessing.
    curves : dict
        Method to its points, ratios growing.
    grids : dict
        Method to ratio to grid, for facts at known depths; ``"full"`` with ratio 1.
    doubts : list of str
        Reasons to doubt the scores.
    """

    model: str
    label: str
    metric: str
    higher_is_better: bool
    full: Comparison | None
    blank: Comparison | None
    curves: dict[str, list[Point]]
    grids: dict[str, dict[float, Grid]]
    doubts: list[str]

    @property
    def title(self) -> str:
        """Task and model."""
        return f"{self.label} · {name_model(self.model)}" if self.model else self.label

    @property
    def comparisons(self) -> list[Comparison]:
        """Results of the full cache, of every method at every ratio, and of guessing."""
        points = [point.found for own in self.curves.values() for point in own]
        return [one for one in (self.full, *points, self.blank) if one is not None]

    @property
    def shows_excess(self) -> bool:
        """True if curves show paired differences to the full cache, as for a loss, which varies more by text."""
        return self.metric == "loss" and self.full is not None

    @property
    def full_level(self) -> float | None:
        """Score of the full cache on the scale of the curves."""
        return 0.0 if self.shows_excess else None if self.full is None else self.full.score.mean

    def pick(self, point: Point) -> Estimate:
        """Return the score of a point on the scale of the curves."""
        if self.shows_excess and point.found.to_full is not None:
            return point.found.to_full
        return point.found.score


def summarize_quality(rows: Sequence[Row], seed: int = 0) -> list[TaskQuality]:
    """Summarize rows by model and task, in the order in which they first appear.

    Parameters
    ----------
    rows : sequence of mapping
        As :attr:`rankkv.report.ReportData.rows`.
    seed : int, default 0
        Seed of the bootstrap.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["label"]), []).append({**row, "task": row["label"]})
    return [_summarize_task(own, seed) for own in groups.values()]


def _summarize_task(rows: Sequence[Row], seed: int) -> TaskQuality:
    settings = {row["setting"]: (row["method"], row["ratio"]) for row in rows}
    by_method = {method: setting for setting, method in settings.items()}
    uniform_of = {}
    for setting, (method, ratio) in settings.items():
        partner = (f"{method.rpartition(' + ')[0]} + {UNIFORM}", ratio)
        if partner in by_method:
            uniform_of[setting] = by_method[partner]
    found = {one.setting: one for one in compare_settings(rows, uniform_of, seed=seed)}
    full, blank = found.pop(FULL, None), found.pop(BLANK, None)
    curves: dict[str, list[Point]] = {}
    for setting, comparison in found.items():
        method, ratio = settings[setting]
        curves.setdefault(method, []).append(Point(ratio, comparison.kept_share or ratio, comparison))
    return TaskQuality(
        model=rows[0]["model"],
        label=rows[0]["label"],
        metric=rows[0]["metric"],
        higher_is_better=rows[0]["higher_is_better"],
        full=full,
        blank=blank,
        curves={method: sorted(points, key=lambda point: point.ratio) for method, points in curves.items()},
        grids=_build_grids(rows),
        doubts=list_doubts(rows, settings),
    )


def list_doubts(rows: Sequence[Row], settings: Mapping[str, tuple[str, float]]) -> list[str]:
    """List reasons to doubt the scores of one task: guessing does as well, or a share makes no difference.

    Parameters
    ----------
    rows : sequence of mapping
        Rows of one task.
    settings : mapping
        Setting to method and ratio.
    """
    doubts = []
    try:
        check_floor(rows)
    except FloorError as error:
        doubts.append(str(error))
    options = {
        name: {"method": method, "compression_ratio": ratio}
        for name, (method, ratio) in settings.items()
        if name not in (FULL, BLANK)
    }
    doubts += [
        f"{a} and {b} gave the same output and likelihood on every sample, though they keep different shares."
        for _, a, b in find_identical(rows, options, warn=False)
    ]
    return doubts


def _build_grids(rows: Sequence[Row]) -> dict[str, dict[float, Grid]]:
    scores: dict[tuple[str, float, float, int], list[float]] = {}
    for row in rows:
        if row["depth"] is not None and row["metric"] != "loss" and row["method"] != BLANK:
            scores.setdefault((row["method"], row["ratio"], row["depth"], row["length"]), []).append(
                row["score"]
            )
    grids: dict[str, dict[float, Grid]] = {}
    for (method, ratio, depth, length), found in scores.items():
        grids.setdefault(method, {}).setdefault(ratio, {})[depth, length] = fmean(found)
    return grids
