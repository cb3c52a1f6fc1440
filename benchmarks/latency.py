"""TTFT, TPOT and KV bytes of RankKV against plain ``generate()``, interleaved in one process.

python -m benchmarks.latency --tokens 2048 --repeats 5
"""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import DynamicCache

from benchmarks.common import build_prompt, compute_ratio, publish, summarize_seconds
from rankkv import RankKVCache, load_model
from rankkv.generation import analyze_generation


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048])
    parser.add_argument("--compression_ratio", type=float, default=0.3)
    parser.add_argument("--new_tokens", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", default="results/bench.json")
    options = parser.parse_args()
    console = Console(stderr=True)
    model, tokenizer = load_model(options.model)
    rows = [_measure(model, tokenizer, tokens, options, console) for tokens in options.tokens]
    table = Table(title="RankKV (snapkv, evictable rank) against plain generate()")
    for heading in (
        "tokens",
        "TTFT plain s",
        "TTFT ratio [95%]",
        "TPOT plain ms",
        "TPOT ratio [95%]",
        "KV bytes kept",
    ):
        table.add_column(heading, justify="right")
    for row in rows:
        ttft, tpot = row["ttft_ratio"], row["tpot_ratio"]
        table.add_row(
            str(row["tokens"]),
            f"{row['plain_ttft']['median_seconds']:.2f}",
            f"{ttft['ratio']:.3f} [{ttft['low']:.3f}, {ttft['high']:.3f}]",
            f"{1000 * row['plain_tpot']['median_seconds']:.1f}",
            f"{tpot['ratio']:.3f} [{tpot['low']:.3f}, {tpot['high']:.3f}]",
            f"{row['cache_bytes'] / row['full_cache_bytes']:.1%}",
        )
    console.print(table)
    publish("latency", rows, options.output)


def _measure(
    model: Any, tokenizer: Any, tokens: int, options: argparse.Namespace, console: Console
) -> dict[str, Any]:
    input_ids = build_prompt(tokenizer, tokens)
    caches = {
        "plain": lambda: DynamicCache(config=model.config),
        "rankkv": lambda: RankKVCache(model, options.compression_ratio),
    }
    records: dict[str, list[Any]] = {name: [] for name in caches}
    for turn in range(-1, options.repeats):
        # In turn, and the other way round every second time: a drifting machine hits both alike.
        for name in list(caches) if turn % 2 == 0 else list(caches)[::-1]:
            record = analyze_generation(
                model, input_ids, caches[name](), options.new_tokens, min_new_tokens=options.new_tokens
            )
            console.print(
                f"{tokens} tokens, {'warm-up' if turn < 0 else f'run {turn + 1}'}, {name}: "
                f"TTFT {record.ttft_seconds:.2f} s, TPOT {1000 * record.tpot_seconds:.1f} ms"
            )
            if turn >= 0:
                records[name].append(record)
    plain, ours = records["plain"], records["rankkv"]
    return {
        "tokens": tokens,
        "compression_ratio": options.compression_ratio,
        "new_tokens": options.new_tokens,
        "plain_ttft": summarize_seconds([r.ttft_seconds for r in plain]),
        "rankkv_ttft": summarize_seconds([r.ttft_seconds for r in ours]),
        "ttft_ratio": compute_ratio([r.ttft_seconds for r in ours], [r.ttft_seconds for r in plain]),
        "plain_tpot": summarize_seconds([r.tpot_seconds for r in plain]),
        "rankkv_tpot": summarize_seconds([r.tpot_seconds for r in ours]),
        "tpot_ratio": compute_ratio([r.tpot_seconds for r in ours], [r.tpot_seconds for r in plain]),
        "cache_bytes": ours[0].cache_bytes,
        "full_cache_bytes": ours[0].full_cache_bytes,
        "prompt_slots_kept": sum(ours[0].budgets),
        "prompt_slots": tokens * len(ours[0].budgets),
    }


if __name__ == "__main__":
    main()
