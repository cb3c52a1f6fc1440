"""Looking into attention: transformers' own attention functions, wrapped so that one cache can observe them.

Nothing is wrapped on import.  The first cache built wraps each attention function *under its existing name*, so that
the user's backend and config stay what they are; the wrapper passes every call through untouched unless a RankKV
cache has just been updated by the same layer in the same thread.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from . import block_masks
from .compat import find_eager_homes, takes_dynamic_cache
from .errors import CacheStateError, UnsupportedModelError
from .observation import is_visible

#: Backends whose masks are understood; eager is the model module's own function.
SUPPORTED_BACKENDS = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")

_EAGER = "eager_attention_forward"
_originals: dict[str, Callable[..., Any] | None] = {}
_eager_homes: dict[ModuleType, Callable[..., Any]] = {}
_install_lock = threading.Lock()
_local = threading.local()
_alive: set[int] = set()
# A plain flag, so that a compiled model without such a cache keeps its whole graph.
_any_cache_alive = False


class ObservingCache(Protocol):
    """A cache that wants to see the attention of its layers."""

    def attend(
        self,
        layer_idx: int,
        inner: Callable[..., Any],
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        options: dict[str, Any],
    ) -> Any:
        """Run ``inner`` with the layer's own mask and look at what it used."""

    def find_attended(self, key: Tensor) -> int | None:
        """Return the layer whose attention was last given these very keys, if there is one."""

    def attend_shared(
        self,
        layer_idx: int,
        inner: Callable[..., Any],
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        options: dict[str, Any],
    ) -> Any:
        """Run ``inner`` for a layer that attends to the keys of layer ``layer_idx``."""


def hand_off(cache: ObservingCache, layer_idx: int, key_length: int) -> None:
    """Announce that the next attention call of this thread belongs to ``cache`` and ``layer_idx``.

    A call of another layer, or over another number of keys, is none of this cache's: its forward was interrupted.

    Raises
    ------
    UnsupportedModelError
        If the previous hand-off of the same cache was never taken: the model's attention does not go through
        transformers' attention interface.
    """
    pending = getattr(_local, "pending", None)
    # Weak, so that a forward that was interrupted does not keep its cache alive.
    _local.pending = (weakref.ref(cache), layer_idx, key_length)
    if pending is not None and pending[0]() is cache and layer_idx >= pending[1]:
        _local.pending = None
        raise UnsupportedModelError(
            f"the attention of layer {pending[1]} did not go through transformers' attention interface, so RankKV "
            "could not observe it (or an earlier forward with this cache was interrupted). Use a model whose attention "
            "supports AttentionInterface, and a new cache after an interrupted forward."
        )


def _take_hand_off(module: nn.Module, key: Tensor) -> tuple[ObservingCache, int] | None:
    pending = getattr(_local, "pending", None)
    if pending is None:
        return None
    layer_idx = getattr(module, "layer_idx", pending[1])
    if layer_idx != pending[1] or key.shape[-2] != pending[2]:
        return None
    _local.pending = None
    cache = pending[0]()
    return None if cache is None else (cache, pending[1])


def _find_lender(key: Tensor) -> tuple[ObservingCache, int] | None:
    # A layer without keys of its own attends to another layer's, the very tensor that layer was given.
    current = getattr(_local, "current", None)
    cache = None if current is None else current()
    layer_idx = None if cache is None else cache.find_attended(key)
    return None if cache is None or layer_idx is None else (cache, layer_idx)


def _wrap(inner_of: Callable[[nn.Module], Callable[..., Any]], named_after: Callable[..., Any] | None) -> Any:
    def observed_attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        **options: Any,
    ) -> Any:
        inner = inner_of(module)
        if not _any_cache_alive:
            return inner(module, query, key, value, attention_mask, **options)
        return _dispatch(inner, module, query, key, value, attention_mask, options)

    return observed_attention if named_after is None else wraps(named_after)(observed_attention)


# Never part of a compiled graph: which cache owns a call is known only when it runs.
@torch.compiler.disable
def _dispatch(
    inner: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    options: dict[str, Any],
) -> Any:
    owner = _take_hand_off(module, key)
    if owner is not None:
        cache, layer_idx = owner
        _local.current = weakref.ref(cache)
        return cache.attend(layer_idx, inner, module, query, key, value, attention_mask, options)
    lender = _find_lender(key)
    if lender is not None:
        cache, layer_idx = lender
        return cache.attend_shared(layer_idx, inner, module, query, key, value, attention_mask, options)
    return inner(module, query, key, value, attention_mask, **options)


