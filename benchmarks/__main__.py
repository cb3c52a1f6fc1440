"""The small set of all benchmarks in one process, and the table of targets: ``python -m benchmarks``.

Takes less than ten minutes on two quiet CPU cores; ``--long`` makes more runs, and adds ``analyze()`` at 8,192.
"""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import analysis, latency, memory, scaling, throughput
from benchmarks.common import count_weight_bytes, measure_bandwidth, publish_all
from benchmarks.targets import evaluate_targets
from rankkv import load_model


def main() -> None:
    """Measure everything, print the targets, write the results once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--output", default="results/bench.json")
    options = parser.parse_args()
    model, tokenizer = load_model(options.model)
    repeats = 7 if options.long else 5
    found: dict[str, list[dict[str, Any]]] = {}
    # First, since memory that a longer run freed would be taken again, and count as none.
    found["analysis"] = analysis.measure(model, tokenizer, [2048], ["evictable", "full", analysis.EAGER_WAY])
    # Tokens, fraction kept, new tokens, runs, other options: one or two turns at the longer prompts in the small set.
    once, few = (3, 4) if options.long else (1, 2)
    plan: list[tuple[int, float, int, int, dict[str, Any]]] = [
        (2048, 0.3, 16, repeats, {"power": True}),
        (1024, 1.0, 32, repeats, {}),
        (4096, 0.3, 8, few, {"power": True, "warm_ups": 0}),
        (8000, 0.1, 24, once, {"power": True, "warm_ups": 0, "single_steps": 60}),
    ]
    found["latency"] = [latency.measure(model, tokenizer, *settings, **more) for *settings, more in plan]
    latency.print_latencies(found["latency"])
    found["traffic"] = [compare_with_traffic(model, found["latency"][-1])]
    found["memory"] = memory.measure(model, tokenizer, [4096], [0.1])
    found["throughput"] = throughput.measure(model, tokenizer, 1024, 8, 0.1, plain_rows=2, repeats=3)
    found["scaling"] = scaling.measure(model, repeats=5)
    found["h2o"] = scaling.measure_h2o(model, tokenizer, 8000)
    if options.long:
        found["analysis"] += analysis.measure(model, tokenizer, [8192], ["evictable", "full"])
    found["targets"] = evaluate_targets(found)
    print_targets(found["targets"])
    publish_all(found, options.output)


def compare_with_traffic(model: Any, row: dict[str, Any]) -> dict[str, Any]:
    """Set the time of a decode step beside that of reading its bytes once, at the bandwidth measured here."""
    weights, bandwidth = count_weight_bytes(model), measure_bandwidth()
    bound = (weights + row["cache_bytes"]) / bandwidth
    return {
        "tokens": row["tokens"],
        "compression_ratio": row["compression_ratio"],
        "weight_bytes": weights,
        "cache_bytes": row["cache_bytes"],
        "bytes_per_second": bandwidth,
        "bound_seconds": bound,
        "tpot_seconds": row["rankkv_tpot"]["median_seconds"],
        "plain_tpot_seconds": row["plain_tpot"]["median_seconds"],
        "tpot_over_bound": row["rankkv_tpot"]["median_seconds"] / bound,
        # All linear layers once on one row, alone: what no cache changes.
        "linear_share": row["beside_kept_length"]["linear_share"],
    }


def print_targets(rows: list[dict[str, Any]]) -> None:
    """Print the table of targets on stderr, with the reason where one is not met."""
    table = Table(title="Targets, as ratios in one run")
    for heading in ("what", "against", "target", "measured", "met"):
        table.add_column(heading)
    for row in rows:
        interval = "" if row["low"] is None else f" [{row['low']:.3f}, {row['high']:.3f}]"
        verdict = "yes" if row["met"] else f"no: {row['reason']}"
        table.add_row(row["what"], row["against"], row["target"], f"{row['ratio']:.3f}{interval}", verdict)
    Console(stderr=True).print(table)


if __name__ == "__main__":
    main()
