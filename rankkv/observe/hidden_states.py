"""Looking at the hidden state around each layer's attention, which the attention functions themselves never see.

Hooks stand on a model's modules only while a cache lives that asks for them; they act only in a forward of that very
cache, so that caches on one model, in one thread or several, do not disturb each other.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import UnsupportedModelError

# Tokens whose hidden states are taken to float64 at a time.
_BLOCK_TOKENS = 1024


class ChangeTaker(Protocol):
    """A cache that wants to know how much each layer's attention changes the hidden state."""

    def note_changes(self, layer_idx: int, changes: Tensor) -> None:
        """Take the changes ``[batch, token]`` of one forward of one layer."""


def compute_token_changes(before: Tensor, attended: Tensor) -> Tensor:
    """Compute how far attention turns each token's hidden state.

    ``1 - cos(x, x + a)`` with the hidden state x that enters the layer and the output a of its attention.

    Parameters
    ----------
    before, attended : Tensor
        ``[batch, token, hidden]``.

    Returns
    -------
    Tensor
        ``[batch, token]`` float32, in [0, 2].

    Examples
    --------
    >>> compute_token_changes(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[-1.0, 1.0]]])).tolist()
    [[1.0]]
    """
    dtype = torch.float32 if before.device.type == "mps" else torch.float64
    parts = []
    for start in range(0, before.shape[1], _BLOCK_TOKENS):
        x = before[:, start : start + _BLOCK_TOKENS].to(dtype)
        a = attended[:, start : start + _BLOCK_TOKENS].to(dtype)
        parts.append((1.0 - functional.cosine_similarity(x, x + a, dim=-1)).clamp(min=0.0).float())
    return torch.cat(parts, dim=1)


def watch_hidden_states(cache: ChangeTaker, model: nn.Module, layer_indices: Iterable[int]) -> None:
    """Tell ``cache``, as long as it lives, how each layer's attention changes the hidden state.

    A layer is the member of a module list that the attention module stands in.  Its hidden state before attention is
    what it is called with; after attention, that plus what the attention module returns.  A family that scales or
    normalises this before it adds it (Gemma 2 and 3, OLMo 2) is measured without.

    Raises
    ------
    UnsupportedModelError
        If a layer of the model is not found.
    """
    owner = weakref.ref(cache)
    # By thread, since another thread may run the same module with another cache in between.
    entered: dict[tuple[int, int], Tensor] = {}
    handles = []
    found = _find_layers(model, set(layer_indices))
    for layer_idx, (layer, attentions) in found.items():

        def enter(_: nn.Module, args: Any, kwargs: Any, layer_idx: int = layer_idx) -> None:
            if owner() is not None and any(value is owner() for value in (*args, *kwargs.values())):
                entered[threading.get_ident(), layer_idx] = args[0] if args else kwargs["hidden_states"]

        def leave(_: nn.Module, args: Any, output: Any, layer_idx: int = layer_idx) -> None:
            before = entered.pop((threading.get_ident(), layer_idx), None)
            cache = owner()
            if before is None or cache is None:
                return
            attended = output if isinstance(output, Tensor) else output[0]
            # A layer may be called from another device; accelerate moves its arguments inside the call.
            before = before.to(attended.device)
            if attended.shape != before.shape:
                raise UnsupportedModelError(
                    f"layer {layer_idx} is called with hidden states of shape {tuple(before.shape)} and its attention "
                    f"returns {tuple(attended.shape)}: how much it changes them cannot be measured. Use another "
                    "strategy with this model."
                )
            with torch.no_grad():
                cache.note_changes(layer_idx, compute_token_changes(before, attended))

        handles.append(layer.register_forward_pre_hook(torch.compiler.disable(enter), with_kwargs=True))
        handles += [module.register_forward_hook(torch.compiler.disable(leave)) for module in attentions]
    weakref.finalize(cache, _remove, handles)


def _find_layers(model: nn.Module, wanted: set[int]) -> dict[int, tuple[nn.Module, list[nn.Module]]]:
    modules = dict(model.named_modules())
    found: dict[int, tuple[nn.Module, list[nn.Module]]] = {}
    for name, module in modules.items():
        layer_idx = getattr(module, "layer_idx", None)
        parts = name.split(".")
        lists = [n for n in range(1, len(parts)) if isinstance(modules[".".join(parts[:n])], nn.ModuleList)]
        if layer_idx not in wanted or not lists or lists[-1] + 1 == len(parts):
            continue
        layer = modules[".".join(parts[: lists[-1] + 1])]
        found.setdefault(layer_idx, (layer, []))[1].append(module)
    missing = sorted(wanted - set(found))
    if missing:
        raise UnsupportedModelError(
            f"layer {missing[0]} of {type(model).__name__} is no member of a list of layers, so its hidden states "
            "cannot be seen. Use another strategy with this model."
        )
    return found


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
