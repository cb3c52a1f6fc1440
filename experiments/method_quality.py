"""Every selector with every way to spread the budget: loss of a continuation, and needles found.

    python experiments/method_quality.py --texts encyclopaedia=wiki.txt --texts code=code.txt --samples 4

For each context: how much worse its continuation is predicted from a compressed cache (nats a token), and whether a
code hidden in it can still be told, the question being the end of what is compressed. One prefill serves all methods.
Writes Parquet parts (a run that was killed goes on), `rows.parquet`, `summary.md` with 95 % intervals over contexts,
and a figure under `figures/`.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from allocation_ablation import add_text_arguments, cut_contexts, describe, finish, main, read_texts
from forced_needle import evaluate_needle
from tqdm import tqdm

from rankkv.errors import ConfigError
from rankkv.evaluation.settings import NAMED_STRATEGIES

#: Ways to spread the budget over layers; what is left out takes its default.
BUDGETS: dict[str, dict[str, Any]] = {
    "uniform": {"strategy": "uniform"},
    "pyramid": {"strategy": "pyramid"},
    "cake": {"strategy": "cake"},
    "lava": {"strategy": "lava"},
    "RankKV": NAMED_STRATEGIES["default"],
    "RankKV, profile": NAMED_STRATEGIES["auto"],
    "RankKV, layers": NAMED_STRATEGIES["layers"],
}
SELECTORS = (
    "snapkv", "h2o", "streaming_llm", "tova", "knorm", "keydiff", "expected_attention", "lagkv", "qfilter", "cur",
    "lava", "criticalkv", "chunkkv", "random",
)  # fmt: skip


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Every selector with every way to spread the budget: loss of a continuation, and needles found.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add_text_arguments(parser, samples=4, continuation=128)
    add("--ratios", type=float, nargs="+", default=[0.1, 0.2, 0.3], help="fractions of the cache kept")
    add("--selectors", nargs="+", default=list(SELECTORS), help="token selection methods")
    add("--strategies", nargs="+", default=list(BUDGETS), choices=list(BUDGETS), help="budgets from")
    add("--seed", type=int, default=0, help="where the contexts start, of the codes, and of the bootstrap")
    add("--output_dir", type=Path, default=Path("results/method_quality"), help="where everything goes")
    return parser.parse_args(arguments)


def build_cells(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return every combination as `selector|strategy|ratio` and its options of RankKVCache."""
    return {
        f"{selector}|{name}|{ratio:g}": {**BUDGETS[name], "selector": selector, "compression_ratio": ratio}
        for selector, name, ratio in itertools.product(
            arguments.selectors, arguments.strategies, arguments.ratios
        )
    }


