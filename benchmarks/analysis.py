"""Time and peak extra memory of ``RankKVAnalyzer.analyze`` against a plain prefill of the same prompt.

python -m benchmarks.analysis --tokens 2048 8192 --scopes evictable full
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import DynamicCache

from benchmarks.common import build_prompt, publish, read_peak_memory, reset_peak_memory
from rankkv import RankKVAnalyzer, load_model
from rankkv.generation import run_prefill


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048])
    parser.add_argument("--scopes", nargs="+", default=["evictable", "full"])
    parser.add_argument("--output", default="results/bench.json")
    options = parser.parse_args()
    console = Console(stderr=True)
    model, tokenizer = load_model(options.model)
    rows = []
    for tokens in options.tokens:
        input_ids = build_prompt(tokenizer, tokens)
        run_prefill(model, DynamicCache(config=model.config), input_ids[:, :256])
        plain = _measure(lambda ids=input_ids: run_prefill(model, DynamicCache(config=model.config), ids))
        for scope in options.scopes:
            analyzer = RankKVAnalyzer(model, scope=scope)
            found = _measure(lambda ids=input_ids, analyzer=analyzer: analyzer.analyze(ids))
            rows.append(
                {
                    "tokens": tokens,
                    "scope": scope,
                    "plain_seconds": plain["seconds"],
                    "analyze_seconds": found["seconds"],
                    "ratio": found["seconds"] / plain["seconds"],
                    "plain_peak_extra_bytes": plain["peak_extra_bytes"],
                    "analyze_peak_extra_bytes": found["peak_extra_bytes"],
                }
            )
            console.print(rows[-1])
    table = Table(title="analyze() against a plain prefill")
    for heading in (
        "tokens",
        "scope",
        "prefill s",
        "analyze s",
        "ratio",
        "prefill peak MiB",
        "analyze peak MiB",
    ):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            str(row["tokens"]),
            row["scope"],
            f"{row['plain_seconds']:.1f}",
            f"{row['analyze_seconds']:.1f}",
            f"{row['ratio']:.2f}",
            f"{row['plain_peak_extra_bytes'] / 2**20:.0f}",
            f"{row['analyze_peak_extra_bytes'] / 2**20:.0f}",
        )
    console.print(table)
    publish("analysis", rows, options.output)


def _measure(run: Callable[[], Any]) -> dict[str, float]:
    gc.collect()
    held = reset_peak_memory()
    start = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - start
    del result
    return {"seconds": seconds, "peak_extra_bytes": read_peak_memory() - held}


if __name__ == "__main__":
    main()
