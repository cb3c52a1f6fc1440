"""Compressed caches on disk: one safetensors file, for the model the cache came from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ..budget.heads import HeadCurves
from ..budget.plan import BudgetPlan
from ..config import RankKVConfig
from ..errors import CacheStateError, InputError
from ..models.fingerprint import (
    compute_fingerprint,
    compute_first_fingerprint,
    describe_difference,
    describe_model,
    find_adapters,
)
from ..models.tensor_parallel import find_head_shards
from ..observe.queries import QueryBuffer
from ..selection import Selector, get_selector
from ..utils.files import parse_json, replace_atomically, shorten
from .file_checks import HEADER_LIMIT, PROMPT_IDS, SavedCheck, compute_digest
from .head_budget_layer import HeadBudgetLayer
from .layer import ROW_TENSORS, RankKVLayer

#: The format that is written, and the first one, which is still read.
FORMAT, FIRST_FORMAT = "rankkv-cache-2", "rankkv-cache-1"
# State of the schedule that is saved under its own name.
_PLAN = ("length", "total_budget", "budgets", "layer_measures", "ranks", "notes")
_FLOW = ("row_start", "compressed_at", "streaming", "holes")


def save_cache(cache: Any, path: str | Path, model: Any) -> Path:
    """Write a finished cache to one safetensors file, atomically, and return the path.

    Parameters
    ----------
    cache : RankKVCache
        A cache whose prefill is complete.
    path : str or Path
        Path of the file.
    model : PreTrainedModel
        The model that the cache belongs to.

    Raises
    ------
    CacheStateError
        If the prefill is not complete, a layer holds something other than keys and values, or a number is not finite.
    OutputError
        If the file cannot be written.
    """
    schedule = cache._schedule
    if schedule.row_start is None or schedule.deferred or not schedule.compressed:
        raise CacheStateError(
            "the prompt is not compressed yet: call finish() after the last chunk, then save()."
        )
    tensors, layers = _collect_layers(cache)
    for index, packer in cache._packers.items():
        for number, (start, frequencies) in enumerate(packer.epochs):
            tensors[f"{index}.epoch.{number}.{start}"] = frequencies.contiguous().cpu()
    if cache.prompt_ids is not None:
        tensors[PROMPT_IDS] = cache.prompt_ids.to(torch.int64).contiguous()
    flow: dict[str, Any] = {name: getattr(schedule, name) for name in _FLOW}
    offset = schedule.position_offset
    flow["position_offset"] = None if offset is None else offset.tolist()
    header = {
        "format": FORMAT,
        "model": describe_model(model),
        "fingerprint": compute_fingerprint(model),
        "options": {**cache.config.to_dict(), "selector": serialize_selector(cache.selector)},
        "layers": layers,
        "flow": flow,
        "plans": [_serialize_plan(plan) for plan in schedule.compressor.plans],
    }
    _check_saveable(header, tensors)
    text = json.dumps(header)
    metadata = {"rankkv": text, "digest": compute_digest(text, tensors)}
    with replace_atomically(path) as temporary:
        try:
            save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from error
    return Path(path)


def _collect_layers(cache: Any) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Return the tensors of all layers by name, and the record of each layer."""
    tensors: dict[str, Tensor] = {}
    layers = []
    for index, layer in enumerate(cache.layers):
        record: dict[str, Any] = {"type": type(layer).__name__}
        if isinstance(layer, RankKVLayer):
            record |= {"seen": layer.seen, "compressed_at": layer.compressed_at}
            if isinstance(layer, HeadBudgetLayer):
                record["attends_as_held"] = layer.attends_as_held
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
    return tensors, layers


