"""Figures for papers, of the data that the page shows."""

from __future__ import annotations

from pathlib import Path

from ..plots import (
    name_methods,
    plot_kept_stretches,
    plot_quality,
    plot_recall_grids,
    plot_strategy_budgets,
    save_figure,
)
from ..plots.style import format_share
from .collect import ReportData
from .page import describe_axis
from .tables import summarize_quality


def write_figures(data: ReportData, folder: str | Path, prefix: str = "") -> list[Path]:
    """Draw quality, facts found, budgets and kept stretches, as far as the data has them, as PNG and PDF.

    Parameters
    ----------
    data : ReportData
        From :func:`rankkv.report.collect_results`.
    folder : str or Path
        Folder of the figures.
    prefix : str, default ""
        Beginning of their names.

    Returns
    -------
    list of Path
        The files written.

    Raises
    ------
    MissingDependencyError
        If matplotlib is not installed.
    InputError
        If the folder cannot be written to.
    """
    written: list[Path] = []
    folder = Path(folder)

    def save(figure: object, name: str) -> None:
        written.extend(save_figure(figure, folder / f"{prefix}{name}"))  # type: ignore[arg-type]

    tasks = summarize_quality(data.rows)
    methods = [name for task in tasks for name in task.curves] + [row["method"] for row in data.kept_maps]
    named = name_methods(methods)
    if tasks:
        save(
            plot_quality(
                {
                    f"{task.title}\n{describe_axis(task)}": {
                        named[name]: [(point.kept, task.pick(point)) for point in points]
                        for name, points in task.curves.items()
                    }
                    for task in tasks
                },
                [task.full_level for task in tasks],
            ),
            "quality",
        )
    for number, task in enumerate(task for task in tasks if task.grids):
        panels = {
            f"{named.get(method, method)}, {format_share(ratio)}" if ratio < 1.0 else "Full cache": grid
            for ratio in sorted({ratio for ratios in task.grids.values() for ratio in ratios})
            for method, ratios in task.grids.items()
            if (grid := ratios.get(ratio)) is not None
        }
        save(
            plot_recall_grids(panels, f"Facts found by depth, length and share kept\n{task.title}"),
            f"facts_{number}" if number else "facts",
        )
    if data.kept_maps:
        first = [row for row in data.kept_maps if row["prompt"] == data.kept_maps[0]["prompt"]]
        smallest = min(row["ratio"] for row in first)
        maps = {named[row["method"]]: row for row in first if row["ratio"] == smallest}
        layers = next(iter(maps.values()))["layer_indices"]
        title = f"one prompt of {len(first[0]['pieces']):,} tokens, {format_share(smallest)} kept"
        budgets = {name: row["budgets"] for name, row in maps.items()}
        save(plot_strategy_budgets(budgets, layers, title=f"Budget of each layer\n{title}"), "budgets")
        shares = {name: row["stretch_shares"] for name, row in maps.items()}
        save(plot_kept_stretches(shares, layers, title=f"Tokens kept by each layer\n{title}"), "kept")
    return written
