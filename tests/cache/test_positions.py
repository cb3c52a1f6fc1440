"""Packed and original positions: where attention sees the kept keys, whatever rotary embedding the model has."""

from __future__ import annotations

import copy

import oracles
import pytest
import torch
from transformers import (
    AttentionInterface,
    CohereConfig,
    CohereForCausalLM,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from rankkv import RankKVCache
from rankkv.errors import UnsupportedModelError
from rankkv.observe import hook as attention

PROMPT = oracles.random_prompt(90, seed=1)
SHORT = oracles.random_prompt(33, seed=2)

_BASE = {"rope_theta": 10000.0}
ROPES = {
    "default": {"rope_type": "default", **_BASE},
    "linear": {"rope_type": "linear", "factor": 4.0, **_BASE},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, **_BASE},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, **_BASE},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
        **_BASE,
    },
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0] * 8,
        "long_factor": [2.0 + i for i in range(8)],
        "original_max_position_embeddings": 128,
        "factor": 32.0,
        **_BASE,
    },
}
SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": None,
}
KINDS = [*ROPES, "partial", "interleaved", "nope"]


@pytest.fixture(scope="module")
def build(tiny_llama, tiny_neox):
    """Return a function that builds a fresh model of a kind; the same weights every time."""

    def build_kind(kind):
        if kind in ROPES:
            # Dynamic scaling sets in beyond this length, in the middle of what the tests generate.
            limit = {"dynamic": 100}.get(kind, 4096)
            return tiny_llama(rope_parameters=ROPES[kind], max_position_embeddings=limit)
        if kind == "partial":
            return tiny_neox()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            if kind == "interleaved":
                return CohereForCausalLM(CohereConfig(**SMALL)).eval()
            return SmolLM3ForCausalLM(SmolLM3Config(**SMALL, no_rope_layers=[1, 0, 1])).eval()

    return build_kind


@pytest.fixture
def used():
    """``{layer: (query, key)}`` that sdpa itself was called with last, past whatever RankKV does before."""
    attention.uninstall()
    sdpa, calls = AttentionInterface._global_mapping["sdpa"], {}

    def capture(module, query, key, *args, **kwargs):
        calls[module.layer_idx] = (query, key)
        return sdpa(module, query, key, *args, **kwargs)

    AttentionInterface.register("sdpa", capture)
    yield calls
    attention.uninstall()
    AttentionInterface.register("sdpa", sdpa)


def freeze_frequencies(model, copied):
    """Give ``copied`` the frequencies ``model`` has now, for any length."""
    for ours, theirs in zip(model.modules(), copied.modules(), strict=True):
        if hasattr(ours, "rope_type") and hasattr(ours, "inv_freq"):
            theirs.inv_freq.copy_(ours.inv_freq)
            theirs.rope_type = "default"


