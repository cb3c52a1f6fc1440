"""The attention hook: transformers' attention functions, wrapped so that a cache can observe their calls.

Nothing is wrapped on import.  The first cache wraps each attention function *under its existing name*, so the user's
backend and config stay unchanged.  A wrapper passes a call through untouched, unless the same layer has just updated a
RankKV cache in the same thread.  Older transformers have their assisted decoding wrapped too: it announces its drafts.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import CacheStateError, UnsupportedModelError
from ..models.compat import (
    announce_drafts,
    find_eager_homes,
    restore_assisted_decoding,
    takes_dynamic_cache,
)
from .call import AttentionCall

#: Attention backends whose masks are supported.
SUPPORTED_BACKENDS = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")
_EAGER = "eager_attention_forward"
# The functions that were registered before, by name; None if there was none.
_originals: dict[str, Callable[..., Any] | None] = {}
# The eager functions of modules that call them past the interface.
_eager_homes: dict[ModuleType, Callable[..., Any]] = {}
# Wrapped functions of other libraries that override the registered ones, as kvpress's do: ours, and theirs inside it.
_overrides: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {}
_install_lock = threading.Lock()
_local = threading.local()
_alive: set[int] = set()
# A plain flag, so that a compiled model without a RankKV cache keeps one graph.
_any_cache_alive = False


class AttentionObserver:
    """Base class of the objects that the hook passes attention calls to: a cache, or a part its layers share."""

    def attend(self, layer_idx: int, call: AttentionCall) -> Any:
        """Run the call of a layer that has just updated its keys, and observe it."""
        raise NotImplementedError

    def find_attended(self, key: Tensor) -> int | None:
        """Return the layer whose attention last used exactly this key tensor, or None."""
        return None

    def attend_shared(self, layer_idx: int, call: AttentionCall) -> Any:
        """Run the call of a layer that attends to the keys of layer ``layer_idx``."""
        return call.run()


def check_observable(model: PreTrainedModel) -> None:
    """Check, before any token runs, that RankKV can observe this model's attention.

    Raises
    ------
    UnsupportedModelError
        If the model is an encoder-decoder, cannot generate, computes its attention without transformers' attention
        interface, or uses a backend whose masks are not supported.
    """
    name = type(model).__name__
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise UnsupportedModelError(
            f"{name} is not a transformers model: pass a loaded causal language model."
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} is an encoder-decoder; use a decoder-only language model.")
    if hasattr(model, "can_generate") and not model.can_generate():
        raise UnsupportedModelError(f"{name} cannot generate: load it with AutoModelForCausalLM.")
    attention_modules = [module for module in model.modules() if hasattr(module, "layer_idx")]
    if not any(_uses_interface(module) for module in attention_modules):
        raise UnsupportedModelError(
            f"the attention of {name} does not go through transformers' attention interface, so it cannot be observed; "
            "use a model whose attention supports AttentionInterface."
        )
    if not takes_dynamic_cache(model):
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} gives {name} a cache of its own, which cannot be compressed; try "
            "a newer transformers."
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


def watch_for(cache: AttentionObserver, model: PreTrainedModel | None) -> None:
    """Observe attention calls as long as ``cache`` lives; wraps the attention functions if needed."""
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


def install() -> None:
    """Wrap the attention functions that transformers has now; a second call changes nothing.

    Examples
    --------
    >>> install(); is_installed()
    True
    >>> uninstall(); is_installed()
    False
    """
    with _install_lock:
        announce_drafts()
        registered = AttentionInterface._global_mapping
        for name in SUPPORTED_BACKENDS:
            current = registered.get(name)
            # Another library may have registered its own function over the wrapped one since.
            if name in _originals and getattr(current, "_is_rankkv_wrapper", False):
                continue
            if name == "eager" and current is None:
                # Usually nothing is registered as eager: the model passes its own function as the default.
                _originals[name] = None
                AttentionInterface.register(name, _wrap(_find_eager, None))
            elif current is not None:
                _originals[name] = current
                AttentionInterface.register(name, _wrap(_constant(current), current))
        for name, override in list(_find_overrides().items()):
            if name in SUPPORTED_BACKENDS and override is not _overrides.get(name, (None,))[0]:
                _overrides[name] = (_wrap(_constant(override), override), override)
                ALL_ATTENTION_FUNCTIONS[name] = _overrides[name][0]


def uninstall() -> None:
    """Restore transformers' own functions; caches built before can no longer be used."""
    with _install_lock:
        restore_assisted_decoding()
        for name, original in _originals.items():
            if original is None:
                AttentionInterface._global_mapping.pop(name, None)
            else:
                AttentionInterface.register(name, original)
        _originals.clear()
        for name, (ours, theirs) in _overrides.items():
            if _find_overrides().get(name) is ours:
                ALL_ATTENTION_FUNCTIONS[name] = theirs
        _overrides.clear()
        for home, inner in _eager_homes.items():
            setattr(home, _EAGER, inner)
        _eager_homes.clear()


def is_installed() -> bool:
    """Tell whether the attention functions are wrapped."""
    return bool(_originals)


