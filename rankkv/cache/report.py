"""Reports on a cache: slots, bytes and a summary text."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .layer import RankKVLayer

# What a layer holds of each kept token beside its key and value.
_METADATA = ("kept_positions", "kept_valid", "running_scores", "query_moments")


def count_slots(layer: Any) -> int:
    """Count the slots of a cache layer: an average if heads differ, 0 for a layer without keys."""
    if isinstance(layer, RankKVLayer):
        # Reading `keys` would dequantize them or move them back from the CPU.
        return layer.kept_length
    keys = getattr(layer, "keys", None)
    return keys.shape[-2] if isinstance(keys, Tensor) and keys.dim() == 4 else 0


def compute_cache_bytes(cache: Any) -> int:
    """Compute the bytes of all keys and values in a cache; shared storage counts once.

    Parameters
    ----------
    cache : Cache
        Any cache of transformers.
    """
    storages = {}
    for layer in cache.layers:
        # What a RankKVLayer shows as keys may be computed; what it holds is what takes memory.
        tensors = layer.held() if isinstance(layer, RankKVLayer) else _list_keys_and_values(layer)
        for tensor in tensors:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def compute_kept_bytes(cache: Any) -> int:
    """Compute the bytes of the keys and values of all tokens held, without the room for tokens to come.

    Parameters
    ----------
    cache : Cache
        Any cache of transformers.
    """
    room = sum(layer.room_bytes for layer in cache.layers if isinstance(layer, RankKVLayer))
    return compute_cache_bytes(cache) - room


def compute_metadata_bytes(cache: Any) -> int:
    """Compute the bytes of what a cache holds beside keys and values: positions, masks and scores of kept tokens.

    Parameters
    ----------
    cache : Cache
        Any cache of transformers; 0 for one that is not RankKV's.
    """
    storages = {}
    for layer in cache.layers:
        if isinstance(layer, RankKVLayer):
            for name in _METADATA:
                tensor = getattr(layer, name)
                if isinstance(tensor, Tensor):
                    storage = tensor.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def compute_full_cache_bytes(cache: Any) -> int:
    """Compute the bytes of an uncompressed cache after the tokens that ``cache`` has seen."""
    total = 0
    for layer in cache.layers:
        if isinstance(layer, RankKVLayer):
            total += layer.count_full_bytes()
            continue
        total += sum(tensor.nbytes for tensor in _list_keys_and_values(layer))
    return total


def summarize(cache: Any) -> str:
    """Write the text that :meth:`rankkv.RankKVCache.summary` returns."""
    kept, full = cache.kept_bytes(), cache.full_cache_bytes()
    room = cache.cache_bytes() - kept
    share = f" ({kept / full:.1%})" if full else ""
    lines = [
        f"RankKVCache: {cache.seen_tokens} tokens seen, {kept:,} of {full:,} bytes kept{share}",
        f"selector {cache.selector}, strategy {cache.config.resolve_strategy()[0]}, scope {cache.config.scope}, "
        f"decode {cache.config.decode}, positions {cache.config.positions}, prefill {cache.config.prefill}",
    ]
    if room:
        lines.append(f"{room:,} bytes more are held for tokens to come; copies and saved files have none")
    if not cache.seen_tokens:
        lines.append(
            "no forward has used this cache (transformers' paged cache and generate_batch ignore theirs)"
        )
    if cache.selector.remark:
        lines.append(cache.selector.remark)
    lines += cache.remarks
    others = len(cache.layers) - len(cache.layer_indices)
    if others:
        lines.append(
            f"{others} of {len(cache.layers)} layers have no full-attention cache and stay unchanged"
        )
    lines += describe_loss(cache)
    for plan in cache.plans[:1]:
        lines += plan.notes
        if plan.score_weights is not None:
            lines.append("the profile weighs each head's scores (profile=None does not)")
        if plan.needs_all_layers:
            lines.append(
                f"strategy {plan.strategy} weighs all layers together: nothing was released before the last layer"
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


def describe_loss(cache: Any) -> list[str]:
    """Describe the predicted loss of row 0 in lines; empty before the prefill or if the loss was not measured."""
    if cache.predicted_loss is None:
        is_open = (
            cache.plans and cache.plans[0].lost_attention is None and cache._schedule.compressor.predicts
        )
        return (
            ["the loss is not predicted on a GPU without max_loss or measure_lost_attention()"]
            if is_open
            else []
        )
    curve, is_own = cache.find_loss_curve()
    models = ", ".join(curve.measured.get("models", [])) or "other models"
    asked = "" if cache.config.max_loss is None else f", max_loss {cache.config.max_loss:g}"
    lines = [
        f"predicted loss {cache.predicted_loss:.2g} nats per token, for nine of ten prompts below "
        f"{cache.loss_bounds[0]:.2g}{asked}; {cache.lost_attention[0]:.1%} of the attention is lost"
    ]
    if not is_own:
        lines.append(
            f"the loss curve is that of {models}: measure this model's with rankkv calibrate --losses"
        )
    measured = curve.measured.get("strategy")
    used = cache.config.resolve_strategy()[0]
    if measured not in (None, used):
        lines.append(f"the loss curve was measured with strategy {measured}, not {used}")
    most = cache.config.max_loss
    above = [row for row, bound in enumerate(cache.loss_bounds) if row and most and bound and bound > most]
    if above:
        lines.append(f"max_loss is not reached within the largest cache allowed in rows {above}")
    return lines + [f"the prediction is weak: {doubt}" for doubt in cache.doubts]


def _describe_heads(cache: Any, layer_idx: int) -> str:
    if cache.config.head_budgets is None:
        return ""
    counts = cache.layers[layer_idx].kept_per_head[0]
    return f" on average; its heads now hold {min(counts)} to {max(counts)}"


def _list_keys_and_values(layer: Any) -> list[Tensor]:
    tensors = (getattr(layer, "keys", None), getattr(layer, "values", None))
    return [tensor for tensor in tensors if isinstance(tensor, Tensor)]