def watch_for(cache: ObservingCache, model: PreTrainedModel | None) -> None:
    """Look at attention calls as long as ``cache`` lives, wrapping the attention functions if they are not yet."""
    global _any_cache_alive
    install()
    if model is not None:
        _wrap_eager_of(model)
    with _install_lock:
        _alive.add(id(cache))
        _any_cache_alive = True
    weakref.finalize(cache, _forget_cache, id(cache))


def _forget_cache(cache_id: int) -> None:
    global _any_cache_alive
    _alive.discard(cache_id)
    _any_cache_alive = bool(_alive)


def _find_eager(module: nn.Module) -> Callable[..., Any]:
    for cls in type(module).__mro__:
        inner = getattr(sys.modules.get(cls.__module__), _EAGER, None)
        if inner is not None:
            return inner
    raise UnsupportedModelError(
        f"no eager attention function was found for {type(module).__name__}; "
        "load the model with attn_implementation='sdpa'."
    )


def install() -> None:
    """Wrap the attention functions transformers has now; calling it again changes nothing.

    Examples
    --------
    >>> install(); is_installed()
    True
    >>> uninstall(); is_installed()
    False
    """
    with _install_lock:
        registered = AttentionInterface._global_mapping
        for name in SUPPORTED_BACKENDS:
            if name in _originals:
                continue
            if name == "eager":
                # Usually nothing stands under this name: the model passes its own function as the default.
                registered_eager = registered.get(name)
                finder = _find_eager if registered_eager is None else _constant(registered_eager)
                _originals[name] = registered_eager
                AttentionInterface.register(name, _wrap(finder, registered_eager))
            elif name in registered:
                _originals[name] = registered[name]
                AttentionInterface.register(name, _wrap(_constant(registered[name]), registered[name]))


def _wrap_eager_of(model: PreTrainedModel) -> None:
    with _install_lock:
        for home in find_eager_homes(model):
            if home not in _eager_homes:
                inner = _eager_homes[home] = getattr(home, _EAGER)
                setattr(home, _EAGER, _wrap(_constant(inner), inner))


def _constant(inner: Callable[..., Any]) -> Callable[[nn.Module], Callable[..., Any]]:
    return lambda module: inner


def uninstall() -> None:
    """Put transformers' own attention functions back; caches built before can no longer be used."""
    with _install_lock:
        for name, original in _originals.items():
            if original is None:
                AttentionInterface._global_mapping.pop(name, None)
            else:
                AttentionInterface.register(name, original)
        _originals.clear()
        for home, inner in _eager_homes.items():
            setattr(home, _EAGER, inner)
        _eager_homes.clear()


def is_installed() -> bool:
    """Tell whether the attention functions are wrapped."""
    return bool(_originals)


def check_observable(model: PreTrainedModel) -> None:
    """Check, before any token, that RankKV can observe this model's attention.

    Raises
    ------
    UnsupportedModelError
        If the model is an encoder-decoder, cannot generate, computes its attention without transformers' attention
        interface, or uses a backend whose masks are not understood.
    """
    name = type(model).__name__
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise UnsupportedModelError(
            f"{name} is not a transformers model: pass a loaded causal language model."
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{name} is an encoder-decoder; RankKV compresses decoder-only language models."
        )
    if hasattr(model, "can_generate") and not model.can_generate():
        raise UnsupportedModelError(f"{name} cannot generate: load it with AutoModelForCausalLM.")
    attention_modules = [module for module in model.modules() if hasattr(module, "layer_idx")]
    if not any(_uses_interface(module) for module in attention_modules):
        raise UnsupportedModelError(
            f"the attention of {name} does not go through transformers' attention interface, so it cannot be observed."
        )
    if not takes_dynamic_cache(model):
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} gives {name} a cache of its own, which cannot be compressed; a "
            "newer transformers may not."
        )
    backend = getattr(config.get_text_config(decoder=True), "_attn_implementation", None)
    if backend is not None and backend not in SUPPORTED_BACKENDS:
        raise UnsupportedModelError(
            f"attention backend {backend!r} of {name} is not supported; call "
            f"model.set_attn_implementation(...) with one of: {', '.join(SUPPORTED_BACKENDS)}."
        )


def _uses_interface(module: nn.Module) -> bool:
    return any(
        hasattr(sys.modules.get(cls.__module__), "ALL_ATTENTION_FUNCTIONS")
        for cls in type(module).__mro__[:-1]
    )


