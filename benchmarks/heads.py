"""What budgets of heads cost: prefill and decode steps with them, without them, and with the plain cache, in turn.

python -m benchmarks.heads --tokens 2048 --ratios 0.1 0.3 --steps 20

CPU time is what tells, on a machine that others use too.  Nothing is calibrated: the heads' errors are those of the
prompt.
"""

from __future__ import annotations

import argparse
from typing import Any

from transformers import DynamicCache

from benchmarks.common import build_prompt, compute_ratio, print_rows, publish, time_both
from benchmarks.stepping import Step, step_in_turn
from rankkv import RankKVCache, load_model
from rankkv.cache.prefill import run_prefill


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.3], help="fractions kept")
    parser.add_argument("--steps", type=int, default=20, help="decode steps of each cache")
    parser.add_argument("--prefills", type=int, default=3, help="prefills of each cache")
    parser.add_argument("--output", default="results/bench.json")
    options = parser.parse_args()
    model, tokenizer = load_model(options.model)
    input_ids = build_prompt(tokenizer, options.tokens)
    rows = [row for ratio in options.ratios for row in measure(model, input_ids, ratio, options)]
    shown = "{0[ratio]:.3f} [{0[low]:.3f}, {0[high]:.3f}]"
    print_rows(
        "Budgets of heads: CPU time over that of the plain cache, and of equal heads",
        rows,
        {
            "tokens": "{}",
            "compression_ratio": "{}",
            "heads": "{}",
            "prefill_cpu_ratio": shown,
            "step_cpu_ratio": shown,
            "step_over_equal": shown,
        },
    )
    publish("heads", rows, options.output)


def measure(model: Any, input_ids: Any, ratio: float, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Prefill and step the plain cache, equal heads and heads by their errors, in turn."""
    builders = {
        "plain": lambda: DynamicCache(config=model.config),
        "equal": lambda: RankKVCache(model, ratio, profile=None, head_budgets=None),
        "distortion": lambda: RankKVCache(model, ratio, profile=None, head_budgets="distortion"),
    }
    prefills: dict[str, list[float]] = {name: [] for name in builders}
    caches = {}
    for turn in range(options.prefills):
        for name in list(builders) if turn % 2 == 0 else list(builders)[::-1]:
            cache = caches[name] = builders[name]()
            _, cpu = time_both(lambda cache=cache: run_prefill(model, cache, input_ids))
            prefills[name].append(cpu)
    steps = {name: Step(model, cache, input_ids.shape[1]) for name, cache in caches.items()}
    over_plain = step_in_turn(steps, options.steps, against="plain")
    over_equal = step_in_turn(steps, options.steps, against="equal")
    return [
        {
            "tokens": options.tokens,
            "compression_ratio": ratio,
            "heads": name,
            "prefill_cpu_ratio": compute_ratio(prefills[name], prefills["plain"]),
            "step_cpu_ratio": over_plain[name]["tpot_cpu_ratio"],
            "step_over_equal": over_equal[name]["tpot_cpu_ratio"],
        }
        for name in ("equal", "distortion")
    ]


if __name__ == "__main__":
    main()
