"""Quantized caches as settings: bytes counted in full, equal bytes for eviction with int8 storage."""

from __future__ import annotations

import pytest
import torch

from rankkv.errors import ConfigError, MissingDependencyError
from rankkv.evaluation import Haystack, evaluate_task, get_task, make_samples, record_prefill
from rankkv.evaluation.comparison import compare_settings
from rankkv.evaluation.quantized import add_quantized_settings, build_setting, compute_int8_gain
from rankkv.evaluation.settings import build_settings


@pytest.fixture(scope="module")
def samples(embedded, python_docs):
    haystack = Haystack(embedded[1], python_docs[:30_000])
    return make_samples(get_task("niah_single"), embedded[1], haystack, lengths=[200], count=1)


def test_eviction_and_int8_take_the_bytes_of_eviction_alone(embedded, samples):
    settings, uniform_of = build_settings([0.2], strategies=["default"])
    settings, partners = add_quantized_settings(settings, uniform_of, ["evict+int8"])
    assert partners["snapkv|default+int8|0.2"] == "snapkv|uniform|0.2"
    rows = {row["setting"]: row for row in evaluate_task(*embedded, samples, settings, blank=False)}
    alone, stored = rows["snapkv|default|0.2"], rows["snapkv|default+int8|0.2"]
    shares = {one.setting: one.bytes_share for one in compare_settings(rows.values())}
    assert shares["snapkv|default+int8|0.2"] == pytest.approx(shares["snapkv|default|0.2"], rel=0.02)
    # Positions count: 8 bytes for each head and token, more where the heads of a layer differ in length.
    assert 8 * 3 * alone["kept_tokens"] <= alone["metadata_bytes"] < 0.05 * alone["full_cache_bytes"]
    counted = alone["cache_bytes"] + alone["metadata_bytes"]
    assert shares["snapkv|default|0.2"] == pytest.approx(counted / alone["full_cache_bytes"])
    # Key and value in float32 to int8 with a float32 scale for each 64 numbers.
    gain = (2 * 64 * 4 + 8) / (2 * (64 + 4) + 8)
    assert stored["kept_tokens"] == pytest.approx(alone["kept_tokens"] * gain, rel=0.02)
    assert stored["answer_loss"] < alone["answer_loss"]


def test_gain_never_keeps_more_than_all(embedded, samples):
    record = record_prefill(embedded[0], torch.tensor(samples[0].context_ids)[None])
    assert compute_int8_gain(record) == pytest.approx(520 / 144)
    cache = build_setting(record, {"compression_ratio": 0.9, "storage": "int8", "equal_bytes": True})
    assert set(cache.kept_lengths) == {len(samples[0].context_ids)}


def test_quantized_caches_keep_all_tokens_in_fewer_bytes(embedded, samples):
    pytest.importorskip("hqq")
    settings, _ = add_quantized_settings({}, {}, ["int4", "int8"])
    rows = {row["setting"]: row for row in evaluate_task(*embedded, samples, settings, blank=False)}
    full, four, eight = rows["full"], rows["quantized|int4|1"], rows["quantized|int8|1"]
    assert four["kept_tokens"] == eight["kept_tokens"] == full["full_tokens"]
    # Bits, and float32 scale and zero point for each 64 numbers, over 32 bits.
    assert four["cache_bytes"] / full["cache_bytes"] == pytest.approx((4 + 1) / 32, rel=0.01)
    assert eight["cache_bytes"] / full["cache_bytes"] == pytest.approx((8 + 1) / 32, rel=0.01)
    assert 0.0 < eight["divergence"] < four["divergence"]


def test_what_is_missing_is_one_sentence(monkeypatch):
    import importlib.util

    with pytest.raises(ConfigError, match="'int2' must be one of int4, int8, evict"):
        add_quantized_settings({}, {}, ["int2"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"int4 needs the package 'hqq'.*rankkv\[quantized\]"):
        add_quantized_settings({}, {}, ["int4"])
