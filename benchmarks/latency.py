"""TTFT, TPOT and KV bytes of RankKV against plain ``generate()``, interleaved in one process.

python -m benchmarks.latency --tokens 2048 --repeats 5
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import DynamicCache

from benchmarks.common import build_prompt, compute_ratio, print_rows, publish, summarize_seconds
from benchmarks.stepping import Step, measure_linears, step_in_turn
from rankkv import RankKVCache, load_model
from rankkv.analysis.generation import analyze_generation
from rankkv.cache.prefill import run_prefill


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
        measure(model, tokenizer, tokens, ratio, options.new_tokens, options.repeats, power=True)
        for tokens in options.tokens
        for ratio in options.compression_ratios
    ]
    print_latencies(rows)
    publish("latency", rows, options.output)


def print_latencies(rows: list[dict[str, Any]]) -> None:
    """Print ratios with their intervals, those of CPU time beside those of the wall clock."""
    flat = [
        {
            "tokens": row["tokens"],
            "kept": row["compression_ratio"],
            "TTFT_plain_s": row["plain_ttft"]["median_seconds"],
            "TTFT_ratio": _show(row["ttft_ratio"]),
            "TTFT_ratio_CPU": _show(row["ttft_cpu_ratio"]),
            "power_of_the_rank": _show(row["power_ttft_ratio"]) if "power_ttft" in row else "",
            "the_same_CPU": _show(row["power_ttft_cpu_ratio"]) if "power_ttft" in row else "",
            "TPOT_plain_ms": 1000 * row["plain_tpot"]["median_seconds"],
            "TPOT_ratio": _show(row["tpot_ratio"]),
            "KV_bytes": row["cache_bytes"] / row["full_cache_bytes"],
        }
        for row in rows
    ]
    forms = ["{}", "{:.0%}", "{:.2f}", "{}", "{}", "{}", "{}", "{:.1f}", "{}", "{:.1%}"]
    print_rows(
        "RankKV (snapkv, default budgets without a profile) against plain generate()",
        flat,
        dict(zip(flat[0], forms, strict=True)),
    )


def _show(ratio: dict[str, float]) -> str:
    return "{ratio:.3f} [{low:.3f}, {high:.3f}]".format(**ratio)


def measure(
    model: Any,
    tokenizer: Any,
    tokens: int,
    ratio: float,
    new_tokens: int,
    repeats: int,
    warm_ups: int = 1,
    power: bool = False,
    single_steps: int = 0,
) -> dict[str, Any]:
    """TTFT and TPOT of plain ``generate()`` and RankKV, in turn; their ratios are those of neighbouring runs.

    ``power`` adds the TTFT with budgets by the fourth power of the evictable rank; ``single_steps`` so many decode
    steps beside those of a plain cache whose prompt is as long as what RankKV kept.
    """
    input_ids = build_prompt(tokenizer, tokens)
    caches: dict[str, Callable[[], Any]] = {
        "plain": lambda: DynamicCache(config=model.config),
        # Without the profile that is shipped for some models: measuring ranks and errors is what may cost time.
        "rankkv": lambda: RankKVCache(model, ratio, profile=None),
    }
    if power:
        caches["power"] = lambda: RankKVCache(
            model, ratio, profile=None, strategy="power", strategy_options={"exponent": 4.0}
        )
    records: dict[str, list[Any]] = {name: [] for name in caches}
    cpu: dict[str, list[list[float]]] = {name: [] for name in caches}
    used: dict[str, Any] = {}
    for turn in range(-warm_ups, repeats):
        # In turn, and the other way round every second time: a drifting machine hits both alike.
        for name in list(caches) if turn % 2 == 0 else list(caches)[::-1]:
            # Of a way whose decode steps are not compared, only the first token is needed.
            count = 1 if name == "power" else new_tokens
            times = [time.process_time()]
            used[name] = caches[name]()
            record = analyze_generation(
                model,
                input_ids,
                used[name],
                count,
                on_token=lambda _, times=times: times.append(time.process_time()),
                min_new_tokens=count,
            )
            print(
                f"{tokens} tokens, {'warm-up' if turn < 0 else f'run {turn + 1}'}, {name}: "
                f"TTFT {record.ttft_seconds:.2f} s ({times[1] - times[0]:.2f} s CPU), "
                f"TPOT {1000 * record.tpot_seconds:.1f} ms",
                file=sys.stderr,
                flush=True,
            )
            if turn >= 0:
                records[name].append(record)
                cpu[name].append(times)
    ours = records["rankkv"][-1]
    row: dict[str, Any] = {
        "tokens": tokens,
        "compression_ratio": ratio,
        "new_tokens": new_tokens,
        "cache_bytes": ours.cache_bytes,
        "full_cache_bytes": ours.full_cache_bytes,
        "prompt_slots_kept": sum(ours.budgets),
        "prompt_slots": tokens * len(ours.budgets),
    }
    wall_first = {name: [record.ttft_seconds for record in runs] for name, runs in records.items()}
    cpu_first = {name: [times[1] - times[0] for times in runs] for name, runs in cpu.items()}
    wall_each = {name: [record.tpot_seconds for record in runs] for name, runs in records.items()}
    cpu_each = {
        name: [(times[-1] - times[1]) / max(1, len(times) - 2) for times in runs]
        for name, runs in cpu.items()
    }
    for name in caches:
        row[f"{name}_ttft"] = summarize_seconds(wall_first[name])
        row[f"{name}_ttft_cpu"] = summarize_seconds(cpu_first[name])
        if name != "power":
            row[f"{name}_tpot"] = summarize_seconds(wall_each[name])
            row[f"{name}_tpot_cpu"] = summarize_seconds(cpu_each[name])
    for prefix, name in (("", "rankkv"), ("power_", "power")):
        if name in caches:
            row[f"{prefix}ttft_ratio"] = compute_ratio(wall_first[name], wall_first["plain"])
            row[f"{prefix}ttft_cpu_ratio"] = compute_ratio(cpu_first[name], cpu_first["plain"])
    row["tpot_ratio"] = compute_ratio(wall_each["rankkv"], wall_each["plain"])
    row["tpot_cpu_ratio"] = compute_ratio(cpu_each["rankkv"], cpu_each["plain"])
    if single_steps:
        row["beside_kept_length"] = compare_steps(
            model, input_ids, used["rankkv"], tokens + new_tokens - 1, row, single_steps
        )
    return row


def compare_steps(
    model: Any, input_ids: Tensor, cache: Any, past: int, row: dict[str, Any], count: int
) -> dict[str, Any]:
    """Decode with a compressed cache, and in turn with a plain one whose prompt is as long as what is kept.

    Both read as many bytes, so what is more than 1 is RankKV's own; the share of the linear layers is torch's.
    """
    kept = round(row["prompt_slots_kept"] * input_ids.shape[1] / row["prompt_slots"])
    plain = DynamicCache(config=model.config)
    run_prefill(model, plain, input_ids[:, :kept])
    steps = {"plain": Step(model, plain, kept), "rankkv": Step(model, cache, past)}
    found = step_in_turn(steps, count, against="plain")
    linear_seconds, linear_cpu_seconds = measure_linears(model)
    return {
        "plain_tokens": kept,
        "steps": count,
        **found["rankkv"],
        "plain_tpot_cpu_seconds": found["plain"]["tpot_cpu_seconds"],
        "linear_share": linear_seconds / found["rankkv"]["tpot_seconds"],
        "linear_share_cpu": linear_cpu_seconds / found["rankkv"]["tpot_cpu_seconds"],
    }


if __name__ == "__main__":
    main()
