"""Wrapping attention functions, and masks brought from all tokens seen to the kept slots."""

from __future__ import annotations

import gc
import threading
import weakref

import oracles
import pytest
import torch
from transformers import AttentionInterface, DynamicCache, GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rankkv import RankKVCache
from rankkv.cache import masks
from rankkv.errors import CacheStateError, UnsupportedModelError
from rankkv.observe import hook as attention

LOWEST = torch.finfo(torch.float32).min


@pytest.fixture(autouse=True)
def put_back():
    """Leave the attention functions as they were found."""
    was_installed = attention.is_installed()
    yield
    attention.uninstall()
    if was_installed:
        attention.install()


# -- installing ---------------------------------------------------------------------------------------------


def test_installing_twice_wraps_once():
    attention.uninstall()
    before = dict(AttentionInterface._global_mapping)
    attention.install()
    once = dict(AttentionInterface._global_mapping)
    attention.install()
    assert dict(AttentionInterface._global_mapping) == once
    assert {name for name in once if before.get(name) is not once[name]} >= {"sdpa", "eager"}
    attention.uninstall()
    assert dict(AttentionInterface._global_mapping) == before
    attention.uninstall()
    assert dict(AttentionInterface._global_mapping) == before
    assert not attention.is_installed()


def test_no_new_name_is_registered_but_eagers():
    attention.uninstall()
    before = set(AttentionInterface._global_mapping)
    attention.install()
    assert set(AttentionInterface._global_mapping) - before <= {"eager"}


def test_a_function_the_user_registered_is_wrapped_and_put_back(tiny_llama):
    attention.uninstall()
    original = AttentionInterface._global_mapping["sdpa"]
    calls = []

    def mine(module, *args, **kwargs):
        calls.append(module.layer_idx)
        return original(module, *args, **kwargs)

    AttentionInterface.register("sdpa", mine)
    try:
        model = tiny_llama()
        oracles.forward(model, RankKVCache(model), oracles.random_prompt(40))
        assert calls == [0, 1, 2]
        attention.uninstall()
        assert AttentionInterface._global_mapping["sdpa"] is mine
    finally:
        AttentionInterface.register("sdpa", original)


@pytest.mark.parametrize("when", ["before", "after", "both"])
def test_a_function_that_a_library_puts_before_the_registered_one(tiny_llama, when):
    """As kvpress does when it is imported: it wraps what stands there, ours too, for every model."""
    model, prompt = tiny_llama(), oracles.random_prompt(60)
    plain = RankKVCache(model, 0.4)
    expected = oracles.forward(model, plain, prompt)
    # Masks of layers of unequal lengths.
    turn = oracles.random_prompt(5, seed=7)
    later = oracles.forward(model, plain, turn)
    calls = []

    def put_before():
        inner = ALL_ATTENTION_FUNCTIONS["sdpa"]

        def outer(module, query, key, value, attention_mask, dropout, **kwargs):
            calls.append(module.layer_idx)
            # Transformers names the dropout; kvpress passes it on by its place.
            return inner(module, query, key, value, attention_mask, dropout, **kwargs)

        ALL_ATTENTION_FUNCTIONS["sdpa"] = outer
        return outer

    attention.uninstall()
    try:
        first = put_before() if when != "after" else None
        attention.install()
        if when != "before":
            put_before()
        cache = RankKVCache(model, 0.4)
        assert oracles.forward(model, cache, prompt).equal(expected)
        assert sum(cache.kept_lengths) == round(0.4 * 60 * 3)
        assert calls == [0, 1, 2] if when != "both" else [0, 0, 1, 1, 2, 2]
        assert oracles.forward(model, cache, turn).equal(later)
        assert cache.kept_lengths == plain.kept_lengths
        if when == "before":
            attention.uninstall()
            assert ALL_ATTENTION_FUNCTIONS["sdpa"] is first
    finally:
        ALL_ATTENTION_FUNCTIONS._local_mapping.clear()


def test_older_assisted_decoding_announces_its_drafts(tiny_llama, monkeypatch):
    """A version that removes a rejected draft from the cache without a word beforehand."""
    model, prompt, draft = tiny_llama(), oracles.random_prompt(90), oracles.random_prompt(5, seed=7)

    def decode(model, ids, **options):
        oracles.forward(model, options["past_key_values"], ids)
        options["past_key_values"].crop(90 - ids.shape[1])

    attention.uninstall()
    monkeypatch.delattr(Cache, "activate_past_recording", raising=False)
    monkeypatch.setattr(GenerationMixin, "_assisted_decoding", decode)
    cache = RankKVCache(model, 0.4)
    model._assisted_decoding(torch.cat([prompt, draft], dim=-1), past_key_values=cache)
    assert cache.seen_tokens == 90
    assert oracles.kept_tokens(cache) == oracles.kept_tokens(
        oracles.prefill(model, prompt, compression_ratio=0.4)
    )
    # Other caches get no such call.
    model._assisted_decoding(prompt, past_key_values=DynamicCache(config=model.config))
    attention.uninstall()
    assert GenerationMixin._assisted_decoding is decode


