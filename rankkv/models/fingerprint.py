"""Fingerprint of a model: its weights, active adapters, rope settings and dtype, so that saved caches find it again."""

from __future__ import annotations

import hashlib
import itertools
import json
from typing import Any

import torch

from .placement import list_weights, read_weight
from .tensor_parallel import take_local

# Prefixes of the config entries that keys and values depend on.
_SHAPE = ("num_", "hidden", "head", "vocab", "rope", "partial_rotary", "sliding", "layer_types")


def describe_model(model: Any) -> dict[str, Any]:
    """Describe a model in words that a reader can compare.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model.

    Returns
    -------
    dict
        ``model`` (class), ``name``, ``layers``, ``dtype``, ``rope`` (type of the rotary embedding) and ``adapters``
        (those active now, "merged NAME" for one that is part of the weights).
    """
    config = model.config.get_text_config(decoder=True)
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = parameters.get("rope_type", parameters.get("type")) if isinstance(parameters, dict) else None
    return {
        "model": type(_unwrap(model)).__name__,
        "name": str(getattr(config, "_name_or_path", "") or ""),
        "layers": getattr(config, "num_hidden_layers", None),
        "dtype": str(model.get_input_embeddings().weight.dtype).removeprefix("torch."),
        "rope": kind or "none",
        "adapters": find_adapters(model),
    }


def find_adapters(model: Any) -> list[str]:
    """Find the adapters (PEFT) that change what the model computes now, sorted."""
    found = set()
    for module in model.modules():
        if hasattr(module, "merged_adapters") and hasattr(module, "active_adapters"):
            found |= {f"merged {name}" for name in module.merged_adapters}
            if not module.disable_adapters:
                found |= set(module.active_adapters) - set(module.merged_adapters)
    return sorted(found)


def compute_fingerprint(model: Any, with_adapters: bool = True) -> str:
    """Compute a digest of a model's shape, rope, dtype, active adapters and a sample of every weight in use.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model.
    with_adapters : bool, default True
        False computes the digest of files written before adapters were part of it.

    Returns
    -------
    str
        Hexadecimal digest; it differs for the same model in another dtype.
    """
    config = model.config.get_text_config(decoder=True).to_dict()
    shape = {name: config[name] for name in sorted(config) if name.startswith(_SHAPE)}
    dtype = str(model.get_input_embeddings().weight.dtype)
    adapters = find_adapters(model)
    named: list[Any] = [type(model).__name__, dtype, shape]
    if with_adapters:
        named = [type(_unwrap(model)).__name__, dtype, shape, *([adapters] if adapters else [])]
    digest = hashlib.sha256(json.dumps(named, default=str).encode())
    # Sample every weight: adapters and fine-tuning may change only some of them.
    for name in list_weights(model):
        if with_adapters and _is_idle(name, adapters):
            continue
        weight = read_weight(model, name)
        if weight is None:
            continue
        flat = take_local(weight).reshape(-1)
        if flat.numel():
            sample = flat[:: max(1, flat.numel() // 16)][:16].to("cpu", torch.bfloat16)
            digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _unwrap(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _is_idle(name: str, adapters: list[str]) -> bool:
    """Return True for a weight of an adapter that is not active now."""
    parts = name.split(".")
    used = [adapter.removeprefix("merged ") for adapter in adapters]
    return any(
        part.startswith("lora_") and following not in used for part, following in itertools.pairwise(parts)
    )
