"""What attention does to the hidden state, seen from outside: right, of one cache only, and gone with it."""

from __future__ import annotations

import gc
import threading

import oracles
import pytest
import torch
from torch import nn
from transformers import DynamicCache

from rankkv import RankKVAnalyzer, RankKVCache
from rankkv.errors import UnsupportedModelError
from rankkv.observe.hidden_states import compute_token_changes, watch_hidden_states

OPTIONS = {"strategy": "squeezeattention", "compression_ratio": 0.4}
PROMPTS = (oracles.random_prompt(80, 1), oracles.random_prompt(47, 2))


@pytest.fixture
def model(tiny_llama):
    return tiny_llama(5)


def count_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def measure_by_hand(model, prompt):
    """Return 1 - cosine of what enters a layer and what enters the norm after its attention, averaged over tokens."""
    states = {}
    hooks = []
    for index, layer in enumerate(model.model.layers):
        for name, module in (("before", layer), ("after", layer.post_attention_layernorm)):
            hooks.append(
                module.register_forward_pre_hook(
                    lambda _, args, key=(name, index): states.__setitem__(key, args[0])
                )
            )
    with torch.no_grad():
        model(prompt)
    for hook in hooks:
        hook.remove()
    expected = []
    for index in range(len(model.model.layers)):
        total = 0.0
        pairs = zip(states["before", index][0].double(), states["after", index][0].double(), strict=True)
        for before, after in pairs:
            total += 1.0 - float(before @ after / (before.norm() * after.norm()))
        expected.append(total / prompt.shape[1])
    return expected


def test_changes_are_those_between_the_layer_and_the_norm_after_its_attention(model):
    cache = oracles.prefill(model, PROMPTS[0], **OPTIONS)
    assert cache.layer_measures == pytest.approx(measure_by_hand(model, PROMPTS[0]), rel=1e-4)
    assert len({round(number, 4) for number in cache.layer_measures}) == 5
    assert sum(cache.kept_lengths) == sum(cache.budgets) == round(0.4 * 80 * 5)
    assert "weighs all layers together" in cache.summary()


def test_a_padded_row_is_measured_as_alone(model):
    batch = oracles.prefill(model, *oracles.left_pad(PROMPTS), **OPTIONS)
    for row, prompt in enumerate(PROMPTS):
        alone = oracles.prefill(model, prompt, **OPTIONS)
        assert batch.layer_measures_per_row[row] == pytest.approx(alone.layer_measures, rel=1e-4)
        assert batch.budgets_per_row[row] == alone.budgets


@pytest.mark.parametrize("prefill", ["chunked", "streaming"])
def test_chunks_are_measured_together(model, prefill):
    whole = oracles.prefill(model, PROMPTS[0], **OPTIONS)
    cache = RankKVCache(model, prefill=prefill, **OPTIONS)
    oracles.feed(model, cache, PROMPTS[0].split(30, dim=1))
    cache.finish()
    if prefill == "chunked":
        assert cache.layer_measures == pytest.approx(whole.layer_measures, rel=1e-4)
        assert cache.budgets == whole.budgets
        assert oracles.kept_tokens(cache) == oracles.kept_tokens(whole)
    assert sum(cache.kept_lengths) == sum(cache.budgets)


def test_the_analyzer_measures_alike(model):
    result = RankKVAnalyzer(model, strategy="squeezeattention").analyze(PROMPTS[0], compression_ratio=0.4)
    cache = oracles.prefill(model, PROMPTS[0], **OPTIONS)
    assert result.layer_measures == cache.layer_measures
    assert result.budgets == cache.budgets
    assert min(result.layer_ranks) >= 1.0
    assert count_hooks(model) == count_hooks(model.__class__(model.config)) + 2 * 5
    del cache
    gc.collect()
    assert count_hooks(model) == count_hooks(model.__class__(model.config))


