"""Time to first token of RankKV against kvpress' SnapKVPress and a plain cache, in turn in one process.

Runs where kvpress is installed (`make bench-peers`):

python -m benchmarks.peers.ttft --tokens 2048 --repeats 7

One run is what a user waits for: build the cache, one forward over the prompt with the compression in it, and the first
token's id.  Same model, same prompt, the same mean number of tokens kept a layer; budgets by the fourth power of the
rank, and the default ones of a model without a profile.  Ratios of CPU time, which other programs do not lengthen,
stand beside those of the wall clock.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import kvpress
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache

from benchmarks.common import build_prompt, compute_ratio, publish, summarize_seconds, time_interleaved_both
from rankkv import RankKVCache, load_model
from rankkv.models.compat import cache_argument


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048])
    parser.add_argument("--compression_ratio", type=float, default=0.3, help="fraction of the cache kept")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", default="results/bench.json")
    options = parser.parse_args()
    model, tokenizer = load_model(options.model)
    rows = [_measure(model, tokenizer, tokens, options) for tokens in options.tokens]
    table = Table(title=f"TTFT beside kvpress {version('kvpress')}, {options.compression_ratio:.0%} kept")
    for heading in ("tokens", "budgets", "against", "wall", "CPU time"):
        table.add_column(heading, justify="right")
    for row in rows:
        for name, title in (("power", "power of the rank"), ("rankkv", "default")):
            for other in ("snapkv_press", "plain"):
                shown = (
                    "{ratio:.3f} [{low:.3f}, {high:.3f}]".format(**row[f"{name}_{clock}ratio_to_{other}"])
                    for clock in ("", "cpu_")
                )
                table.add_row(str(row["tokens"]), title, other, *shown)
    Console(stderr=True).print(table)
    publish("peers_ttft", rows, options.output)


def _measure(model: Any, tokenizer: Any, tokens: int, options: argparse.Namespace) -> dict[str, Any]:
    input_ids = build_prompt(tokenizer, tokens).to(model.device)
    kept = options.compression_ratio
    slots: dict[str, int] = {}

    def run(name: str, cache: Any) -> None:
        _take_first_token(model, input_ids, cache)
        own = getattr(cache, "kept_lengths", None)
        slots[name] = sum(layer.keys.shape[-2] for layer in cache.layers) if own is None else sum(own)

    def run_press() -> None:
        # The same window and pooling width as RankKV's default.
        with kvpress.SnapKVPress(1.0 - kept, window_size=32, kernel_size=5)(model):
            run("snapkv_press", DynamicCache())

    runs: dict[str, Callable[[], None]] = {
        "plain": lambda: run("plain", DynamicCache()),
        "snapkv_press": run_press,
        # Without the profile that is shipped for some models, which costs less than measuring.
        "rankkv": lambda: run("rankkv", RankKVCache(model, kept, profile=None)),
        "power": lambda: run(
            "power",
            RankKVCache(model, kept, profile=None, strategy="power", strategy_options={"exponent": 4.0}),
        ),
    }
    seconds, cpu_seconds = time_interleaved_both(runs, options.repeats)
    return {
        "tokens": tokens,
        "compression_ratio": kept,
        "kvpress": version("kvpress"),
        **{name: summarize_seconds(times) for name, times in seconds.items()},
        **{f"{name}_cpu": summarize_seconds(times) for name, times in cpu_seconds.items()},
        **{
            f"{name}_{clock}ratio_to_{other}": compute_ratio(times[name], times[other])
            for name in ("rankkv", "power")
            for other in ("snapkv_press", "plain")
            for clock, times in (("", seconds), ("cpu_", cpu_seconds))
        },
        "slots": slots,
    }


@torch.no_grad()
def _take_first_token(model: Any, input_ids: Tensor, cache: Any) -> int:
    logits = model(input_ids=input_ids, use_cache=True, logits_to_keep=1, **cache_argument(cache)).logits
    # Reading it waits for the device.
    return int(logits[0, -1].argmax())


if __name__ == "__main__":
    main()
