"""What a cache holds, in slots, bytes and words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from .layer import RankKVLayer


def _tensors(cache: Any) -> Iterator[tuple[Any, Tensor]]:
    for layer in cache.layers:
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if isinstance(tensor, Tensor) and tensor.numel():
                yield layer, tensor


def _held(cache: Any) -> Iterator[Tensor]:
    for layer in cache.layers:
        if isinstance(layer, RankKVLayer):
            yield from layer.held()
        else:
            tensors = (getattr(layer, "keys", None), getattr(layer, "values", None))
            yield from (tensor for tensor in tensors if isinstance(tensor, Tensor))


def count_slots(layer: Any) -> int:
    """Count the slots of a cache layer, an average where heads differ; a layer without keys has none."""
    if isinstance(layer, RankKVLayer):
        # Not by its keys: stored as int8 or on the CPU they would be computed or moved for it.
        return layer.kept_length
    keys = getattr(layer, "keys", None)
    return keys.shape[-2] if isinstance(keys, Tensor) and keys.dim() == 4 else 0


def compute_cache_bytes(cache: Any) -> int:
    """Compute the bytes of all keys and values a cache holds, each distinct storage counted once.

    Parameters
    ----------
    cache : Cache
        Any of transformers' caches.
    """
    storages = {}
    for tensor in _held(cache):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def compute_full_cache_bytes(cache: Any) -> int:
    """Compute the bytes the model's plain cache would hold after the tokens that ``cache`` has seen."""
    total = 0
    for layer, tensor in _tensors(cache):
        slots = layer.seen if isinstance(layer, RankKVLayer) else tensor.shape[-2]
        total += tensor.numel() // tensor.shape[-2] * slots * tensor.element_size()
    return total


def summarize(cache: Any) -> str:
    """Write the account that :meth:`rankkv.RankKVCache.summary` returns."""
    kept, full = cache.cache_bytes(), cache.full_cache_bytes()
    share = f" ({kept / full:.1%})" if full else ""
    lines = [
        f"RankKVCache: {cache.seen_tokens} tokens seen, {kept:,} of {full:,} bytes kept{share}",
        f"selector {cache.selector}, strategy {cache.config.resolve_strategy()[0]}, scope {cache.config.scope}, "
        f"decode {cache.config.decode}, positions {cache.config.positions}, prefill {cache.config.prefill}",
    ]
    if cache.selector.remark:
        lines.append(cache.selector.remark)
    others = len(cache.layers) - len(cache.layer_indices)
    if others:
        lines.append(
            f"{others} of {len(cache.layers)} layers hold no full-attention cache and are left alone"
        )
    for plan in cache.plans[:1]:
        lines += plan.notes
        if cache.config.merging is not None:
            lines.append(
                f"merging {cache.config.merging}: what is evicted was folded into what is kept, once all budgets were "
                "known; nothing was released before the last layer"
            )
        elif plan.needs_all_layers:
            lines.append(
                f"strategy {plan.strategy} weighs all layers together: nothing was released before the last one"
            )
        measures = plan.layer_ranks or plan.layer_measures or [None] * len(plan.budgets)
        name = "rank" if plan.layer_ranks or plan.measure is None else plan.measure
        for layer_idx, measured, budget in zip(cache.layer_indices, measures, plan.budgets, strict=True):
            shown = (
                "      -"
                if measured is None
                else f"{measured:7.2f}"
                if name == "rank"
                else f"{measured:9.4g}"
            )
            spread = _describe_heads(cache, layer_idx)
            lines.append(
                f"  layer {layer_idx:3d}  {name} {shown}  keeps {budget:6d} of {plan.length}{spread}"
            )
    return "\n".join(lines)


def _describe_heads(cache: Any, layer_idx: int) -> str:
    if cache.config.head_budgets is None:
        return ""
    counts = cache.layers[layer_idx].kept_per_head[0]
    return f" on average; its heads now hold {min(counts)} to {max(counts)}"
