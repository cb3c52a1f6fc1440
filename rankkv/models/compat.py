"""Differences between transformers versions."""

from __future__ import annotations

import functools
import inspect
import sys
import warnings
from types import ModuleType
from typing import Any

import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import AttentionInterface, GenerationMixin, cache_utils

from ..errors import UnsupportedModelError

OLDEST_TRANSFORMERS = "5.0.0"
_RENAMED_IN = Version("5.24.0.dev0")


def check_transformers() -> None:
    """Raise if the installed transformers is older than the oldest tested version.

    Raises
    ------
    UnsupportedModelError
        With the installed version and the needed one.
    """
    if Version(transformers.__version__) < Version(OLDEST_TRANSFORMERS):
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} is too old: RankKV needs {OLDEST_TRANSFORMERS} or newer "
            f"(pip install 'transformers>={OLDEST_TRANSFORMERS}')."
        )


def cache_argument(cache: Any) -> dict[str, Any]:
    """Return the keyword argument by which this transformers version takes a cache.

    ``cache`` from transformers 5.24 on, ``past_key_values`` before.

    Examples
    --------
    >>> list(cache_argument(None)) in (["cache"], ["past_key_values"])
    True
    """
    renamed = Version(transformers.__version__) >= _RENAMED_IN
    return {"cache" if renamed else "past_key_values": cache}


def accepts_argument(model: Any, name: str) -> bool:
    """Tell whether the model's forward, or that of the base model of a PEFT wrapper, has this argument."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return name in inspect.signature(base.forward).parameters


def announces_linear_states() -> bool:
    """Tell whether every step of a linear layer goes through the cache's ``update_...`` methods.

    Before 5.24 some models changed their states in place.
    """
    return Version(transformers.__version__) >= _RENAMED_IN


def find_linear_state(layer: Any, kind: str, number: int) -> Tensor | None:
    """Return a ``"convolution"`` or ``"recurrent"`` state of a linear cache layer, or None before its first update."""
    states = layer.conv_states if kind == "convolution" else layer.recurrent_states
    state: Tensor | None = states[number] if layer.has_previous_state[number] else None
    return state


def drop_linear_states(layer: Any) -> None:
    """Drop the states of a linear cache layer: its own ``reset()`` keeps them as zeros for as many rows as before."""
    if not (hasattr(layer, "update_conv_state") and announces_linear_states()):
        return
    for number in range(layer.number_of_states):
        layer.conv_states[number] = layer.recurrent_states[number] = None
        layer.is_conv_states_initialized[number] = layer.is_recurrent_states_initialized[number] = False


def holds_state(layer: Any) -> bool:
    """Tell whether every forward updates a cache layer, through the cache.

    Examples
    --------
    >>> from transformers.cache_utils import DynamicLayer
    >>> holds_state(DynamicLayer())
    True
    """
    if hasattr(layer, "update_conv_state"):
        return announces_linear_states()
    # A layer without a cache has a stand-in, which nothing updates.
    return type(layer) is not getattr(cache_utils, "DummyLayer", None)


def find_decoder_layers(model: Any) -> list[nn.Module]:
    """Find the model's decoder layers; empty if it is not clear which modules they are."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    found = [
        module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if len(found) > 1:
        # A list of as many experts, say.
        found = [layers for layers in found if _has_numbers(layers)]
    return list(found[0]) if len(found) == 1 else []


def _has_numbers(layers: nn.ModuleList) -> bool:
    """Tell whether each layer of the list holds a module with the layer's number."""
    return all(
        any(getattr(module, "layer_idx", None) == index for module in layer.modules())
        for index, layer in enumerate(layers)
    )


def takes_dynamic_cache(model: Any) -> bool:
    """Tell whether this transformers version gives the model a DynamicCache."""
    # Most hybrid models once had their own cache class, and reported it by this method.
    ask = getattr(model, "_supports_default_dynamic_cache", None)
    return True if ask is None else bool(ask())


def read_config(config: Any, name: str) -> Any:
    """Return a value of a config; None if it is absent, or differs between layers."""
    # transformers refuses to read a value that has one entry per layer.
    spec = vars(config).get("_heterogeneity_spec")
    if spec is not None and name in spec.per_layer_attributes:
        return None
    return getattr(config, name, None)


def find_eager_homes(model: Any) -> list[ModuleType]:
    """Find the Python modules whose eager attention function is called directly, past the attention interface.

    Before transformers 5.1 every model did so.  Newer versions look up eager like any other backend.
    """
    if hasattr(AttentionInterface, "get_interface"):
        return []
    names = {cls.__module__ for module in model.modules() for cls in type(module).__mro__}
    homes = (sys.modules.get(name) for name in sorted(names))
    return [home for home in homes if hasattr(home, "eager_attention_forward")]  # type: ignore[misc]


def announce_drafts() -> None:
    """Let assisted decoding call ``activate_past_recording()`` of its cache, where transformers does not.

    Newer versions tell a cache beforehand that they will remove rejected drafts.  Older ones remove them unannounced,
    when the prompt is already compressed together with its first draft.
    """
    inner = GenerationMixin._assisted_decoding
    if hasattr(cache_utils.Cache, "activate_past_recording") or hasattr(inner, "_rankkv_inner"):
        return

    @functools.wraps(inner)
    def decode(model: Any, *arguments: Any, **options: Any) -> Any:
        announce = getattr(options.get("past_key_values"), "activate_past_recording", None)
        if announce is not None:
            announce()
        return inner(model, *arguments, **options)

    decode._rankkv_inner = inner  # type: ignore[attr-defined]
    GenerationMixin._assisted_decoding = decode


def restore_assisted_decoding() -> None:
    """Undo :func:`announce_drafts`."""
    decode = GenerationMixin._assisted_decoding
    GenerationMixin._assisted_decoding = getattr(decode, "_rankkv_inner", decode)


def find_position_limit(config: Any) -> int | None:
    """Return the number of positions of a text config; None if it has none, or its rope grows with the text."""
    parameters = read_config(config, "rope_parameters") or read_config(config, "rope_scaling") or {}
    kinds = {parameters.get("rope_type")} | {
        kind.get("rope_type") for kind in parameters.values() if isinstance(kind, dict)
    }
    limit = read_config(config, "max_position_embeddings")
    return limit if isinstance(limit, int) and limit > 0 and "dynamic" not in kinds else None


def warn_if_dropped(model: Any) -> None:
    """Warn if generate() of this model drops its cache once the text passes the length its rope was trained for.

    Phi-3 and its relatives do so with longrope: their short and long factors turn keys differently.
    """
    prepare = getattr(type(model), "prepare_inputs_for_generation", None)
    code = getattr(inspect.unwrap(prepare), "__code__", None) if prepare else None
    name = "original_max_position_embeddings"
    limit = getattr(model.config, name, None)
    if code is None or limit is None or name not in (*code.co_names, *code.co_consts):
        return
    warnings.warn(
        f"generate() of {type(model).__name__} drops any cache when the text passes {limit} tokens "
        f"({name}), so such a text is not compressed: give a longer prompt to rankkv.compress() first; an answer that "
        "passes this length continues with a full cache.",
        stacklevel=3,
    )


def find_offset_owner(model: Any) -> Any:
    """Return the module that keeps the position offset of the last image (Qwen2-VL and others); None without one."""
    return next((module for module in model.modules() if "rope_deltas" in vars(module)), None)
