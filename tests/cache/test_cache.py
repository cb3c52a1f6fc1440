"""The compressed cache against the five oracles: families x backends x selectors x padding."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import oracles
import pytest
import torch

from rankkv import RankKVCache
from rankkv.budget_allocation import STRATEGIES, Strategy
from rankkv.errors import BudgetError

FAMILIES = ("llama", "neox")
BACKENDS = ("sdpa", "eager")
PROMPTS = (oracles.random_prompt(90, seed=1), oracles.random_prompt(41, seed=2))


@pytest.fixture(scope="module", params=[(f, b) for f in FAMILIES for b in BACKENDS], ids="-".join)
def model(request, tiny_llama, tiny_neox):
    family, backend = request.param
    return {"llama": tiny_llama, "neox": tiny_neox}[family](attn_implementation=backend)


@pytest.fixture(scope="module")
def llama(tiny_llama):
    return tiny_llama()


@pytest.fixture(params=[1, 2], ids=["single", "padded"])
def batch(request):
    """``(ids, attention mask)`` of one prompt, or of two left-padded ones."""
    return oracles.left_pad(PROMPTS[: request.param])


@pytest.fixture
def reversed_pyramid(monkeypatch):
    """Name of a strategy that gives the first layer least."""
    weights = Strategy(lambda ranks: np.linspace(0.05, 1.95, len(ranks)), False, "", "", measure=None)
    monkeypatch.setitem(STRATEGIES, "reversed_pyramid", weights)
    return "reversed_pyramid"


# -- O1 to O5 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("selector", oracles.ONE_PASS)
def test_everything_kept_changes_no_token(model, batch, selector):
    oracles.assert_identity(model, *batch, compression_ratio=1.0, selector=selector)


@pytest.mark.parametrize("selector", oracles.ONE_PASS)
def test_decoding_equals_the_full_cache_with_the_evicted_masked(model, batch, selector):
    cache = oracles.prefill(model, *batch, compression_ratio=0.3, selector=selector, min_budget=3)
    oracles.assert_equals_masked_oracle(model, cache, *batch)


@pytest.mark.parametrize("selector", oracles.ONE_PASS)
def test_a_row_of_a_padded_batch_is_treated_as_if_alone(model, selector):
    oracles.assert_batch_invariant(model, PROMPTS, selector=selector, min_budget=3)


@pytest.mark.parametrize("selector", oracles.ONE_PASS)
def test_rows_of_equal_length_do_not_share_a_kept_set(llama, selector):
    prompts = [oracles.random_prompt(70, seed) for seed in (5, 6, 7)]
    oracles.assert_batch_invariant(llama, prompts, selector=selector, min_budget=3)


@pytest.mark.parametrize("lengths", [(90, 41), (41, 90)], ids=["long-then-short", "short-then-long"])
@pytest.mark.parametrize("selector", oracles.ONE_PASS)
def test_calls_are_independent(tiny_llama, selector, lengths):
    a, b = (oracles.random_prompt(n, n) for n in lengths)
    oracles.assert_calls_independent(tiny_llama(), tiny_llama(), a, b, selector=selector)


@pytest.mark.parametrize("selector", oracles.ONE_PASS)
def test_bytes_are_those_of_the_kept_tokens(model, batch, selector):
    ids, mask = batch
    cache = oracles.prefill(model, ids, mask, compression_ratio=0.3, selector=selector)
    oracles.assert_bytes_match(cache)
    assert cache.kept_lengths == [max(column) for column in zip(*cache.budgets_per_row, strict=True)]
    equal = oracles.prefill(model, ids, mask, compression_ratio=0.3, selector=selector, head_budgets=None)
    oracles.assert_bytes_match(equal)
    full = oracles.prefill(model, ids, mask, compression_ratio=1.0, head_budgets=None)
    assert cache.full_cache_bytes() == full.full_cache_bytes() == full.cache_bytes()
    assert cache.cache_bytes() < 0.45 * full.cache_bytes()
    oracles.feed(model, cache, oracles.next_chunks(len(ids)), mask)
    oracles.assert_bytes_match(cache)


def test_only_key_value_heads_are_stored(tiny_llama):
    # Keys repeated to the query heads would make the cache four times as large.
    model = tiny_llama(num_attention_heads=8, num_key_value_heads=2, head_dim=8)
    cache = oracles.prefill(model, PROMPTS[0], compression_ratio=0.3)
    assert all(layer.keys.shape[1] == layer.values.shape[1] == 2 for layer in cache.layers)
    oracles.assert_bytes_match(cache)


def test_head_dim_is_read_from_the_keys(tiny_llama):
    model = tiny_llama(head_dim=24)
    cache = oracles.prefill(model, PROMPTS[0], compression_ratio=0.3)
    assert cache.layers[0].keys.shape[-1] == 24
    oracles.assert_equals_masked_oracle(model, cache, PROMPTS[0])


def test_evicted_memory_is_released(llama, monkeypatch):
    cache = RankKVCache(llama, compression_ratio=0.3)
    update, appended = cache.update, []

    def watched_update(*args, **kwargs):
        keys, values = update(*args, **kwargs)
        appended.extend([weakref.ref(keys), weakref.ref(values)])
        return keys, values

    monkeypatch.setattr(cache, "update", watched_update)
    oracles.forward(llama, cache, PROMPTS[0])
    gc.collect()
    assert len(appended) == 2 * len(cache.layers)
    assert all(tensor() is None for tensor in appended)
    oracles.assert_bytes_match(cache)


def test_kept_keys_are_those_of_the_prefill(model):
    # Positions stay original: nothing is rotated again.
    cache = oracles.prefill(model, PROMPTS[0], compression_ratio=0.3)
    full = oracles.prefill(model, PROMPTS[0], compression_ratio=1.0, head_budgets=None)
    for layer_idx in cache.layer_indices:
        for head, kept in enumerate(oracles.kept_positions(cache, layer_idx)[0]):
            for name in ("keys", "values"):
                # Of a head that keeps fewer than others the first slots are empty.
                ours = getattr(cache.layers[layer_idx], name)[0, head, -len(kept) :]
                assert torch.equal(ours, getattr(full.layers[layer_idx], name)[0, head, kept])


def test_the_masked_oracle_sees_an_eviction(llama):
    # Otherwise it would pass whatever is kept.
    cache = oracles.prefill(llama, PROMPTS[0], compression_ratio=0.3)
    chunks = oracles.next_chunks(1)
    compressed = oracles.feed(llama, cache, chunks)
    whole = oracles.feed(llama, oracles.prefill(llama, PROMPTS[0], compression_ratio=1.0), chunks)
    assert all((ours - theirs).abs().max() > 1e-2 for ours, theirs in zip(compressed, whole, strict=True))


# -- lengths that differ by layer ---------------------------------------------------------------------------


def test_first_layer_longest(model, batch):
    cache = oracles.prefill(
        model, *batch, budget=30, min_budget=2, strategy="pyramid", strategy_options={"steepness": 1.0}
    )
    assert cache.kept_lengths[0] > 5 * cache.kept_lengths[-1]
    oracles.assert_equals_masked_oracle(model, cache, *batch)


def test_first_layer_shortest(model, batch, reversed_pyramid):
    cache = oracles.prefill(model, *batch, budget=30, min_budget=2, strategy=reversed_pyramid)
    assert cache.kept_lengths[-1] > 5 * cache.kept_lengths[0]
    oracles.assert_equals_masked_oracle(model, cache, *batch)


def test_generate_with_lengths_that_differ(model, reversed_pyramid):
    options = {"budget": 30, "min_budget": 2, "strategy": reversed_pyramid}
    oracles.assert_batch_invariant(model, PROMPTS, **options)


# -- short prompts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 16])
def test_a_prompt_within_the_floor_is_kept_whole(llama, length, ratio):
    prompt = oracles.random_prompt(length, seed=length)
    cache = RankKVCache(llama, compression_ratio=ratio)
    logits = oracles.forward(llama, cache, prompt)
    assert cache.kept_lengths == [length] * len(cache.layers)
    assert torch.isfinite(logits).all()
    assert torch.isfinite(oracles.feed(llama, cache, [prompt[:, :1]])[0]).all()
    oracles.assert_identity(llama, prompt, compression_ratio=ratio)


@pytest.mark.parametrize("selector", oracles.ONE_PASS)
def test_short_rows_of_a_padded_batch(model, selector):
    prompts = [oracles.random_prompt(n, seed=n) for n in (1, 5, 12, 60)]
    oracles.assert_batch_invariant(model, prompts, selector=selector)
    ids, mask = oracles.left_pad(prompts)
    cache = oracles.prefill(model, ids, mask, selector=selector)
    oracles.assert_equals_masked_oracle(model, cache, ids, mask)


def test_a_one_token_prompt_is_compressed_once(llama):
    # A decode step on a one-token cache looks like a prefill to whoever goes by positions.
    prompt = oracles.random_prompt(1)
    cache = RankKVCache(llama, budget=1, min_budget=1)
    text = oracles.generate(llama, prompt, cache, new_tokens=8)
    assert torch.equal(text, oracles.generate(llama, prompt, None, new_tokens=8))
    assert cache.kept_lengths == [8] * len(cache.layers)
    assert cache.budgets == [1] * len(cache.layers)


def test_decode_steps_are_never_compressed(llama):
    cache = RankKVCache(llama, compression_ratio=0.3)
    oracles.generate(llama, PROMPTS[0], cache, new_tokens=40)
    # The last token generated is never fed back.
    assert cache.kept_lengths == [budget + 39 for budget in cache.budgets]
    assert cache.seen_tokens == PROMPTS[0].shape[1] + 39


# -- what is kept -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("selector", oracles.ONE_PASS)
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.7])
def test_first_token_equals_the_uncompressed(model, selector, ratio):
    for prompt in PROMPTS:
        ours = oracles.generate(model, prompt, RankKVCache(model, ratio, selector=selector), new_tokens=1)
        assert torch.equal(ours, oracles.generate(model, prompt, None, new_tokens=1))


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.9])
@pytest.mark.parametrize("length", [33, 100, 1000])
def test_budgets_sum_to_the_total(llama, length, ratio):
    cache = oracles.prefill(llama, oracles.random_prompt(length), compression_ratio=ratio)
    floor = min(length, max(16, round(ratio * length)))
    asked = round(ratio * length * len(cache.layers))
    assert sum(cache.budgets) == sum(cache.kept_lengths) == max(asked, min(floor, 16) * len(cache.layers))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_budgets_sum_to_the_total_with_every_strategy(llama, strategy):
    cache = oracles.prefill(llama, PROMPTS[0], compression_ratio=0.4, strategy=strategy)
    assert sum(cache.kept_lengths) == round(0.4 * PROMPTS[0].shape[1] * len(cache.layers))
    assert min(cache.kept_lengths) >= 18  # half of the average of 36


@pytest.mark.parametrize("selector", oracles.ONE_PASS)
def test_sinks_and_newest_are_kept(model, selector):
    for budget in (4, 16, 40):
        cache = oracles.prefill(
            model, PROMPTS[0], budget=budget, min_budget=budget, selector=selector, strategy="uniform"
        )
        length = PROMPTS[0].shape[1]
        protected = {*range(min(4, budget // 4)), *range(length - min(32, budget // 2), length)}
        for layer in oracles.kept_tokens(cache):
            for kept in layer[0]:
                assert protected <= set(kept)
                assert len(kept) == len(set(kept)) == budget


def test_no_sinks_when_asked(llama):
    cache = oracles.prefill(llama, PROMPTS[0], sink_size=0, selector="streaming_llm")
    for kept in oracles.kept_tokens(cache):
        for head in kept[0]:
            assert head == list(range(PROMPTS[0].shape[1] - len(head), PROMPTS[0].shape[1]))


def test_an_explicit_budget_below_the_floor_names_the_least(llama):
    with pytest.raises(BudgetError, match=r"budget=15 .* floor of 16 .* at least budget=16"):
        oracles.prefill(llama, PROMPTS[0], budget=15)
    assert oracles.prefill(llama, PROMPTS[0], budget=16).kept_lengths == [16] * 3


def test_a_ratio_below_the_floor_is_raised_and_said(llama):
    cache = oracles.prefill(llama, PROMPTS[0], compression_ratio=0.05)
    assert cache.kept_lengths == [16] * 3
    assert "raised to 48: the floor is 16 per layer" in cache.summary()
    assert "raised" not in oracles.prefill(llama, PROMPTS[0], compression_ratio=0.5).summary()


def test_summary_gives_tokens_bytes_and_budgets(llama):
    cache = oracles.prefill(llama, PROMPTS[0], compression_ratio=0.4)
    text = cache.summary()
    assert f"{PROMPTS[0].shape[1]} tokens seen" in text
    assert f"{cache.cache_bytes():,} of {cache.full_cache_bytes():,}" in text
    assert all(str(budget) in text for budget in cache.budgets)


def test_the_layers_of_higher_rank_keep_more(llama):
    cache = oracles.prefill(llama, oracles.random_prompt(200), compression_ratio=0.4)
    by_rank = sorted(range(3), key=lambda i: cache.layer_ranks[i])
    assert len(set(cache.layer_ranks)) == 3
    assert [cache.budgets[i] for i in by_rank] == sorted(cache.budgets)
    assert cache.budgets[by_rank[0]] < cache.budgets[by_rank[-1]]


def test_backends_keep_the_same_tokens(tiny_llama):
    kept = [
        oracles.kept_tokens(oracles.prefill(tiny_llama(attn_implementation=backend), PROMPTS[0]))
        for backend in BACKENDS
    ]
    assert kept[0] == kept[1]
