"""Loss of a continuation from a compressed context, for every strategy, selector and ratio.

    python experiments/allocation_ablation.py --texts encyclopaedia=wiki.txt --texts code=code.txt --samples 20

Each text kind is a local file (`name=path`), or `python-docs` for the embedded one. Contexts are cut from a part of
the file (`--part 0.6 1.0`: its last 40 %), evenly spread, without overlap. Writes Parquet parts (a run that was killed
goes on), `rows.parquet`, `summary.md` with paired 95 % intervals over texts, and a figure under `figures/`.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rankkv.cli.common import EXIT_BAD_INPUT, EXIT_INTERRUPTED, format_error
from rankkv.errors import ConfigError, InputError, RankKVError
from rankkv.evaluation.settings import UNIFORM
from rankkv.evaluation.sweep.config import NAMED_ALLOCATIONS
from rankkv.utils.files import write_text_atomically


def add_text_arguments(parser: argparse.ArgumentParser, *, samples: int, continuation: int) -> None:
    """Add the arguments that choose the model and cut contexts from texts, with these defaults."""
    add = parser.add_argument
    add("--model", default="embedded", help="hub id, local folder, GGUF file, or embedded")
    add("--texts", action="append", metavar="NAME=PATH", help="a kind of text; default: python-docs")
    add(
        "--part", type=float, nargs=2, default=(0.0, 1.0), help="part of each file that contexts are cut from"
    )
    add("--samples", type=int, default=samples, help="contexts of each kind")
    add("--context", type=int, default=1024, help="tokens of a context")
    add("--continuation", type=int, default=continuation, help="tokens that follow it and are scored")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Loss of a continuation from a compressed context, for every strategy, selector and ratio.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add_text_arguments(parser, samples=20, continuation=256)
    add("--ratios", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.3], help="fractions of the cache kept")
    add("--selectors", nargs="+", default=["snapkv"], help="token selection methods")
    add(
        "--strategies",
        nargs="+",
        default=[UNIFORM, "default", "pyramid", "cake", "whole"],
        help="budgets from",
    )
    add("--scopes", nargs="+", default=[], help="also: power 4 of the rank in each of these scopes")
    add("--aggregations", nargs="+", default=[], help="also: power 4 of the rank, heads joined in these ways")
    add("--exponents", type=float, nargs="+", default=[], help="also: these powers of the rank")
    add("--processes", type=int, default=1, help="worker processes, of one thread each if more than one")
    add("--seed", type=int, default=0, help="where the contexts start, and of the bootstrap")
    add("--output_dir", type=Path, default=Path("results/ablation"), help="where everything goes")
    return parser.parse_args(arguments)


def build_cells(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return every combination as `selector|strategy|ratio` and its options of RankKVCache."""
    strategies = {
        name: dict(NAMED_ALLOCATIONS.get(name, {"strategy": name})) for name in arguments.strategies
    }
    power = {"strategy": "power", "strategy_options": {"exponent": 4.0}}
    strategies |= {f"power 4, {scope}": {**power, "scope": scope} for scope in arguments.scopes}
    strategies |= {f"power 4, {name}": {**power, "aggregation": name} for name in arguments.aggregations}
    strategies |= {
        f"power {exponent:g}": {"strategy": "power", "strategy_options": {"exponent": exponent}}
        for exponent in arguments.exponents
    }
    if UNIFORM not in strategies:
        strategies = {UNIFORM: {"strategy": UNIFORM}, **strategies}
    return {
        f"{selector}|{name}|{ratio:g}": {**options, "selector": selector, "compression_ratio": ratio}
        for selector, (name, options), ratio in itertools.product(
            arguments.selectors, strategies.items(), arguments.ratios
        )
    }


def read_texts(arguments: argparse.Namespace) -> dict[str, str]:
    from rankkv import load_texts

    kinds: dict[str, str] = {}
    for given in arguments.texts or ["python-docs"]:
        name, _, path = given.partition("=")
        texts = load_texts(path or name)
        whole = "\n\n".join(texts)
        low, high = arguments.part
        if not 0.0 <= low < high <= 1.0:
            raise ConfigError(f"--part {low:g} {high:g} must be two growing numbers within [0, 1].")
        kinds[name] = whole[int(len(whole) * low) : int(len(whole) * high)]
    return kinds


