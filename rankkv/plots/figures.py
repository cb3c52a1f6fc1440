"""Figures of ranks, budgets, memory and times, and the files they are written to."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import InputError
from ..utils.files import replace_atomically
from .names import name_budgets, name_model
from .style import (
    INK,
    PALETTE,
    QUIET,
    format_share,
    new_figure,
    set_title,
    shorten,
    style_axes,
    style_layer_axis,
    use_dark_colours,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FORMATS = (".png", ".pdf")
_DOTS_PER_INCH = 150


class LayerBudgets(Protocol):
    """Ranks and budgets of one prompt, as :class:`rankkv.RankKVResult` holds them."""

    @property
    def layer_indices(self) -> list[int]:
        """``[layer]`` model indices."""

    @property
    def layer_ranks(self) -> list[float]:
        """``[layer]`` effective ranks; empty if none were measured."""

    @property
    def budgets(self) -> list[int]:
        """``[layer]`` tokens kept."""

    @property
    def seq_len(self) -> int:
        """Tokens of the prompt."""

    @property
    def compression_ratio(self) -> float:
        """Fraction of the cache kept, in (0, 1]."""

    @property
    def strategy(self) -> str:
        """Budget strategy."""

    @property
    def strategy_options(self) -> dict[str, Any]:
        """Options of the strategy."""

    @property
    def scope(self) -> str:
        """Part of the attention that was ranked."""

    @property
    def model_name(self) -> str | None:
        """Name of the model."""


def save_figure(figure: Figure, stem: str | Path) -> list[Path]:
    """Write a figure as PNG for light and for dark pages, and as PDF, each file atomically.

    Parameters
    ----------
    figure : Figure
        Drawn by a function of this package.
    stem : str or Path
        Path without its ending.  ``results/rank`` gives ``results/rank.png`` on white, ``results/rank-dark.png`` in
        light ink on a transparent ground, and ``results/rank.pdf``.  A path that ends in ``.png`` or ``.pdf`` gives
        that one file.  PNG files have 150 dots per inch and at most 256 colours.

    Returns
    -------
    list of Path
        The files written.

    Raises
    ------
    OutputError
        If a file cannot be written.
    """
    stem = Path(stem)
    if stem.suffix.lower() in _FORMATS:
        paths = [stem]
    else:
        # Not `with_suffix`: a stem such as "rank_0.3" has no ending to replace.
        paths = [stem.with_name(stem.name + suffix) for suffix in (".png", "-dark.png", ".pdf")]
    for path in paths:
        if path.name == f"{stem.name}-dark.png":
            with use_dark_colours(figure):
                content = _draw_png(figure, transparent=True)
        else:
            content = _draw_pdf(figure) if path.suffix.lower() == ".pdf" else _draw_png(figure)
        with replace_atomically(path) as temporary:
            temporary.write_bytes(content)
    return paths


def _draw_pdf(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # Without a date in it, the same figure gives the same bytes.
    figure.savefig(buffer, format="pdf", metadata={"CreationDate": None})
    return buffer.getvalue()


def _draw_png(figure: Figure, transparent: bool = False) -> bytes:
    from PIL import Image

    raw, small = io.BytesIO(), io.BytesIO()
    figure.savefig(raw, format="png", dpi=_DOTS_PER_INCH, transparent=transparent)
    # A palette of 256 colours makes the file three times smaller. Only the octree method knows transparency.
    method = Image.Quantize.FASTOCTREE if transparent else Image.Quantize.MEDIANCUT
    image = Image.open(raw).convert("RGBA" if transparent else "RGB")
    image = image.quantize(256, method=method, dither=Image.Dither.NONE)
    image.save(small, format="PNG", optimize=True, dpi=(_DOTS_PER_INCH, _DOTS_PER_INCH))
    return small.getvalue()


def plot_ranks_and_budgets(result: LayerBudgets, path: str | Path | None = None) -> Figure:
    """Draw the effective rank and the budget of every layer, one above the other.

    Parameters
    ----------
    result : LayerBudgets
        Ranks and budgets of one prompt, such as a :class:`rankkv.RankKVResult`.
    path : str or Path, optional
        Where to save the figure; see :func:`save_figure`.

    Returns
    -------
    Figure
        Two axes with one bar per layer.  The dashed line is the uniform budget.

    Raises
    ------
    MissingDependencyError
        If matplotlib is not installed.
    OutputError
        If ``path`` cannot be written.
    """
    figure = new_figure(7.5, 5.2)
    upper, lower = figure.subplots(2, 1, sharex=True)
    layers = list(result.layer_indices)
    if result.layer_ranks:
        upper.bar(layers, result.layer_ranks, color=PALETTE[0], width=0.72)
    upper.set_ylabel("Effective rank", color=INK)
    lower.bar(layers, result.budgets, color=PALETTE[1], width=0.72)
    lower.set_ylabel("Budget (tokens)", color=INK)
    average = sum(result.budgets) / len(result.budgets)
    for axes in (upper, lower):
        style_axes(axes)
    _mark_average(lower, average, max(layers), f"uniform\n{average:,.0f}")
    style_layer_axis(upper, layers, None)
    style_layer_axis(lower, layers)
    figure.align_ylabels()
    set_title(
        figure,
        f"Rank and budget of each layer: {shorten(name_model(result.model_name or 'model'))}",
        f"{result.seq_len:,} tokens, {format_share(result.compression_ratio)} of the cache kept, "
        f"budgets: {_describe(result.strategy, result.strategy_options)}, ranks of {result.scope} attention",
    )
    return _finish(figure, path)


def plot_layer_ranks(
    mean: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    layer_indices: Sequence[int],
    path: str | Path | None = None,
    title: str | None = None,
) -> Figure:
    """Draw the mean rank of every layer over samples, with an interval.

    Parameters
    ----------
    mean, low, high : sequence of float
        ``[layer]`` mean of the effective rank, and the bounds of its interval.
    layer_indices : sequence of int
        ``[layer]`` model indices.
    path : str or Path, optional
        Where to save the figure; see :func:`save_figure`.
    title : str, optional
        Title; its second line is set smaller.

    Returns
    -------
    Figure

    Raises
    ------
    InputError
        If the lengths differ, a bound lies on the wrong side of its mean, or ``path`` cannot be written.
    MissingDependencyError
        If matplotlib is not installed.
    """
    _check_lengths(layer_indices, mean=mean, low=low, high=high)
    for layer, *bounds in zip(layer_indices, low, mean, high, strict=True):
        if bounds != sorted(bounds):
            raise InputError(
                f"layer {layer} has the interval [{bounds[0]:g}, {bounds[2]:g}] for a mean of {bounds[1]:g}; "
                "give bounds that hold the mean."
            )
    figure = new_figure(7.5, 3.9)
    axes = figure.subplots()
    axes.errorbar(
        layer_indices,
        mean,
        yerr=[
            [middle - bound for middle, bound in zip(mean, low, strict=True)],
            [bound - middle for middle, bound in zip(mean, high, strict=True)],
        ],
        color=PALETTE[0],
        marker="o",
        markersize=4.5,
        linewidth=1.4,
        elinewidth=1.2,
        capsize=3,
        ecolor=PALETTE[4],
    )
    axes.set_ylabel("Effective rank", color=INK)
    style_axes(axes)
    axes.set_ylim(bottom=0)
    style_layer_axis(axes, list(layer_indices))
    heading, _, subtitle = (title or "Effective rank of each layer\nmean and interval").partition("\n")
    set_title(figure, heading, subtitle)
    return _finish(figure, path)


def plot_strategy_budgets(
    budgets_by_strategy: Mapping[str, Sequence[float]],
    layer_indices: Sequence[int],
    path: str | Path | None = None,
    title: str | None = None,
) -> Figure:
    """Draw the budgets of every strategy, one small chart each, all with the same axes.

    Parameters
    ----------
    budgets_by_strategy : mapping
        Name of each strategy to its ``[layer]`` budgets in tokens.
    layer_indices : sequence of int
        ``[layer]`` model indices.
    path : str or Path, optional
        Where to save the figure; see :func:`save_figure`.
    title : str, optional
        Title; its second line is set smaller.

    Returns
    -------
    Figure
        One axes per strategy, in the mapping's order, with one bar per layer.  The dashed line is the average.

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
    count = len(budgets_by_strategy)
    # Three panels in a row, or four where that leaves fewer of them empty.
    columns = min(count, max((3, 4), key=lambda columns: (-(-count % columns), -columns)))
    rows = math.ceil(len(budgets_by_strategy) / columns)
    figure = new_figure(max(5.0, (3.2 if columns < 4 else 2.8) * columns), 0.9 + 2.1 * rows)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    panels = list(grid.flat)
    for place, (axes, (label, budgets)) in enumerate(zip(panels, budgets_by_strategy.items(), strict=False)):
        axes.bar(layer_indices, budgets, color=PALETTE[1 if "RankKV" in label else 0], width=0.78)
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
    default = "Budget of each layer by strategy\nsame total for all; dashed: average"
    heading, _, subtitle = (title or default).partition("\n")
    set_title(figure, heading, subtitle)
    return _finish(figure, path)


def plot_cache_comparison(runs: Sequence[Mapping[str, Any]], path: str | Path | None = None) -> Figure:
    """Draw memory and times of the same generation with several caches.

    Parameters
    ----------
    runs : sequence of mapping
        Each with ``name``, ``cache_bytes``, ``ttft_seconds`` and ``tpot_seconds``.
    path : str or Path, optional
        Where to save the figure; see :func:`save_figure`.

    Returns
    -------
    Figure
        Three axes (megabytes, seconds, milliseconds) with one bar per run.

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
    named = name_budgets(strategy)
    return f"{named}, {listed}" if listed else named


def _check_lengths(layer_indices: Sequence[int], **series: Sequence[float]) -> None:
    for name, values in series.items():
        if len(values) != len(layer_indices):
            raise InputError(
                f"{name} has {len(values)} values for {len(layer_indices)} layers; give one per layer."
            )


def _finish(figure: Figure, path: str | Path | None) -> Figure:
    if path is not None:
        save_figure(figure, path)
    return figure
