"""Prefill and decode steps of RankKV beside those of a plain cache: CPU time, in turn in one process.

    OMP_NUM_THREADS=1 python -m benchmarks.speed decode --tokens 2048 --ratios 0.3 --steps 40
    OMP_NUM_THREADS=1 python -m benchmarks.speed prefill --tokens 2048 --repeats 7

A ratio is that of two neighbouring runs; each row gives the median ratio and its quartiles.  CPU time is what tells, on
a machine that others use too.  Nothing is calibrated: `profile=None`, but for the row of a profile.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from benchmarks.common import build_prompt, print_rows, publish, time_both
from benchmarks.stepping import Step, time_in_turn
from rankkv import RankKVCache, load_model
from rankkv.cache.prefill import run_prefill

#: Name of each kind of cache, and its options of RankKVCache; None is the plain cache.
PREFILLS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "default without a profile": {"profile": None},
    "head_budgets=None": {"profile": None, "head_budgets": None},
    "strategy='uniform'": {"profile": None, "strategy": "uniform", "head_budgets": None},
    "the shipped profile": {},
}
_SHOWN = "{0[ratio]:.3f} [{0[low]:.3f}, {0[high]:.3f}]"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["decode", "prefill"])
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.3], help="fractions kept")
    parser.add_argument("--steps", type=int, default=40, help="decode steps of each cache")
    parser.add_argument("--repeats", type=int, default=7, help="prefills of each cache")
    parser.add_argument("--output", default="results/speed.json")
    options = parser.parse_args()
    model, tokenizer = load_model(options.model)
    measure = measure_decode if options.what == "decode" else measure_prefill
    rows = [
        row
        for tokens in options.tokens
        for ratio in options.ratios
        for row in measure(model, build_prompt(tokenizer, tokens), ratio, options)
    ]
    columns = [name for name in rows[0] if isinstance(rows[0][name], dict)]
    print_rows(
        f"{options.what}: CPU time as a ratio",
        [{**row, "over": row.get("over", "plain")} for row in rows],
        {"tokens": "{}", "kept": "{}", "cache": "{}", **dict.fromkeys(columns, _SHOWN)},
    )
    publish(f"{options.what} {'+'.join(map(str, options.tokens))}", rows, options.output)


def compute_quartiles(seconds: list[float], base: list[float]) -> dict[str, float]:
    """Median and quartiles of the ratios of neighbouring runs."""
    low, middle, high = np.percentile(np.array(seconds) / np.array(base), [25, 50, 75])
    return {"ratio": float(middle), "low": float(low), "high": float(high)}


def measure_decode(
    model: Any, input_ids: torch.Tensor, ratio: float, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Decode with each cache in turn; over the plain cache, and over a plain one as long as what is kept."""
    tokens = input_ids.shape[1]
    caches: dict[str, Any] = {
        "plain": DynamicCache(config=model.config),
        "everything kept": RankKVCache(model, 1.0, profile=None, head_budgets=None),
        "head_budgets=None": RankKVCache(model, ratio, profile=None, head_budgets=None),
        "default without a profile": RankKVCache(model, ratio, profile=None),
    }
    for cache in caches.values():
        run_prefill(model, cache, input_ids)
    steps = {name: Step(model, cache, tokens) for name, cache in caches.items()}
    short, kept = DynamicCache(config=model.config), round(ratio * tokens)
    run_prefill(model, short, input_ids[:, :kept])
    steps["plain, as long as what is kept"] = Step(model, short, kept)
    _, cpu = time_in_turn(steps, options.steps)  # type: ignore[arg-type]
    return [
        {
            "tokens": tokens,
            "kept": ratio if "kept" not in name else 1.0,
            "cache": name,
            "steps": options.steps,
            "over_plain": compute_quartiles(cpu[name], cpu["plain"]),
            "over_plain_of_kept_length": compute_quartiles(cpu[name], cpu["plain, as long as what is kept"]),
        }
        for name in caches
        if name != "plain"
    ]


def measure_prefill(
    model: Any, input_ids: torch.Tensor, ratio: float, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Prefill each cache in turn; over the plain cache."""
    seconds: dict[str, list[float]] = {name: [] for name in PREFILLS}
    for turn in range(-1, options.repeats):
        for name in list(PREFILLS) if turn % 2 == 0 else list(PREFILLS)[::-1]:
            given = PREFILLS[name]
            cache: Any = (
                DynamicCache(config=model.config) if given is None else RankKVCache(model, ratio, **given)
            )
            _, cpu = time_both(lambda cache=cache: run_prefill(model, cache, input_ids))
            print(f"{input_ids.shape[1]} tokens, {name}: {cpu:.2f} s CPU", file=sys.stderr, flush=True)
            if turn >= 0:
                seconds[name].append(cpu)
    return [
        {
            "tokens": input_ids.shape[1],
            "kept": ratio,
            "cache": name,
            "repeats": options.repeats,
            "over_plain": compute_quartiles(seconds[name], seconds["plain"]),
        }
        for name in PREFILLS
        if name != "plain"
    ]


if __name__ == "__main__":
    main()
