"""Identity of a model: a digest of all that its keys and values depend on, and words for what differs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .placement import list_weights, read_weight
from .tensor_parallel import take_local

# Prefixes of the config entries that keys and values depend on.
_SHAPE = ("num_", "hidden", "head", "vocab", "rope", "partial_rotary", "sliding", "layer_types")
# Values sampled of each weight.
_SAMPLED = 16


@dataclass
class Adapters:
    """Adapters of peft on a model: those that change its forward now, and the weights of those that do not.

    Attributes
    ----------
    active : list of str
        Adapters in use.
    merged : list of str
        Adapters whose weights were added to the model's.
    loaded : bool
        True if the model holds any adapter, in use or not.
    unused : set of str
        Names of parameters that belong to adapters not in use.
    scales : list of str
        Module and scale of each adapter in use.
    """

    active: list[str] = field(default_factory=list)
    merged: list[str] = field(default_factory=list)
    loaded: bool = False
    unused: set[str] = field(default_factory=set)
    scales: list[str] = field(default_factory=list)


def find_adapters(model: nn.Module) -> Adapters:
    """Find the adapters on a model that change its forward now.

    Works with peft's models and with adapters that transformers loaded.  Modules are recognised by the attributes of
    peft's layers, so peft need not be installed.

    Parameters
    ----------
    model : PreTrainedModel or PeftModel
        A model, with or without adapters.

    Returns
    -------
    Adapters
        All lists are empty for a model without adapters.

    Examples
    --------
    >>> find_adapters(nn.Linear(2, 2))
    Adapters(active=[], merged=[], loaded=False, unused=set(), scales=[])
    """
    found, used, own = Adapters(), set[str](), dict[str, str]()
    for path, module in model.named_modules():
        if not _is_adapted(module):
            continue
        names: dict[str, str] = dict(_list_adapter_weights(path, module))
        own |= names
        scaling = getattr(module, "scaling", None)
        scaling = scaling if isinstance(scaling, dict) else {}
        present = {*names.values(), *scaling}
        found.loaded = True
        merged = list(getattr(module, "merged_adapters", None) or [])
        if module.disable_adapters:
            effective: list[str] = []
        elif merged:
            effective = merged
        else:
            active = module.active_adapters
            listed = [active] if isinstance(active, str) else list(active)
            effective = [name for name in listed if name in present]
        kinds = found.merged if merged and effective else found.active
        kinds += [name for name in effective if name not in kinds]
        used |= {weight for weight, adapter in names.items() if adapter in effective and not merged}
        found.scales += [f"{_strip(path)} {scaling.get(name)}" for name in effective if not merged]
    found.unused = set(own) - used
    _add_prompts(model, found)
    return found


def describe_model(model: Any) -> dict[str, Any]:
    """Return what tells models apart in words: class, name, layers, dtype, adapters and rope, JSON-ready.

    Parameters
    ----------
    model : PreTrainedModel or PeftModel
        A causal language model.
    """
    base = _get_base(model)
    config = base.config.get_text_config(decoder=True)
    adapters = find_adapters(model)
    return {
        "class": type(base).__name__,
        "name": str(getattr(base.config, "_name_or_path", "") or base.config.model_type)[:200],
        "layers": int(config.num_hidden_layers),
        "dtype": str(model.get_input_embeddings().weight.dtype).removeprefix("torch."),
        "adapters": adapters.active,
        "merged_adapters": adapters.merged,
        "rope": _describe_rope(config),
    }


def compute_fingerprint(model: Any) -> str:
    """Compute a digest of a model's shape, rope, dtype, adapters in use, and a sample of every weight.

    Adapters that are loaded and not in use change nothing: the digest is then the one of the model without them.

    Parameters
    ----------
    model : PreTrainedModel or PeftModel
        A causal language model.

    Returns
    -------
    str
        Hexadecimal digest; it differs for the same model in another dtype.
    """
    base, adapters = _get_base(model), find_adapters(model)
    config = base.config.get_text_config(decoder=True).to_dict()
    shape = {name: config[name] for name in sorted(config) if name.startswith(_SHAPE)}
    dtype = str(model.get_input_embeddings().weight.dtype)
    told = [type(base).__name__, dtype, shape, adapters.scales]
    digest = hashlib.sha256(json.dumps(told, default=str).encode())
    # Sample every weight: adapters and fine-tuning may change only some of them.
    for name in list_weights(model):
        weight = None if name in adapters.unused else read_weight(model, name)
        if weight is None:
            continue
        flat = take_local(weight).reshape(-1)
        if flat.numel():
            sample = flat[:: max(1, flat.numel() // _SAMPLED)][:_SAMPLED].to("cpu").contiguous()
            digest.update(str(sample.dtype).encode() + _read_bytes(sample))
    return digest.hexdigest()


def compute_first_fingerprint(model: Any) -> str:
    """Compute the digest of the first cache format, which knew nothing of adapters in use.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model.
    """
    config = model.config.get_text_config(decoder=True).to_dict()
    shape = {name: config[name] for name in sorted(config) if name.startswith(_SHAPE)}
    dtype = str(model.get_input_embeddings().weight.dtype)
    digest = hashlib.sha256(json.dumps([type(model).__name__, dtype, shape], default=str).encode())
    for name in list_weights(model):
        weight = read_weight(model, name)
        if weight is None:
            continue
        flat = take_local(weight).reshape(-1)
        if flat.numel():
            sample = flat[:: max(1, flat.numel() // 16)][:16].to("cpu", torch.bfloat16)
            digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def describe_difference(saved: dict[str, Any], model: dict[str, Any]) -> str:
    """Write in one clause how two models differ, from their records of :func:`describe_model`.

    Parameters
    ----------
    saved, model : dict
        Records of the model that wrote a file and of the model that reads it.

    Examples
    --------
    >>> one = {"class": "A", "name": "a", "layers": 2, "dtype": "float32", "adapters": ["x"], "merged_adapters": [],
    ...     "rope": "default"}
    >>> describe_difference(one, {**one, "adapters": []})
    "saved with adapter 'x' of A 'a' (2 layers, float32), loaded with no adapter"
    """
    differing = [name for name in saved if saved[name] != model.get(name) and name != "name"]
    both = [_describe_shape(record) for record in (saved, model)]
    adapters = [_describe_adapters(record) for record in (saved, model)]
    ropes = [f"rope {record.get('rope')}" for record in (saved, model)]
    if {"class", "layers", "dtype"} & set(differing):
        one, other = both
    elif {"adapters", "merged_adapters"} & set(differing):
        one, other = f"{adapters[0]} of {both[0]}", adapters[1]
    elif "rope" in differing:
        one, other = f"{ropes[0]} of {both[0]}", ropes[1]
    elif saved.get("name") != model.get("name"):
        one, other = f"{both[0]}", f"{both[1]}, whose weights or shape differ"
    else:
        one, other = (
            f"{adapters[0]} of {both[0]}",
            "other weights, another adapter of that name or another shape",
        )
    return f"saved with {one}, loaded with {other}"


def find_state_shapes(model: Any) -> dict[int, tuple[int, int, int]]:
    """Find the key/value heads and the head dimensions of keys and values that each layer's projections give.

    Parameters
    ----------
    model : PreTrainedModel
        Any model.

    Returns
    -------
    dict
        ``(kv_heads, key_dim, value_dim)`` by layer index; a layer whose projections are fused is left out.
    """
    found: dict[int, set[tuple[int, int, int]]] = {}
    for module in model.modules():
        index, dim = getattr(module, "layer_idx", None), getattr(module, "head_dim", None)
        sizes = [getattr(getattr(module, f"{name}_proj", None), "out_features", None) for name in "kv"]
        # Where values are the keys, there is no v_proj.
        keys, values = sizes[0], sizes[1] if getattr(module, "v_proj", None) is not None else sizes[0]
        if not (isinstance(index, int) and isinstance(dim, int) and isinstance(keys, int) and dim > 0):
            continue
        if keys and keys % dim == 0 and keys == values:
            found.setdefault(index, set()).add((keys // dim, dim, dim))
    return {index: next(iter(shapes)) for index, shapes in found.items() if len(shapes) == 1}


def _get_base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _is_adapted(module: nn.Module) -> bool:
    """Return True for a layer of peft: it lists its adapters and says if they are disabled."""
    # transformers' models have methods of these names.
    disabled, active = (getattr(module, name, None) for name in ("disable_adapters", "active_adapters"))
    return isinstance(disabled, bool) and isinstance(active, str | list | tuple | set)


def _list_adapter_weights(path: str, module: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield each parameter of a layer that belongs to an adapter, with the name of the adapter."""
    places = {*getattr(module, "adapter_layer_names", ()), "modules_to_save"}
    for name, _ in module.named_parameters(remove_duplicate=False):
        parts = name.split(".")
        if len(parts) > 1 and parts[0] in places:
            yield f"{path}.{name}" if path else name, parts[1]