def test_a_forward_of_another_cache_is_none_of_its_business(model):
    first = RankKVCache(model, **OPTIONS)
    oracles.forward(model, DynamicCache(config=model.config), PROMPTS[1])
    with torch.no_grad():
        model(PROMPTS[1], use_cache=False)
    second = oracles.prefill(model, PROMPTS[1], **OPTIONS)
    assert all(layer.token_changes is None for layer in first.layers)
    oracles.forward(model, first, PROMPTS[0])
    assert first.layer_measures == oracles.prefill(model, PROMPTS[0], **OPTIONS).layer_measures
    assert second.layer_measures == oracles.prefill(model, PROMPTS[1], **OPTIONS).layer_measures


def test_threads_do_not_disturb_each_other(model):
    expected = [oracles.prefill(model, prompt, **OPTIONS).layer_measures for prompt in PROMPTS]
    found: dict[int, list[list[float]]] = {0: [], 1: []}

    def run(number):
        for _ in range(5):
            found[number].append(oracles.prefill(model, PROMPTS[number], **OPTIONS).layer_measures)

    threads = [threading.Thread(target=run, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: [expected[number]] * 5 for number in (0, 1)}


def test_a_copy_before_the_prompt_watches_for_itself(model):
    cache = RankKVCache(model, **OPTIONS)
    copied = cache.copy()
    oracles.forward(model, copied, PROMPTS[0])
    assert len(copied.layer_measures) == 5
    assert cache.layer_measures == []
    del cache
    gc.collect()
    copied.reset()
    oracles.forward(model, copied, PROMPTS[1])
    assert copied.layer_measures == oracles.prefill(model, PROMPTS[1], **OPTIONS).layer_measures


@pytest.mark.parametrize(
    "mode", [{}, pytest.param({"prompt_lookup_num_tokens": 3}, marks=oracles.needs_recent_generate)]
)
def test_generation_starts_with_the_uncompressed_token(model, mode):
    plain = oracles.generate(model, PROMPTS[0], None, 8, **mode)
    cache = RankKVCache(model, **OPTIONS)
    output = oracles.generate(model, PROMPTS[0], cache, 8, **mode)
    assert output[0, 0] == plain[0, 0]
    # A draft that was taken back has left no trace.
    assert {layer.token_changes.shape[1] for layer in cache.layers} == {cache.plans[0].length}
    assert len(cache.layer_measures) == 5


def test_later_turns_measure_all_that_was_seen(model, tmp_path):
    cache = oracles.prefill(model, PROMPTS[0], recompress_turns=True, **OPTIONS)
    loaded = RankKVCache.load(cache.save(tmp_path / "cache"), model)
    for each in (cache, loaded):
        oracles.forward(model, each, PROMPTS[1])
        assert [layer.token_changes.shape[1] for layer in each.layers] == [127] * 5
    assert cache.layer_measures == loaded.layer_measures
    assert cache.budgets == loaded.budgets


def test_a_model_without_a_list_of_layers_is_refused(tiny_llama):
    model = tiny_llama(2)
    bare = nn.Sequential(model.model.layers[0].self_attn)
    with pytest.raises(UnsupportedModelError, match="layer 0 of Sequential is no member of a list of layers"):
        watch_hidden_states(RankKVCache(model, **OPTIONS), bare, [0])


def test_changes_of_known_vectors():
    before = torch.tensor([[[3.0, 4.0], [1.0, 0.0], [2.0, 2.0]]])
    attended = torch.tensor([[[3.0, 4.0], [-2.0, 0.0], [-2.0, 0.0]]])
    assert compute_token_changes(before, attended)[0].tolist() == pytest.approx([0.0, 2.0, 1 - 0.5**0.5])
    many = torch.randn(2, 2500, 8, generator=torch.Generator().manual_seed(0))
    whole = 1 - torch.cosine_similarity(many[:, :-1], many[:, :-1] + many[:, 1:], dim=-1)
    torch.testing.assert_close(compute_token_changes(many[:, :-1], many[:, 1:]), whole, rtol=1e-4, atol=1e-5)