def hand_off(cache: AttentionObserver, layer_idx: int, key_length: int) -> None:
    """Announce that the next attention call of this thread belongs to ``cache`` and ``layer_idx``.

    A call of another layer, or over another number of keys, does not belong to the cache: its forward was interrupted.

    Raises
    ------
    UnsupportedModelError
        If no call took the previous announcement of this cache: the model's attention does not use transformers'
        attention interface.
    """
    pending = getattr(_local, "pending", None)
    # Weak, so that a forward that was interrupted does not keep its cache alive.
    _local.pending = (weakref.ref(cache), layer_idx, key_length)
    if pending is not None and pending[0]() is cache and layer_idx >= pending[1]:
        _local.pending = None
        raise UnsupportedModelError(
            f"layer {pending[1]} was not observed: its attention does not go through transformers' attention "
            "interface, or an earlier forward was interrupted. Use a model whose attention supports "
            "AttentionInterface, and a new cache after an interrupted forward."
        )


def take_back(cache: AttentionObserver) -> None:
    """Take back the announcement of ``cache``, if it has one in this thread."""
    pending = getattr(_local, "pending", None)
    if pending is not None and pending[0]() is cache:
        _local.pending = None


def check_not_pending(cache: object) -> None:
    """Raise if the last layer that updated ``cache`` was never observed.

    Raises
    ------
    CacheStateError
        If its attention call did not come; the message names the layer.
    """
    pending = getattr(_local, "pending", None)
    if pending is not None and pending[0]() is cache:
        raise CacheStateError(
            f"layer {pending[1]} updated this cache but its attention was not observed: it does not go through "
            "transformers' attention interface, or the forward was interrupted. Build a new cache."
        )


# Positional arguments after the mask: of registered functions, and of a model's own eager one.
_REGISTERED_ORDER = ("dropout", "scaling")
_EAGER_ORDER = ("scaling", "dropout")


def _wrap(
    inner_of: Callable[[nn.Module], Callable[..., Any]],
    named_after: Callable[..., Any] | None,
    order: tuple[str, ...] = _REGISTERED_ORDER,
) -> Any:
    """Wrap an attention function so that its calls are observed.

    ``inner_of`` finds the function of a module.  ``order`` names the positional arguments after the mask.
    """

    def observed_attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        *unnamed: Any,
        **options: Any,
    ) -> Any:
        inner = inner_of(module)
        if unnamed:
            # transformers passes these by keyword; another library's wrapper may not.
            options |= zip(order, unnamed, strict=False)
        if not _any_cache_alive:
            return inner(module, query, key, value, attention_mask, **options)
        return _dispatch(AttentionCall(inner, module, query, key, value, attention_mask, options))

    wrapper: Any = observed_attention if named_after is None else wraps(named_after)(observed_attention)
    wrapper._is_rankkv_wrapper = True
    return wrapper


# Never part of a compiled graph: the cache of a call is known only when it runs.
@torch.compiler.disable
def _dispatch(call: AttentionCall) -> Any:
    # Another library's function around ours leads here twice; only the outer call is observed.
    if getattr(_local, "inside", False):
        return call.run()
    try:
        # Inside, so that an interruption here does not leave it set.
        _local.inside = True
        return _run_observed(call)
    finally:
        _local.inside = False


def _run_observed(call: AttentionCall) -> Any:
    """Run a call through its observer, or unobserved if it has none."""
    owner = _take_hand_off(call.module, call.key)
    if owner is not None:
        cache, layer_idx = owner
        _local.current = weakref.ref(cache)
        return cache.attend(layer_idx, call)
    shared = _find_key_owner(call.key)
    if shared is not None:
        cache, layer_idx = shared
        return cache.attend_shared(layer_idx, call)
    return call.run()


def _take_hand_off(module: nn.Module, key: Tensor) -> tuple[AttentionObserver, int] | None:
    """Return the observer and layer that announced this call, and clear the announcement; None without one."""
    pending = getattr(_local, "pending", None)
    if pending is None:
        return None
    layer_idx = getattr(module, "layer_idx", pending[1])
    # An announcement is for the very next call: if another one comes, the forward that made it was interrupted.
    _local.pending = None
    if layer_idx != pending[1] or key.shape[-2] != pending[2]:
        return None
    cache = pending[0]()
    return None if cache is None else (cache, pending[1])


def _find_key_owner(key: Tensor) -> tuple[AttentionObserver, int] | None:
    # A layer without own keys attends to exactly the key tensor of an earlier layer.
    """Return the observer and layer whose keys this call shares, or None."""
    current = getattr(_local, "current", None)
    cache = None if current is None else current()
    layer_idx = None if cache is None else cache.find_attended(key)
    return None if cache is None or layer_idx is None else (cache, layer_idx)


def _find_eager(module: nn.Module) -> Callable[..., Any]:
    """Return the eager attention function of the file that defines an attention module's class."""
    for cls in type(module).__mro__:
        inner = getattr(sys.modules.get(cls.__module__), _EAGER, None)
        if inner is not None:
            return inner
    raise UnsupportedModelError(
        f"{type(module).__name__} has no eager attention function; load the model with attn_implementation='sdpa'."
    )


def _find_overrides() -> dict[str, Callable[..., Any]]:
    return ALL_ATTENTION_FUNCTIONS._local_mapping


def _wrap_eager_of(model: PreTrainedModel) -> None:
    """Wrap the eager functions that this model calls past the attention interface."""
    with _install_lock:
        for home in find_eager_homes(model):
            if home not in _eager_homes:
                inner = _eager_homes[home] = getattr(home, _EAGER)
                setattr(home, _EAGER, _wrap(_constant(inner), inner, _EAGER_ORDER))


def _constant(inner: Callable[..., Any]) -> Callable[[nn.Module], Callable[..., Any]]:
    return lambda module: inner