@pytest.mark.parametrize("selector", ["streaming_llm", "snapkv"])
@pytest.mark.parametrize("kind", KINDS)
def test_attention_sees_the_keys_of_consecutive_positions(build, used, kind, selector):
    model = build(kind)
    options = {"selector": selector, "decode": "bounded", "positions": "packed", "head_budgets": None}
    cache = oracles.prefill(model, PROMPT, budget=24, **options)
    seen = PROMPT
    checked = []
    for evictions, step in enumerate(oracles.next_chunks(1, (1,) * 101), start=1):
        kept = oracles.kept_positions(cache, 0)[0]
        oracles.feed(model, cache, [step])
        seen = torch.cat([seen, step], dim=-1)
        if evictions not in (1, 10, 100):
            continue
        query, keys = used[0]
        copied = copy.deepcopy(model)
        freeze_frequencies(model, copied)
        for head, positions in enumerate(kept):
            tokens = seen[:, [*positions, seen.shape[1] - 1]]
            assert tokens.shape[1] == keys.shape[-2]
            oracles.forward(copied, DynamicCache(config=copied.config), tokens)
            groups = query.shape[1] // keys.shape[1]
            heads = slice(head * groups, (head + 1) * groups)
            torch.testing.assert_close(keys[:, head], used[0][1][:, head], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(query[:, heads], used[0][0][:, heads, -1:], atol=1e-4, rtol=1e-4)
        checked.append(evictions)
    assert checked == [1, 10, 100]


def test_layers_without_positions_are_left_alone(build, used):
    model = build("nope")
    cache = oracles.prefill(model, PROMPT, budget=24, positions="packed")
    oracles.feed(model, cache, oracles.next_chunks(1, (1,)))
    assert torch.equal(used[1][1], cache.layers[1].keys)
    assert not torch.equal(used[0][1], cache.layers[0].keys)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("positions", ["original", "packed"])
def test_stored_keys_stay_those_of_the_prefill(build, kind, positions):
    model = build(kind)
    full = oracles.prefill(model, PROMPT, compression_ratio=1.0, head_budgets=None)
    options = {"selector": "h2o", "decode": "bounded", "positions": positions, "head_budgets": None}
    cache = oracles.prefill(model, PROMPT, budget=40, **options)
    oracles.feed(model, cache, oracles.next_chunks(1, (1,) * 20))
    compared = 0
    for layer_idx in range(3):
        for head, kept in enumerate(oracles.kept_positions(cache, layer_idx)[0]):
            slots = [slot for slot, position in enumerate(kept) if position < 90]
            stored = cache.layers[layer_idx].keys[0, head, slots]
            assert torch.equal(stored, full.layers[layer_idx].keys[0, head, [kept[slot] for slot in slots]])
            compared += len(slots)
    assert compared > 20


@pytest.mark.parametrize("kind", KINDS)
def test_original_positions_equal_the_masked_oracle(build, kind):
    model = build(kind)
    cache = oracles.prefill(model, PROMPT, compression_ratio=0.3)
    oracles.assert_equals_masked_oracle(model, cache, PROMPT, torch.ones_like(PROMPT))


@pytest.mark.parametrize("kind", ["default", "linear", "yarn", "partial", "interleaved"])
def test_streaming_llm_packed_forgets_what_it_evicted(build, used, kind):
    # Attention of a window of sinks and newest tokens at consecutive positions depends on nothing else: layer 0 sees
    # the same whether the tokens in between were ever there or not.
    model = build(kind)
    options = {"selector": "streaming_llm", "positions": "packed", "decode": "bounded", "strategy": "uniform"}
    keys = []
    for length in (60, 90):
        prompt = torch.cat(
            [PROMPT[:, :4], oracles.random_prompt(length - 24, length), PROMPT[:, -20:]], dim=-1
        )
        cache = oracles.prefill(model, prompt, budget=24, **options)
        oracles.feed(model, cache, oracles.next_chunks(1, (1,)))
        keys.append(used[0])
    for ours, theirs in zip(*keys, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["default", "llama3", "partial", "interleaved", "nope"])
@pytest.mark.parametrize("decode", ["grow", "bounded", "periodic"])
def test_packed_rows_equal_the_rows_alone(build, kind, decode):
    model = build(kind)
    options = {"budget": 24, "min_budget": 5, "decode": decode, "decode_interval": 6, "positions": "packed"}
    for prompts in ([PROMPT, SHORT], [oracles.random_prompt(n, n) for n in (40, 12)]):
        ids, mask = oracles.left_pad(prompts)
        cache = RankKVCache(model, **options)
        text = oracles.generate(model, ids, cache, 20, mask)
        kept = oracles.kept_tokens(cache, mask)
        for row, prompt in enumerate(prompts):
            alone = RankKVCache(model, **options)
            assert torch.equal(text[row], oracles.generate(model, prompt, alone, 20)[0])
            assert [layer[row] for layer in kept] == [layer[0] for layer in oracles.kept_tokens(alone)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("selector", oracles.ONE_PASS)
def test_packed_with_everything_kept_changes_nothing(build, kind, selector):
    if kind == "dynamic" and not oracles.IS_NEWEST:
        pytest.skip("without RankKV, too, the second call has frequencies of the first")
    for ids, mask in (oracles.left_pad([PROMPT]), oracles.left_pad([PROMPT, SHORT])):
        oracles.assert_identity(
            build(kind), ids, mask, compression_ratio=1.0, selector=selector, positions="packed"
        )


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_change_survive_a_file_a_copy_and_beams(build, kind, tmp_path):
    model = build(kind)
    options = {"budget": 24, "positions": "packed", "decode": "bounded"}
    cache = oracles.prefill(model, PROMPT, **options)
    oracles.feed(model, cache, oracles.next_chunks(1, (1,) * 45))
    loaded = RankKVCache.load(cache.save(tmp_path / "cache.safetensors"), model)
    copied = cache.copy()
    chunks = oracles.next_chunks(1, (1, 1, 5, 1), seed=77)
    forget = lambda: oracles.forward(model, DynamicCache(config=model.config), PROMPT[:, :5])  # noqa: E731
    # The frequencies of dynamic scaling stand on the model and grow with the longest call; a short one resets them.
    forget()
    expected = oracles.feed(model, cache, chunks)
    for other in (loaded, copied):
        forget()
        for ours, theirs in zip(oracles.feed(model, other, chunks), expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    text = oracles.generate(model, PROMPT, RankKVCache(model, **options), 30, num_beams=3)
    assert text.shape == (1, 30)


@oracles.needs_recent_generate
def test_chunks_and_packed_positions(build):
    model = build("default")
    options = {"budget": 24, "positions": "packed", "decode": "bounded", "selector": "h2o"}
    expected = oracles.generate(model, PROMPT, RankKVCache(model, **options), 20)
    chunked = RankKVCache(model, prefill="chunked", **options)
    assert torch.equal(oracles.generate(model, PROMPT, chunked, 20, prefill_chunk_size=33), expected)
    streaming = RankKVCache(model, prefill="streaming", **options)
    oracles.generate(model, PROMPT, streaming, 20, prefill_chunk_size=33)
    assert torch.isfinite(oracles.feed(model, streaming, oracles.next_chunks(1, (1,)))[0]).all()


def test_learned_positions_are_refused_by_name():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4)).eval()
    with pytest.raises(UnsupportedModelError, match=r"GPT2LMHeadModel .* positions='packed' cannot work"):
        RankKVCache(model, positions="packed")
    assert oracles.prefill(model, PROMPT, positions="original").seen_tokens == 90


@pytest.mark.parametrize("positions", ["original", "packed"])
def test_the_summary_says_which_positions(build, positions):
    cache = oracles.prefill(build("default"), PROMPT, positions=positions)
    assert f"positions {positions}" in cache.summary()
    assert cache.config.to_dict()["positions"] == positions
