"""The HTML page: one file with its data, style, program and plotly.js inside, which asks no network for anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import resources
from typing import Any

from ..errors import MissingDependencyError
from ..evaluation.statistics import Estimate
from ..evaluation.task_runner import FULL
from ..utils.files import dump_json, make_json_ready
from .collect import ReportData
from .speed import summarize_speed
from .tables import TaskQuality, summarize_quality

#: What each metric is called on an axis.
METRICS = {
    "loss": "loss, nats a token (lower is better)",
    "recall": "share of answers found (higher is better)",
}


def build_page(data: ReportData, title: str = "RankKV report") -> str:
    """Build the page of all parts that a results folder has.

    Parameters
    ----------
    data : ReportData
        From :func:`rankkv.report.collect_results`.
    title : str, default "RankKV report"
        Of the page.

    Returns
    -------
    str
        HTML.

    Raises
    ------
    MissingDependencyError
        If jinja2 or plotly is not installed.
    """
    try:
        import jinja2
        from markupsafe import Markup
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise MissingDependencyError(
            "a report needs jinja2 and plotly, which are not installed: pip install 'rankkv[report]'."
        ) from error
    files = resources.files(__package__) / "templates"
    # Whatever stands in a results folder, prompts and answers too, is text and never markup.
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"share": _format_share, "estimate": _format_estimate, "signed": _format_signed}
    template = environment.from_string((files / "report.html").read_text(encoding="utf-8"))
    tasks = summarize_quality(data.rows)
    named = [name for task in tasks for name in task.curves] + [cell["method"] for cell in data.portraits]
    methods = list(dict.fromkeys(named))
    portraits = _group_portraits(data.portraits)
    speed = summarize_speed(data.bench, data.demo)
    page: str = template.render(
        title=title,
        facts=_list_facts(data, tasks, methods),
        is_finished=data.is_finished,
        tasks=tasks,
        metrics=METRICS,
        axes={task.title: describe_axis(task) for task in tasks},
        grids=[_lay_out_grid(task) for task in tasks if task.grids],
        portraits=portraits,
        speed=speed,
        manifest=dump_json(data.manifest) if data.manifest else "",
        payload=make_json_ready(
            {
                "methods": methods,
                "tasks": [_pack_task(task) for task in tasks],
                "portraits": portraits,
                "speed": speed,
            }
        ),
        style=Markup((files / "report.css").read_text(encoding="utf-8")),
        program=Markup((files / "report.js").read_text(encoding="utf-8")),
        plotly=Markup(get_plotlyjs()),
    )
    return page


def describe_axis(task: TaskQuality) -> str:
    """Say what a task's curves show: the score, or of a loss what it is above that of the full cache."""
    if task.shows_excess:
        return "loss above the full cache's, nats a token (lower is better)"
    return METRICS.get(task.metric, task.metric)


def _list_facts(
    data: ReportData, tasks: Sequence[TaskQuality], methods: Sequence[str]
) -> list[tuple[str, str]]:
    """Return what the page says at its top, as names and values."""
    environment = data.manifest.get("environment") or {}
    config = data.manifest.get("config") or {}
    models = list(
        dict.fromkeys([row["model"] for row in data.rows] + [cell["model"] for cell in data.portraits])
    )
    if models == [""]:
        models = [str(config.get("model", ""))]
    ratios = sorted({point.ratio for task in tasks for points in task.curves.values() for point in points})
    samples = {(row["model"], row["label"], row["seed"], row["sample"]) for row in data.rows}
    facts = [
        ("model", ", ".join(filter(None, models))),
        ("methods", str(len(methods)) if methods else ""),
        ("shares of the cache kept", ", ".join(f"{ratio:.0%}" for ratio in ratios)),
        ("samples", f"{len(samples):,}" if samples else ""),
        ("device", str(environment.get("device", ""))),
        (
            "versions",
            ", ".join(
                f"{name} {environment[name]}"
                for name in ("rankkv", "torch", "transformers")
                if name in environment
            ),
        ),
        ("commit", (environment.get("commit") or "")[:12]),
    ]
    return [(name, value) for name, value in facts if value]


def _pack_task(task: TaskQuality) -> dict[str, Any]:
    return {
        "full": task.full_level,
        # Beside a loss that hardly moves, that of another context would leave no room for the curves.
        "guess": None if task.blank is None or task.metric == "loss" else task.blank.score.mean,
        "curves": [
            {
                "method": name,
                "points": [
                    {"ratio": point.ratio, "kept": point.kept, **asdict(task.pick(point))} for point in points
                ],
            }
            for name, points in task.curves.items()
        ],
    }


def _lay_out_grid(task: TaskQuality) -> dict[str, Any]:
    """Return one small table for each method and ratio: depths down, lengths across."""
    spots = {spot for ratios in task.grids.values() for cells in ratios.values() for spot in cells}
    return {
        "title": task.title,
        "depths": sorted({depth for depth, _ in spots}),
        "lengths": sorted({length for _, length in spots}),
        "ratios": sorted({ratio for ratios in task.grids.values() for ratio in ratios if ratio < 1.0}),
        "full": task.grids.get(FULL, {}).get(1.0),
        "methods": {name: ratios for name, ratios in task.grids.items() if name != FULL},
    }


def _group_portraits(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one entry a prompt, with what all of its cells share said once."""
    shared = ("model", "label", "pieces", "layer_indices", "head_ranks")
    own = (
        "method", "ratio", "measure", "layer_measures", "budgets", "head_kept", "token_layers", "stretch_shares",
    )  # fmt: skip
    prompts: dict[str, dict[str, Any]] = {}
    for row in rows:
        prompt = prompts.setdefault(row["prompt"], {**{key: row[key] for key in shared}, "cells": []})
        cell = {key: row[key] for key in own}
        cell["token_shares"] = [round(share, 3) for share in row["token_shares"]]
        cell["stretch_shares"] = [[round(share, 3) for share in layer] for layer in row["stretch_shares"]]
        prompt["cells"].append(cell)
    return list(prompts.values())


# -- numbers as one reads them -----------------------------------------------------------------------


def _format_share(value: float) -> str:
    return f"{value:.0%}" if value >= 0.095 else f"{value:.1%}"


def _format_estimate(estimate: Estimate | None) -> str:
    return "" if estimate is None else f"{estimate.mean:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def _format_signed(estimate: Estimate | None) -> str:
    return "" if estimate is None else f"{estimate.mean:+.3f} [{estimate.low:+.3f}, {estimate.high:+.3f}]"
