"""Time and peak extra memory of ``RankKVAnalyzer.analyze`` against a plain prefill of the same prompt.

python -m benchmarks.analysis --tokens 2048 8192 --scopes evictable full
python -m benchmarks.analysis --tokens 2048 --eager_way   # needs 5 GB more
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache

from benchmarks.common import (
    build_prompt,
    print_rows,
    publish,
    read_peak_memory,
    reset_peak_memory,
    time_once,
)
from rankkv import RankKVAnalyzer, compute_effective_rank, load_model
from rankkv.cache.prefill import run_prefill

_COLUMNS = {
    "tokens": "{}",
    "scope": "{}",
    "plain_seconds": "{:.1f}",
    "analyze_seconds": "{:.1f}",
    "ratio": "{:.2f}",
    "plain_peak_extra_bytes": "{:,}",
    "analyze_peak_extra_bytes": "{:,}",
}
#: The usual way to such ranks, as a row beside the scopes.
EAGER_WAY = "output_attentions"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048])
    parser.add_argument("--scopes", nargs="+", default=["evictable", "full"])
    parser.add_argument(
        "--eager_way", action="store_true", help="also output_attentions=True, then an SVD a layer"
    )
    parser.add_argument("--output", default="results/bench.json")
    options = parser.parse_args()
    model, tokenizer = load_model(options.model)
    rows = measure(model, tokenizer, options.tokens, [*options.scopes, *[EAGER_WAY] * options.eager_way])
    publish("analysis", rows, options.output)


def measure(model: Any, tokenizer: Any, lengths: list[int], scopes: list[str]) -> list[dict[str, Any]]:
    """Time and peak extra memory of each scope at each length, beside one plain prefill of that length."""
    rows = []
    for tokens in lengths:
        input_ids = build_prompt(tokenizer, tokens)
        run_prefill(model, DynamicCache(config=model.config), input_ids[:, :256])
        plain = _measure(lambda ids=input_ids: run_prefill(model, DynamicCache(config=model.config), ids))
        for scope in scopes:
            if scope == EAGER_WAY:
                found = _measure(lambda ids=input_ids: _rank_from_attentions(model, ids))
            else:
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
    print_rows("analyze() against a plain prefill", rows, _COLUMNS)
    return rows


@torch.no_grad()
def _rank_from_attentions(model: Any, input_ids: torch.Tensor) -> list[float]:
    """Rank every layer from the attention that the model returns: mean of the heads, then an SVD in float64."""
    usual = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        attentions = model(input_ids.to(model.device), output_attentions=True, logits_to_keep=1).attentions
        return [compute_effective_rank(attention[0].mean(dim=0)) for attention in attentions]
    finally:
        model.set_attn_implementation(usual)


def _measure(run: Callable[[], Any]) -> dict[str, float]:
    gc.collect()
    held = reset_peak_memory()
    seconds = time_once(run)
    return {"seconds": seconds, "peak_extra_bytes": read_peak_memory() - held}


if __name__ == "__main__":
    main()
