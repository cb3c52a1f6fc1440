"""The look all figures share: a colour-blind safe palette, quiet axes, titles that start at the left."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any, Literal

from ..errors import MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Okabe and Ito's palette, without the yellow that vanishes on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#5F5F5F", "#000000")
INK, QUIET, GRID = "#222222", "#666666", "#E3E3E3"


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of so many inches that belongs to no window and to no global state.

    Raises
    ------
    MissingDependencyError
        If matplotlib is not installed; the message is the command that installs it.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingDependencyError(
            'figures need matplotlib, which is not installed: pip install "rankkv[plots]"'
        )
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def style_axes(axes: Axes, grid: Literal["x", "y"] = "y") -> None:
    """Leave of the axes what helps to read a value, with grid lines behind the data along ``grid``."""
    for side in ("top", "right", "left" if grid == "y" else "bottom"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom" if grid == "y" else "left"].set_color(QUIET)
    axes.tick_params(colors=INK, labelsize=9, length=0)
    axes.grid(True, axis=grid, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    if grid == "y":
        axes.yaxis.set_major_formatter("{x:,.0f}")


def style_layer_axis(
    axes: Axes, layer_indices: list[int], label: str | None = "Layer", most_ticks: int = 15
) -> None:
    """Let the x axis run over the layers: whole numbers only, as many ticks as stay apart."""
    first, last = min(layer_indices), max(layer_indices)
    step = next(size for size in (1, 2, 5, 10, 20, 50, 100, 1000) if (last - first) / size <= most_ticks)
    axes.set_xticks([tick for tick in range(0, last + 1, step) if tick >= first])
    axes.set_xlim(first - 0.8, last + 0.8)
    if label:
        axes.set_xlabel(label, color=INK)


def shorten(name: str, longest: int = 48) -> str:
    """Return a name that fits a title; of a long path the end says more than the start."""
    return name if len(name) <= longest else "…" + name[1 - longest :]


def set_title(figure: Figure, title: str, subtitle: str = "") -> None:
    """Put a title, and under it a quieter line, at the figure's left edge, as large as they fit."""
    heading: dict[str, Any] = {"x": 0.01, "ha": "left", "color": INK, "fontweight": "bold"}
    # A second, empty line of the title keeps the room for the subtitle.
    texts = [figure.suptitle(f"{title}\n" if subtitle else title, fontsize=12, **heading)]
    if subtitle:
        below = 1 - 0.28 / figure.get_size_inches()[1]
        texts.append(figure.text(0.01, below, subtitle, ha="left", va="top", fontsize=9.5, color=QUIET))
    for text in texts:
        too_wide = text.get_window_extent().width / (0.97 * figure.bbox.width)
        if too_wide > 1:
            text.set_fontsize(float(text.get_fontsize()) / too_wide)
