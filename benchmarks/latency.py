"""TTFT, TPOT and KV bytes of RankKV against plain ``generate()``, interleaved in one process.

python -m benchmarks.latency --tokens 2048 --repeats 5
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from transformers import DynamicCache

from benchmarks.common import build_prompt, compute_ratio, print_rows, publish, summarize_seconds
from rankkv import RankKVCache, load_model
from rankkv.generation import analyze_generation


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048])
    parser.add_argument("--compression_ratios", type=float, nargs="+", default=[0.3])
    parser.add_argument("--new_tokens", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", default="results/bench.json")
    options = parser.parse_args()
    model, tokenizer = load_model(options.model)
    rows = [
        measure(model, tokenizer, tokens, ratio, options.new_tokens, options.repeats)
        for tokens in options.tokens
        for ratio in options.compression_ratios
    ]
    print_latencies(rows)
    publish("latency", rows, options.output)


def print_latencies(rows: list[dict[str, Any]]) -> None:
    """Print ratios with their intervals."""
    flat = [
        {
            "tokens": row["tokens"],
            "kept": row["compression_ratio"],
            "TTFT_plain_s": row["plain_ttft"]["median_seconds"],
            "TTFT_ratio": "{ratio:.3f} [{low:.3f}, {high:.3f}]".format(**row["ttft_ratio"]),
            "TPOT_plain_ms": 1000 * row["plain_tpot"]["median_seconds"],
            "TPOT_ratio": "{ratio:.3f} [{low:.3f}, {high:.3f}]".format(**row["tpot_ratio"]),
            "KV_bytes": row["cache_bytes"] / row["full_cache_bytes"],
        }
        for row in rows
    ]
    forms = ["{}", "{:.0%}", "{:.2f}", "{}", "{:.1f}", "{}", "{:.1%}"]
    print_rows(
        "RankKV (snapkv, evictable rank) against plain generate()",
        flat,
        dict(zip(flat[0], forms, strict=True)),
    )


def measure(
    model: Any, tokenizer: Any, tokens: int, ratio: float, new_tokens: int, repeats: int, warm_ups: int = 1
) -> dict[str, Any]:
    """TTFT and TPOT of both, in turn; their ratios are those of neighbouring runs."""
    input_ids = build_prompt(tokenizer, tokens)
    caches = {
        "plain": lambda: DynamicCache(config=model.config),
        "rankkv": lambda: RankKVCache(model, ratio),
    }
    records: dict[str, list[Any]] = {name: [] for name in caches}
    for turn in range(-warm_ups, repeats):
        # In turn, and the other way round every second time: a drifting machine hits both alike.
        for name in list(caches) if turn % 2 == 0 else list(caches)[::-1]:
            record = analyze_generation(
                model, input_ids, caches[name](), new_tokens, min_new_tokens=new_tokens
            )
            print(
                f"{tokens} tokens, {'warm-up' if turn < 0 else f'run {turn + 1}'}, {name}: "
                f"TTFT {record.ttft_seconds:.2f} s, TPOT {1000 * record.tpot_seconds:.1f} ms",
                file=sys.stderr,
                flush=True,
            )
            if turn >= 0:
                records[name].append(record)
    plain, ours = records["plain"], records["rankkv"]
    return {
        "tokens": tokens,
        "compression_ratio": ratio,
        "new_tokens": new_tokens,
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