def cut_contexts(tokenizer: Any, text: str, arguments: argparse.Namespace) -> list[tuple[int, Any]]:
    """Return (first token, ids [1, token]) of each context and its continuation, evenly spread, none overlapping."""
    import torch

    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    size = arguments.context + arguments.continuation
    room = len(ids) // arguments.samples
    if room < size:
        raise InputError(
            f"a text of {len(ids)} tokens has no room for {arguments.samples} contexts of {size}: lower --samples, "
            "or give more text."
        )
    shift = torch.Generator().manual_seed(arguments.seed)
    starts = [
        index * room + int(torch.randint(room - size + 1, (), generator=shift))
        for index in range(arguments.samples)
    ]
    return [(start, torch.tensor(ids[start : start + size])[None]) for start in starts]


def iterate_contexts(
    store: Any, tokenizer: Any, texts: Mapping[str, str], arguments: argparse.Namespace
) -> Iterator[tuple[str, str, int, int, Any]]:
    """Yield unit, kind, number, first token and ids of each context not scored yet, one of each kind in turn."""
    contexts = {kind: cut_contexts(tokenizer, text, arguments) for kind, text in texts.items()}
    units = [(kind, index) for index in range(arguments.samples) for kind in contexts]
    for kind, index in tqdm(units, unit="context", disable=None):
        unit = f"{kind}-{index:03d}"
        if not store.is_done(unit):
            yield unit, kind, index, *contexts[kind][index]


