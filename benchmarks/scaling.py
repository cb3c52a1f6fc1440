"""How the cost of compressing one layer grows with the context, and what H2O's scores cost beside a prefill.

python -m benchmarks.scaling
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from benchmarks.common import build_prompt, print_rows, publish, time_interleaved, time_once
from rankkv import RankKVCache, load_model
from rankkv.cache.prefill import run_prefill
from rankkv.observe.call import observe
from rankkv.observe.observation import Observation
from rankkv.rank.observed_layer import compute_layer_ranks
from rankkv.selection import get_selector, select_tokens

_COLUMNS = {"what": "{}", "lengths": "{}", "median_seconds": "{}", "exponent": "{:.2f}"}
#: Lengths at which the parts that grow with the length, and with its square, are timed.
LINEAR_LENGTHS = [2048, 4096, 8192, 16384, 32768]
QUADRATIC_LENGTHS = [512, 1024, 2048]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--h2o_tokens", type=int, default=8000, help="0 leaves the comparison with a prefill out"
    )
    parser.add_argument("--output", default="results/bench.json")
    options = parser.parse_args()
    model, tokenizer = load_model(options.model)
    publish("scaling", measure(model, options.repeats), options.output)
    if options.h2o_tokens:
        publish("h2o", measure_h2o(model, tokenizer, options.h2o_tokens), options.output)


def measure(model: Any, repeats: int) -> list[dict[str, Any]]:
    """Seconds a layer and the exponent fitted to them, for three ways to rank and select."""
    ways: dict[str, tuple[Callable[[Observation], Any], list[int]]] = {
        "snapkv, evictable rank": (lambda seen: _compress(seen, "snapkv", "evictable"), LINEAR_LENGTHS),
        "h2o scores": (lambda seen: get_selector("h2o").compute_scores(seen), QUADRATIC_LENGTHS),
        "rank, scope full": (lambda seen: compute_layer_ranks(seen, "full"), QUADRATIC_LENGTHS),
    }
    rows = []
    for what, (run, lengths) in ways.items():
        layers = {
            length: _build_layer(model.config.get_text_config(decoder=True), length) for length in lengths
        }
        seconds = time_interleaved(
            {f"{what}, {n}": lambda n=n, run=run, layers=layers: run(layers[n]()) for n in lengths}, repeats
        )
        medians = [float(np.median(taken)) for taken in seconds.values()]
        exponent = np.polyfit([math.log(n) for n in lengths], np.log(medians), 1)[0]
        rows.append(
            {
                "what": what,
                "lengths": lengths,
                "median_seconds": [round(value, 5) for value in medians],
                "exponent": float(exponent),
            }
        )
    print_rows("one layer", rows, _COLUMNS)
    return rows


def measure_h2o(model: Any, tokenizer: Any, tokens: int) -> list[dict[str, Any]]:
    """What H2O's scores add to a prefill, as a share of it; budgets are uniform, so that no rank is computed."""
    input_ids = build_prompt(tokenizer, tokens)
    run_prefill(model, DynamicCache(config=model.config), input_ids[:, :256])
    plain = time_once(lambda: run_prefill(model, DynamicCache(config=model.config), input_ids))
    h2o = time_once(
        lambda: run_prefill(model, RankKVCache(model, 0.1, selector="h2o", strategy="uniform"), input_ids)
    )
    row = {
        "tokens": tokens,
        "plain_seconds": plain,
        "h2o_seconds": h2o,
        "scores_over_prefill": h2o / plain - 1,
    }
    columns = {
        "tokens": "{}",
        "plain_seconds": "{:.1f}",
        "h2o_seconds": "{:.1f}",
        "scores_over_prefill": "{:.2f}",
    }
    print_rows("H2O", [row], columns)
    return [row]


def _build_layer(config: Any, length: int) -> Callable[[], Observation]:
    """Return what builds a fresh observation of random queries and keys of the model's shape."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(length)
    query = torch.randn(1, heads, length, dim, device=device, generator=generator)
    key = torch.randn(1, kv_heads, length, dim, device=device, generator=generator)
    return lambda: observe(
        0, torch.nn.Module(), query, key, key, None, {}, kv_heads=kv_heads, window_size=32, sink_size=4
    )


@torch.no_grad()
def _compress(seen: Observation, name: str, scope: str, ratio: float = 0.1) -> tuple[Tensor, Tensor]:
    """Rank, score, select and gather, as a prefill does for a layer whose budget is known."""
    compute_layer_ranks(seen, scope)
    selector = get_selector(name)
    scores = selector.compute_scores(seen)
    budget = [round(ratio * seen.key_length)]
    kept = select_tokens(scores, seen.real_index, seen.lengths, budget, selector, 32, 4)
    index = kept[..., None].expand(-1, -1, -1, seen.keys.shape[-1])
    return seen.keys.gather(2, index), seen.values.gather(2, index)


if __name__ == "__main__":
    main()
