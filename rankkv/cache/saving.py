"""Compressed caches on disk: one safetensors file, for the model the cache came from."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
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
from ..models.placement import list_weights, read_weight
from ..models.tensor_parallel import take_local
from ..observe.queries import QueryBuffer
from ..selection import Selector, get_selector
from .layer import ROW_TENSORS, RankKVLayer

_FORMAT = "rankkv-cache-1"
# Prefixes of the config entries that keys and values depend on.
_SHAPE = ("num_", "hidden", "head", "vocab", "rope", "partial_rotary", "sliding", "layer_types")


def save_cache(cache: Any, path: str | Path, fingerprint: str) -> Path:
    """Write a finished cache to one safetensors file, atomically, and return the path.

    Parameters
    ----------
    cache : RankKVCache
        A cache whose prefill is complete.
    path : str or Path
        Path of the file.
    fingerprint : str
        Fingerprint of the model the cache came from.

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
    header = {
        "format": _FORMAT,
        "fingerprint": fingerprint,
        "options": {**cache.config.to_dict(), "selector": serialize_selector(cache.selector)},
        "layers": layers,
        "flow": {name: getattr(schedule, name) for name in ("row_start", "compressed_at", "streaming")},
        "plans": [_serialize_plan(plan) for plan in schedule.compressor.plans],
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata={"rankkv": json.dumps(header)})
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


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
    except (SafetensorError, ValueError) as error:
        raise InputError(f"{path} is not a safetensors file ({error}).") from error
    found = header.get("format") if isinstance(header, dict) else header
    if found != _FORMAT:
        raise InputError(
            f"{path} holds no RankKV cache of format {_FORMAT}, but {found!r}: give a file of save()."
        )
    return header


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
    cache: Any, path: str | Path, header: dict[str, Any], devices: dict[int, torch.device]
) -> None:
    """Fill an empty cache with the saved state, each layer on its own device."""
    held: dict[int, dict[str, Tensor]] = {}
    with safe_open(str(path), framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            index, _, what = name.partition(".")
            tensor = file.get_tensor(name).to(devices.get(int(index), "cpu"))
            if what.startswith("epoch."):
                cache._packers[int(index)].epochs.append((int(what.rpartition(".")[2]), tensor))
                continue
            layer = cache.layers[int(index)]
            if what.startswith("buffer."):
                held.setdefault(int(index), {})[what.removeprefix("buffer.")] = tensor
                continue
            setattr(layer, what, tensor)
            if what == "keys":
                layer.dtype, layer.device, layer.is_initialized = tensor.dtype, tensor.device, True
    for packer in cache._packers.values():
        # The file lists tensors by name, so 10 comes before 2.
        packer.epochs.sort(key=lambda epoch: epoch[0])
    schedule = cache._schedule
    for name, value in header["flow"].items():
        setattr(schedule, name, value)
    schedule.compressed, schedule.deferred = True, False
    for index, (layer, record) in enumerate(zip(cache.layers, header["layers"], strict=True)):
        for name, value in record.items():
            if name not in ("type", "buffer_capacity"):
                setattr(layer, name, value)
        if index in held:
            layer.buffer = QueryBuffer(record["buffer_capacity"])
            layer.buffer.fill(**held[index], row_start=schedule.row_start)
        if isinstance(layer, RankKVLayer):
            layer.rest()
    schedule.compressor.plans = [_restore_plan(cache, record) for record in header["plans"]]


def compute_model_fingerprint(model: Any) -> str:
    """Compute a digest of a model's shape, dtype and a sample of every weight.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model.

    Returns
    -------
    str
        Hexadecimal digest; it differs for the same model in another dtype.
    """
    config = model.config.get_text_config(decoder=True).to_dict()
    shape = {name: config[name] for name in sorted(config) if name.startswith(_SHAPE)}
    dtype = str(model.get_input_embeddings().weight.dtype)
    digest = hashlib.sha256(json.dumps([type(model).__name__, dtype, shape], default=str).encode())
    # Sample every weight: adapters and fine-tuning may change only some of them.
    for name in list_weights(model):
        weight = read_weight(model, name)
        if weight is None:
            continue
        flat = take_local(weight).reshape(-1)
        if flat.numel():
            sample = flat[:: max(1, flat.numel() // 16)][:16].to("cpu", torch.bfloat16)
            digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


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
