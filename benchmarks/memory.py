"""Keys and values held while a prompt is prefilled, at their peak, against the total budget and one layer.

python -m benchmarks.memory --tokens 4096
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.common import build_prompt, print_rows, publish, read_peak_memory, reset_peak_memory
from rankkv import RankKVCache, load_model
from rankkv.cache.prefill import run_prefill

_COLUMNS = {
    "tokens": "{}",
    "kept": "{:.0%}",
    "peak_slots": "{:,}",
    "bound_slots": "{:,}",
    "ratio": "{:.3f}",
    "peak_kv_bytes": "{:,}",
    "full_cache_bytes": "{:,}",
    "peak_extra_bytes": "{:,}",
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096])
    parser.add_argument("--compression_ratios", type=float, nargs="+", default=[0.1, 0.3])
    parser.add_argument("--output", default="results/bench.json")
    options = parser.parse_args()
    model, tokenizer = load_model(options.model)
    publish("memory", measure(model, tokenizer, options.tokens, options.compression_ratios), options.output)


def measure(model: Any, tokenizer: Any, lengths: list[int], ratios: list[float]) -> list[dict[str, Any]]:
    """One prefill for each length and ratio."""
    rows = [_measure(model, build_prompt(tokenizer, tokens), ratio) for tokens in lengths for ratio in ratios]
    print_rows("keys and values in prefill", rows, _COLUMNS)
    return rows


class _WatchedCache(RankKVCache):
    """Notes what all layers hold, right after each layer took the keys and values of the prompt."""

    peak_slots = 0
    peak_bytes = 0

    def update(self, *args: Any, **kwargs: Any) -> Any:
        states = super().update(*args, **kwargs)
        self.peak_slots = max(self.peak_slots, sum(self.kept_lengths))
        # By storage, so that memory behind a view would count.
        held = [tensor.untyped_storage() for layer in self.layers for tensor in layer.held()]
        self.peak_bytes = max(
            self.peak_bytes, sum({s.data_ptr(): s.nbytes() for s in held if s.nbytes()}.values())
        )
        return states


def _measure(model: Any, input_ids: Any, ratio: float) -> dict[str, Any]:
    cache = _WatchedCache(model, ratio)
    before = reset_peak_memory()
    run_prefill(model, cache, input_ids)
    peak_extra = read_peak_memory() - before
    bound = sum(cache.budgets) + input_ids.shape[1]
    slot_bytes = cache.cache_bytes() // sum(cache.kept_lengths)
    return {
        "tokens": input_ids.shape[1],
        "kept": ratio,
        "peak_slots": cache.peak_slots,
        "bound_slots": bound,
        "ratio": cache.peak_bytes / (bound * slot_bytes),
        "peak_kv_bytes": cache.peak_bytes,
        "full_cache_bytes": cache.full_cache_bytes(),
        "peak_extra_bytes": peak_extra,
    }


if __name__ == "__main__":
    main()
