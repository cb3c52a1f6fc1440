"""Display: progress by layer, tables with bars, and a stream of generated text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ..analysis.predicted_loss import PredictedLoss

_SECONDS_BETWEEN_LINES = 20.0
# Smaller losses are noise.
_LEAST_SHOWN = 1e-6
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def make_console() -> Console:
    """Return a console on stderr, because stdout is for results."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=False)


class Step:
    """Show the progress of one task: a bar on a terminal, else plain lines.

    Parameters
    ----------
    console : Console
        Console to print to.
    description : str
        Name of the task, such as ``"Loading embedded"``.
    """

    def __init__(self, console: Console, description: str) -> None:
        self._console, self._description = console, description
        self._start = self._said = time.perf_counter()
        self._progress: Any = None
        if not console.is_terminal:
            console.print(f"{description} ...", markup=False, soft_wrap=True)
            return
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            # Redraw seldom, because drawing disturbs the times that are measured meanwhile.
            refresh_per_second=4,
        )
        self._task = self._progress.add_task(description, total=None, count="")
        self._progress.start()

    def advance(self, done: float, total: int, count: str | None = None) -> None:
        """Show the number of layers done, or the text ``count``; without a terminal, every 20 seconds."""
        count = count or f"layer {done}/{total}"
        if self._progress is not None:
            self._progress.update(self._task, completed=done, total=total, count=count)
        elif time.perf_counter() - self._said > _SECONDS_BETWEEN_LINES:
            self._said = time.perf_counter()
            self._console.print(f"  {count}", markup=False, soft_wrap=True)

    def finish(self, note: str = "") -> None:
        """Print one line with the description and the seconds it took; do nothing the second time."""
        if self._start is None:
            return
        seconds, self._start = time.perf_counter() - self._start, None  # type: ignore[assignment]
        self.clear()
        line = f"{self._description}: {note or 'done'} ({seconds:.1f} s)"
        self._console.print(line, markup=False, soft_wrap=True)

    def clear(self) -> None:
        """Remove the bar, so that other output can follow."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


@contextmanager
def show_step(console: Console, description: str) -> Iterator[Step]:
    """Show a task's progress until the block ends."""
    step = Step(console, description)
    try:
        yield step
    except BaseException:
        step.clear()
        raise
    step.finish()


@contextmanager
def watch_layers(model: Any, on_layer: Callable[[int, int], None]) -> Iterator[Callable[[], None]]:
    """Call ``on_layer(done, total)`` after each attention module of a forward, until the block ends.

    Yields a function that removes the hooks earlier, so that they do not slow down decode steps.
    """
    modules = [module for module in model.modules() if isinstance(getattr(module, "layer_idx", None), int)]
    order = sorted({module.layer_idx for module in modules})
    handles = [
        module.register_forward_hook(
            lambda module, *_: on_layer(order.index(module.layer_idx) + 1, len(order))
        )
        for module in modules
    ]

    def stop() -> None:
        while handles:
            handles.pop().remove()

    try:
        yield stop
    finally:
        stop()


def format_seconds(seconds: float) -> str:
    """Format a duration in seconds, minutes or hours.

    Examples
    --------
    >>> [format_seconds(seconds) for seconds in (7.2, 200.0, 9000.0)]
    ['7 s', '3.3 min', '2.5 h']
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def draw_bar(value: float, largest: float, width: int) -> str:
    """Draw a horizontal bar of at most ``width`` characters, in steps of an eighth.

    Examples
    --------
    >>> draw_bar(3, 6, 4)
    '██'
    """
    if not largest > 0 or not value > 0:
        return ""
    eighths = max(1, round(8 * width * min(1.0, value / largest)))
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def make_loss_table(points: Sequence[PredictedLoss]) -> Table:
    """Return a table with a line per share kept: the predicted loss, its bound, a logarithmic bar, and the knee."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name, justify in (
        ("kept", "right"),
        ("loss", "right"),
        ("9 of 10 below", "right"),
        ("", "left"),
        ("", "left"),
    ):
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    logs = [math.log10(max(point.loss, _LEAST_SHOWN)) for point in points]
    low, high = min(logs), max(logs)
    for point, log in zip(points, logs, strict=True):
        # The smallest loss gets a short bar.
        bar = draw_bar(log - low + 0.1, high - low + 0.1, 22)
        knee = "<- knee" if point.is_knee else ""
        table.add_row(f"{point.share:.1%}", f"{point.loss:.2g}", f"{point.bound:.2g}", bar, knee)
    return table


