"""Quality, decode time and bytes of a compressed cache, as one record and one figure (``make bench-quality``).

    python -m benchmarks.quality_speed --samples 2 --context 2048

Scores the continuation of a few texts from a compressed cache and from the full one, and times decode steps of each in
turn. The texts are too few to compare methods: ``experiments/allocation_ablation.py`` scores many.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rich.console import Console

from benchmarks.common import describe_machine, print_rows
from benchmarks.stepping import Step, time_in_turn
from rankkv import load_model
from rankkv.evaluation import evaluate_continuation, record_prefill
from rankkv.evaluation.statistics import compute_mean
from rankkv.models.texts import python_docs_text
from rankkv.plots import name_budgets, save_figure
from rankkv.plots.style import (
    INK,
    PALETTE,
    format_share,
    new_figure,
    set_title,
    style_axes,
    style_number_axis,
)
from rankkv.utils.files import write_text_atomically

#: Ways to spread the budget, by their name in the record.
WAYS: dict[str, dict[str, Any]] = {
    "uniform": {"strategy": "uniform"},
    "default (no profile)": {"profile": None},
    "auto (shipped profile)": {},
}
#: The same, by their name in the legend.
NAMES = dict(zip(WAYS, map(name_budgets, ("uniform", "default", "auto")), strict=True))


def main() -> None:
    """Measure, write the record and draw it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--samples", type=int, default=4, help="texts cut from the embedded one")
    parser.add_argument("--context", type=int, default=2048, help="tokens that are compressed")
    parser.add_argument("--continuation", type=int, default=128, help="tokens that follow and are scored")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.3, 1.0])
    parser.add_argument("--steps", type=int, default=12, help="decode steps of each cache in each text")
    parser.add_argument("--output_dir", type=Path, default=Path("results"))
    options = parser.parse_args()
    model, tokenizer = load_model(options.model)
    found = measure(model, tokenizer, options)
    machine = describe_machine()
    record = {"machine": machine, "settings": describe(options), "rows": found}
    write_text_atomically(options.output_dir / "quality_speed.json", json.dumps(record, indent=2) + "\n")
    print_rows(
        "Quality, time and bytes",
        found,
        {
            "way": "{}",
            "compression_ratio": "{:.0%}",
            "excess_loss": "{:.3f}",
            "tpot_cpu_ratio": "{:.3f}",
            "cache_bytes": "{:,.0f}",
        },
    )
    source = f"commit {machine['commit'][:7]}" if machine["commit"] else ""
    for path in draw(found, record["settings"], options.output_dir / "figures" / "quality_speed", source):
        Console(stderr=True).print(path)


def describe(options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of the run."""
    names = ("model", "samples", "context", "continuation", "ratios", "steps")
    return {"text": "python-docs", **{name: getattr(options, name) for name in names}}


def measure(model: Any, tokenizer: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one row per method and ratio: means over the texts."""
    options_of = {
        f"{way}|{ratio:g}": {**settings, "compression_ratio": ratio}
        for way, settings in WAYS.items()
        for ratio in options.ratios
    }
    excess: dict[str, list[float]] = {name: [] for name in options_of}
    ratios: dict[str, list[float]] = {name: [] for name in options_of}
    held: dict[str, list[int]] = {name: [] for name in ["full", *options_of]}
    size = options.context + options.continuation
    ids = tokenizer(python_docs_text(), return_tensors="pt", verbose=False).input_ids
    if ids.shape[1] < options.samples * size:
        raise SystemExit(f"the embedded text has {ids.shape[1]} tokens: lower --samples or --context")
    for sample in range(options.samples):
        start = sample * (ids.shape[1] // options.samples)
        record = record_prefill(model, ids[:, start : start + options.context])
        scores = dict(
            evaluate_continuation(record, ids[:, start + options.context : start + size], options_of)
        )
        for name in options_of:
            excess[name].append(scores[name].loss - scores["full"].loss)
        for name, score in scores.items():
            held[name].append(score.cache_bytes)
        # One step of each cache of a text in turn, so that all see the same load of the machine.
        caches = {name: record.build_cache(**settings) for name, settings in options_of.items()}
        steps = {
            name: Step(model, cache, options.context)
            for name, cache in {"full": record.build_full_cache(), **caches}.items()
        }
        _, cpu = time_in_turn(steps, options.steps)
        for name in options_of:
            ratios[name].append(
                median(ours / plain for ours, plain in zip(cpu[name], cpu["full"], strict=True))
            )
    full_bytes = fmean(held["full"])
    return [
        {
            "way": name.split("|")[0],
            "compression_ratio": settings["compression_ratio"],
            "excess_loss": fmean(excess[name]),
            "excess_losses": excess[name],
            "tpot_cpu_ratio": fmean(ratios[name]),
            "tpot_cpu_ratios": ratios[name],
            "cache_bytes": fmean(held[name]),
            "full_cache_bytes": full_bytes,
        }
        for name, settings in options_of.items()
    ]


def draw(rows: list[dict[str, Any]], settings: dict[str, Any], stem: Path, source: str = "") -> list[Path]:
    """Draw excess loss against step time and bytes: a line per method, a point per share kept, 95 % intervals."""
    figure = new_figure(9.6, 4.5)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, key, scale, label in (
        (panels[0], "tpot_cpu_ratio", 1.0, "CPU time of a decode step, full cache = 1"),
        (panels[1], "cache_bytes", 1e-6, "Keys and values, MB"),
    ):
        style_axes(axes)
        for number, way in enumerate(WAYS):
            points = [row for row in rows if row["way"] == way]
            x, losses = (
                [row[key] * scale for row in points],
                [compute_mean(row["excess_losses"]) for row in points],
            )
            axes.errorbar(
                x,
                [loss.mean for loss in losses],
                yerr=[[loss.mean - loss.low for loss in losses], [loss.high - loss.mean for loss in losses]],
                color=PALETTE[number],
                marker="osD"[number],
                markersize=5,
                elinewidth=1.0,
                capsize=2.5,
                label=NAMES[way],
            )
            if not number:
                for row, across, loss in zip(points, x, losses, strict=True):
                    axes.annotate(
                        format_share(row["compression_ratio"]),
                        (across, loss.mean),
                        xytext=(6, 4),
                        textcoords="offset points",
                        fontsize=8,
                        color=INK,
                    )
        style_number_axis(axes.xaxis)
        axes.set_xlabel(label, color=INK)
    panels[0].set_ylabel("Loss above the full cache's,\nnats per token", color=INK)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9, labelcolor=INK
    )
    below = [
        f"{settings['samples']} texts of {settings['context']:,} tokens of {settings['text']}, next "
        f"{settings['continuation']} scored, 95 % intervals: too few texts to compare methods",
        source,
    ]
    set_title(figure, "Loss, time and memory of a smaller cache", ", ".join(filter(None, below)))
    return save_figure(figure, stem)


if __name__ == "__main__":
    main()