def test_threads_may_install_at_once():
    attention.uninstall()
    before = AttentionInterface._global_mapping["sdpa"]
    threads = [threading.Thread(target=attention.install) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    attention.uninstall()
    assert AttentionInterface._global_mapping["sdpa"] is before


# -- which cache owns a call --------------------------------------------------------------------------------


def update(cache, layer_idx):
    """Give a layer keys and values, as a model does just before it calls its attention function."""
    cache.update(torch.randn(1, 2, 30, 16), torch.randn(1, 2, 30, 16), layer_idx)


def test_attention_that_goes_around_the_interface_is_an_error_by_name(tiny_llama):
    cache = RankKVCache(tiny_llama())
    update(cache, 0)
    for use in (cache.finish, cache.copy):
        with pytest.raises(
            CacheStateError, match="layer 0 updated this cache, but its attention was not observed"
        ):
            use()
    with pytest.raises(UnsupportedModelError, match=r"layer 0 was not observed: .* interface"):
        update(cache, 1)


def test_another_cache_may_follow_one_that_was_left_waiting(tiny_llama):
    model, prompt = tiny_llama(), oracles.random_prompt(60)
    expected = oracles.generate(model, prompt, RankKVCache(model))
    update(RankKVCache(model), 0)
    assert torch.equal(oracles.generate(model, prompt, RankKVCache(model)), expected)
    left_waiting = RankKVCache(model)
    update(left_waiting, 0)
    assert torch.equal(
        oracles.generate(model, prompt, None), oracles.generate(model, prompt, RankKVCache(model, 1.0))
    )


def test_a_cache_that_waits_in_another_thread_is_not_mixed_up(tiny_llama):
    model, prompt = tiny_llama(), oracles.random_prompt(60)
    expected = oracles.generate(model, prompt, RankKVCache(model))
    waiting = RankKVCache(model)
    thread = threading.Thread(target=update, args=(waiting, 0))
    thread.start()
    thread.join()
    assert torch.equal(oracles.generate(model, prompt, RankKVCache(model)), expected)
    with pytest.raises(
        CacheStateError, match="layer 0 updated this cache, but its attention was not observed"
    ):
        _ = waiting.kept_lengths
    assert [layer.seen for layer in waiting.layers] == [30, 0, 0]


def test_waiting_does_not_keep_a_cache_alive(tiny_llama):
    cache = RankKVCache(tiny_llama())
    reference = weakref.ref(cache)
    update(cache, 0)
    del cache
    gc.collect()
    assert reference() is None


def test_a_used_cache_dies_with_its_last_reference(tiny_llama):
    model = tiny_llama()
    cache = oracles.prefill(model, oracles.random_prompt(60))
    keys, reference = weakref.ref(cache.layers[0].keys), weakref.ref(cache)
    del cache
    assert reference() is None
    assert keys() is None


# -- project_mask -------------------------------------------------------------------------------------------


def draw_slots(seen, slots, batch, heads, seed):
    """Return ascending positions ``[batch, heads, slots]`` that end with the newest token."""
    generator = torch.Generator().manual_seed(seed)
    rows = [
        sorted([*torch.randperm(seen - 1, generator=generator)[: slots - 1].tolist(), seen - 1])
        for _ in range(batch * heads)
    ]
    return torch.tensor(rows).view(batch, heads, slots)


def draw_mask(batch, heads, queries, seen, seed, additive):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, heads, queries, seen, generator=generator) < 0.6
    if not additive:
        return mask
    bias = torch.randn(mask.shape, generator=generator)
    return torch.where(mask, bias, LOWEST)


