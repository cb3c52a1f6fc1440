"""Quality against time per output token and against bytes, as one figure (``make bench-quality``).

python -m benchmarks.quality_speed --samples 2 --context 2048

How much worse the continuation of a few stretches of the embedded text is predicted from a compressed cache than from
the whole one, beside the CPU time of a decode step and the bytes of keys and values. A figure to see the trade on, not
a comparison of methods: for that, ``experiments/allocation_ablation.py`` scores many texts.
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
from rankkv.models.texts import python_docs_text
from rankkv.plots import save_figure
from rankkv.plots.style import INK, PALETTE, new_figure, set_title, style_axes
from rankkv.utils.files import write_text_atomically

#: Ways to spread the budget, by the name in the legend.
WAYS: dict[str, dict[str, Any]] = {
    "uniform": {"strategy": "uniform"},
    "default (no profile)": {"profile": None},
    "auto (shipped profile)": {},
}


def main() -> None:
    """Measure, write the rows, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--samples", type=int, default=4, help="stretches of the embedded text")
    parser.add_argument("--context", type=int, default=2048, help="tokens that are compressed")
    parser.add_argument("--continuation", type=int, default=128, help="tokens that follow and are scored")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.3, 1.0])
    parser.add_argument("--steps", type=int, default=12, help="decode steps of each cache in each stretch")
    parser.add_argument("--output_dir", type=Path, default=Path("results"))
    options = parser.parse_args()
    model, tokenizer = load_model(options.model)
    found = measure(model, tokenizer, options)
    record = {"machine": describe_machine(), "settings": describe(options), "rows": found}
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
    for path in draw(found, record["settings"], options.output_dir / "figures" / "quality_speed"):
        Console(stderr=True).print(path)


def describe(options: argparse.Namespace) -> dict[str, Any]:
    """What the numbers hold for."""
    names = ("model", "samples", "context", "continuation", "ratios", "steps")
    return {"text": "python-docs", **{name: getattr(options, name) for name in names}}


def measure(model: Any, tokenizer: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a way and ratio: means over the stretches."""
    cells = {
        f"{way}|{ratio:g}": {**settings, "compression_ratio": ratio}
        for way, settings in WAYS.items()
        for ratio in options.ratios
    }
    excess: dict[str, list[float]] = {cell: [] for cell in cells}
    ratios: dict[str, list[float]] = {cell: [] for cell in cells}
    held: dict[str, list[int]] = {cell: [] for cell in ["full", *cells]}
    size = options.context + options.continuation
    ids = tokenizer(python_docs_text(), return_tensors="pt", verbose=False).input_ids
    if ids.shape[1] < options.samples * size:
        raise SystemExit(f"the embedded text has {ids.shape[1]} tokens: lower --samples or --context")
    for sample in range(options.samples):
        start = sample * (ids.shape[1] // options.samples)
        record = record_prefill(model, ids[:, start : start + options.context])
        scores = dict(evaluate_continuation(record, ids[:, start + options.context : start + size], cells))
        for cell in cells:
            excess[cell].append(scores[cell].loss - scores["full"].loss)
        for cell, score in scores.items():
            held[cell].append(score.cache_bytes)
        # All caches of one stretch, a step of each in turn.
        caches = {cell: record.build_cache(**settings) for cell, settings in cells.items()}
        steps = {
            cell: Step(model, cache, options.context)
            for cell, cache in {"full": record.build_full_cache(), **caches}.items()
        }
        _, cpu = time_in_turn(steps, options.steps)
        for cell in cells:
            ratios[cell].append(
                median(ours / plain for ours, plain in zip(cpu[cell], cpu["full"], strict=True))
            )
    full_bytes = fmean(held["full"])
    return [
        {
            "way": cell.split("|")[0],
            "compression_ratio": settings["compression_ratio"],
            "excess_loss": fmean(excess[cell]),
            "excess_losses": excess[cell],
            "tpot_cpu_ratio": fmean(ratios[cell]),
            "tpot_cpu_ratios": ratios[cell],
            "cache_bytes": fmean(held[cell]),
            "full_cache_bytes": full_bytes,
        }
        for cell, settings in cells.items()
    ]


def draw(rows: list[dict[str, Any]], settings: dict[str, Any], stem: Path) -> list[Path]:
    """Excess loss against the time of a step and against bytes, a line a way, a point a share kept."""
    figure = new_figure(9.6, 4.3)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, key, scale, label in (
        (panels[0], "tpot_cpu_ratio", 1.0, "CPU time of a decode step over plain"),
        (panels[1], "cache_bytes", 1e-6, "keys and values, MB"),
    ):
        style_axes(axes)
        axes.yaxis.set_major_formatter("{x:.2f}")
        for number, way in enumerate(WAYS):
            points = [row for row in rows if row["way"] == way]
            x, y = [row[key] * scale for row in points], [row["excess_loss"] for row in points]
            axes.plot(x, y, color=PALETTE[number], marker="osD"[number], markersize=5, label=way)
            if not number:
                for row, across, up in zip(points, x, y, strict=True):
                    axes.annotate(
                        f"{row['compression_ratio']:.0%}",
                        (across, up),
                        xytext=(5, 5),
                        textcoords="offset points",
                        fontsize=8,
                        color=INK,
                    )
        axes.set_xlabel(label, color=INK)
    panels[0].set_ylabel("excess loss, nats a token", color=INK)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    set_title(
        figure,
        "What a smaller cache costs and saves",
        f"{settings['samples']} stretches of {settings['context']:,} tokens of {settings['text']}, next "
        f"{settings['continuation']} scored: few texts, an illustration",
    )
    return save_figure(figure, stem)


if __name__ == "__main__":
    main()
