"""The HTML page: one file that holds its data, style, program and plotly.js, and uses no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import date
from importlib import resources
from typing import Any

from ..errors import MissingDependencyError
from ..evaluation.settings import UNIFORM
from ..evaluation.statistics import Estimate
from ..evaluation.task_runner import FULL
from ..plots import name_methods, name_model
from ..utils.files import dump_json, make_json_ready
from .collect import ReportData
from .speed import summarize_speed
from .tables import Point, TaskQuality, summarize_quality

#: Axis label of each metric.
METRICS = {
    "loss": "loss, nats per token (lower is better)",
    "recall": "share of answers found (higher is better)",
}


def build_page(data: ReportData, title: str | None = None, made: date | None = None) -> str:
    """Build the page of all parts of a results folder.

    Parameters
    ----------
    data : ReportData
        From :func:`rankkv.report.collect_results`.
    title : str, optional
        Title of the page; by default the tasks and the models.
    made : date, optional
        Date on the page; by default today.

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
    # Prompts and answers of a results folder are text and must never become markup.
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"share": _format_share, "estimate": _format_estimate, "signed": _format_signed}
    template = environment.from_string((files / "report.html").read_text(encoding="utf-8"))
    tasks = summarize_quality(data.rows)
    raw = [name for task in tasks for name in task.curves] + [row["method"] for row in data.kept_maps]
    named = name_methods(dict.fromkeys(raw))
    methods = list(named.values())
    kept_maps = _group_kept_maps(data.kept_maps, named)
    speed = summarize_speed(data.bench, data.demo)
    page: str = template.render(
        title=title or _make_title(data, tasks),
        made=(made or date.today()).isoformat(),
        takeaways=[
            # A sign of per cent must not start a line.
            sentence.replace(" %", "\N{NO-BREAK SPACE}%")
            for sentence in [
                *(describe_task(task, named) for task in tasks if task.curves),
                *describe_speed(speed),
            ]
        ],
        methods=methods,
        named=named,
        facts=_list_facts(data, tasks),
        notes=data.notes,
        is_finished=data.is_finished,
        tasks=tasks,
        metrics=METRICS,
        axes={task.title: describe_axis(task) for task in tasks},
        grids=[_lay_out_grid(task, named) for task in tasks if task.grids],
        kept_maps=kept_maps,
        speed=speed,
        manifest=dump_json(data.manifest) if data.manifest else "",
        payload=make_json_ready(
            {
                "methods": methods,
                "tasks": [_pack_task(task, named) for task in tasks],
                "maps": kept_maps,
                "speed": speed,
            }
        ),
        style=Markup((files / "report.css").read_text(encoding="utf-8")),
        program=Markup((files / "report.js").read_text(encoding="utf-8")),
        plotly=Markup(get_plotlyjs()),
    )
    return page


def describe_axis(task: TaskQuality) -> str:
    """Return the axis label of a task's curves: its metric, or the loss above that of the full cache."""
    if task.shows_excess:
        return "loss above the full cache's, nats per token (lower is better)"
    return METRICS.get(task.metric, task.metric)


def describe_task(task: TaskQuality, named: Mapping[str, str]) -> str:
    """Return the result of a task in one or two sentences, at the smallest share kept.

    The method is RankKV's if there is one, else the best, and it is compared with uniform budgets of its selector.
    """
    ratio = min(point.ratio for points in task.curves.values() for point in points)
    at = {name: point for name, points in task.curves.items() for point in points if point.ratio == ratio}
    sign = 1 if task.higher_is_better else -1
    compared = [name for name, point in at.items() if point.found.to_uniform is not None]
    # The first of RankKV's, not the best of all: the best of many is best by chance, too.
    own = next((name for name in compared if named[name].endswith("RankKV (default)")), None)
    name = own or max(compared or at, key=lambda one: sign * at[one].found.score.mean)
    point = at[name]
    start = f"{task.title}, {_format_share(ratio)} kept: {named[name]} {_say_score(task, point)}"
    paired = point.found.to_uniform
    if paired is None:
        best = " the best mean of all methods" if len(at) > 1 else ""
        return f"{start}{',' + best if best else ''} ({point.found.score.samples} samples)."
    partner = f"{name.rpartition(' + ')[0]} + {UNIFORM}"
    if paired.low <= 0.0 <= paired.high:
        verdict = "No difference is shown"
    else:
        verdict = "It is better" if sign * paired.mean > 0 else "It is worse"
    return (
        f"{start}, {named.get(partner, partner)} {_say_score(task, at[partner], is_second=True)}. {verdict}: "
        f"paired difference {paired:+}, {paired.samples} samples."
    )


def _say_score(task: TaskQuality, point: Point, is_second: bool = False) -> str:
    value = task.pick(point).mean
    if task.metric == "recall":
        return f"{'' if is_second else 'finds '}{100 * value:.0f} %{'' if is_second else ' of the answers'}"
    if is_second:
        return f"{value:.3f}"
    return (
        f"loses {value:.3f} nats per token to the full cache" if task.shows_excess else f"scores {value:.3f}"
    )