def make_layer_table(
    layer_indices: Sequence[int], ranks: Sequence[float], budgets: Sequence[int], measure: str = "rank"
) -> Table:
    """Return a table with a line per layer: rank (or another measure) and budget, each with a bar."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    width = 22
    for name, justify in (
        ("layer", "right"),
        (measure, "right"),
        ("", "left"),
        ("budget", "right"),
        ("", "left"),
    ):
        table.add_column(name, justify=justify, no_wrap=True, min_width=0 if name else width)  # type: ignore[arg-type]
    shown = [rank for rank in ranks if rank == rank]
    highest, widest = max(shown, default=0.0), max(budgets)
    # If the strategy measures nothing, only the budgets have bars.
    listed: list[float | None] = [*ranks] or [None] * len(budgets)
    for layer_idx, rank, budget in zip(layer_indices, listed, budgets, strict=True):
        table.add_row(
            str(layer_idx),
            "-" if rank is None else f"{rank:.2f}" if measure == "rank" else f"{rank:.4g}",
            f"[blue]{draw_bar(rank or 0.0, highest, width)}[/]",
            f"{budget:,}",
            f"[dark_orange]{draw_bar(budget, widest, width)}[/]",
        )
    return table


def make_spread_table(rows: Sequence[Mapping[str, float]], measure: str | None = None) -> Table:
    """Return a table with a line per layer: mean and deviation of rank (or ``measure``) and budget."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    width, kind = 18, "rank" if measure is None else "measure"
    table.add_column("layer", justify="right", no_wrap=True)
    for name in (measure or "rank", "budget"):
        table.add_column(name, justify="right", no_wrap=True)
        table.add_column("", no_wrap=True, min_width=width)
    highest, widest = (
        max((row[f"{name}_mean"] for row in rows if row[f"{name}_mean"] == row[f"{name}_mean"]), default=0.0)
        for name in (kind, "budget")
    )
    digits = ".2f" if measure is None else ".4g"
    for row in rows:
        mean, deviation, budget = row[f"{kind}_mean"], row[f"{kind}_std"], row["budget_mean"]
        table.add_row(
            str(row["layer"]),
            f"{mean:{digits}} ± {deviation:{digits}}",
            f"[blue]{draw_bar(mean, highest, width)}[/]",
            f"{budget:,.1f} ± {row['budget_std']:,.1f}",
            f"[dark_orange]{draw_bar(budget, widest, width)}[/]",
        )
    return table


class AnswerStream:
    """Turn token ids that arrive one by one into text, without splitting a character.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        Tokenizer of the model; special tokens are left out of the text.
    write : callable
        Called with each new part of the text.
    """

    def __init__(self, tokenizer: Any, write: Callable[[str], Any]) -> None:
        self._tokenizer, self._write = tokenizer, write
        self._ids: list[int] = []
        self._written = ""

    def put(self, token_id: int) -> None:
        """Add the next token."""
        self._ids.append(token_id)
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        # A token may end inside a character of several bytes. Decoding then gives U+FFFD: wait for the next token.
        if not text.endswith("\ufffd"):
            self._emit(text)

    def end(self) -> str:
        """Write the text that was held back, and return the whole text."""
        text: str = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        self._emit(text)
        return text

    def _emit(self, text: str) -> None:
        if text.startswith(self._written):
            self._write(text[len(self._written) :])
            self._written = text
