"""Figures of evaluations: quality by share kept, pairs of methods, facts by depth and length, kept tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import InputError
from .style import (
    GRID,
    INK,
    PALETTE,
    QUIET,
    choose_ink,
    new_figure,
    set_title,
    style_axes,
    style_share_axis,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKERS = "osD^Pv*X"


class Interval(Protocol):
    """A mean with its bounds."""

    @property
    def mean(self) -> float:
        """The mean."""

    @property
    def low(self) -> float:
        """Lower bound."""

    @property
    def high(self) -> float:
        """Upper bound."""


def plot_quality(
    curves: Mapping[str, Mapping[str, Sequence[tuple[float, Interval]]]],
    full: Sequence[float | None] = (),
    title: str = "",
    share_axis: bool = False,
) -> Figure:
    """Draw quality against the share of the cache kept, one panel per task, one line per method.

    Parameters
    ----------
    curves : mapping
        Title of a panel (its second line is set below) to method to pairs of the share kept and the score.
    full : sequence of float or None
        Score of the full cache in each panel.
    title : str, default ""
        Title of the figure; its second line is set smaller.
    share_axis : bool, default False
        Whether all panels have the same scores on their y axis.

    Returns
    -------
    Figure

    Raises
    ------
    InputError
        If there is no panel.
    MissingDependencyError
        If matplotlib is not installed.
    """
    if not curves:
        raise InputError("curves is empty: give at least one task.")
    columns = min(2, len(curves))
    rows = math.ceil(len(curves) / columns)
    figure = new_figure(1.0 + 4.3 * columns, 0.6 + 3.1 * rows + (0.5 if title else 0))
    panels = list(figure.subplots(rows, columns, squeeze=False, sharey=share_axis).flat)
    methods = list(dict.fromkeys(name for lines in curves.values() for name in lines))
    for place, (heading, lines) in enumerate(curves.items()):
        axes = panels[place]
        style_axes(axes)
        for name, points in lines.items():
            number = methods.index(name)
            # Methods stand a little apart, so that their intervals at one share can be told apart.
            shift = 1 + 0.018 * (number - (len(methods) - 1) / 2)
            axes.errorbar(
                [kept * shift for kept, _ in points],
                [score.mean for _, score in points],
                yerr=[
                    [score.mean - score.low for _, score in points],
                    [score.high - score.mean for _, score in points],
                ],
                label=name,
                color=PALETTE[number % len(PALETTE)],
                marker=_MARKERS[number % len(_MARKERS)],
                markersize=5,
                linewidth=1.6,
                elinewidth=1.0,
                capsize=2.5,
            )
        if place < len(full) and full[place] is not None:
            axes.axhline(full[place], color=QUIET, linewidth=1, linestyle=(0, (4, 3)), label="Full cache")
        shares = {round(kept, 3) for points in lines.values() for kept, _ in points}
        if shares:
            style_share_axis(axes, sorted(shares))
        above, _, below = heading.partition("\n")
        axes.set_title(f"{above}\n{below}" if below else above, loc="left", fontsize=9.5, color=INK)
    for axes in panels[len(curves) :]:
        axes.set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(4, len(labels)),
        frameon=False,
        fontsize=9,
        labelcolor=INK,
    )
    if title:
        above, _, below = title.partition("\n")
        set_title(figure, above, below)
    return figure


def plot_pairs(
    panels: Mapping[str, Mapping[str, Mapping[str, Interval]]],
    title: str,
    full: Mapping[str, float] | None = None,
) -> Figure:
    """Draw a few methods beside each other on every line of a list, one panel per measure, with intervals.

    Parameters
    ----------
    panels : mapping
        Title of a panel to line to method to its score.
    title : str
        Title of the figure; its second line is set smaller.
    full : mapping, optional
        Title of a panel to the score of the full cache.

    Returns
    -------
    Figure
        One axes per panel; the lines run down in the order of the first panel.

    Raises
    ------
    InputError
        If there is no panel, or the panels have different lines.
    MissingDependencyError
        If matplotlib is not installed.
    """
    if not panels or len({tuple(lines) for lines in panels.values()}) != 1:
        raise InputError(
            "panels must have at least one panel, and all panels the same lines in the same order."
        )
    names = list(next(iter(panels.values())))
    methods = list(dict.fromkeys(name for lines in panels.values() for own in lines.values() for name in own))
    figure = new_figure(1.6 + 3.6 * len(panels), 1.5 + 0.3 * len(names))
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (heading, lines) in zip(grid, panels.items(), strict=True):
        style_axes(axes, grid="x")
        for number, method in enumerate(methods):
            own = [(line, lines[name][method]) for line, name in enumerate(names) if method in lines[name]]
            shift = 0.24 * (number - (len(methods) - 1) / 2)
            axes.errorbar(
                [score.mean for _, score in own],
                [line + shift for line, _ in own],
                xerr=[
                    [score.mean - score.low for _, score in own],
                    [score.high - score.mean for _, score in own],
                ],
                label=method,
                color=PALETTE[number % len(PALETTE)],
                marker=_MARKERS[number % len(_MARKERS)],
                markersize=4.5,
                linestyle="none",
                elinewidth=1.1,
                capsize=2,
            )
        if full and heading in full:
            axes.axvline(full[heading], color=QUIET, linewidth=1, linestyle=(0, (4, 3)), label="Full cache")
        for line in range(1, len(names)):
            axes.axhline(line - 0.5, color=GRID, linewidth=0.6)
        axes.set_title(heading, loc="left", fontsize=9.5, color=INK)
        axes.set_yticks(range(len(names)), names)
    grid[0].set_ylim(len(names) - 0.5, -0.5)
    handles = {
        label: handle
        for axes in grid
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=min(4, max(1, len(handles))),
        frameon=False,
        fontsize=9,
        labelcolor=INK,
    )
    above, _, below = title.partition("\n")
    set_title(figure, above, below)
    return figure


def plot_recall_grids(grids: Mapping[str, Mapping[tuple[float, int], float]], title: str) -> Figure:
    """Draw the share of facts found by depth and context length, one small map per setting.

    Parameters
    ----------
    grids : mapping
        Title of a panel to ``(depth, length)`` to a share in [0, 1].
    title : str
        Title; its second line is set smaller.

    Returns
    -------
    Figure

    Raises
    ------
    InputError
        If there is no panel.
    MissingDependencyError
        If matplotlib is not installed.
    """
    if not grids:
        raise InputError("grids is empty: give at least one setting.")
    depths = sorted({depth for cells in grids.values() for depth, _ in cells})
    lengths = sorted({length for cells in grids.values() for _, length in cells})

    def draw(axes: Any, cells: Mapping[tuple[float, int], float]) -> Any:
        values = [[cells.get((depth, length), math.nan) for length in lengths] for depth in depths]
        image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                if not math.isnan(value):
                    ink = choose_ink(*image.cmap(image.norm(value)))
                    axes.text(x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color=ink)
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths])
        return image

    return _draw_maps(grids, draw, title, "Context, tokens", "Depth", "Found, %")


def plot_kept_stretches(
    shares: Mapping[str, Sequence[Sequence[float]]], layer_indices: Sequence[int], title: str
) -> Figure:
    """Draw the share of every stretch of a prompt that each layer keeps, one map per method.

    Parameters
    ----------
    shares : mapping
        Method to ``[layer][stretch]`` in [0, 1].
    layer_indices : sequence of int
        ``[layer]`` model indices.
    title : str
        Title; its second line is set smaller.

    Returns
    -------
    Figure

    Raises
    ------
    InputError
        If there is no method, or the layers differ.
    MissingDependencyError
        If matplotlib is not installed.
    """
    if not shares or any(len(rows) != len(layer_indices) for rows in shares.values()):
        raise InputError(f"shares must have at least one method, each with {len(layer_indices)} layers.")
    edge = (0.0, 100.0, max(layer_indices) + 0.5, min(layer_indices) - 0.5)

    def draw(axes: Any, rows: Sequence[Sequence[float]]) -> Any:
        return axes.imshow(
            rows, vmin=0, vmax=1, cmap="viridis", aspect="auto", extent=edge, interpolation="nearest"
        )

    return _draw_maps(shares, draw, title, "Place in the prompt, %", "Layer", "Kept, %")


def _draw_maps(
    panels: Mapping[str, Any], draw: Any, title: str, x_label: str, y_label: str, bar_label: str
) -> Figure:
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(1.4 + 2.7 * columns, 1.0 + 2.1 * rows)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    flat, image = list(grid.flat), None
    for axes, (name, values) in zip(flat, panels.items(), strict=False):
        image = draw(axes, values)
        axes.set_title(name, loc="left", fontsize=9, color=INK)
        axes.tick_params(colors=INK, labelsize=8, length=0)
        for side in axes.spines.values():
            side.set_visible(False)
    for axes in flat[len(panels) :]:
        axes.set_visible(False)
    for place, axes in enumerate(flat[: len(panels)]):
        if place + columns >= len(panels):
            axes.set_xlabel(x_label, color=INK, fontsize=9)
            axes.tick_params(labelbottom=True)
    for row in grid:
        row[0].set_ylabel(y_label, color=INK, fontsize=9)
    bar = figure.colorbar(image, ax=flat, shrink=0.8, pad=0.02)  # type: ignore[arg-type]
    bar.outline.set_visible(False)
    bar.set_label(bar_label, color=INK, fontsize=9)
    bar.set_ticks([0, 0.25, 0.5, 0.75, 1], labels=["0", "25", "50", "75", "100"])
    bar.ax.tick_params(colors=INK, labelsize=8)
    heading, _, subtitle = title.partition("\n")
    set_title(figure, heading, subtitle)
    return figure