@pytest.mark.parametrize("additive", [False, True], ids=["bool", "additive"])
@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("mask_heads", [1, 4])
@pytest.mark.parametrize("slot_heads", [1, 2])
@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("mask_batch", [1, 3])
def test_four_dimensional_masks(additive, queries, mask_heads, slot_heads, filled, mask_batch):
    batch, query_heads, seen, slots = 3, 4, 20, 9
    positions = draw_slots(seen, slots, batch, slot_heads, seed=1)
    mask = draw_mask(mask_batch, mask_heads, queries, seen, 2, additive)
    valid = None
    if filled:
        valid = torch.ones(batch, slots, dtype=torch.bool)
        valid[1, :3] = valid[2, :7] = False
    actual = masks.project_mask(mask, positions, valid, queries, query_heads, "eager", torch.float32)
    heads = 1 if mask_heads == slot_heads == 1 else query_heads
    assert actual.shape == (batch, heads, queries, slots)
    assert actual.dtype == mask.dtype
    for row in range(batch):
        for head in range(heads):
            for query in range(queries):
                for slot in range(slots):
                    position = positions[row, head * slot_heads // query_heads if heads > 1 else 0, slot]
                    expected = mask[
                        row if mask_batch > 1 else 0, head if mask_heads > 1 else 0, query, position
                    ]
                    if valid is not None and not valid[row, slot]:
                        expected = torch.tensor(LOWEST if additive else False)
                    assert actual[row, head, query, slot] == expected


@pytest.mark.parametrize("additive", [False, True], ids=["bool", "additive"])
def test_a_step_that_hides_nothing_needs_no_mask(additive):
    positions = draw_slots(20, 9, 2, 2, seed=1)
    mask = torch.ones(2, 1, 1, 20, dtype=torch.bool)
    mask[1, ..., [p for p in range(20) if p not in positions[1]]] = False
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, LOWEST)
    arguments = (positions, None, 1, 4, "eager" if additive else "sdpa", torch.float32)
    assert masks.project_mask(mask, *arguments) is None
    mask[0, ..., positions[0, 0, 2]] = LOWEST if additive else False
    assert masks.project_mask(mask, *arguments) is not None


@pytest.mark.parametrize("backend", ["sdpa", "eager", "flash_attention_2"])
def test_no_mask_and_one_query_stays_no_mask(backend):
    positions = draw_slots(20, 9, 1, 2, seed=1)
    assert masks.project_mask(None, positions, None, 1, 4, backend, torch.float32) is None


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_no_mask_and_several_queries_is_causal(backend):
    # sdpa without a mask would line its triangle up with the first key, and cut the others off.
    positions = draw_slots(20, 9, 1, 2, seed=1)
    mask = masks.project_mask(None, positions, None, 3, 4, backend, torch.float32)
    visible = mask == 0 if backend == "eager" else mask
    assert visible.shape == (1, 1, 3, 9)
    for query in range(3):
        assert visible[0, 0, query].tolist() == [True] * (7 + query) + [False] * (2 - query)
    if backend == "eager":
        assert mask.dtype == torch.float32
        assert set(mask.unique().tolist()) == {0.0, LOWEST}


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("queries", [1, 3])
def test_no_mask_hides_the_empty_slots(backend, queries):
    positions = draw_slots(20, 9, 2, 2, seed=1)
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[1, :4] = False
    mask = masks.project_mask(None, positions, valid, queries, 4, backend, torch.float32)
    visible = mask == 0 if backend == "eager" else mask
    for row in range(2):
        for query in range(queries):
            expected = [bool(valid[row, slot]) and slot <= 9 - queries + query for slot in range(9)]
            assert visible[row, 0, query].tolist() == expected


def test_eager_numbers_have_the_dtype_of_the_queries():
    positions = draw_slots(20, 9, 1, 1, seed=1)
    mask = masks.project_mask(None, positions, None, 3, 4, "eager", torch.bfloat16)
    assert mask.dtype == torch.bfloat16
    assert mask.min() == torch.finfo(torch.bfloat16).min


def test_two_dimensional_masks():
    positions = draw_slots(20, 9, 2, 1, seed=1)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, :8] = 0
    actual = masks.project_mask(mask, positions, None, 1, 4, "flash_attention_2", torch.float16)
    assert actual.tolist() == [[int(mask[row, p]) for p in positions[row, 0]] for row in range(2)]
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[0, :2] = False
    filled = masks.project_mask(mask, positions, valid, 1, 4, "flash_attention_2", torch.float16)
    assert filled.tolist() == (actual * valid).tolist()
    only_slots = masks.project_mask(None, positions, valid, 1, 4, "flash_attention_2", torch.float16)
    assert torch.equal(only_slots, valid)


def test_heads_that_differ_have_no_two_dimensional_mask():
    positions = draw_slots(20, 9, 1, 2, seed=1)
    with pytest.raises(UnsupportedModelError, match=r"flash attention.*padded batch.*streaming_llm.*sdpa"):
        masks.project_mask(torch.ones(1, 20), positions, None, 1, 4, "flash_attention_2", torch.float16)


@pytest.mark.parametrize("mask", ["BlockMask", torch.ones(1, 1, 20)])
def test_masks_of_another_kind_are_refused(mask):
    positions = draw_slots(20, 9, 1, 1, seed=1)
    with pytest.raises(UnsupportedModelError, match=r"attention mask of type \w+ cannot be restricted"):
        masks.project_mask(mask, positions, None, 1, 4, "flex_attention", torch.float32)