def _add_prompts(model: Any, found: Adapters) -> None:
    """Add learned prompts, which peft keeps beside the model and not in its layers."""
    prompts = getattr(model, "prompt_encoder", None)
    if not isinstance(prompts, nn.ModuleDict):
        return
    found.loaded = True
    active = getattr(model, "active_adapters", [])
    names = [name for name in ([active] if isinstance(active, str) else list(active)) if name in prompts]
    found.active += [name for name in names if name not in found.active]
    found.unused |= {
        f"prompt_encoder.{name}"
        for name, _ in prompts.named_parameters()
        if name.partition(".")[0] not in names
    }


def _strip(path: str) -> str:
    return path.removeprefix("base_model.model.")


def _describe_rope(config: Any) -> str:
    values = config.to_dict()
    told = {
        name: values[name] for name in ("rope_parameters", "rope_scaling", "rope_theta") if values.get(name)
    }
    parameters = told.get("rope_parameters") or told.get("rope_scaling") or {}
    kind = parameters.get("rope_type") if isinstance(parameters, dict) else None
    rest = json.dumps(told, sort_keys=True, default=str)
    return f"{kind or 'default'} {rest}"[:400] if told else "none"


def _describe_shape(record: dict[str, Any]) -> str:
    name = f" {record.get('name')!r}" if record.get("name") else ""
    return f"{record.get('class')}{name} ({record.get('layers')} layers, {record.get('dtype')})"


def _describe_adapters(record: dict[str, Any]) -> str:
    kinds = [("adapter", record.get("adapters")), ("merged adapter", record.get("merged_adapters"))]
    told = [f"{kind} {' and '.join(map(repr, names))}" for kind, names in kinds if names]
    return " and ".join(told) or "no adapter"


def _read_bytes(sample: Tensor) -> bytes:
    return sample.view(torch.uint8).numpy().tobytes()
