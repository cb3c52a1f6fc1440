"""Decoding with ``torch.compile`` and ``decode="bounded"``, where each layer's length stays what its budget says.

python -m benchmarks.compiled --tokens 1024 --compression_ratio 0.3 --steps 24

Both models are one and the same; a copy of one compressed cache is stepped eagerly and compiled, in turn, a step at a
time. Graphs that are compiled after the first steps are recompilations.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch._dynamo.utils import counters

from benchmarks.common import build_prompt, print_rows, publish
from benchmarks.stepping import Step, step_in_turn
from rankkv import RankKVCache, load_model
from rankkv.cache.prefill import run_prefill

#: Steps before graphs are counted again; the first compiles, and a second graph may follow for flags that change once.
_FIRST_STEPS = 4


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--compression_ratio", type=float, default=0.3)
    parser.add_argument("--steps", type=int, default=24, help="compared steps, after the first few")
    parser.add_argument(
        "--recompile_limit", type=int, default=256, help="graphs of one function; torch's own limit is 8"
    )
    parser.add_argument("--output", default="results/bench.json")
    options = parser.parse_args()
    model, tokenizer = load_model(options.model)
    rows = [measure(model, tokenizer, options)]
    print_rows(
        "Decode steps with torch.compile, bounded mode",
        rows,
        {
            "compile_seconds": "{:.1f}",
            "graphs": "{}",
            "graph_breaks": "{}",
            "recompiled": "{}",
            "tpot_ratio": "{0[ratio]:.3f} [{0[low]:.3f}, {0[high]:.3f}]",
            "tpot_cpu_ratio": "{0[ratio]:.3f} [{0[low]:.3f}, {0[high]:.3f}]",
        },
    )
    publish("compiled", rows, options.output)


def measure(model: Any, tokenizer: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Compile, count graphs, then time eager and compiled steps in turn."""
    torch._dynamo.reset()
    counters.clear()
    # Heads of different lengths are padded to the longest, which changes from step to step.
    cache = RankKVCache(model, options.compression_ratio, decode="bounded", head_budgets=None)
    input_ids = build_prompt(tokenizer, options.tokens)
    run_prefill(model, cache, input_ids)
    other = cache.copy()
    eager = Step(model, cache, options.tokens)
    with torch._dynamo.config.patch(recompile_limit=options.recompile_limit):
        compiled = Step(torch.compile(model), other, options.tokens)
        start = time.perf_counter()
        for _ in range(_FIRST_STEPS):
            compiled()
        compile_seconds = time.perf_counter() - start
        graphs = counters["stats"]["unique_graphs"]
        for _ in range(_FIRST_STEPS):
            eager()
        ratios = step_in_turn({"compiled": compiled, "eager": eager}, options.steps, against="eager")[
            "compiled"
        ]
        later = counters["stats"]["unique_graphs"]
    return {
        "tokens": options.tokens,
        "compression_ratio": options.compression_ratio,
        "steps": options.steps,
        "compile_seconds": compile_seconds,
        "graphs": graphs,
        "recompiled": later - graphs,
        "graph_breaks": sum(counters["graph_break"].values()),
        "break_reasons": {str(why).split("\n")[0]: count for why, count in counters["graph_break"].items()},
        "same_tokens": compiled.tokens == eager.tokens,
        **ratios,
    }


if __name__ == "__main__":
    main()
