"""The figures: rank and budget per layer, ranks over samples, budgets by strategy, caches side by side."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .style import INK, PALETTE, QUIET, new_figure, set_title, shorten, style_axes, style_layer_axis

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..pipeline import RankKVResult

_FORMATS = (".png", ".pdf")


def save_figure(figure: Figure, stem: str | Path) -> list[Path]:
    """Write a figure as PNG (150 dpi) and PDF, each atomically.

    Parameters
    ----------
    figure : Figure
        What to write.
    stem : str or Path
        Path without its ending; ``results/rank`` gives ``results/rank.png`` and ``results/rank.pdf``.  A path
        that ends in ``.png`` or ``.pdf`` gives that one file.

    Returns
    -------
    list of Path
        The files written.

    Raises
    ------
    InputError
        If the place cannot be written to.
    """
    stem = Path(stem)
    if stem.suffix.lower() in _FORMATS:
        paths = [stem]
    else:
        # Not `with_suffix`: a stem such as "rank_0.3" has no ending to replace.
        paths = [stem.with_name(stem.name + suffix) for suffix in _FORMATS]
    for path in paths:
        try:
            _write(figure, path)
        except OSError as error:
            raise InputError(f"cannot write the figure {str(path)!r}: {error.strerror or error}.") from error
    return paths


def _write(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    # Without dates in them two runs that draw the same write the same bytes.
    metadata = {"CreationDate": None} if path.suffix.lower() == ".pdf" else {}
    try:
        with os.fdopen(handle, "wb") as file:
            figure.savefig(file, format=path.suffix[1:].lower(), dpi=150, metadata=metadata)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def plot_ranks_and_budgets(result: RankKVResult, path: str | Path | None = None) -> Figure:
    """Draw the effective rank and the budget of every layer, one above the other.

    Parameters
    ----------
    result : RankKVResult
        Of one prompt.
    path : str or Path, optional
        Where to save it too; see :func:`save_figure`.

    Returns
    -------
    Figure
        Two axes, one bar a layer in each; the dashed line is what every layer would keep uniformly.

    Raises
    ------
    MissingDependencyError
        If matplotlib is not installed.
    InputError
        If ``path`` cannot be written.
    """
    figure = new_figure(7.5, 5.2)
    upper, lower = figure.subplots(2, 1, sharex=True)
    layers = result.layer_indices
    if result.layer_ranks:
        upper.bar(layers, result.layer_ranks, color=PALETTE[0], width=0.72)
    upper.set_ylabel("Effective rank", color=INK)
    lower.bar(layers, result.budgets, color=PALETTE[1], width=0.72)
    lower.set_ylabel("Budget (tokens)", color=INK)
    average = sum(result.budgets) / len(result.budgets)
    _mark_average(lower, average, max(layers), f"uniform\n{average:,.0f}")
    for axes in (upper, lower):
        style_axes(axes)
    style_layer_axis(upper, layers, None)
    style_layer_axis(lower, layers)
    figure.align_ylabels()
    set_title(
        figure,
        f"Rank and budget of each layer: {shorten(result.model_name)}",
        f"{result.seq_len:,} tokens, {result.compression_ratio:.0%} of the cache kept, "
        f"{_describe(result.strategy, result.strategy_options)}, {result.scope} attention",
    )
    return _finish(figure, path)


def plot_layer_ranks(
    mean: Sequence[float],
    std: Sequence[float],
    layer_indices: Sequence[int],
    path: str | Path | None = None,
    title: str | None = None,
) -> Figure:
    """Draw the mean rank of every layer over samples, with one standard deviation to both sides.

    Parameters
    ----------
    mean, std : sequence of float
        ``[layer]`` mean and standard deviation of the effective rank.
    layer_indices : sequence of int
        ``[layer]`` model indices.
    path : str or Path, optional
        Where to save it too; see :func:`save_figure`.
    title : str, optional
        Title; a second line of it is set smaller.

    Returns
    -------
    Figure

    Raises
    ------
    InputError
        If the lengths differ, or ``path`` cannot be written.
    MissingDependencyError
        If matplotlib is not installed.
    """
    _check_lengths(layer_indices, mean=mean, std=std)
    figure = new_figure(7.5, 3.9)
    axes = figure.subplots()
    axes.errorbar(
        layer_indices,
        mean,
        yerr=std,
        color=PALETTE[0],
        marker="o",
        markersize=4.5,
        linewidth=1.4,
        elinewidth=1.2,
        capsize=3,
        ecolor=PALETTE[4],
    )
    axes.set_ylabel("Effective rank", color=INK)
    axes.set_ylim(bottom=0)
    style_axes(axes)
    style_layer_axis(axes, list(layer_indices))
    heading, _, subtitle = (title or "Effective rank of each layer\nmean and standard deviation").partition(
        "\n"
    )
    set_title(figure, heading, subtitle)
    return _finish(figure, path)


def plot_strategy_budgets(
    budgets_by_strategy: Mapping[str, Sequence[float]],
    layer_indices: Sequence[int],
    path: str | Path | None = None,
    title: str | None = None,
) -> Figure:
    """Draw the budgets of every strategy, one small chart each, all on the same axes.

    Parameters
    ----------
    budgets_by_strategy : mapping
        Label of each strategy to its ``[layer]`` budgets in tokens.
    layer_indices : sequence of int
        ``[layer]`` model indices.
    path : str or Path, optional
        Where to save it too; see :func:`save_figure`.
    title : str, optional
        Title; a second line of it is set smaller.

    Returns
    -------
    Figure
        One axes a strategy, in the mapping's order, with one bar a layer.

    Raises
    ------
    InputError
        If there is no strategy, the lengths differ, or ``path`` cannot be written.
    MissingDependencyError
        If matplotlib is not installed.
    """
    if not budgets_by_strategy:
        raise InputError("budgets_by_strategy is empty: give the budgets of at least one strategy.")
    _check_lengths(layer_indices, **budgets_by_strategy)
    columns = min(3, len(budgets_by_strategy))
    rows = math.ceil(len(budgets_by_strategy) / columns)
    figure = new_figure(max(5.0, 3.2 * columns), 0.9 + 2.1 * rows)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    panels = list(grid.flat)
    for place, (axes, (label, budgets)) in enumerate(zip(panels, budgets_by_strategy.items(), strict=False)):
        axes.bar(layer_indices, budgets, color=PALETTE[place % len(PALETTE)], width=0.78)
        axes.axhline(sum(budgets) / len(budgets), color=INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_title(label, loc="left", fontsize=10, color=INK)
        style_axes(axes)
        is_lowest = place + columns >= len(budgets_by_strategy)
        style_layer_axis(axes, list(layer_indices), "Layer" if is_lowest else None, most_ticks=8)
        axes.tick_params(labelbottom=is_lowest)
    for axes in panels[len(budgets_by_strategy) :]:
        axes.set_visible(False)
    for row in grid:
        row[0].set_ylabel("Budget (tokens)", color=INK)
    default = "Budget of each layer by strategy\nsame total for all; the dashed line is the average"
    heading, _, subtitle = (title or default).partition("\n")
    set_title(figure, heading, subtitle)
    return _finish(figure, path)


def plot_cache_comparison(runs: Sequence[Mapping[str, Any]], path: str | Path | None = None) -> Figure:
    """Draw memory and times of the same generation with several caches.

    Parameters
    ----------
    runs : sequence of mapping
        Each with ``name``, ``cache_bytes``, ``ttft_seconds`` and ``tpot_seconds``, as
        :class:`~rankkv.analysis.generation.GenerationRecord` counts them.
    path : str or Path, optional
        Where to save it too; see :func:`save_figure`.

    Returns
    -------
    Figure
        Three axes (megabytes, seconds, milliseconds), one bar a run in each.

    Raises
    ------
    InputError
        If there is no run, or ``path`` cannot be written.
    MissingDependencyError
        If matplotlib is not installed.
    """
    if not runs:
        raise InputError("runs is empty: give the record of at least one generation.")
    panels = (
        ("KV cache (MB)", "cache_bytes", 1e-6, "{:.1f}"),
        ("Time to first token (s)", "ttft_seconds", 1.0, "{:.2f}"),
        ("Time per output token (ms)", "tpot_seconds", 1e3, "{:.0f}"),
    )
    figure = new_figure(9.0, 0.9 + 0.42 * len(runs))
    names = [str(run["name"]) for run in runs]
    colors = [PALETTE[(6, 4, 1)[i] if i < 3 else i % len(PALETTE)] for i in range(len(runs))]
    for axes, (label, key, factor, form) in zip(figure.subplots(1, 3, sharey=True), panels, strict=True):
        values = [run[key] * factor for run in runs]
        bars = axes.barh(names, values, color=colors, height=0.62)
        axes.bar_label(bars, [form.format(value) for value in values], padding=4, fontsize=9, color=INK)
        axes.set_title(label, loc="left", fontsize=10, color=INK)
        style_axes(axes, grid="x")
        axes.grid(False)
        axes.set_xticks([])
        axes.set_xlim(0, max(*values, 1e-9) * 1.22)
    axes.invert_yaxis()
    return _finish(figure, path)


def _mark_average(axes: Any, average: float, last: int, label: str) -> None:
    axes.axhline(average, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        label,
        (last + 0.8, average),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
        color=QUIET,
        annotation_clip=False,
    )


def _describe(strategy: str, options: Mapping[str, Any]) -> str:
    listed = ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in options.items()
    )
    return f"strategy {strategy} ({listed})" if listed else f"strategy {strategy}"


def _check_lengths(layer_indices: Sequence[int], **series: Sequence[float]) -> None:
    for name, values in series.items():
        if len(values) != len(layer_indices):
            raise InputError(
                f"{name} has {len(values)} values for {len(layer_indices)} layers; give one a layer."
            )


def _finish(figure: Figure, path: str | Path | None) -> Figure:
    if path is not None:
        save_figure(figure, path)
    return figure
