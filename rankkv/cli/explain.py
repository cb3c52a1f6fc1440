"""What `rankkv generate --explain` shows: the prompt, line by line, with how much of the cache keeps each part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from .display import draw_bar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from ..cache.kept_tokens import KeptTokens

# Names of the terminal's own palette, which suits its background: share of the heads that keep a token, from where on.
_STYLES = ((1.0, "bold reverse"), (0.75, "magenta"), (0.5, "yellow"), (0.25, "cyan"), (0.0, ""))
_NONE = "bright_black"
_BAR, _NARROWEST = 4, 40
_SPARKS = " ▁▂▃▄▅▆▇█"


def print_kept_tokens(console: Console, pieces: Sequence[str], kept: KeptTokens) -> None:
    """Print which parts of the prompt a cache kept.

    On a terminal every token has a colour; elsewhere the share at the start of each line says the same of the line.

    Parameters
    ----------
    console : Console
        Where it goes.
    pieces : sequence of str
        Text of each token.
    kept : KeptTokens
        Of the same tokens.
    """
    from rich.text import Text

    shares = kept.compute_shares().tolist()
    fates = kept.count_fates()
    layers, heads = len(kept.layer_indices), sum(kept.kv_heads)
    console.print(
        f"\nKept of the {kept.tokens:,} prompt tokens: {fates['all']:,} by every head of every layer, "
        f"{fates['some']:,} by some, {fates['none']:,} by none ({layers} layers, {heads} heads; on average "
        f"{sum(shares) / len(shares):.1%} of the heads keep a token). In front of each line: its own average.",
        soft_wrap=True,
    )
    width = max(_NARROWEST, console.width)
    console.print(Text("beginning to end ") + Text(_draw_strip(shares, min(width - 18, 100)), style="cyan"))
    if console.is_terminal:
        console.print(_make_legend())
    gutter = _BAR + 6
    for line in _break_lines(pieces, width - gutter):
        own = [shares[index] for index, _ in line]
        mean = sum(own) / len(own)
        # Rounded away from both ends: 0 % and 100 % are said of lines that are lost or kept whole.
        shown = mean if mean in (0.0, 1.0) else min(max(mean, 0.01), 0.99)
        text = Text(f"{shown:4.0%} ") + Text(f"{draw_bar(mean, 1.0, _BAR):<{_BAR}} ", style="cyan")
        for index, piece in line:
            text.append(piece, style=_choose_style(shares[index]))
        console.print(text, no_wrap=True, overflow="ignore", crop=False)


def _choose_style(share: float) -> str:
    return _NONE if share == 0.0 else next(style for least, style in _STYLES if share >= least)


def _make_legend() -> Text:
    from rich.text import Text

    legend = Text("kept by ")
    names = [("no head", _NONE)]
    names += [(f"{least:.0%} or more" if least else "fewer", style) for least, style in reversed(_STYLES[1:])]
    for name, style in [*names, ("all", _STYLES[0][1])]:
        legend.append(name, style=style).append("  ")
    return legend


def _draw_strip(shares: Sequence[float], width: int) -> str:
    """Draw the share kept from the prompt's beginning to its end, one sign for each stretch of tokens."""
    width = min(width, len(shares))
    bounds = [round(place * len(shares) / width) for place in range(width + 1)]
    means = [sum(shares[a:b]) / (b - a) for a, b in pairwise(bounds)]
    # Nothing kept is a blank, so whatever is kept shows.
    return "".join(_SPARKS[0 if mean == 0.0 else max(1, round(8 * mean))] for mean in means)


def _break_lines(pieces: Sequence[str], width: int) -> Iterator[list[tuple[int, str]]]:
    """Yield lines as pairs of a token and its text: broken where the text is, and where a line is full."""
    from rich.cells import cell_len

    line: list[tuple[int, str]] = []
    used = 0
    for index, piece in enumerate(pieces):
        parts = piece.expandtabs(4).split("\n")
        for number, part in enumerate(parts):
            if number and line:
                yield line
                line, used = [], 0
            # What a document holds must not steer the terminal.
            text = "".join(sign if sign.isprintable() else "\ufffd" for sign in part)
            if line and used + cell_len(text) > width:
                yield line
                line, used = [], 0
                text = text.removeprefix(" ")
            # A line break alone goes with the line it ends; blank lines are left out.
            if text or (line and number == 0):
                line.append((index, text))
                used += cell_len(text)
    if line:
        yield line
