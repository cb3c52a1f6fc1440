"""Devices of a model's weights, and access to weights that accelerate offloads.

An offloaded weight is a parameter on the meta device, which stores no values.  A hook of accelerate knows its values
and the device that computes with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def find_input_device(model: Any) -> torch.device:
    """Find the device for token ids: the one that stores, or computes with, the model's first weights.

    Parameters
    ----------
    model : PreTrainedModel
        Any model, with a device map or without.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> find_input_device(LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
    ...     num_hidden_layers=2, num_attention_heads=4)))
    device(type='cpu')
    """
    device = _find_device(model, "", model)
    return model.device if device is None else device


def find_layer_devices(model: nn.Module) -> dict[int, torch.device]:
    """Find the device that computes each layer's attention, by layer index.

    Parameters
    ----------
    model : PreTrainedModel
        Any model.
    """
    devices: dict[int, torch.device] = {}
    for name, module in model.named_modules():
        index = getattr(module, "layer_idx", None)
        device = _find_device(model, name, module) if isinstance(index, int) else None
        if isinstance(index, int) and device is not None:
            devices[index] = device
    return devices


def list_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """List a model's parameters by name, in order; tied ones once, even if offloading separated them.

    Parameters
    ----------
    model : PreTrainedModel
        Any model.
    """
    tied = getattr(model, "all_tied_weights_keys", None)
    # Only a mapping says which parameter a tied one repeats.
    same_as = tied if isinstance(tied, dict) else {}
    weights: dict[str, nn.Parameter] = {}
    known = set()
    for name, parameter in model.named_parameters():
        shared = same_as.get(name, name)
        if shared not in known:
            known.add(shared)
            weights[name] = parameter
    return weights


def read_weight(model: nn.Module, name: str) -> Tensor | None:
    """Return the values of a parameter, fetched from accelerate's storage if it is offloaded.

    Parameters
    ----------
    model : PreTrainedModel
        Any model.
    name : str
        Name of the parameter.

    Returns
    -------
    Tensor or None
        None if the values are stored nowhere.
    """
    parameter = model.get_parameter(name)
    if not parameter.is_meta:
        return parameter.detach()
    for hook, local in _find_hooks(model, name):
        try:
            value = (getattr(hook, "weights_map", None) or {})[local]
        except KeyError:
            continue
        if isinstance(value, Tensor) and not value.is_meta:
            # Values on disk may have another dtype than the model.
            return value.detach().to(parameter.dtype)
    return None


def _find_device(model: nn.Module, name: str, module: nn.Module) -> torch.device | None:
    """Return the device that computes with a module's first parameter; None if it has no parameters."""
    first = next(module.named_parameters(), None)
    if first is None:
        return None
    local, parameter = first
    if parameter.is_meta:
        for hook, _ in _find_hooks(model, f"{name}.{local}" if name else local):
            device = getattr(hook, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return parameter.device


def _find_hooks(model: nn.Module, name: str) -> Iterator[tuple[Any, str]]:
    """Yield accelerate's hooks on the modules around a parameter, innermost first, with its name in each module."""
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        hook = getattr(model.get_submodule(".".join(parts[:depth])), "_hf_hook", None)
        # Several hooks on one module are wrapped in a single hook.
        for one in () if hook is None else (hook, *getattr(hook, "hooks", ())):
            yield one, ".".join(parts[depth:])
