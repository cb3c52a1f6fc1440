"""Figures of evaluations: quality against the share kept, facts found by depth and length, where tokens are kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import InputError
from .style import INK, PALETTE, QUIET, new_figure, set_title, style_axes

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
    curves: Mapping[str, Mapping[str, Sequence[tuple[float, Interval]]]], full: Sequence[float | None] = ()
) -> Figure:
    """Draw quality against the share of the cache kept, one panel a task, one line a method.

    Parameters
    ----------
    curves : mapping
        Title of a panel (a second line of it is set below) to method to pairs of the share kept and the score.
    full : sequence of float or None
        Score of the full cache in each panel.

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
    figure = new_figure(1.0 + 4.6 * columns, 0.6 + 3.3 * rows)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    methods = list(dict.fromkeys(name for lines in curves.values() for name in lines))
    for place, (title, lines) in enumerate(curves.items()):
        axes = panels[place]
        style_axes(axes)
        axes.yaxis.set_major_formatter("{x:.3g}")
        for name, points in lines.items():
            number = methods.index(name)
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
            axes.axhline(full[place], color=QUIET, linewidth=1, linestyle=(0, (4, 3)), label="full cache")
        ticks = sorted({round(kept, 3) for points in lines.values() for kept, _ in points})
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{tick:.0%}" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("share of the KV cache kept", color=INK)
        heading, _, below = title.partition("\n")
        axes.set_title(f"{heading}\n{below}" if below else heading, loc="left", fontsize=9.5, color=INK)
    for axes in panels[len(curves) :]:
        axes.set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False, fontsize=9
    )
    return figure


def plot_recall_grids(grids: Mapping[str, Mapping[tuple[float, int], float]], title: str) -> Figure:
    """Draw the share of facts found by depth and context length, one small map a setting.

    Parameters
    ----------
    grids : mapping
        Title of a panel to ``(depth, length)`` to a share in [0, 1].
    title : str
        Of the figure.

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
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        return image

    return _draw_maps(grids, draw, title, "context, tokens", "depth", "found")


def plot_kept_stretches(
    shares: Mapping[str, Sequence[Sequence[float]]], layer_indices: Sequence[int], title: str
) -> Figure:
    """Draw which share of each stretch of a prompt each layer keeps, one map a method.

    Parameters
    ----------
    shares : mapping
        Method to ``[layer][stretch]`` in [0, 1].
    layer_indices : sequence of int
        ``[layer]`` model indices.
    title : str
        Title; a second line of it is set smaller.

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

    return _draw_maps(shares, draw, title, "place in the prompt, %", "layer", "share kept")


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
    heading, _, subtitle = title.partition("\n")
    set_title(figure, heading, subtitle)
    return figure
