"""What must not break: the user's model, attention that is not finite, half precision, threads, stops."""

from __future__ import annotations

import copy
import threading
import warnings

import oracles
import pytest
import torch
from transformers import AttentionInterface, DynamicCache

from rankkv import RankKVCache, compress
from rankkv.errors import RankKVError
from rankkv.observe import hook as attention

PROMPT = oracles.random_prompt(90, seed=1)


@pytest.fixture(scope="module")
def llama(tiny_llama):
    return tiny_llama()


# -- the user's model stays as it is ----------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_the_model_is_left_alone(tiny_llama, tiny_neox, backend, monkeypatch):
    for build in (tiny_llama, tiny_neox):
        model = build(attn_implementation=backend)
        before = copy.deepcopy(model.config.to_dict())
        attributes = {name: set(vars(module)) for name, module in model.named_modules()}
        asked = []
        forward = type(model).forward

        def watched(self, *args, forward=forward, asked=asked, **kwargs):
            asked.append(kwargs.get("output_attentions"))
            return forward(self, *args, **kwargs)

        monkeypatch.setattr(type(model), "forward", watched)
        oracles.generate(model, PROMPT, RankKVCache(model), new_tokens=3)
        monkeypatch.undo()
        assert model.config._attn_implementation == backend
        assert model.config.to_dict() == before
        assert not any(asked)
        # Nothing about a sequence is remembered on modules.
        assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes


def test_other_caches_are_not_touched(tiny_llama):
    model = tiny_llama()
    attention.uninstall()
    plain = oracles.feed(model, DynamicCache(config=model.config), [PROMPT, *oracles.next_chunks(1)])
    RankKVCache(model)
    assert attention.is_installed()
    beside = oracles.feed(model, DynamicCache(config=model.config), [PROMPT, *oracles.next_chunks(1)])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(beside, plain, strict=True))


def test_uninstalling_restores_the_attention_functions(llama):
    attention.uninstall()
    before = dict(AttentionInterface._global_mapping)
    cache = RankKVCache(llama)
    assert dict(AttentionInterface._global_mapping) != before
    attention.uninstall()
    assert dict(AttentionInterface._global_mapping) == before
    with pytest.raises(RankKVError):
        oracles.generate(llama, PROMPT, cache)
    # A new cache installs them again.
    oracles.generate(llama, PROMPT, RankKVCache(llama), new_tokens=2)


# -- numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("selector", oracles.ONE_PASS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tiny_llama, backend, selector, dtype):
    model = tiny_llama(attn_implementation=backend)
    single = oracles.prefill(model, PROMPT, selector=selector)
    model = copy.deepcopy(model).to(dtype)
    for ids, mask in (oracles.left_pad([PROMPT]), oracles.left_pad([PROMPT, oracles.random_prompt(30)])):
        cache = oracles.prefill(model, ids, mask, selector=selector)
        assert sum(cache.budgets) == sum(single.budgets)
        assert {layer.keys.dtype for layer in cache.layers} == {dtype}
        assert all(1 <= rank <= 32 for rank in cache.layer_ranks)
        logits = oracles.feed(model, cache, oracles.next_chunks(len(ids)), mask)
        assert all(torch.isfinite(step).all() for step in logits)
        oracles.assert_bytes_match(cache)


@pytest.fixture
def broken_layer(tiny_llama):
    """A model whose layer 1 has queries that are not numbers."""
    model = copy.deepcopy(tiny_llama())
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[0, 0] = float("nan")
    return model


def test_attention_that_is_not_finite_is_one_warning_that_names_the_layer(broken_layer):
    cache = RankKVCache(broken_layer, compression_ratio=0.3)
    # Layer 2 sees what layer 1 made of it, so the layer before stands for those that are well.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        oracles.forward(broken_layer, cache, PROMPT)
    messages = [str(entry.message) for entry in caught if "not finite" in str(entry.message)]
    assert [name for name in ("layer 0", "layer 1", "layer 2") if any(name in text for text in messages)] == [
        "layer 1",
        "layer 2",
    ]
    assert len(messages) == 2
    # The uniform share, and the total stays exact.
    assert cache.budgets[1:] == [27, 27]
    assert sum(cache.budgets) == round(0.3 * 90 * 3)
    assert "layer 1 has no finite rank" in cache.summary()
    oracles.feed(broken_layer, cache, oracles.next_chunks(1))


@pytest.mark.filterwarnings("ignore:the attention of layer [12]")
def test_one_broken_row_leaves_the_others_alone(tiny_llama):
    model = copy.deepcopy(tiny_llama())
    with torch.no_grad():
        model.model.embed_tokens.weight[127] = float("nan")
    good = PROMPT.clamp(max=120)
    bad = good.clone()
    bad[0, 20] = 127
    with pytest.warns(UserWarning, match="layer 0 is not finite"):
        cache = oracles.prefill(model, torch.cat([bad, good]))
    alone = oracles.prefill(model, good)
    assert cache.budgets_per_row[1] == alone.budgets
    assert [layer[1] for layer in oracles.kept_tokens(cache)] == [
        layer[0] for layer in oracles.kept_tokens(alone)
    ]


