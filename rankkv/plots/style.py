"""Colours, axes and titles that all figures share, and their dark variant."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from ..errors import MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

#: Colours of methods on a light ground: blue, orange, green and purple first, which differ for colour-blind readers.
PALETTE = ("#0072b2", "#d55e00", "#00875f", "#b5478f", "#2f9bd6", "#b88600", "#5f5f5f", "#7a4fc0")
INK, QUIET, GRID = "#222222", "#666666", "#e3e3e3"
#: Each colour above on a dark ground.
DARK = {
    **dict(
        zip(
            PALETTE,
            ("#56b4e9", "#ff8a3d", "#35c594", "#e08cc0", "#9bd3f5", "#f0c545", "#b5b5b5", "#b79bf0"),
            strict=True,
        )
    ),
    INK: "#e8eaed",
    QUIET: "#a2abb5",
    GRID: "#3a424b",
}
#: Numbers on coloured ground. They stay as they are in the dark variant, since the ground does too.
ON_LIGHT, ON_DARK = "#1b1b1b", "#ffffff"

_COLOURS = ("color", "facecolor", "edgecolor", "markerfacecolor", "markeredgecolor")


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, sizes in inches, that touches no global state of matplotlib.

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
    """Remove frame and tick marks, and draw grid lines along ``grid`` behind the data."""
    for side in ("top", "right", "left" if grid == "y" else "bottom"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom" if grid == "y" else "left"].set_color(QUIET)
    axes.tick_params(colors=INK, labelsize=9, length=0)
    axes.grid(True, axis=grid, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    style_number_axis(axes.yaxis if grid == "y" else axes.xaxis)


def style_number_axis(axis: Axis, most_ticks: int = 6) -> None:
    """Put ticks on round numbers, and write all of them with the decimals that their distance needs."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(most_ticks, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(lambda value, _: format_tick(value, axis.get_majorticklocs().tolist()))


def format_tick(value: float, ticks: Sequence[float]) -> str:
    """Write a tick with as many decimals as tell all ticks apart exactly, at most six.

    Examples
    --------
    >>> format_tick(0.1, [0.1, 0.125, 0.15]), format_tick(1000.0, [0.0, 500.0, 1000.0])
    ('0.100', '1,000')
    """
    decimals = next(
        (
            count
            for count in range(6)
            if all(math.isclose(tick, round(tick, count), rel_tol=1e-9, abs_tol=1e-9) for tick in ticks)
        ),
        6,
    )
    # Adding zero turns a negative zero into zero.
    return f"{round(value, decimals) + 0.0:,.{decimals}f}"


def style_share_axis(axes: Axes, shares: Sequence[float]) -> None:
    """Let the x axis show shares of the cache kept, on a logarithmic scale with a tick at each share."""
    ticks: list[float] = []
    for share in sorted(shares):
        # Shares closer than this would be printed over each other.
        if not ticks or share > 1.1 * ticks[-1]:
            ticks.append(share)
    axes.set_xscale("log")
    axes.set_xticks(ticks, [format_share(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("Share of the KV cache kept", color=INK)


def format_share(share: float) -> str:
    """Write a share in per cent, with one decimal if it has one.

    Examples
    --------
    >>> format_share(0.1), format_share(0.125)
    ('10 %', '12.5 %')
    """
    return f"{100 * share:.1f}".removesuffix(".0") + " %"


def style_layer_axis(
    axes: Axes, layer_indices: list[int], label: str | None = "Layer", most_ticks: int = 15
) -> None:
    """Let the x axis show layers: whole numbers only, with room between the ticks."""
    first, last = min(layer_indices), max(layer_indices)
    step = next(size for size in (1, 2, 5, 10, 20, 50, 100, 1000) if (last - first) / size <= most_ticks)
    axes.set_xticks([tick for tick in range(0, last + 1, step) if tick >= first])
    axes.set_xlim(first - 0.8, last + 0.8)
    if label:
        axes.set_xlabel(label, color=INK)


def choose_ink(red: float, green: float, blue: float, *_: float) -> str:
    """Return the colour of a number that stands on this colour (components in [0, 1])."""
    return ON_LIGHT if 0.299 * red + 0.587 * green + 0.114 * blue > 0.55 else ON_DARK


def shorten(name: str, longest: int = 48) -> str:
    """Return a name that fits a title; of a longer one only the end is kept, which tells paths apart."""
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


@contextmanager
def use_dark_colours(figure: Figure) -> Iterator[None]:
    """Give a figure the colours of the dark variant while the context lasts; images keep theirs."""
    undo: list[tuple[Callable[[Any], object], Any]] = []
    for artist in figure.findobj():
        # Colours that come from a colour map stand for numbers.
        if getattr(artist, "get_array", lambda: None)() is not None:
            continue
        for name in _COLOURS:
            get, set_ = getattr(artist, f"get_{name}", None), getattr(artist, f"set_{name}", None)
            if get is None or set_ is None:
                continue
            old = get()
            new = _darken(old)
            if new is not None:
                set_(new)
                undo.append((set_, old))
    try:
        yield
    finally:
        for set_, old in reversed(undo):
            set_(old)


def _darken(colour: Any) -> Any:
    """Return the dark variant of a colour or of an array of colours, None if nothing changes."""
    from matplotlib.colors import to_hex, to_rgba, to_rgba_array

    try:
        rows = to_rgba_array(colour)
    except (ValueError, TypeError):
        return None
    changed = [DARK.get(to_hex(row[:3])) for row in rows]
    if not any(changed):
        return None
    new = [to_rgba(dark, row[3]) if dark else tuple(row) for row, dark in zip(rows, changed, strict=True)]
    return new[0] if len(new) == 1 else new