def _check_saveable(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Raise CacheStateError for a cache that load() would refuse, such as one that holds NaN."""
    check = SavedCheck("the cache", header)
    try:
        check.check_header()
        check.check_tensors(tensors)
    except InputError as error:
        what = str(error).removeprefix("the cache is damaged: ").partition("; save the cache")[0]
        raise CacheStateError(
            f"the cache cannot be saved: {what}; find out where the model's numbers overflow, and build it again."
        ) from error


@dataclass
class SavedCache:
    """Content of a saved cache that was checked against a model: nothing has been built from it yet.

    Attributes
    ----------
    header : dict
        Header of the file.
    config : RankKVConfig
        Options of the cache.
    tensors : dict
        All tensors by name, on the CPU.
    """

    header: dict[str, Any]
    config: RankKVConfig
    tensors: dict[str, Tensor]


def read_cache(path: str | Path, model: Any) -> SavedCache:
    """Read a saved cache and check all of it: header, names, dtypes, shapes, numbers, and the model it belongs to.

    Nothing larger than the file is allocated.

    Parameters
    ----------
    path : str or Path
        File that :func:`save_cache` wrote, of this format or the first one.
    model : PreTrainedModel
        The model that the cache will serve.

    Raises
    ------
    InputError
        If the file is missing, damaged, or belongs to another model.
    """
    if not Path(path).is_file():
        raise InputError(f"{path} is not a file: give the path that save() wrote.")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            header = _parse_header(path, metadata)
            check = SavedCheck(str(path), header)
            _check_model(path, header, model)
            check.check_header(_list_layer_types(model))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except InputError:
        raise
    # safetensors raises others than its own for a header that names a dtype unknown to torch.
    except (SafetensorError, ValueError, OSError, AttributeError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is not a safetensors file, or is damaged ({shorten(str(error))}): give a file that save() wrote."
        ) from error
    shards = find_head_shards(model)
    check.check_tensors(tensors, model, 1 if shards is None else shards.size)
    is_first = header["format"] == FIRST_FORMAT
    told = None if is_first else metadata.get("digest")
    if told is not None and told != compute_digest(metadata["rankkv"], tensors):
        raise check.fail("its digest differs from its content")
    try:
        config = restore_config(header)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise InputError(
            f"{path} has options that this version of RankKV cannot build ({_say(error)}): save it again."
        ) from error
    return SavedCache(header, config, tensors)


def _say(error: Exception) -> str:
    return str(error)[:300] or type(error).__name__


def _parse_header(path: str | Path, metadata: dict[str, str]) -> dict[str, Any]:
    text = metadata.get("rankkv") or "{}"
    if len(text) > HEADER_LIMIT:
        raise InputError(
            f"{path} has a header of {len(text):,} characters, at most {HEADER_LIMIT:,} are read."
        )
    header = parse_json(text)
    found = header.get("format") if isinstance(header, dict) else header
    if found not in (FORMAT, FIRST_FORMAT) or not isinstance(header, dict):
        raise InputError(
            f"{path} holds no RankKV cache of format {FORMAT} or {FIRST_FORMAT}, but {shorten(found)}: give a file of "
            "save()."
        )
    return header


def _check_model(path: str | Path, header: dict[str, Any], model: Any) -> None:
    """Raise InputError, in one sentence that names both models, if the file belongs to another model."""
    if header["format"] == FIRST_FORMAT:
        if find_adapters(model).loaded:
            raise InputError(
                f"{path} was saved by an earlier version, which did not note the adapters in use, and this model has "
                "adapters: load it with the model without adapters, or build the cache again."
            )
        if header.get("fingerprint") != compute_first_fingerprint(model):
            raise InputError(
                f"{path} was saved from another model, or from this one in another dtype: load it with the model it "
                "came from."
            )
        return
    if header.get("fingerprint") == compute_fingerprint(model):
        return
    saved = header.get("model")
    difference = describe_difference(saved if isinstance(saved, dict) else {}, describe_model(model))
    raise InputError(
        f"{path} was saved from another model ({difference}): load it with the model and the adapters it came from."
    )


def _list_layer_types(model: Any) -> list[bool]:
    """Return True for each layer of the model's cache that is compressed, False for one with a sliding window."""
    layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    return [type(layer) is DynamicLayer for layer in layers]


def restore_config(header: dict[str, Any]) -> RankKVConfig:
    """Build the options of a saved cache from its header.

    Raises
    ------
    KeyError, TypeError, ValueError
        If this version does not write such a header.
    """
    options = dict(header["options"])
    # A path would read another file; save() writes the profile itself.
    if not isinstance(options["profile"], dict | None) and options["profile"] != "auto":
        raise ValueError(f"profile is {shorten(options['profile'])}, not a record")
    # Files of before may hold an option that is gone; it only matters where it was used.
    if options.pop("merging", None) is not None:
        raise ValueError("its evicted tokens were merged into kept ones, an option that is gone")
    options["selector"] = restore_selector(options["selector"])
    options["protect"] = [tuple(span) for span in options["protect"]]
    return RankKVConfig(**options)


def restore_state(cache: Any, saved: SavedCache, devices: dict[int, torch.device]) -> None:
    """Fill an empty cache with a saved state that was checked, each layer on its own device.

    Raises
    ------
    ValueError
        If the file has epochs of a layer that is not rotated.
    """
    header, held = saved.header, dict[int, dict[str, Tensor]]()
    for name, tensor in saved.tensors.items():
        if name == PROMPT_IDS:
            cache.prompt_ids = tensor
            continue
        place, _, what = name.partition(".")
        index = int(place)
        layer, tensor = cache.layers[index], tensor.to(devices.get(index, "cpu"))
        if what.startswith("epoch."):
            if index not in cache._packers:
                raise ValueError(f"the tensor {name!r}, though layer {index} has no packed positions")
            cache._packers[index].epochs.append((int(what.rpartition(".")[2]), tensor))
        elif what.startswith("buffer."):
            held.setdefault(index, {})[what.removeprefix("buffer.")] = tensor
        else:
            setattr(layer, what, tensor)
        if what == "keys":
            layer.dtype, layer.device, layer.is_initialized = tensor.dtype, tensor.device, True
    for packer in cache._packers.values():
        # The file lists tensors by name, so 10 comes before 2.
        packer.epochs.sort(key=lambda epoch: epoch[0])
    schedule, flow = cache._schedule, header["flow"]
    for name in _FLOW:
        # The first format knows no holes: none were allowed.
        setattr(schedule, name, flow.get(name, []))
    offset = flow.get("position_offset")
    schedule.position_offset = None if offset is None else torch.tensor(offset).view(-1, 1)
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
    record = {name: getattr(plan, name) for name in (*_PLAN, "lost_attention")}
    return {**record, "head_curves": [curves.to_dict() for curves in plan.head_curves]}


def _restore_plan(cache: Any, record: dict[str, Any]) -> BudgetPlan:
    plan = BudgetPlan(cache.config, record["length"], cache.layer_indices)
    for name in _PLAN:
        setattr(plan, name, record[name])
    plan.head_curves = [HeadCurves.from_dict(curves) for curves in record.get("head_curves", [])]
    plan.lost_attention = record.get("lost_attention")
    return plan
