"""Compressed caches on disk: one safetensors file, for the model the cache came from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer

from ..budget.heads import HeadCurves
from ..budget.plan import BudgetPlan
from ..config import RankKVConfig
from ..errors import CacheStateError, InputError
from ..models.fingerprint import compute_fingerprint, describe_model
from ..observe.queries import QueryBuffer
from ..selection import Selector, get_selector
from ..utils.files import replace_atomically
from .file_checks import check_header, check_layer, check_tensor_name
from .layer import ROW_TENSORS, RankKVLayer

# The first format knew no adapters and no image offset.
_FIRST_FORMAT, _FORMAT = "rankkv-cache-1", "rankkv-cache-2"


def save_cache(cache: Any, path: str | Path, model: Any) -> Path:
    """Write a finished cache to one safetensors file, atomically, and return the path.

    Parameters
    ----------
    cache : RankKVCache
        A cache whose prefill is complete.
    path : str or Path
        Path of the file.
    model : PreTrainedModel
        The model the cache came from; its fingerprint goes into the file.

    Raises
    ------
    CacheStateError
        If the prefill is not complete, or a layer holds something other than keys and values.
    """
    schedule = cache._schedule
    if schedule.row_start is None or schedule.deferred or not schedule.compressed:
        raise CacheStateError(
            "the prompt is not compressed yet: call finish() after the last chunk, then save()."
        )
    tensors: dict[str, Tensor] = {}
    layers = []
    for index, layer in enumerate(cache.layers):
        record: dict[str, Any] = {"type": type(layer).__name__}
        if isinstance(layer, RankKVLayer):
            record |= {"seen": layer.seen, "compressed_at": layer.compressed_at}
        elif isinstance(layer, DynamicSlidingWindowLayer):
            record |= {"cumulative_length": layer.cumulative_length}
        else:
            raise CacheStateError(
                f"layer {index} is a {type(layer).__name__}, which cannot be saved: use a model with attention layers."
            )
        for name in ROW_TENSORS:
            tensor = getattr(layer, name, None)
            if tensor is not None:
                tensors[f"{index}.{name}"] = tensor.contiguous().cpu()
        buffer = getattr(layer, "buffer", None)
        if buffer is not None:
            tensors |= {f"{index}.buffer.{name}": tensor.cpu() for name, tensor in buffer.held().items()}
            record["buffer_capacity"] = buffer.capacity
        layers.append(record)
    for index, packer in cache._packers.items():
        for number, (start, frequencies) in enumerate(packer.epochs):
            tensors[f"{index}.epoch.{number}.{start}"] = frequencies.contiguous().cpu()
    offset = schedule.position_offset
    header = {
        "format": _FORMAT,
        "fingerprint": compute_fingerprint(model),
        "model": describe_model(model),
        "options": {**cache.config.to_dict(), "selector": serialize_selector(cache.selector)},
        "layers": layers,
        "flow": {
            **{
                name: getattr(schedule, name) for name in ("row_start", "compressed_at", "streaming", "holes")
            },
            "position_offset": None if offset is None else offset.flatten().tolist(),
        },
        "plans": [_serialize_plan(plan) for plan in schedule.compressor.plans],
    }
    metadata = {"rankkv": json.dumps(header)}
    with replace_atomically(path) as temporary:
        mode = temporary.stat().st_mode
        save_file(tensors, temporary, metadata=metadata)
        # safetensors writes a file that only the owner can read.
        temporary.chmod(mode)
    return Path(path)


def read_cache_header(path: str | Path) -> dict[str, Any]:
    """Read the header of a saved cache.

    Raises
    ------
    InputError
        If the file is missing or is not a saved cache.
    """
    if not Path(path).is_file():
        raise InputError(f"{path} is not a file: give the path that save() wrote.")
    try:
        with safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("rankkv") or "{}")
    except (SafetensorError, ValueError, RecursionError, OSError) as error:
        raise InputError(f"{path} is not a safetensors file ({str(error)[:200]}).") from error
    found = header.get("format") if isinstance(header, dict) else type(header).__name__
    if found not in (_FIRST_FORMAT, _FORMAT):
        raise InputError(
            f"{path} holds no RankKV cache of format {_FORMAT}, but {str(found)[:40]!r}: give a file of save()."
        )
    return header


def check_model(header: Mapping[str, Any], model: Any, path: str | Path) -> None:
    """Raise if a saved cache belongs to another model, or to this one with other adapters, rope or dtype.

    Raises
    ------
    InputError
        It names both sides.
    """
    old = header.get("format") == _FIRST_FORMAT
    now = describe_model(model)
    if compute_fingerprint(model, with_adapters=not old) == header.get("fingerprint") and not (
        old and now["adapters"]
    ):
        return
    saved = header.get("model")
    saved = saved if isinstance(saved, dict) else {}
    differing = [
        f"{name}: file {_show(saved.get(name))}, here {_show(value)}"
        for name, value in now.items()
        if saved and saved.get(name) != value
    ]
    says = "; ".join(differing) or (
        "adapters were not recorded then" if old and now["adapters"] else "the weights differ"
    )
    raise InputError(
        f"{path} was saved from another model, or from this one in another dtype or with other adapters ({says}): load "
        "it with the model it came from."
    )


def _show(value: Any) -> str:
    return (", ".join(map(str, value)) or "none") if isinstance(value, list) else str(value)[:60]


def restore_config(header: dict[str, Any]) -> RankKVConfig:
    """Build the options of a saved cache from its header.

    Raises
    ------
    KeyError, TypeError, ValueError
        If this version does not write such a header.
    """
    options = dict(header["options"])
    # Files of before may hold an option that is gone; it only matters where it was used.
    if options.pop("merging", None) is not None:
        raise ValueError("its evicted tokens were merged into kept ones, an option that is gone")
    options["selector"] = restore_selector(options["selector"])
    options["protect"] = [tuple(span) for span in options["protect"]]
    return RankKVConfig(**options)


def restore_state(
    cache: Any, path: str | Path, header: dict[str, Any], devices: dict[int, torch.device], dtype: torch.dtype
) -> None:
    """Check the saved state whole, then fill an empty cache with it, each layer on its own device.

    Raises
    ------
    InputError
        If an entry or a tensor of the file is not what :func:`save_cache` writes for this model.
    """
    name_of_file, count = str(path), len(cache.layers)
    varies = has_varying_layers(cache)
    check_header(header, count, cache.layer_indices, name_of_file)
    rows = len(header["flow"]["row_start"])
    found: dict[int, dict[str, Tensor]] = {}
    with safe_open(name_of_file, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            index, what = check_tensor_name(name, count, name_of_file)
            if what.startswith("epoch.") and index not in cache._packers:
                raise InputError(
                    f"{path} holds rotary frequencies of layer {index}, which has none: save it again."
                )
            found.setdefault(index, {})[what] = file.get_tensor(name)
    for index, layer in enumerate(cache.layers):
        record = header["layers"][index]
        check_layer(index, layer, record, found.get(index, {}), rows, dtype, name_of_file)
    if not varies:
        # Of the keys and values of one model, all layers have the same heads and dimensions.
        first = found[cache.layer_indices[0]]
        for index in cache.layer_indices:
            for what in ("keys", "values"):
                one, other = (list(held[what].shape[1::2]) for held in (first, found[index]))
                if one != other:
                    raise InputError(
                        f"{path} is not a cache that save() wrote: {index}.{what} has kv_heads, head_dim {other}, and "
                        f"layer {cache.layer_indices[0]} has {one}; save it again."
                    )
    held: dict[int, dict[str, Tensor]] = {}
    for index, tensors in found.items():
        layer = cache.layers[index]
        for what, tensor in tensors.items():
            tensor = tensor.to(devices.get(index, "cpu"))
            if what.startswith("epoch."):
                cache._packers[index].epochs.append((int(what.rpartition(".")[2]), tensor))
            elif what.startswith("buffer."):
                held.setdefault(index, {})[what.removeprefix("buffer.")] = tensor
            else:
                setattr(layer, what, tensor)
        layer.dtype, layer.device, layer.is_initialized = layer.keys.dtype, layer.keys.device, True
    for packer in cache._packers.values():
        # The file lists tensors by name, so 10 comes before 2.
        packer.epochs.sort(key=lambda epoch: epoch[0])
    schedule = cache._schedule
    for name in ("row_start", "compressed_at", "streaming"):
        setattr(schedule, name, header["flow"][name])
    schedule.holes = header["flow"].get("holes") or []
    offset = header["flow"].get("position_offset")
    schedule.position_offset = None if offset is None else torch.tensor(offset).view(-1, 1)
    schedule.compressed, schedule.deferred = True, False
    for index, (layer, record) in enumerate(zip(cache.layers, header["layers"], strict=True)):
        for name in ("seen", "compressed_at", "cumulative_length"):
            if name in record and hasattr(layer, name):
                setattr(layer, name, record[name])
        if index in held:
            layer.buffer = QueryBuffer(record["buffer_capacity"])
            layer.buffer.fill(**held[index], row_start=schedule.row_start)
        if isinstance(layer, RankKVLayer):
            layer.rest()
    schedule.compressor.plans = [_restore_plan(cache, record) for record in header["plans"]]


def has_varying_layers(cache: Any) -> bool:
    """Return True for a model whose config allows other heads or dimensions in each layer."""
    config = cache.text_config
    return bool(vars(config).get("_heterogeneity_spec")) or isinstance(
        getattr(config, "num_key_value_heads", None), list | tuple
    )


def serialize_selector(selector: Selector) -> dict[str, Any]:
    """Return the name and options of a selector as JSON-ready values."""
    # A wrapping selector has the wrapped one as an option.
    options = {
        name: serialize_selector(value)
        if isinstance(value, Selector)
        else (str(value) if isinstance(value, PurePath) else value)
        for name, value in selector.options.items()
    }
    if selector.recent_fraction is not None:
        options["recent_fraction"] = selector.recent_fraction
    return {"name": selector.name, "options": options}


def restore_selector(record: Mapping[str, Any]) -> Selector:
    """Build a selector from the record of :func:`serialize_selector`."""
    options = {
        name: restore_selector(value) if isinstance(value, dict) else value
        for name, value in record["options"].items()
    }
    return get_selector(record["name"], **options)


def _serialize_plan(plan: BudgetPlan) -> dict[str, Any]:
    names = ("length", "total_budget", "budgets", "layer_measures", "ranks", "notes")
    record = {name: getattr(plan, name) for name in names}
    return {**record, "head_curves": [curves.to_dict() for curves in plan.head_curves]}


def _restore_plan(cache: Any, record: dict[str, Any]) -> BudgetPlan:
    plan = BudgetPlan(cache.config, record["length"], cache.layer_indices)
    for name, value in record.items():
        setattr(plan, name, value)
    plan.head_curves = [HeadCurves.from_dict(curves) for curves in record.get("head_curves", [])]
    return plan