@pytest.mark.parametrize("length", [40, 36])
def test_nothing_evictable_gives_uniform_budgets(llama, length):
    # The window and the sinks cover the prompt, so every rank is 0.
    cache = oracles.prefill(llama, oracles.random_prompt(length), compression_ratio=0.5, window_size=length)
    assert cache.layer_ranks == [0.0] * 3
    assert cache.budgets == [length // 2] * 3


@pytest.mark.parametrize("strategy", ["proportional", "power", "softmax", "adaptive", "inverse"])
@pytest.mark.parametrize("scope", ["full", "window", "evictable"])
def test_a_prompt_of_one_repeated_token(llama, scope, strategy):
    # All keys are nearly the same, so the attention is nearly of rank 1.
    prompt = torch.full((1, 100), 7)
    cache = oracles.prefill(llama, prompt, scope=scope, strategy=strategy)
    assert all(0.0 <= rank <= 100 for rank in cache.layer_ranks)
    assert sum(cache.budgets) == 90
    oracles.assert_equals_masked_oracle(llama, cache, prompt)


# -- one model, several users -----------------------------------------------------------------------------


def test_threads_with_a_cache_each(llama):
    prompts = [oracles.random_prompt(length, seed=length) for length in (60, 75, 90, 120)]
    expected = [oracles.generate(llama, prompt, RankKVCache(llama)) for prompt in prompts]
    results: dict[int, torch.Tensor] = {}
    barrier = threading.Barrier(len(prompts))

    def run(number):
        cache = RankKVCache(llama)
        barrier.wait()
        results[number] = oracles.generate(llama, prompts[number], cache)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[number], text) for number, text in enumerate(expected))


def test_two_caches_in_turn(llama):
    a, b = oracles.random_prompt(70, 5), oracles.random_prompt(50, 6)
    chunks = oracles.next_chunks(1)
    expected = [oracles.feed(llama, compress(llama, prompt), chunks) for prompt in (a, b)]
    caches = [compress(llama, a), compress(llama, b)]
    for step, chunk in enumerate(chunks):
        for number, cache in enumerate(caches):
            assert torch.equal(oracles.feed(llama, cache, [chunk])[0], expected[number][step])


# -- interrupted forwards -----------------------------------------------------------------------------


class Interruption(Exception):
    """Raised by the test inside a forward."""


@pytest.fixture(params=["before-attention", "after-attention", "inside-attention"])
def interrupt(request, llama):
    """Return a function that runs a forward which is interrupted in layer 1."""

    def raise_interruption(*args, **kwargs):
        raise Interruption

    def run(cache, input_ids):
        module = llama.model.layers[1].self_attn
        if request.param == "before-attention":
            hook = module.register_forward_pre_hook(raise_interruption)
        elif request.param == "after-attention":
            hook = module.register_forward_hook(raise_interruption)
        else:
            # After the keys went to the cache there is only the attention function itself.
            hook = module.v_proj.register_forward_hook(raise_interruption)
        try:
            with pytest.raises(Interruption):
                oracles.forward(llama, cache, input_ids)
        finally:
            hook.remove()

    return run


def test_an_interrupted_prefill_leaves_the_model_usable(llama, interrupt):
    expected = oracles.generate(llama, PROMPT, RankKVCache(llama))
    plain = oracles.generate(llama, PROMPT, None)
    interrupt(RankKVCache(llama), PROMPT)
    assert torch.equal(oracles.generate(llama, PROMPT, RankKVCache(llama)), expected)
    assert torch.equal(oracles.generate(llama, PROMPT, None), plain)


def test_an_interrupted_prefill_is_named_when_its_cache_is_used_again(llama, interrupt):
    cache = RankKVCache(llama)
    interrupt(cache, PROMPT)
    with pytest.raises(RankKVError, match="new cache"):
        oracles.forward(llama, cache, PROMPT)
    with pytest.raises(RankKVError, match="new cache"):
        cache.finish()


def test_an_interrupted_decode_step_is_named_when_its_cache_is_used_again(llama, interrupt):
    cache = oracles.prefill(llama, PROMPT)
    interrupt(cache, PROMPT[:, :1])
    with pytest.raises(RankKVError, match="new cache"):
        oracles.feed(llama, cache, oracles.next_chunks(1, (1,)))


def test_an_interrupted_cache_can_be_reset(llama, interrupt):
    cache = RankKVCache(llama)
    interrupt(cache, PROMPT)
    cache.reset()
    assert torch.equal(
        oracles.generate(llama, PROMPT, cache), oracles.generate(llama, PROMPT, RankKVCache(llama))
    )


def test_an_interruption_inside_the_attention_function(llama, monkeypatch):
    cache = RankKVCache(llama)
    observe = RankKVCache.attend

    def attend(self, layer_idx, *args, **kwargs):
        if layer_idx == 1:
            raise Interruption
        return observe(self, layer_idx, *args, **kwargs)

    monkeypatch.setattr(RankKVCache, "attend", attend)
    with pytest.raises(Interruption):
        oracles.forward(llama, cache, PROMPT)
    monkeypatch.undo()
    with pytest.raises(RankKVError, match="new cache"):
        oracles.forward(llama, cache, PROMPT)
    assert torch.equal(
        oracles.generate(llama, PROMPT, RankKVCache(llama), 3),
        oracles.generate(llama, PROMPT, RankKVCache(llama), 3),
    )
