"""Which models: more families pass the oracles, hybrids keep their sliding layers, others are refused."""

from __future__ import annotations

from types import SimpleNamespace

import oracles
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from rankkv import RankKVAnalyzer, RankKVCache
from rankkv.errors import UnsupportedModelError

TINY = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PROMPTS = (oracles.random_prompt(90, seed=1), oracles.random_prompt(41, seed=2))


def build(name, backend="sdpa", model_class=AutoModelForCausalLM, **options):
    config = getattr(transformers, name)(**options)
    config._attn_implementation = backend
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model_class.from_config(config, dtype=torch.float32).eval()


# Beyond the two families of every other test: fused QKV, query and key norms, biases, learned positions, experts.
FAMILIES = {
    "qwen2": ("Qwen2Config", {k: v for k, v in TINY.items() if k != "head_dim"}),
    "qwen3": ("Qwen3Config", TINY),
    "phi3": ("Phi3Config", TINY),
    "phi": ("PhiConfig", {k: v for k, v in TINY.items() if k != "head_dim"}),
    "mistral-full": ("MistralConfig", {**TINY, "sliding_window": None}),
    "olmo2": ("Olmo2Config", TINY),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": 128,
            "n_embd": 64,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 512,
            "initializer_range": 0.2,
        },
    ),
    "mixtral": ("MixtralConfig", {**TINY, "num_local_experts": 2, "sliding_window": None}),
}


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, backend):
    name, options = FAMILIES[family]
    model = build(name, backend, **options)
    ids, mask = oracles.left_pad(PROMPTS)
    oracles.assert_identity(model, ids, mask, compression_ratio=1.0)
    cache = oracles.prefill(model, ids, mask, min_budget=3)
    assert cache.layer_indices == [0, 1, 2]
    oracles.assert_bytes_match(cache)
    oracles.assert_equals_masked_oracle(model, cache, ids, mask)
    oracles.assert_batch_invariant(model, PROMPTS, min_budget=3)


HYBRIDS = {
    "gemma2": ("Gemma2Config", {**TINY, "sliding_window": 24, "query_pre_attn_scalar": 16}),
    "gemma3": (
        "Gemma3TextConfig",
        {
            **TINY,
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "gpt-oss": (
        "GptOssConfig",
        {
            **TINY,
            "sliding_window": 24,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
        },
    ),
}


@pytest.mark.parametrize("family", HYBRIDS)
def test_hybrids_keep_their_sliding_layers(family):
    # Gemma 2 caps its logits and gpt-oss has learned sinks, which sdpa cannot compute.
    name, options = HYBRIDS[family]
    model = build(name, "eager", **options)
    full_layers = [i for i, kind in enumerate(model.config.layer_types) if kind == "full_attention"]
    ids, mask = oracles.left_pad(PROMPTS)
    cache = oracles.prefill(model, ids, mask, compression_ratio=0.3)
    assert cache.layer_indices == full_layers
    assert len(cache.budgets) == len(full_layers)
    assert sum(cache.budgets) == round(0.3 * 90 * len(full_layers))
    plain = transformers.DynamicCache(config=model.config)
    oracles.forward(model, plain, ids, mask)
    for layer_idx, layer in enumerate(cache.layers):
        if layer_idx not in full_layers:
            assert type(layer) is type(plain.layers[layer_idx])
            assert layer.keys.shape == plain.layers[layer_idx].keys.shape
    # transformers' sliding layers show their window of the whole prompt and hold all of it: here the rest is released.
    windows = sum(layer.keys.nbytes + layer.values.nbytes for layer in plain.layers)
    assert cache.full_cache_bytes() == windows
    assert cache.cache_bytes() == oracles.storage_bytes(cache) < windows
    left_alone = f"{3 - len(full_layers)} of 3 layers have no full-attention cache and stay unchanged"
    assert left_alone in cache.summary()
    # Past the window, and past it again.
    oracles.assert_equals_masked_oracle(model, cache, ids, mask, chunks=oracles.next_chunks(2, [1] * 30))
    oracles.assert_batch_invariant(model, PROMPTS, new_tokens=30, compression_ratio=0.3)
    oracles.assert_identity(model, ids, mask, new_tokens=40, compression_ratio=1.0)


def test_full_layers_of_a_hybrid_hold_every_position_when_all_is_kept():
    name, options = HYBRIDS["gemma3"]
    model = build(name, "eager", **options)
    cache = oracles.prefill(model, PROMPTS[0], compression_ratio=1.0)
    assert oracles.kept_positions(cache, 1) == [[list(range(90))] * 2]


def test_sliding_layers_everywhere_run_unchanged_with_a_warning():
    model = build("MistralConfig", **{**TINY, "sliding_window": 24})
    with pytest.warns(UserWarning, match=r"no layer of MistralForCausalLM has a full-attention KV cache"):
        cache = RankKVCache(model, compression_ratio=0.3)
    plain = oracles.generate(model, PROMPTS[0], None)
    assert torch.equal(oracles.generate(model, PROMPTS[0], cache), plain)
    assert (cache.budgets, cache.layer_indices) == ([], [])
    with pytest.raises(UnsupportedModelError, match="MistralForCausalLM has no full-attention layer"):
        RankKVAnalyzer(model).analyze(PROMPTS[0])


REFUSED = {
    "FalconForCausalLM": lambda: build(
        "FalconConfig", "eager", vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4
    ),
    "BloomForCausalLM": lambda: build(
        "BloomConfig", "eager", vocab_size=128, hidden_size=64, n_layer=2, n_head=4
    ),
    "MptForCausalLM": lambda: build("MptConfig", "eager", vocab_size=128, d_model=64, n_layers=2, n_heads=4),
    "MambaForCausalLM": lambda: build(
        "MambaConfig", "eager", vocab_size=128, hidden_size=64, num_hidden_layers=2, state_size=4
    ),
    "T5ForConditionalGeneration": lambda: build(
        "T5Config",
        "eager",
        AutoModelForSeq2SeqLM,
        vocab_size=128,
        d_model=64,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=4,
    ),
    "BertModel": lambda: build(
        "BertConfig",
        "eager",
        transformers.AutoModel,
        vocab_size=128,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
    ),
    "Linear": lambda: torch.nn.Linear(2, 2),
    "str": lambda: "a name",
    "SimpleNamespace": lambda: SimpleNamespace(config=SimpleNamespace()),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_be_observed_are_refused_by_name(name):
    model = REFUSED[name]()
    with pytest.raises(UnsupportedModelError, match=name):
        RankKVCache(model)
    if name != "str":  # The analyzer takes the name of a model.
        with pytest.raises(UnsupportedModelError, match=name):
            RankKVAnalyzer(model)


def test_an_unknown_backend_is_refused_by_name(tiny_llama):
    model = tiny_llama()
    model.set_attn_implementation(oracles.MASKED_ORACLE)
    with pytest.raises(UnsupportedModelError, match=r"backend 'masked_oracle' of LlamaForCausalLM .*sdpa"):
        RankKVCache(model)


def test_a_static_cache_is_refused(tiny_llama):
    model = tiny_llama()
    with pytest.raises(ValueError, match="cache"):
        oracles.generate(model, PROMPTS[0], RankKVCache(model), cache_implementation="static")
