"""Quantized caches as settings: transformers' QuantizedCache, and eviction with int8 storage at equal bytes."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..errors import ConfigError
from ..utils.hub import require
from .prefill_record import PrefillRecord
from .settings import MAX_LOSS, UNIFORM

#: Names of quantized settings: bits of transformers' QuantizedCache, or None for eviction with int8 storage.
QUANTIZED: dict[str, int | None] = {"int4": 4, "int8": 8, "evict+int8": None}
INSTALL = 'pip install "rankkv[quantized]"'
#: Options that only this module reads.
BITS, EQUAL_BYTES = "quantized_bits", "equal_bytes"
_GROUP = 64


def add_quantized_settings(
    settings: Mapping[str, Mapping[str, Any]], uniform_of: Mapping[str, str], names: Iterable[str]
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Add quantized settings to those of :func:`~rankkv.evaluation.settings.build_settings`.

    Parameters
    ----------
    settings, uniform_of : mapping
        Settings by name, and the uniform setting of each.
    names : iterable of str
        Keys of :data:`QUANTIZED`.  "int4" and "int8" keep all tokens.  "evict+int8" repeats every setting that is not
        uniform with int8 storage and as many more tokens as give the same bytes; it is compared with uniform budgets
        of these bytes.

    Returns
    -------
    settings, uniform_of : dict
        With the new ones behind the given ones.

    Raises
    ------
    ConfigError
        If a name is unknown.
    MissingDependencyError
        If the package hqq is needed and not installed.

    Examples
    --------
    >>> given = {"snapkv|auto|0.2": {"compression_ratio": 0.2, "selector": "snapkv"}}
    >>> found, _ = add_quantized_settings(given, {"snapkv|auto|0.2": "snapkv|uniform|0.2"}, ["evict+int8"])
    >>> list(found)
    ['snapkv|auto|0.2', 'snapkv|auto+int8|0.2']
    """
    found = {name: dict(options) for name, options in settings.items()}
    partners = dict(uniform_of)
    for name in names:
        if name not in QUANTIZED:
            raise ConfigError(f"quantized setting {name!r} must be one of {', '.join(QUANTIZED)}.")
        bits = QUANTIZED[name]
        if bits is not None:
            require("hqq", INSTALL, f"the quantized cache {name}")
            found[f"quantized|{name}|1"] = {BITS: bits}
            continue
        for setting, options in settings.items():
            selector, strategy, ratio = setting.split("|")
            if strategy not in (UNIFORM, MAX_LOSS):
                added = f"{selector}|{strategy}+int8|{ratio}"
                found[added] = {**options, "storage": "int8", EQUAL_BYTES: True}
                partners[added] = uniform_of.get(setting, setting)
    return found, partners


def build_setting(record: PrefillRecord, options: Mapping[str, Any]) -> Any:
    """Build the cache of a setting from a recorded prefill.

    Parameters
    ----------
    record : PrefillRecord
        The prefill.
    options : mapping
        Options of :class:`~rankkv.RankKVCache`, or of a quantized setting.

    Returns
    -------
    Cache
        A :class:`~rankkv.RankKVCache`, or a ``QuantizedCache`` of transformers.
    """
    options = dict(options)
    bits = options.pop(BITS, None)
    if bits is not None:
        return _build_quantized(record, bits)
    if options.pop(EQUAL_BYTES, False):
        options["compression_ratio"] = min(1.0, options["compression_ratio"] * compute_int8_gain(record))
    return record.build_cache(**options)


def compute_int8_gain(record: PrefillRecord) -> float:
    """Compute how many tokens int8 storage holds in the bytes of one.

    ``sum(2 * d * size + 8) / sum(2 * (d + 4) + 8)`` over all heads: ``d`` is the head size, ``size`` the bytes of a
    number, 4 those of an int8 scale, 8 those of a position.
    """
    plain = stored = 0
    for layer in record.build_full_cache().layers:
        tensors = _list_tensors(layer)
        heads = tensors[0].shape[1] if tensors else 0
        plain += sum(heads * tensor.shape[-1] * tensor.element_size() for tensor in tensors) + 8 * heads
        stored += sum(heads * (tensor.shape[-1] + 4) for tensor in tensors) + 8 * heads
    return plain / stored


def copy_cache(cache: Any) -> Any:
    """Return an independent copy of any cache."""
    return cache.copy() if hasattr(cache, "copy") else copy.deepcopy(cache)


def count_quantized_bytes(cache: Any) -> int | None:
    """Count the bytes of a ``QuantizedCache``, scales and zero points included; None for another cache."""
    total = 0
    for layer in cache.layers:
        if not hasattr(layer, "_quantized_keys"):
            return None
        for packed, meta in (layer._quantized_keys, layer._quantized_values):
            total += packed.nbytes
            total += sum(part.nbytes for part in meta.values() if isinstance(part, torch.Tensor))
        total += sum(tensor.nbytes for tensor in _list_tensors(layer))
    return total


def _build_quantized(record: PrefillRecord, bits: int) -> Any:
    """Build transformers' quantized cache with all tokens of a prefill, groups of 64 numbers within a token."""
    from transformers import QuantizedCache

    config = record.model.config.get_text_config(decoder=True)
    plain = record.build_full_cache()
    size = plain.layers[0].keys.shape[-1]
    cache = QuantizedCache(
        "hqq",
        config,
        nbits=bits,
        axis_key=1,
        axis_value=1,
        q_group_size=_GROUP if size % _GROUP == 0 else size,
    )
    for index, layer in enumerate(plain.layers):
        cache.update(layer.keys, layer.values, index)
    return cache


def _list_tensors(layer: Any) -> list[torch.Tensor]:
    """Return the keys and values that a plain layer holds."""
    found = (getattr(layer, name, None) for name in ("keys", "values"))
    return [tensor for tensor in found if isinstance(tensor, torch.Tensor) and tensor.dim() == 4]
