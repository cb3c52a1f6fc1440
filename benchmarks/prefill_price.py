"""CPU time of a prefill with each selector over a plain prefill, in turn in one process.

    OMP_NUM_THREADS=1 python -m benchmarks.prefill_price --tokens 2048 --repeats 5

Writes `results/prefill_price.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import DynamicCache

from rankkv import RankKVCache, load_model
from rankkv.evaluation.results import describe_environment
from rankkv.models.compat import cache_argument
from rankkv.models.texts import python_docs_text
from rankkv.selection import get_selector
from rankkv.utils.files import write_text_atomically

#: Name of each kind of cache, and its options of RankKVCache.
CACHES: dict[str, dict[str, Any]] = {
    "snapkv, uniform": {"strategy": "uniform", "head_budgets": None, "profile": None},
    "snapkv, default": {"profile": None},
    "echo": {"selector": "echo"},
    "echo, no expected attention": {"selector": get_selector("echo", expected=0)},
    "echo, chunks of 256": {"selector": get_selector("echo", chunk_size=256)},
}


def measure(model: Any, ids: torch.Tensor, cache: Any) -> float:
    """Return the CPU seconds of one prefill into a cache."""
    started = time.process_time()
    with torch.no_grad():
        model(ids, logits_to_keep=1, **cache_argument(cache))
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU time of a prefill with each selector over a plain one.")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ratio", type=float, default=0.2)
    arguments = parser.parse_args()
    model, tokenizer = load_model(arguments.model)
    ids = tokenizer(python_docs_text(), return_tensors="pt", verbose=False)["input_ids"][
        :, : arguments.tokens
    ]
    shares: dict[str, list[float]] = {name: [] for name in CACHES}
    for _ in tqdm(range(arguments.repeats), disable=None):
        plain = measure(model, ids, DynamicCache(config=model.config))
        for name, options in CACHES.items():
            cache = RankKVCache(model, compression_ratio=arguments.ratio, **options)
            shares[name].append(measure(model, ids, cache) / plain)
    record = {
        "tokens": arguments.tokens,
        "ratio": arguments.ratio,
        "repeats": arguments.repeats,
        "over_plain": {name: round(statistics.median(values), 3) for name, values in shares.items()},
        "spread": {name: [round(min(values), 3), round(max(values), 3)] for name, values in shares.items()},
        "environment": describe_environment(),
    }
    path = Path("results/prefill_price.json")
    write_text_atomically(path, json.dumps(record, indent=2) + "\n")
    print(json.dumps(record["over_plain"], indent=2))


if __name__ == "__main__":
    main()