def describe_speed(speed: Mapping[str, Any]) -> list[str]:
    """Return the results of the demo and of the benchmarks in a sentence each."""
    sentences = []
    runs = [run for run in speed["runs"] if run["has_fact"] is not None]
    if runs:
        told = [f"{run['name']} ({run['megabytes']:.0f} MB)" for run in runs if run["has_fact"]]
        lost = [f"{run['name']} ({run['megabytes']:.0f} MB)" for run in runs if not run["has_fact"]]
        parts = [
            f"the hidden fact is found with {_join(told)}" if told else "",
            f"lost with {_join(lost)}" if lost else "",
        ]
        sentences.append(f"Demo, one prompt: {', and '.join(filter(None, parts))}.")
    if speed["targets"]:
        verdicts = [row["verdict"].partition(":")[0] for row in speed["targets"]]
        order = ("met", "not met", "open", "no verdict")
        counts = [f"{verdicts.count(name)} {name}" for name in order if name in verdicts]
        sentences.append(f"Speed and memory, {len(verdicts)} targets: {_join(counts)}.")
    return sentences


def _join(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _make_title(data: ReportData, tasks: Sequence[TaskQuality]) -> str:
    """Return a title of the tasks and the models, or of what else there is."""
    labels = list(dict.fromkeys(task.label for task in tasks)) or list(
        dict.fromkeys(row["label"] for row in data.kept_maps)
    )
    labels = labels or [name for name, part in (("benchmarks", data.bench), ("demo", data.demo)) if part]
    shown = _join(labels if len(labels) < 5 else [*labels[:3], f"{len(labels) - 3} more"])
    models = _list_models(data)
    return f"RankKV report: {shown}" + (f" with {_join(models)}" if models else "")


def _list_models(data: ReportData) -> list[str]:
    models = list(
        dict.fromkeys([row["model"] for row in data.rows] + [row["model"] for row in data.kept_maps])
    )
    if models in ([""], []):
        models = [str((data.manifest.get("config") or {}).get("model") or data.demo.get("model") or "")]
    return [name_model(name) for name in models if name]


def _list_facts(data: ReportData, tasks: Sequence[TaskQuality]) -> list[tuple[str, str]]:
    """Return the names and values at the top of the page."""
    environment = data.manifest.get("environment") or {}
    ratios = sorted({point.ratio for task in tasks for points in task.curves.values() for point in points})
    samples = {(row["model"], row["label"], row["seed"], row["sample"]) for row in data.rows}
    facts = [
        ("model", ", ".join(_list_models(data))),
        ("shares of the cache kept", ", ".join(_format_share(ratio) for ratio in ratios)),
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


def _pack_task(task: TaskQuality, named: Mapping[str, str]) -> dict[str, Any]:
    return {
        "full": task.full_level,
        # The loss after another context is far above the curves and would press them flat.
        "guess": None if task.blank is None or task.metric == "loss" else task.blank.score.mean,
        "curves": [
            {
                "method": named[name],
                "points": [
                    {"ratio": point.ratio, "kept": point.kept, **asdict(task.pick(point))} for point in points
                ],
            }
            for name, points in task.curves.items()
        ],
    }


def _lay_out_grid(task: TaskQuality, named: Mapping[str, str]) -> dict[str, Any]:
    """Return one small table for each method and ratio: depths down, lengths across."""
    spots = {spot for ratios in task.grids.values() for grid in ratios.values() for spot in grid}
    return {
        "title": task.title,
        "depths": sorted({depth for depth, _ in spots}),
        "lengths": sorted({length for _, length in spots}),
        "ratios": sorted({ratio for ratios in task.grids.values() for ratio in ratios if ratio < 1.0}),
        "full": task.grids.get(FULL, {}).get(1.0),
        "methods": {named[name]: ratios for name, ratios in task.grids.items() if name != FULL},
    }


def _group_kept_maps(rows: Sequence[Mapping[str, Any]], named: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return one entry per prompt: what its settings share, and the list of its settings."""
    own = ("ratio", "measure", "layer_measures", "budgets", "head_kept", "token_layers")
    prompts: dict[str, dict[str, Any]] = {}
    for row in rows:
        prompt = prompts.setdefault(
            row["prompt"],
            {
                **{key: row[key] for key in ("label", "layer_indices", "head_ranks")},
                "model": name_model(row["model"]),
                "tokens": row["pieces"],
                "settings": [],
            },
        )
        setting = {key: row[key] for key in own}
        setting["method"] = named[row["method"]]
        setting["token_shares"] = [round(share, 3) for share in row["token_shares"]]
        setting["stretch_shares"] = [[round(share, 3) for share in layer] for layer in row["stretch_shares"]]
        prompt["settings"].append(setting)
    return list(prompts.values())


# -- numbers in words -----------------------------------------------------------------------


def _format_share(value: float) -> str:
    return f"{100 * value:.0f} %" if value >= 0.095 else f"{100 * value:.1f} %"


def _format_estimate(estimate: Estimate | None) -> str:
    return "" if estimate is None else f"{estimate.mean:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def _format_signed(estimate: Estimate | None) -> str:
    return "" if estimate is None else f"{estimate.mean:+.3f} [{estimate.low:+.3f}, {estimate.high:+.3f}]"
