"""A needle in a haystack by depth and length: is a code that stands in the prompt still told from a compressed cache?

    python experiments/needle_grid.py --haystack book.txt --part 0.6 1.0 --samples 4

The question is the end of the prompt that is compressed (`--question_agnostic`: it comes after). Every sample has its
own place, code and stretch of the haystack; one prefill serves all caches of a needle. Writes Parquet parts (a run that
was killed goes on), `rows.parquet`, `summary.md` with 95 % intervals, and a figure under `figures/`.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from allocation_ablation import describe, finish, main, read_texts
from forced_needle import evaluate_needle
from method_quality import BUDGETS
from tqdm import tqdm

from rankkv.errors import ConfigError, InputError

FULL, BLANK = "full", "blank"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="A needle in a haystack, by depth and length, from full and compressed caches.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="embedded", help="hub id, local folder, GGUF file, or embedded")
    add("--haystack", dest="texts", action="append", metavar="NAME=PATH", help="default: python-docs")
    add("--part", type=float, nargs=2, default=(0.0, 1.0), help="part of each file that is used")
    add("--lengths", type=int, nargs="+", default=[512, 1024, 2048], help="tokens of a prompt")
    add("--depths", type=float, nargs="+", default=[0.1, 0.3, 0.5, 0.7, 0.9], help="0 beginning, 1 end")
    add("--samples", type=int, default=4, help="needles for each length and depth")
    add("--ratios", type=float, nargs="+", default=[0.1, 0.2], help="fractions of the cache kept")
    add("--selector", default="snapkv", help="token selection method")
    add(
        "--strategies",
        nargs="+",
        default=["uniform", "RankKV", "RankKV, profile", "RankKV, layers"],
        choices=list(BUDGETS),
        help="budgets from",
    )
    add("--question_agnostic", action="store_true", help="compress the context before the question is known")
    add("--seed", type=int, default=0, help="of places and codes, and of the bootstrap")
    add("--output_dir", type=Path, default=Path("results/needle"), help="where everything goes")
    return parser.parse_args(arguments)


def build_cells(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return every combination as `strategy|ratio` and its options of RankKVCache."""
    return {
        f"{name}|{ratio:g}": {**BUDGETS[name], "selector": arguments.selector, "compression_ratio": ratio}
        for ratio, name in itertools.product(arguments.ratios, arguments.strategies)
    }


def list_units(arguments: argparse.Namespace) -> Iterator[tuple[str, int, float, int]]:
    """Yield the name, length, depth and number of every needle, one of each kind at a time."""
    for number, length, depth in itertools.product(
        range(arguments.samples), arguments.lengths, arguments.depths
    ):
        yield f"{length}-{depth:g}-{number:03d}", length, depth, number


def cut_haystack(tokenizer: Any, texts: Iterable[str], length: int, place: int, places: int) -> str:
    """Return a stretch of the haystacks, taken in turn, with at least ``length`` tokens."""
    texts = list(texts)
    text = texts[place % len(texts)]
    # No token of ordinary text is longer than this many characters on average.
    room = 12 * length
    if len(text) < room:
        raise InputError(
            f"a haystack of {len(text)} characters is too short for {length} tokens; give at least {room}."
        )
    start = (len(text) - room) * place // max(1, places - 1)
    ids = tokenizer(text[start : start + room], add_special_tokens=False, verbose=False)["input_ids"]
    return str(tokenizer.decode(ids[: length + 8]))


