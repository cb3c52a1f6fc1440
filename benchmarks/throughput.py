"""Tokens a second while decoding, where keys and values may take no more than a fixed number of bytes.

The batch of each cache is the largest whose keys and values fit that number, at the peak of its prefill and at the end.

python -m benchmarks.throughput --tokens 1024 --compression_ratio 0.1
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from transformers import DynamicCache

from benchmarks.common import build_prompt, compute_ratio, print_rows, publish, synchronize
from rankkv import RankKVCache, load_model
from rankkv.cache.prefill import run_prefill
from rankkv.models.compat import cache_argument

_COLUMNS = {
    "cache": "{}",
    "rows": "{}",
    "decode_tokens_per_second": "{:.1f}",
    "tokens_per_second_with_prefill": "{:.2f}",
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--new_tokens", type=int, default=16)
    parser.add_argument("--compression_ratio", type=float, default=0.1)
    parser.add_argument("--plain_rows", type=int, default=2, help="the limit is what so many plain rows take")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", default="results/bench.json")
    options = parser.parse_args()
    model, tokenizer = load_model(options.model)
    rows = measure(
        model,
        tokenizer,
        options.tokens,
        options.new_tokens,
        options.compression_ratio,
        options.plain_rows,
        options.repeats,
    )
    publish("throughput", rows, options.output)


def measure(
    model: Any, tokenizer: Any, tokens: int, new_tokens: int, ratio: float, plain_rows: int, repeats: int
) -> list[dict[str, Any]]:
    """Prefill each cache once, then let both decode in turn, a few tokens each time."""
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    limit = plain_rows * layers * (tokens + new_tokens)
    # At the peak of its prefill a row holds its budget, one layer of its prompt and the slack of the cascade.
    held = max(1.05 * (ratio * layers + 1) * tokens, ratio * layers * tokens + layers * new_tokens)
    sizes = {"plain": plain_rows, "rankkv": max(1, int(limit / held))}
    text = build_prompt(tokenizer, tokens * 4)[0]
    speeds: dict[str, list[float]] = {name: [] for name in sizes}
    prefill_seconds, caches = {}, {}
    for name, size in sizes.items():
        # A different stretch of the text for each row.
        starts = torch.linspace(0, len(text) - tokens, size).long().tolist()
        ids = torch.stack([text[start : start + tokens] for start in starts])
        cache = DynamicCache(config=model.config) if name == "plain" else RankKVCache(model, ratio)
        start = time.perf_counter()
        run_prefill(model, cache, ids, torch.ones_like(ids))
        synchronize()
        prefill_seconds[name], caches[name] = time.perf_counter() - start, cache
    for turn in range(-1, repeats):
        for name in list(sizes) if turn % 2 == 0 else list(sizes)[::-1]:
            seconds = _decode(model, caches[name], sizes[name], tokens + (turn + 1) * new_tokens, new_tokens)
            if turn >= 0:
                speeds[name].append(sizes[name] * new_tokens / seconds)
    rows = []
    for name, size in sizes.items():
        speed = sorted(speeds[name])[repeats // 2]
        rows.append(
            {
                "cache": name,
                "tokens": tokens,
                "compression_ratio": 1.0 if name == "plain" else ratio,
                "limit_slots": limit,
                "rows": size,
                "decode_tokens_per_second": speed,
                "prefill_seconds": prefill_seconds[name],
                "tokens_per_second_with_prefill": size
                * new_tokens
                / (prefill_seconds[name] + size * new_tokens / speed),
                "decode_ratio": compute_ratio(speeds[name], speeds["plain"]),
            }
        )
    print_rows(f"{tokens} tokens of context, the same bytes of keys and values", rows, _COLUMNS)
    return rows


@torch.no_grad()
def _decode(model: Any, cache: Any, rows: int, past: int, steps: int) -> float:
    token = torch.full((rows, 1), 100, device=model.device)
    synchronize()
    start = time.perf_counter()
    for step in range(steps):
        position = torch.full((rows, 1), past + step, device=model.device)
        logits = model(token, position_ids=position, **cache_argument(cache)).logits
        token = logits[:, -1:].argmax(dim=-1)
    synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
