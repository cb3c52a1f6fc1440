"""Compare any options of the cache on held-out text: excess loss of a continuation, with paired intervals.

    python experiments/cache_options.py --texts code=code.txt --part 0.6 1.0 --samples 5 --ratios 0.1 0.2 \\
        --setting 'uniform={"strategy": "uniform"}' --setting 'default={"profile": null}'

Each setting is a name and a JSON object of options of `RankKVCache`; every setting is run at every ratio. `--baselines`
names the settings that the others are compared with (default: the first). One prefill serves all settings of a
context. The script writes Parquet parts (a killed run resumes), `rows.parquet`, and `summary.md` with 95 % intervals
over contexts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from allocation_ablation import add_text_arguments, describe, finish, iterate_contexts, main, read_texts

from rankkv.errors import ConfigError


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Compare any options of the cache: excess loss of a continuation, with paired intervals.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add_text_arguments(parser, samples=5, continuation=256)
    add("--ratios", type=float, nargs="+", default=[0.1, 0.2, 0.3], help="fractions of the cache kept")
    add("--selector", default="snapkv", help="token selection method")
    add(
        "--setting",
        dest="settings",
        action="append",
        required=True,
        metavar="NAME=JSON",
        help="options of RankKVCache",
    )
    add("--baselines", nargs="+", default=[], help="settings to compare with; default: the first setting")
    add("--seed", type=int, default=0, help="of the starts of the contexts and of the bootstrap")
    add("--output_dir", type=Path, default=Path("results/cache_options"), help="folder of the results")
    return parser.parse_args(arguments)


def read_settings(given: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Read `NAME=JSON` strings into a name and options each."""
    settings = {}
    for item in given:
        name, _, text = item.partition("=")
        try:
            options = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(
                f'--setting {item!r} is not NAME=JSON ({error}): give options such as {{"strategy": "uniform"}}.'
            ) from error
        if not isinstance(options, dict) or "|" in name:
            raise ConfigError(f"--setting {item!r} must be a name without '|' and a JSON object of options.")
        settings[name] = options
    return settings


def score_context(model: Any, ids: Any, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield one row per setting and ratio; each row holds the loss with the full cache too."""
    from rankkv.evaluation import evaluate_continuation, record_prefill

    settings = read_settings(arguments.settings)
    cells = {
        f"{name}|{ratio:g}": {**settings[name], "selector": arguments.selector, "compression_ratio": ratio}
        for name, ratio in itertools.product(settings, arguments.ratios)
    }
    record = record_prefill(model, ids[:, : arguments.context])
    scores = evaluate_continuation(record, ids[:, arguments.context :], cells)
    _, full = next(scores)
    for cell, score in scores:
        name, ratio = cell.split("|")
        yield {
            "setting": name,
            "ratio": float(ratio),
            "loss": score.loss,
            "full_loss": full.loss,
            "excess": score.loss - full.loss,
            "divergence": score.divergence,
            "kept_tokens": score.kept_tokens,
            "cache_bytes": score.cache_bytes,
        }


def summarize(rows: Sequence[dict[str, Any]], seed: int, baselines: Sequence[str] = ()) -> str:
    """Return Markdown tables: excess loss, and the paired difference to each baseline."""
    from rankkv.evaluation.statistics import compute_mean

    settings = list(dict.fromkeys(row["setting"] for row in rows))
    ratios = sorted({row["ratio"] for row in rows})
    lines = []
    kinds = [None, *dict.fromkeys(row["kind"] for row in rows)]
    for base, kind in itertools.product(baselines or settings[:1], kinds):
        texts = sorted({row["text"] for row in rows if kind in (None, row["kind"])})
        table: dict[tuple[str, float], list[float]] = {}
        for row in sorted(rows, key=lambda row: row["text"]):
            if row["text"] in texts:
                table.setdefault((row["setting"], row["ratio"]), []).append(row["excess"])
        lines += [f"### {kind or 'all texts'} ({len(texts)} contexts); in brackets, minus {base}", ""]
        lines += ["| setting | " + " | ".join(f"{ratio:.0%} kept" for ratio in ratios) + " |"]
        lines += ["|---|" + "---|" * len(ratios)]
        for setting in settings:
            line = []
            for ratio in ratios:
                own = compute_mean(table[setting, ratio], seed=seed)
                if setting == base:
                    line.append(str(own))
                    continue
                pairs = zip(table[setting, ratio], table[base, ratio], strict=True)
                paired = compute_mean([a - b for a, b in pairs], seed=seed)
                line.append(f"{own.mean:.3f} ({paired:+})")
            lines.append(f"| {setting} | " + " | ".join(line) + " |")
        lines.append("")
    return "\n".join(lines)


def run(arguments: argparse.Namespace) -> str:
    """Score the contexts that have no rows yet, then write rows and summary; return the summary."""
    from rankkv import load_model
    from rankkv.evaluation.results import ResultStore

    if arguments.samples < 1 or arguments.continuation < 2:
        raise ConfigError(
            f"--samples {arguments.samples} must be at least 1 and --continuation {arguments.continuation} at least 2."
        )
    settings = read_settings(arguments.settings)
    unknown = [name for name in arguments.baselines if name not in settings]
    if unknown:
        raise ConfigError(f"--baselines {unknown[0]!r} must be one of the settings: {', '.join(settings)}.")
    texts = read_texts(arguments)
    store = ResultStore(arguments.output_dir, describe(arguments))
    model, tokenizer = load_model(arguments.model)
    for unit, kind, _, start, ids in iterate_contexts(store, tokenizer, texts, arguments):
        rows = score_context(model, ids, arguments)
        store.write(unit, [{"kind": kind, "text": unit, "first_token": start, **row} for row in rows])
    summary = partial(summarize, baselines=arguments.baselines)
    return finish(store, arguments, summary, lambda rows, folder: [])


if __name__ == "__main__":
    sys.exit(main(parse=parse_arguments, run=run))
