"""Compare how caches store their tokens: excess loss, bytes and time of a decode step, beside quantized caches.

    python experiments/storage_comparison.py --texts code=code.txt --part 0.6 1.0 --samples 2

Rows: the plain cache; RankKV's storages `full`, `int8` and `offload`; `QuantizedCache` of transformers with each
backend that is installed (`fp8` needs no package, `quanto` needs optimum-quanto, `hqq` needs hqq). One prefill serves
all caches of a context. Decode steps run in turn, one token of the true continuation at a time, and count CPU time.
Writes Parquet parts (a killed run resumes), `rows.parquet`, and `summary.md` with 95 % intervals over contexts.
"""

from __future__ import annotations

import argparse
import inspect
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from allocation_ablation import add_text_arguments, describe, finish, iterate_contexts, main, read_texts

from rankkv.errors import ConfigError

PLAIN = "plain"
#: Options of RankKVCache beside the ratio; what is left out takes its default.
RANKKV: dict[str, tuple[float, dict[str, Any]]] = {
    "RankKV": (0.3, {}),
    "RankKV, int8": (0.3, {"storage": "int8"}),
    "RankKV, offload": (0.3, {"storage": "offload"}),
    "RankKV all tokens, int8": (1.0, {"storage": "int8"}),
}
#: Options of QuantizedCache; the axes are those that its documentation recommends for each backend.
QUANTIZED: dict[str, dict[str, Any]] = {
    "QuantizedCache fp8": {"backend": "fp8"},
    "QuantizedCache hqq int8": {"backend": "hqq", "nbits": 8, "axis_key": 1, "axis_value": 1},
    "QuantizedCache hqq int4": {"backend": "hqq", "nbits": 4, "axis_key": 1, "axis_value": 1},
    "QuantizedCache quanto int4": {"backend": "quanto", "nbits": 4},
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Compare how caches store their tokens: excess loss, bytes and time of a decode step.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add_text_arguments(parser, samples=2, continuation=256)
    add("--dtype", default=None, help="dtype of the weights; default: that of load_model")
    add("--ratio", type=float, default=0.3, help="fraction of the cache that RankKV keeps")
    add("--steps", type=int, default=24, help="timed decode steps of each cache and context; 0: none")
    add("--seed", type=int, default=0, help="of the starts of the contexts and of the bootstrap")
    add("--output_dir", type=Path, default=Path("results/storage"), help="folder of the results")
    return parser.parse_args(arguments)


def make_builders(model: Any, record: Any, ratio: float) -> dict[str, Callable[[], Any]]:
    """Return one function per cache; each call builds the cache after the context."""

    def build_quantized(options: Mapping[str, Any]) -> Any:
        from transformers import QuantizedCache

        cache = QuantizedCache(config=model.config, **options)
        # The first update is the prefill: attention sees full precision then, and the cache stores it quantized.
        for index, layer in enumerate(record.build_full_cache().layers):
            cache.update(layer.keys, layer.values, index)
        return cache

    builders: dict[str, Callable[[], Any]] = {PLAIN: record.build_full_cache}
    for name, (kept, options) in RANKKV.items():
        kept = ratio if kept < 1.0 else kept
        builders[f"{name} {kept:.0%}"] = lambda kept=kept, options=options: record.build_cache(
            compression_ratio=kept, **options
        )
    for name, options in QUANTIZED.items():
        try:
            build_quantized(options)
        except ImportError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
            continue
        builders[name] = lambda options=options: build_quantized(options)
    return builders


def count_bytes(cache: Any) -> int:
    """Count the bytes of all tensors that a cache's layers hold: codes, scales, zero points, residual tokens."""
    if hasattr(cache, "cache_bytes"):
        return int(cache.cache_bytes())
    found: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, torch.Tensor) and hasattr(value, "__tensor_flatten__"):
            # A quantized tensor of quanto wraps plain ones.
            for name in value.__tensor_flatten__()[0]:
                visit(getattr(value, name))
        elif isinstance(value, torch.Tensor):
            if value.numel():
                storage = value.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, Mapping):
            for item in value.values():
                visit(item)
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item)

    for layer in cache.layers:
        visit([value for name, value in vars(layer).items() if name.endswith(("keys", "values"))])
    return sum(found.values())


