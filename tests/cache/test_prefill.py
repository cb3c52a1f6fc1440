"""Prefilling a context once, measured generation, and prompts that cannot be used."""

from __future__ import annotations

import json

import oracles
import pytest
import torch
from transformers import DynamicCache

from rankkv import RankKVCache, compress
from rankkv.analysis.generation import analyze_generation
from rankkv.cache.prefill import check_input_ids
from rankkv.errors import BudgetError, ConfigError, InputError, UnknownNameError

PROMPT = oracles.random_prompt(80, seed=1)


@pytest.fixture(scope="module")
def model(tiny_llama):
    return tiny_llama()


@pytest.mark.parametrize(
    ("input_ids", "message"),
    [
        (torch.zeros(1, 0, dtype=torch.long), "the prompt is empty"),
        (torch.zeros(0, dtype=torch.long), "the prompt is empty"),
        ([1, 2, 3], "must be a tensor .* got list"),
        ("text", "must be a tensor .* got str"),
        (torch.zeros(1, 3), r"integers of shape \[batch, token\], got torch.float32 \(1, 3\)"),
        (torch.zeros(1, 3, 2, dtype=torch.long), r"got torch.int64 \(1, 3, 2\)"),
        (torch.tensor(3), r"got torch.int64 \(\)"),
    ],
)
def test_unusable_prompts_are_named(model, input_ids, message):
    for use in (check_input_ids, lambda ids: compress(model, ids)):
        with pytest.raises(InputError, match=message):
            use(input_ids)


@pytest.mark.parametrize("mask", [torch.ones(1, 79), torch.ones(80), torch.ones(2, 80), [1] * 80])
def test_a_mask_of_another_shape_is_named(model, mask):
    with pytest.raises(InputError, match=r"attention_mask .* of the shape of input_ids \(1, 80\)"):
        compress(model, PROMPT, mask)


def test_one_dimension_is_one_row(model):
    row = compress(model, PROMPT[0], torch.ones(80, dtype=torch.long))
    batch = compress(model, PROMPT)
    assert row.seen_tokens == 80
    assert oracles.kept_tokens(row) == oracles.kept_tokens(batch)
    assert check_input_ids(PROMPT[0]).shape == (1, 80)


def test_compress_gives_a_finished_cache_of_every_token(model):
    for length in (1, 2, 17, 80):
        cache = compress(model, PROMPT[:, :length], compression_ratio=0.5)
        assert cache.finish() is cache
        assert cache.seen_tokens == length
        assert cache.kept_lengths == cache.budgets


def test_compress_keeps_no_graph_and_leaves_gradients_as_they_were(model):
    with torch.enable_grad():
        cache = compress(model, PROMPT)
        assert torch.is_grad_enabled()
    assert all(layer.keys.grad_fn is None for layer in cache.layers)


def test_compress_equals_the_prefill_of_generate(model):
    inside = RankKVCache(model, 0.3, selector="echo")
    oracles.generate(model, PROMPT, inside, new_tokens=1)
    assert oracles.kept_tokens(inside) == oracles.kept_tokens(compress(model, PROMPT, compression_ratio=0.3))


def test_compress_passes_options_on(model):
    cache = compress(model, PROMPT, budget=20, selector="h2o", strategy="uniform", sink_size=0)
    assert cache.budgets == [20, 20, 20]
    assert (cache.config.selector, cache.config.sink_size) == ("h2o", 0)
    with pytest.raises(ConfigError, match=r"compression_ratio=1\.5"):
        compress(model, PROMPT, compression_ratio=1.5)
    with pytest.raises(UnknownNameError, match="selector 'h20'; did you mean 'h2o'"):
        compress(model, PROMPT, selector="h20")
    with pytest.raises(BudgetError, match="at least budget=16"):
        compress(model, PROMPT, budget=3, selector="snapkv")


def test_padding_on_the_right_is_refused(model):
    # The window would observe padding.
    ids = torch.cat([PROMPT, PROMPT])
    mask = torch.ones_like(ids)
    mask[1, 50:] = 0
    with pytest.raises(InputError, match=r"row 1 of the batch ends in padding.* pad on the left"):
        compress(model, ids, mask)


def test_a_row_of_padding_alone_is_refused(model):
    ids = torch.cat([PROMPT, PROMPT])
    mask = torch.ones_like(ids)
    mask[0] = 0
    with pytest.raises(InputError, match="row 0 of the batch has no real token"):
        compress(model, ids, mask)


# -- measured generation ------------------------------------------------------------------------------------


def test_record_of_a_compressed_generation(model):
    cache = RankKVCache(model, 0.3)
    arrived = []
    record = analyze_generation(model, PROMPT, cache, 9, arrived.append, eos_token_id=None)
    expected = oracles.generate(model, PROMPT, RankKVCache(model, 0.3), new_tokens=9)[0].tolist()
    assert record.token_ids == expected == arrived
    assert record.prompt_tokens == 80
    assert record.ttft_seconds > 0
    assert record.tpot_seconds > 0
    assert (record.cache_bytes, record.full_cache_bytes) == (cache.kept_bytes(), cache.full_cache_bytes())
    assert record.kept_lengths == [budget + 8 for budget in record.budgets]
    assert record.layer_ranks == cache.layer_ranks
    assert json.loads(json.dumps(record.to_dict()))["token_ids"] == expected


def test_record_of_the_uncompressed_model(model):
    cache = DynamicCache(config=model.config)
    record = analyze_generation(model, PROMPT[0], cache, 9, eos_token_id=None)
    assert record.token_ids == oracles.generate(model, PROMPT, None, new_tokens=9)[0].tolist()
    assert record.cache_bytes == record.full_cache_bytes == oracles.storage_bytes(cache)
    assert record.kept_lengths == [88] * 3
    assert (record.budgets, record.layer_ranks) == ([], [])


def test_full_cache_bytes_are_those_of_the_uncompressed_model(model):
    cache = RankKVCache(model, 0.3)
    ours = analyze_generation(model, PROMPT, cache, 9, eos_token_id=None)
    plain = analyze_generation(model, PROMPT, DynamicCache(config=model.config), 9, eos_token_id=None)
    assert ours.full_cache_bytes == plain.cache_bytes
    # So short a prompt is less than the room for tokens to come.
    assert cache.copy().cache_bytes() < 0.5 * plain.cache_bytes


def test_one_token_has_no_time_per_output_token(model):
    record = analyze_generation(model, PROMPT, RankKVCache(model), 1)
    assert len(record.token_ids) == 1
    assert record.tpot_seconds == 0.0


def test_a_batch_is_refused(model):
    with pytest.raises(InputError, match="one prompt, got a batch of 2"):
        analyze_generation(model, torch.cat([PROMPT, PROMPT]), RankKVCache(model))
    with pytest.raises(InputError, match="empty"):
        analyze_generation(model, PROMPT[:, :0], RankKVCache(model))