def score_context(
    model: Any, tokenizer: Any, ids: Any, number: int, arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Yield one row a cell and task, `full` and `blank` among them."""
    from rankkv.evaluation import evaluate_continuation, record_prefill

    cells = build_cells(arguments)

    def name_cell(cell: str) -> dict[str, Any]:
        selector, strategy, ratio = cell.split("|") if "|" in cell else (cell, "", 1.0)
        return {"selector": selector, "strategy": strategy, "ratio": float(ratio)}

    context = ids[:, : arguments.context]
    scores = evaluate_continuation(
        record_prefill(model, context, tokenizer=tokenizer), ids[:, arguments.context :], cells
    )
    _, full = next(scores)
    for cell, score in scores:
        yield {
            **name_cell(cell),
            "task": "continuation",
            "excess": score.loss - full.loss,
            "divergence": score.divergence,
            "kept_tokens": score.kept_tokens,
        }
    # Depths spread over the contexts, so that every tenth of the context is asked for.
    depth = (0.5 + number * 7 % 10) / 10
    needles = evaluate_needle(
        model,
        tokenizer,
        tokenizer.decode(context[0]),
        cells,
        lengths=[arguments.context * 15 // 16],
        depths=[depth],
        seeds=[arguments.seed + number],
        question_aware=True,
    )
    for needle in needles:
        yield {
            **name_cell(needle.setting),
            "task": "needle",
            "found": needle.exact,
            "answer_loss": needle.answer_loss,
            "depth": depth,
        }


def gather(
    rows: Sequence[dict[str, Any]], task: str, field: str
) -> dict[tuple[str, str, float], list[float]]:
    """Return a cell's numbers over the contexts, in one order for all cells."""
    table: dict[tuple[str, str, float], list[float]] = {}
    for row in sorted(rows, key=lambda row: row["text"]):
        if row["task"] == task:
            table.setdefault((row["selector"], row["strategy"], row["ratio"]), []).append(float(row[field]))
    return table


def summarize(rows: Sequence[dict[str, Any]], seed: int) -> str:
    """Return Markdown tables: a row a selector, a column a way to spread the budget, a table a ratio and task."""
    from rankkv.evaluation.statistics import compute_mean

    lines = []
    for task, field, title in (
        ("continuation", "excess", "Excess loss, nats a token"),
        ("needle", "found", "Needles found"),
    ):
        table = gather(rows, task, field)
        kept = sorted({ratio for _, strategy, ratio in table if strategy})
        selectors = list(dict.fromkeys(selector for selector, strategy, _ in table if strategy))
        strategies = [name for name in BUDGETS if any(name == strategy for _, strategy, _ in table)]
        samples = len(next(iter(table.values())))
        if task == "needle":
            full, blank = (compute_mean(table[name, "", 1.0], seed=seed) for name in ("full", "blank"))
            lines += [f"Needles: the full cache finds {full}; without the needle {blank} are guessed.", ""]
        for ratio in kept:
            lines += [f"### {title}, {ratio:.0%} kept ({samples} contexts)", ""]
            lines += ["| selector | " + " | ".join(strategies) + " |", "|---|" + "---|" * len(strategies)]
            for selector in selectors:
                line = []
                for strategy in strategies:
                    own = table[selector, strategy, ratio]
                    estimate = compute_mean(own, seed=seed)
                    if strategy == "uniform" or "uniform" not in strategies:
                        line.append(f"{estimate.mean:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]")
                        continue
                    uniform = table[selector, "uniform", ratio]
                    paired = compute_mean([a - b for a, b in zip(own, uniform, strict=True)], seed=seed)
                    line.append(
                        f"{estimate.mean:.3f} ({paired.mean:+.3f} [{paired.low:+.3f}, {paired.high:+.3f}])"
                    )
                lines.append(f"| {selector} | " + " | ".join(line) + " |")
            lines.append("")
    return "\n".join(lines)


def draw(rows: Sequence[dict[str, Any]], folder: Path, source: str = "") -> list[Path]:
    """Draw both tasks at the middle share kept, one line per selector: uniform budgets beside RankKV's.

    The tables of `summary.md` hold every other number.
    """
    from rankkv.evaluation.statistics import compute_mean
    from rankkv.plots import name_budgets, name_selector, plot_pairs, save_figure
    from rankkv.plots.style import format_share

    ratios = sorted({row["ratio"] for row in rows if row["strategy"]})
    kept = ratios[len(ratios) // 2]
    strategies = list(dict.fromkeys(row["strategy"] for row in rows if row["strategy"]))
    shown = ["uniform", next((name for name in ("RankKV", "RankKV, layers") if name in strategies), "")]
    panels = {}
    for heading, task, field in (
        ("Loss above the full cache's, nats per token", "continuation", "excess"),
        ("Share of needles found", "needle", "found"),
    ):
        table = gather(rows, task, field)
        panels[heading] = {
            name_selector(selector): {
                name_budgets(strategy): compute_mean(table[selector, strategy, kept])
                for strategy in shown
                if (selector, strategy, kept) in table
            }
            for selector in dict.fromkeys(selector for selector, strategy, _ in table if strategy)
        }
    texts = len({row["text"] for row in rows})
    below = [
        f"{format_share(kept)} of the cache kept",
        f"mean over {texts} texts with 95 % intervals",
        source,
    ]
    figure = plot_pairs(
        panels, "Uniform and RankKV budgets with every selector\n" + ", ".join(filter(None, below))
    )
    figure.axes[0].set_xlim(left=0)
    return save_figure(figure, folder / "figures" / "method_quality")


def run(arguments: argparse.Namespace) -> str:
    """Score what is not scored yet, then write rows, summary and figure; return the summary."""
    from rankkv import load_model
    from rankkv.evaluation.results import ResultStore

    if arguments.samples < 1 or arguments.continuation < 2:
        raise ConfigError(
            f"--samples {arguments.samples} must be at least 1 and --continuation {arguments.continuation} at least 2."
        )
    texts = read_texts(arguments)
    arguments.processes = 1
    store = ResultStore(arguments.output_dir, describe(arguments))
    model, tokenizer = load_model(arguments.model)
    contexts = {kind: cut_contexts(tokenizer, text, arguments) for kind, text in texts.items()}
    units = [(kind, index) for index in range(arguments.samples) for kind in contexts]
    for number, (kind, index) in enumerate(tqdm(units, unit="context", disable=None)):
        unit = f"{kind}-{index:03d}"
        if store.is_done(unit):
            continue
        start, ids = contexts[kind][index]
        rows = score_context(model, tokenizer, ids, number, arguments)
        store.write(unit, [{"kind": kind, "text": unit, "first_token": start, **row} for row in rows])
    return finish(store, arguments, summarize, draw)


if __name__ == "__main__":
    sys.exit(main(parse=parse_arguments, run=run))
