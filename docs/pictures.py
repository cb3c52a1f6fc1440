"""The pictures of the documentation, drawn as SVG, from the recorded demo where they show data.

``python docs/pictures.py`` writes each into ``docs/pictures/``, once for a light and once for a dark ground.
"""

from __future__ import annotations

import json
import re
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
INK, PALE, LINE = "#2b2f3a", "#f4f5fa", "#c9cddb"
COLOURS = {"sinks": "#e08e45", "evictable": "#3f51b5", "recent": "#5aa469", "gone": "#e7e9f2"}
GROUND = "#ffffff"
#: Each colour on a dark ground.
DARK = {
    GROUND: "#1e2129", INK: "#e6e8ee", PALE: "#2a2e3a", LINE: "#4a5063",
    "#e08e45": "#f0a05a", "#3f51b5": "#8f9dff", "#5aa469": "#76c487", "#e7e9f2": "#363b4a",
}  # fmt: skip


def _frame(width: int, height: int, title: str, parts: list[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" font-family="system-ui, sans-serif" font-size="13" fill="{INK}">\n<title>{escape(title)}</title>\n'
        f'<rect width="{width}" height="{height}" rx="10" fill="{GROUND}"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _text(x: float, y: float, words: str, **attributes: object) -> str:
    extra = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in attributes.items())
    return f'<text x="{x:g}" y="{y:g}"{extra}>{escape(words)}</text>'


def _box(x: float, y: float, width: float, height: float, fill: str, stroke: str = "none") -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="2" fill="{fill}" stroke="{stroke}"/>'


def draw_flow() -> str:
    """Draw one layer's way through the five steps."""
    steps = [
        ("1 observe", "the last queries, the keys, the values and the mask of the layer"),
        ("2 rank", "effective rank of the attention that could be evicted"),
        ("3 budget", "rank and error of evicting become whole tokens, exact in total"),
        ("4 select", "SnapKV, H2O or another method scores every token"),
        ("5 cache", "what is kept stays, the rest is freed"),
    ]
    parts = [
        _text(20, 30, "prompt: layer i attends as always, with the model's own attention", font_weight="600")
    ]
    for place, (title, words) in enumerate(steps):
        y = 62 + place * 62
        parts.append(
            f'<path d="M64 {y - 20} v14 m-5 -6 l5 6 l5 -6" fill="none" stroke="{INK}" stroke-width="1.5"/>'
        )
        parts.append(f'<rect x="20" y="{y}" width="520" height="38" rx="8" fill="{PALE}" stroke="{LINE}"/>')
        parts.append(_text(34, y + 24, title, font_weight="600", fill=COLOURS["evictable"]))
        parts.append(_text(116, y + 24, words))
    parts.append(
        _text(
            20,
            372,
            "then layer i + 1, and after the last layer the first token",
            font_weight="600",
        )
    )
    return _frame(560, 390, "The five steps of one layer: observe, rank, budget, select, cache", parts)


def draw_scopes() -> str:
    """Draw which part of a causal attention matrix is ranked."""
    tokens, window, sinks, recent, side = 28, 7, 3, 5, 13
    left, top = 40, 44
    parts = [_text(left, 28, "keys, oldest to newest", font_size=12)]
    parts.append(
        f'<text transform="translate(26 {top + tokens * side / 2:g}) rotate(-90)" text-anchor="middle" '
        f'font-size="12">queries</text>'
    )
    for query in range(tokens):
        for key in range(query + 1):
            fill = COLOURS["gone"]
            if query >= tokens - window:
                if key < sinks:
                    fill = COLOURS["sinks"]
                elif key >= tokens - recent:
                    fill = COLOURS["recent"]
                else:
                    fill = COLOURS["evictable"]
            parts.append(_box(left + key * side, top + query * side, side - 2, side - 2, fill))
    y = top + (tokens - window) * side - 3
    parts.append(
        f'<rect x="{left - 4}" y="{y}" width="{tokens * side + 6}" height="{window * side + 6}" rx="4" fill="none" '
        f'stroke="{INK}" stroke-width="1.5"/>'
    )
    x = left + tokens * side + 26
    legend = [
        (COLOURS["evictable"], "the evictable part, which is ranked"),
        (COLOURS["sinks"], "attention sinks: always kept"),
        (COLOURS["recent"], "recent tokens: always kept"),
        (COLOURS["gone"], "earlier queries, not ranked"),
    ]
    parts.append(_text(x, 70, "framed: the observation window,"))
    parts.append(_text(x, 88, "the last 32 queries of the prompt"))
    for row, (colour, words) in enumerate(legend):
        parts.append(_box(x, 112 + row * 28, 14, 14, colour))
        parts.append(_text(x + 24, 124 + row * 28, words))
    return _frame(
        760, top + tokens * side + 20, "The evictable part of the attention in the observation window", parts
    )


def draw_budgets() -> str:
    """Draw what each layer of the recorded demo keeps beside uniform budgets."""
    record = json.loads((ROOT / "results" / "demo.json").read_text(encoding="utf-8"))
    runs = {run["name"]: run for run in record["runs"]}
    budgets, uniform = runs["RankKV"]["budgets"], runs["uniform SnapKV"]["budgets"]
    length = runs["RankKV"]["prompt_tokens"]
    left, top, width, row = 64, 62, 640, 15
    scale = width / max(*budgets, *uniform)
    parts = [
        _text(20, 26, f"Tokens kept of {length:,}, layer by layer, in the recorded demo", font_weight="600"),
        _text(20, 46, "bars: RankKV's budgets; line: the same total, spread uniformly", font_size=12),
    ]
    for layer, budget in enumerate(budgets):
        y = top + layer * row
        if layer % 5 == 0:
            parts.append(_text(54, y + 11, f"layer {layer}", text_anchor="end", font_size=11))
        parts.append(_box(left, y, budget * scale, row - 3, COLOURS["evictable"]))
    points = [(left + budget * scale, top + layer * row) for layer, budget in enumerate(uniform)]
    path = " ".join(f"L{x:.1f} {y} v{row - 3}" for x, y in points).replace("L", "M", 1)
    parts.append(f'<path d="{path}" fill="none" stroke="{COLOURS["sinks"]}" stroke-width="2"/>')
    bottom = top + len(budgets) * row + 16
    parts += [
        _text(left, bottom, f"least {min(budgets):,}", font_size=12),
        _text(left + width, bottom, f"most {max(budgets):,}", font_size=12, text_anchor="end"),
    ]
    return _frame(760, bottom + 16, "Budget of each layer in the recorded demo", parts)


def draw_echo() -> str:
    """Draw the queries of a chunk, turned behind the prompt, that look back at its keys."""
    words = ["the", "code", "of", "the", "red", "door", "is", "48", "213", "."]
    most = [0.1, 0.35, 0.05, 0.05, 0.5, 0.45, 0.3, 0.95, 0.9, 0.1]
    looks = [(6, 7), (7, 8), (4, 5)]
    left, wide, top, low = 20, 68, 62, 170
    parts = [
        _text(20, 28, "keys of one chunk, where the prompt has them", font_weight="600"),
        _text(
            20,
            low + 62,
            "queries of the same tokens, turned to positions behind the prompt",
            font_weight="600",
        ),
    ]
    for place, word in enumerate(words):
        x = left + place * wide
        kept = most[place] >= 0.3
        parts.append(_box(x, top, wide - 8, 30, COLOURS["evictable" if kept else "gone"]))
        parts.append(
            _text(x + (wide - 8) / 2, top + 20, word, text_anchor="middle", fill=GROUND if kept else INK)
        )
        parts.append(_box(x, low, wide - 8, 30, PALE, LINE))
        parts.append(_text(x + (wide - 8) / 2, low + 20, word, text_anchor="middle"))
        parts.append(
            _text(x + (wide - 8) / 2, top - 8, f"{most[place]:.2f}", text_anchor="middle", font_size=11)
        )
    for query, key in looks:
        start, stop = (left + place * wide + (wide - 8) / 2 for place in (query, key))
        parts.append(
            f'<path d="M{start:g} {low} C{start:g} {low - 40} {stop:g} {top + 74} {stop:g} {top + 34}" fill="none" '
            f'stroke="{COLOURS["sinks"]}" stroke-width="2"/>'
        )
        parts.append(
            f'<path d="M{stop - 5:g} {top + 41} l5 -8 l5 8" fill="none" stroke="{COLOURS["sinks"]}" stroke-width="2"/>'
        )
    parts.append(_text(20, low + 90, "“is” asks what follows: it finds 48, then 48 finds 213", font_size=12))
    parts.append(
        _text(20, low + 110, "numbers: the most that any query pays a key (drawn by hand)", font_size=12)
    )
    parts.append(_text(20, low + 130, "blue: what stays", font_size=12))
    return _frame(
        720, low + 146, "Echo: queries turned behind the prompt look back at the keys of their chunk", parts
    )


PICTURES = {"echo": draw_echo, "flow": draw_flow, "scopes": draw_scopes, "budgets": draw_budgets}


def draw_all() -> dict[str, str]:
    """Draw every picture for both grounds, by file name."""
    drawn = {}
    for name, draw in PICTURES.items():
        light = draw()
        drawn[f"{name}.svg"] = light
        drawn[f"{name}-dark.svg"] = re.sub("|".join(DARK), lambda colour: DARK[colour[0]], light)
    return drawn


if __name__ == "__main__":
    folder = ROOT / "docs" / "pictures"
    folder.mkdir(exist_ok=True)
    for file, svg in draw_all().items():
        (folder / file).write_text(svg, encoding="utf-8")
