"""Slots and bytes of any cache: storages count as a whole, and once."""

from __future__ import annotations

import oracles
import pytest
import torch
from transformers import DynamicCache

from rankkv.budget.strategies import STRATEGIES
from rankkv.cache.report import compute_cache_bytes, count_slots


def fill(model, length=40):
    cache = DynamicCache(config=model.config)
    oracles.forward(model, cache, oracles.random_prompt(length))
    return cache


def test_bytes_of_a_plain_cache(tiny_llama):
    model = tiny_llama()
    # Keys and values of 3 layers, 2 heads, 40 slots, 16 wide, 4 bytes each.
    assert compute_cache_bytes(fill(model)) == 2 * 3 * 2 * 40 * 16 * 4
    assert compute_cache_bytes(DynamicCache(config=model.config)) == 0


def test_a_view_counts_as_all_it_keeps_in_memory(tiny_llama):
    cache = fill(tiny_llama())
    before = compute_cache_bytes(cache)
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, -3:], layer.values[:, :, -3:]
    assert compute_cache_bytes(cache) == before
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
    assert compute_cache_bytes(cache) == before * 3 // 40


def test_a_shared_storage_counts_once(tiny_llama):
    cache = fill(tiny_llama())
    before = compute_cache_bytes(cache)
    cache.layers[1].keys = cache.layers[0].keys
    cache.layers[2].values = cache.layers[0].values[:, :, 5:]
    assert compute_cache_bytes(cache) == before * 4 // 6


def test_slots(tiny_llama):
    cache = fill(tiny_llama(), length=7)
    assert [count_slots(layer) for layer in cache.layers] == [7, 7, 7]
    assert count_slots(DynamicCache(config=tiny_llama().config).layers[0]) == 0
    assert count_slots(torch.nn.Module()) == 0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_only_a_rank_is_called_a_rank(tiny_llama, strategy):
    cache = oracles.prefill(tiny_llama(), oracles.random_prompt(90), strategy=strategy)
    lines = [line for line in cache.summary().splitlines() if line.startswith("  layer ")]
    measure, ranked = STRATEGIES[strategy].measure, STRATEGIES[strategy].uses_ranks
    assert len(lines) == len(cache.budgets) == 3
    assert len(cache.layer_ranks) == (3 if ranked else 0)
    assert measure != "rank" or cache.layer_ranks == cache.layer_measures
    assert len(cache.layer_measures) == (0 if measure is None else 3)
    assert cache.layer_measures_per_row == [cache.layer_measures]
    assert all((" rank " in line) == (ranked or measure is None) for line in lines)
    for line, measured in zip(lines, cache.layer_ranks or cache.layer_measures, strict=False):
        assert float(line.split()[3]) == pytest.approx(measured, rel=1e-2)
    one_shot = measure is not None and not STRATEGIES[strategy].layerwise
    assert ("weighs all layers together" in cache.summary()) == one_shot