def project_mask(
    attention_mask: Any,
    positions: Tensor,
    slot_valid: Tensor | None,
    query_length: int,
    query_heads: int,
    backend: str | None,
    dtype: torch.dtype,
) -> Any:
    """Bring a mask from logical coordinates (all tokens seen) to those of the kept slots of one layer.

    Parameters
    ----------
    attention_mask : Tensor or None
        What transformers made for all layers: 4-D ``[batch, 1 or head, query, seen]``, flash attention's 2-D
        ``[batch, seen]``, flex_attention's block mask, or None.
    positions : Tensor
        ``[batch, kv_head or 1, slot]`` int64, logical position of each slot (ascending).
    slot_valid : Tensor, optional
        ``[batch, slot]`` bool, False where a shorter row is filled up; None if every slot holds a token.
    query_length, query_heads : int
        Shape of the call.
    backend : str, optional
        Attention backend; eager adds its mask, so it gets numbers.
    dtype : torch.dtype
        Dtype of those numbers.

    Returns
    -------
    Tensor or None
        ``[batch, 1 or query_heads, query, slot]``, ``[batch, slot]``, flex_attention's block mask, or None where
        nothing needs masking.
    """
    flex = backend == block_masks.BACKEND
    if flex and (attention_mask is None or block_masks.is_block_mask(attention_mask)):
        return block_masks.project_block_mask(
            attention_mask, positions, slot_valid, query_length, query_heads
        )
    if attention_mask is None:
        return _mask_from_slots(positions, slot_valid, query_length, backend, dtype)
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() not in (2, 4):
        raise UnsupportedModelError(
            f"attention mask of type {type(attention_mask).__name__} cannot be restricted to the kept tokens; "
            f"use one of the attention backends: {', '.join(SUPPORTED_BACKENDS)}."
        )
    if attention_mask.dim() == 2:
        if positions.shape[1] != 1:
            raise UnsupportedModelError(
                "a padded batch on flash attention needs a selector that keeps the same tokens in all heads "
                "(streaming_llm), or prompts without padding, or attn_implementation='sdpa'."
            )
        gathered = attention_mask.gather(-1, positions[:, 0])
        return gathered if slot_valid is None else gathered * slot_valid
    slots = positions.shape[-1]
    mask = attention_mask.expand(positions.shape[0], -1, -1, -1)
    heads = max(mask.shape[1], positions.shape[1])
    if heads > 1:
        heads = query_heads
        positions = positions.repeat_interleave(heads // positions.shape[1], dim=1)
        mask = mask.expand(-1, heads, -1, -1)
    index = positions[:, :, None, :].expand(-1, heads, mask.shape[2], slots)
    mask = mask.gather(-1, index)
    if slot_valid is not None:
        hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        mask = mask.masked_fill(~slot_valid[:, None, None, :], hidden)
    if query_length == 1 and mask.device.type == "cpu" and _hides_nothing(mask):
        # Without a mask the fast kernels stay available; on other devices asking would stall the stream.
        return None
    # flex_attention reads a dense mask's first head for all of them.
    return block_masks.build_block_mask(is_visible(mask)) if flex else mask


def _hides_nothing(mask: Tensor) -> bool:
    return bool(mask.all()) if mask.dtype == torch.bool else not bool(mask.any())


def _mask_from_slots(
    positions: Tensor, slot_valid: Tensor | None, query_length: int, backend: str | None, dtype: torch.dtype
) -> Tensor | None:
    flash = backend is not None and backend.startswith("flash")
    if slot_valid is not None and flash:
        return slot_valid
    if query_length == 1 or flash:
        visible = None if slot_valid is None else slot_valid[:, None, None, :]
    else:
        # Every kept slot precedes every query; the queries' own slots are the last ones.
        slots = positions.shape[-1]
        rows = torch.arange(slots - query_length, slots, device=positions.device)
        visible = (torch.arange(slots, device=positions.device) <= rows[:, None])[None, None]
        if slot_valid is not None:
            visible = visible & slot_valid[:, None, None, :]
    if visible is None or backend != "eager":
        return visible
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(
        ~visible, torch.finfo(dtype).min
    )


def check_not_pending(cache: object) -> None:
    """Raise if the last layer that updated ``cache`` never came to be observed."""
    pending = getattr(_local, "pending", None)
    if pending is not None and pending[0]() is cache:
        raise CacheStateError(
            f"layer {pending[1]} updated this cache but its attention was not observed: the model's attention does not "
            "go through transformers' attention interface, or the forward was interrupted. Build a new cache."
        )