def score_needle(
    model: Any,
    tokenizer: Any,
    haystack: str,
    length: int,
    depth: float,
    seed: int,
    arguments: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    """Yield one row a cache, `full` and `blank` among them."""
    for score in evaluate_needle(
        model,
        tokenizer,
        haystack,
        build_cells(arguments),
        lengths=[length],
        depths=[depth],
        seeds=[seed],
        question_aware=not arguments.question_agnostic,
    ):
        strategy, _, ratio = score.setting.partition("|")
        yield {
            "strategy": strategy,
            "ratio": float(ratio or 1.0),
            "length": length,
            "depth": depth,
            "found": score.exact,
            "answer_loss": score.answer_loss,
        }


def list_caches(rows: Sequence[dict[str, Any]]) -> list[tuple[str, float]]:
    """Return (budgets from, fraction kept) of every cache of the rows, the full one first, then by fraction."""
    caches = dict.fromkeys((row["strategy"], row["ratio"]) for row in rows)
    return sorted(
        caches, key=lambda cache: (cache[0] not in (FULL, BLANK), cache[1], list(caches).index(cache))
    )


def pick(rows: Sequence[dict[str, Any]], cache: tuple[str, float], field: str, **wanted: Any) -> list[float]:
    """Return a number of every needle of a cache, in one order for all caches."""
    own = [
        row
        for row in rows
        if (row["strategy"], row["ratio"]) == cache
        and all(row[name] == value for name, value in wanted.items())
    ]
    return [float(row[field]) for row in sorted(own, key=lambda row: row["text"])]


def summarize(rows: Sequence[dict[str, Any]], seed: int) -> str:
    """Return a Markdown table: a row a cache, needles found and the loss of the code's tokens, paired to uniform."""
    from rankkv.evaluation.statistics import compute_mean

    lengths = sorted({row["length"] for row in rows})
    lines = ["| kept | budgets from | found | paired difference | loss of the code, nats a token | "]
    lines[0] += " | ".join(f"found, {length:,} tokens" for length in lengths) + " |"
    lines.append("|---|" + "---|" * (4 + len(lengths)))
    for strategy, ratio in list_caches(rows):
        cache = (strategy, ratio)
        found = pick(rows, cache, "found")
        told = ""
        if strategy not in (FULL, BLANK, "uniform"):
            uniform = pick(rows, ("uniform", ratio), "found")
            if uniform:
                paired = compute_mean([a - b for a, b in zip(found, uniform, strict=True)], seed=seed)
                told = f"{paired.mean:+.2f} [{paired.low:+.2f}, {paired.high:+.2f}]"
        estimate = compute_mean(found, seed=seed)
        by_length = [
            f"{sum(own):.0f} of {len(own)}"
            for own in (pick(rows, cache, "found", length=length) for length in lengths)
        ]
        name = {FULL: "full cache", BLANK: "full cache, no needle there"}.get(strategy, strategy)
        lines.append(
            f"| {ratio:.0%} | {name} | {estimate.mean:.2f} [{estimate.low:.2f}, {estimate.high:.2f}] of {len(found)} "
            f"| {told} | {fmean(pick(rows, cache, 'answer_loss')):.2f} | " + " | ".join(by_length) + " |"
        )
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[dict[str, Any]], folder: Path, source: str = "") -> list[Path]:
    """Draw needles found by depth (down) and length (across): the full cache, then one row per share kept."""
    from rankkv.plots import name_budgets, save_figure
    from rankkv.plots.style import INK, choose_ink, format_share, new_figure, set_title

    lengths, depths = (sorted({row[name] for row in rows}) for name in ("length", "depth"))
    caches = [cache for cache in list_caches(rows) if cache[0] not in (FULL, BLANK)]
    ratios = sorted({ratio for _, ratio in caches})
    across = max(sum(ratio == own for _, ratio in caches) for own in ratios)
    figure = new_figure(1.2 + 2.0 * (across + 1), 1.0 + (0.8 + 0.26 * len(depths)) * len(ratios))
    panels = figure.subplots(len(ratios), across + 1, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    places = [((FULL, 1.0), panels[0][0])]
    for down, kept in enumerate(ratios):
        own = [cache for cache in caches if cache[1] == kept]
        places += [(cache, panels[down][1 + number]) for number, cache in enumerate(own)]
    for (strategy, kept), axes in places:
        found = [
            [pick(rows, (strategy, kept), "found", length=length, depth=depth) for length in lengths]
            for depth in depths
        ]
        axes.set_axis_on()
        image = axes.imshow(
            [[fmean(own) for own in line] for line in found], cmap="Blues", vmin=0, vmax=1, aspect="auto"
        )
        for y, line in enumerate(found):
            for x, own in enumerate(line):
                colour = choose_ink(*image.cmap(image.norm(fmean(own))))
                text = f"{sum(own):.0f}/{len(own)}"
                axes.text(x, y, text, ha="center", va="center", fontsize=7, color=colour)
        title = name_budgets(strategy) + f", {format_share(kept)}" if strategy != FULL else "Full cache"
        axes.set_title(title, loc="left", fontsize=8.5, color=INK)
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=7)
        axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths], fontsize=7)
        axes.tick_params(length=0, colors=INK)
        for side in axes.spines.values():
            side.set_visible(False)
    panels[0][0].set_xlabel("Tokens of the prompt", fontsize=8, color=INK)
    panels[0][0].set_ylabel("Depth of the needle", fontsize=8, color=INK)
    below = ["needles found of those hidden, by method and share of the cache kept", source]
    set_title(figure, "Needles found by depth and length", ", ".join(filter(None, below)))
    return save_figure(figure, folder / "figures" / "needle_grid")


def run(arguments: argparse.Namespace) -> str:
    """Score what is not scored yet, then write rows, summary and figure; return the summary."""
    from rankkv import load_model
    from rankkv.evaluation.results import ResultStore

    if arguments.samples < 1:
        raise ConfigError(f"--samples is {arguments.samples} but must be at least 1.")
    texts = read_texts(arguments)
    store = ResultStore(arguments.output_dir, describe(arguments))
    model, tokenizer = load_model(arguments.model)
    units = list(list_units(arguments))
    for place, (unit, length, depth, number) in enumerate(tqdm(units, unit="needle", disable=None)):
        if store.is_done(unit):
            continue
        haystack = cut_haystack(tokenizer, texts.values(), length, place, len(units))
        rows = score_needle(model, tokenizer, haystack, length, depth, arguments.seed + number, arguments)
        store.write(unit, [{"text": unit, **row} for row in rows])
    return finish(store, arguments, summarize, draw)


if __name__ == "__main__":
    sys.exit(main(parse=parse_arguments, run=run))