def score_context(
    model: Any, ids: Any, context: int, cells: dict[str, dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Yield one row a cell; the full cache's loss stands in each."""
    from rankkv.evaluation import evaluate_continuation, record_prefill

    scores = evaluate_continuation(record_prefill(model, ids[:, :context]), ids[:, context:], cells)
    _, full = next(scores)
    for name, score in scores:
        selector, strategy, ratio = name.split("|")
        yield {
            "selector": selector,
            "strategy": strategy,
            "ratio": float(ratio),
            "loss": score.loss,
            "full_loss": full.loss,
            "excess": score.loss - full.loss,
            "divergence": score.divergence,
            "kept_tokens": score.kept_tokens,
            "cache_bytes": score.cache_bytes,
        }


def _work(job: tuple[argparse.Namespace, list[tuple[str, str, int, Any]], bool]) -> int:
    """Score some contexts, in a process of its own or in this one."""
    import torch

    from rankkv import load_model
    from rankkv.evaluation.results import ResultStore

    arguments, units, alone = job
    if not alone:
        torch.set_num_threads(1)
    model, _ = load_model(arguments.model)
    store = ResultStore(arguments.output_dir, describe(arguments))
    cells = build_cells(arguments)
    for unit, kind, start, ids in tqdm(units, unit="text", disable=None):
        rows = score_context(model, ids, arguments.context, cells)
        store.write(unit, [{"kind": kind, "text": unit, "first_token": start, **row} for row in rows])
    return len(units)


def describe(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what decides the numbers: everything but where they go and how many processes there are."""
    record = {key: value for key, value in vars(arguments).items() if key not in ("output_dir", "processes")}
    record["texts"] = [given.partition("=")[0] for given in arguments.texts or ["python-docs"]]
    return record


def summarize(rows: Sequence[dict[str, Any]], seed: int) -> str:
    """Return Markdown tables: excess over the full cache, and the paired difference to uniform budgets."""
    from rankkv.evaluation.statistics import compute_iso_quality_ratio, compute_mean

    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    strategies = list(dict.fromkeys(row["strategy"] for row in rows))
    ratios = sorted({row["ratio"] for row in rows})
    table = {(r["selector"], r["strategy"], r["ratio"], r["text"]): r["excess"] for r in rows}
    texts = {kind: sorted({row["text"] for row in rows if row["kind"] == kind}) for kind in kinds}
    everything = sorted({row["text"] for row in rows})

    def pick(selector: str, strategy: str, ratio: float, names: Iterable[str]) -> list[float]:
        return [table[selector, strategy, ratio, name] for name in names]

    lines = []
    for selector in dict.fromkeys(row["selector"] for row in rows):
        for title, names in [("all texts", everything), *texts.items()]:
            lines += [f"### {selector}, {title} ({len(names)} texts)", ""]
            lines += ["| budgets from | " + " | ".join(f"{ratio:.0%} kept" for ratio in ratios) + " |"]
            lines += ["|---|" + "---|" * len(ratios)]
            for strategy in strategies:
                line = []
                for ratio in ratios:
                    own = pick(selector, strategy, ratio, names)
                    if strategy == UNIFORM:
                        line.append(str(compute_mean(own, seed=seed)))
                        continue
                    uniform = pick(selector, UNIFORM, ratio, names)
                    paired = compute_mean([a - b for a, b in zip(own, uniform, strict=True)], seed=seed)
                    mean = compute_mean(own, seed=seed).mean
                    line.append(f"{mean:.3f} ({paired.mean:+.3f} [{paired.low:+.3f}, {paired.high:+.3f}])")
                lines.append(f"| {strategy} | " + " | ".join(line) + " |")
            lines.append("")
        if 0.2 in ratios and len(ratios) > 1:
            reference = pick(selector, UNIFORM, 0.2, everything)
            lines += [f"### {selector}: share of the cache with the excess of uniform budgets at 20 %", ""]
            lines += ["| budgets from | share |", "|---|---|"]
            for strategy in strategies:
                curve = {ratio: pick(selector, strategy, ratio, everything) for ratio in ratios}
                lines.append(f"| {strategy} | {compute_iso_quality_ratio(curve, reference, seed=seed)} |")
            lines.append("")
    return "\n".join(lines)


def draw(rows: Sequence[dict[str, Any]], folder: Path, source: str = "") -> list[Path]:
    """Draw the excess loss by share kept with 95 % intervals over texts, one panel per selector."""
    from rankkv.evaluation.statistics import compute_mean
    from rankkv.plots import name_budgets, name_selector, plot_quality, save_figure

    curves = {
        f"Tokens selected by {name_selector(selector)}": {
            name_budgets(strategy): [
                (
                    ratio,
                    compute_mean([row["excess"] for row in rows if key(row) == (selector, strategy, ratio)]),
                )
                for ratio in dict.fromkeys(row["ratio"] for row in rows)
            ]
            for strategy in dict.fromkeys(row["strategy"] for row in rows)
        }
        for selector in dict.fromkeys(row["selector"] for row in rows)
    }
    texts = len({row["text"] for row in rows})
    figure = plot_quality(
        curves,
        title="Loss above that of the full cache, nats per token\n"
        + ", ".join(filter(None, [f"mean over {texts} texts with 95 % intervals, lower is better", source])),
        share_axis=True,
    )
    figure.axes[0].set_ylim(bottom=0)
    return save_figure(figure, folder / "figures" / "allocation_ablation")


def key(row: dict[str, Any]) -> tuple[str, str, float]:
    """Return selector, strategy and ratio of a row."""
    return row["selector"], row["strategy"], row["ratio"]


def run(arguments: argparse.Namespace) -> str:
    """Score what is not scored yet, then write rows, summary and figure; return the summary."""
    from rankkv import load_model
    from rankkv.evaluation.results import ResultStore

    for flag in ("samples", "context", "processes"):
        if getattr(arguments, flag) < 1:
            raise ConfigError(f"--{flag} is {getattr(arguments, flag)} but must be at least 1.")
    if arguments.continuation < 2:
        raise ConfigError(f"--continuation is {arguments.continuation} but must be at least 2 tokens.")
    texts = read_texts(arguments)
    store = ResultStore(arguments.output_dir, describe(arguments))
    _, tokenizer = load_model(arguments.model)
    contexts = {kind: cut_contexts(tokenizer, text, arguments) for kind, text in texts.items()}
    # One of each kind at a time, so that what is there of an unfinished run says something of all.
    units = [
        (f"{kind}-{index:03d}", kind, *contexts[kind][index])
        for index in range(arguments.samples)
        for kind in contexts
    ]
    waiting = [unit for unit in units if not store.is_done(unit[0])]
    if len(waiting) < len(units):
        print(f"{len(units) - len(waiting)} of {len(units)} texts are there already", file=sys.stderr)
    if arguments.processes == 1 or len(waiting) < 2:
        _work((arguments, waiting, True))
    else:
        jobs = [
            (arguments, waiting[first :: arguments.processes], False) for first in range(arguments.processes)
        ]
        with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
            pool.map(_work, jobs, chunksize=1)
    return finish(store, arguments, summarize, draw)


def finish(store: Any, arguments: argparse.Namespace, summarize: Any, draw: Any) -> str:
    """Write all rows to one file, their summary and their figure; return the summary."""
    store.join(arguments.output_dir / "rows.parquet")
    rows = store.read()
    summary = summarize(rows, arguments.seed)
    write_text_atomically(arguments.output_dir / "summary.md", summary)
    draw(rows, arguments.output_dir)
    return summary


def main(arguments: list[str] | None = None, parse: Any = parse_arguments, run: Any = run) -> int:
    try:
        print(run(parse(arguments)))
    except RankKVError as error:
        print(format_error(error), file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