def time_steps(model: Any, caches: dict[str, Any], ids: Any, past: int, steps: int) -> dict[str, float]:
    """Decode the tokens of ``ids`` with each cache in turn; return mean CPU seconds per step, two warm-ups left out."""
    name_of_cache = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    seconds: dict[str, list[float]] = {name: [] for name in caches}
    for turn in range(steps + 2):
        for name in list(caches) if turn % 2 == 0 else list(caches)[::-1]:
            start = time.process_time()
            with torch.no_grad():
                model(
                    ids[:, turn : turn + 1],
                    position_ids=torch.tensor([[past + turn]]),
                    use_cache=True,
                    **{name_of_cache: caches[name]},
                )
            if turn >= 2:
                seconds[name].append(time.process_time() - start)
    return {name: fmean(own) for name, own in seconds.items()}


def score_context(model: Any, ids: Any, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield one row per cache."""
    from rankkv.evaluation import compute_continuation_loss, record_prefill

    record = record_prefill(model, ids[:, : arguments.context])
    continuation = ids[:, arguments.context :]
    builders = make_builders(model, record, arguments.ratio)
    rows: dict[str, dict[str, Any]] = {}
    for name, build in builders.items():
        cache = build()
        held = count_bytes(cache)
        loss = float(compute_continuation_loss(model, cache, continuation).mean())
        rows[name] = {"cache": name, "loss": loss, "cache_bytes": held}
    if arguments.steps:
        caches = {name: build() for name, build in builders.items()}
        taken = time_steps(model, caches, continuation, arguments.context, arguments.steps)
        for name, seconds in taken.items():
            rows[name]["step_cpu_seconds"] = seconds
    for row in rows.values():
        row["excess"] = row["loss"] - rows[PLAIN]["loss"]
        row["bytes_ratio"] = row["cache_bytes"] / rows[PLAIN]["cache_bytes"]
        if arguments.steps:
            row["step_ratio"] = row["step_cpu_seconds"] / rows[PLAIN]["step_cpu_seconds"]
        yield row


def summarize(rows: Sequence[dict[str, Any]], seed: int) -> str:
    """Return a Markdown table: excess loss, bytes and step time of each cache, the last two over the plain cache."""
    from rankkv.evaluation.statistics import compute_mean

    texts = sorted({row["text"] for row in rows})
    lines = [f"{len(texts)} contexts; bytes and CPU time of a step are over the plain cache's.", ""]
    lines += ["| cache | excess loss, nats per token | bytes | step |", "|---|---|---|---|"]
    for name in dict.fromkeys(row["cache"] for row in rows):
        own = sorted((row for row in rows if row["cache"] == name), key=lambda row: row["text"])
        fields = [
            compute_mean([row[field] for row in own], seed=seed) if own[0].get(field) is not None else ""
            for field in ("excess", "bytes_ratio", "step_ratio")
        ]
        size = f"{fields[1].mean:.3f}" if fields[1] else ""
        lines.append(f"| {name} | {fields[0]:+} | {size} | {fields[2]} |")
    return "\n".join(lines) + "\n"


def run(arguments: argparse.Namespace) -> str:
    """Score the contexts that have no rows yet, then write rows and summary; return the summary."""
    from rankkv import load_model
    from rankkv.evaluation.results import ResultStore

    if arguments.samples < 1 or arguments.continuation < arguments.steps + 2:
        raise ConfigError(
            f"--samples {arguments.samples} must be at least 1 and --continuation {arguments.continuation} at least "
            f"--steps + 2 = {arguments.steps + 2}."
        )
    texts = read_texts(arguments)
    store = ResultStore(arguments.output_dir, describe(arguments))
    model, tokenizer = load_model(arguments.model, dtype=arguments.dtype)
    for unit, kind, _, start, ids in iterate_contexts(store, tokenizer, texts, arguments):
        rows = score_context(model, ids, arguments)
        store.write(unit, [{"kind": kind, "text": unit, "first_token": start, **row} for row in rows])
    return finish(store, arguments, summarize, lambda rows, folder: [])


if __name__ == "__main__":
    sys.exit(main(parse=parse_arguments, run=run))
