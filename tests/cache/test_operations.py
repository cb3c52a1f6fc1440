"""What transformers and users do to a compressed cache: reorder, select, crop, copy, rewind, reset, turns."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import families
import oracles
import pytest
import torch
from transformers import Cache, DynamicCache, pipeline

from rankkv import RankKVCache, compress
from rankkv.cache.layer import release_hidden
from rankkv.errors import CacheStateError

PROMPTS = (
    oracles.random_prompt(80, seed=1),
    oracles.random_prompt(37, seed=2),
    oracles.random_prompt(64, seed=3),
)
OPTIONS = {"compression_ratio": 0.3, "min_budget": 3}


@pytest.fixture(scope="module", params=["llama-sdpa", "llama-eager", "neox-sdpa"])
def model(request, tiny_llama, tiny_neox):
    family, backend = request.param.split("-")
    return {"llama": tiny_llama, "neox": tiny_neox}[family](attn_implementation=backend)


@pytest.fixture(scope="module")
def llama(tiny_llama):
    return tiny_llama()


@pytest.fixture(params=["equal", "padded"])
def batch(request):
    if request.param == "padded":
        return oracles.left_pad(PROMPTS)
    return oracles.left_pad([oracles.random_prompt(80, seed) for seed in (7, 8, 9)])


def assert_same_logits(actual, expected):
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


# -- rows -----------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["reorder_cache", "batch_select_indices"])
@pytest.mark.parametrize("order", [[2, 0, 1], [1, 1, 2], [0, 0, 0]])
def test_mapping_rows_carries_all_their_state(model, batch, how, order):
    ids, mask = batch
    chunks = oracles.next_chunks(3)
    index = torch.tensor(order)
    cache = oracles.prefill(model, ids, mask, **OPTIONS)
    budgets = cache.budgets_per_row
    expected = [logits[index] for logits in oracles.feed(model, cache.copy(), chunks, mask)]
    getattr(cache, how)(index)
    assert cache.budgets_per_row == [budgets[row] for row in order]
    assert_same_logits(oracles.feed(model, cache, [chunk[index] for chunk in chunks], mask[index]), expected)


def test_selecting_fewer_rows(model, batch):
    ids, mask = batch
    index = torch.tensor([2, 1])
    chunks = oracles.next_chunks(3)
    cache = oracles.prefill(model, ids, mask, **OPTIONS)
    budgets = cache.budgets_per_row
    expected = [logits[index] for logits in oracles.feed(model, cache.copy(), chunks, mask)]
    cache.batch_select_indices(index)
    assert cache.budgets_per_row == [budgets[2], budgets[1]]
    assert_same_logits(oracles.feed(model, cache, [chunk[index] for chunk in chunks], mask[index]), expected)
    oracles.assert_bytes_match(cache)


def test_repeating_rows(model, batch):
    ids, mask = batch
    index = torch.tensor([0, 0, 1, 1, 2, 2])
    chunks = oracles.next_chunks(3)
    cache = oracles.prefill(model, ids, mask, **OPTIONS)
    budgets = cache.budgets_per_row
    expected = [logits[index] for logits in oracles.feed(model, cache.copy(), chunks, mask)]
    cache.batch_repeat_interleave(2)
    assert cache.budgets_per_row == [budgets[row] for row in index]
    assert len(cache.layer_ranks_per_row) == 6
    assert_same_logits(oracles.feed(model, cache, [chunk[index] for chunk in chunks], mask[index]), expected)


def test_reordering_after_some_steps(model, batch):
    ids, mask = batch
    before, after = oracles.next_chunks(3, (1, 4)), oracles.next_chunks(3, (1, 4, 1), seed=5)
    index = torch.tensor([1, 2, 0])
    cache = oracles.prefill(model, ids, mask, **OPTIONS)
    expected = oracles.feed(model, cache.copy(), [*before, *after], mask)[len(before) :]
    oracles.feed(model, cache, before, mask)
    cache.reorder_cache(index)
    longer = torch.cat([mask, mask.new_ones(3, 5)], dim=-1)
    actual = oracles.feed(model, cache, [chunk[index] for chunk in after], longer[index])
    assert_same_logits(actual, [logits[index] for logits in expected])


def test_beam_search_equals_the_plain_one_when_all_is_kept(model, batch):
    ids, mask = batch
    plain = oracles.generate(model, ids, None, mask=mask, num_beams=4)
    ours = oracles.generate(model, ids, RankKVCache(model, 1.0), mask=mask, num_beams=4)
    assert torch.equal(ours, plain)


def test_beam_search_on_a_compressed_cache_is_row_invariant(model):
    ids, mask = oracles.left_pad(PROMPTS)
    together = oracles.generate(model, ids, RankKVCache(model, **OPTIONS), mask=mask, num_beams=4)
    for row, prompt in enumerate(PROMPTS):
        alone = oracles.generate(model, prompt, RankKVCache(model, **OPTIONS), num_beams=4)
        assert together[row].tolist() == alone[0].tolist()


def test_beam_search_equals_that_over_the_masked_full_cache(model):
    prompt, new_tokens = PROMPTS[0], 6
    cache = oracles.prefill(model, prompt, **OPTIONS)
    copied, full = oracles.masked_oracle(model, cache, prompt)
    first = oracles.next_chunks(1, (1,))[0]
    ids = torch.cat([prompt, first], dim=-1)
    # Both go on from one prefilled row, whose last token is not in the cache yet.
    full.batch_repeat_interleave(4)
    cache.batch_repeat_interleave(4)
    for module in oracles.attention_modules(copied).values():
        module.oracle_evicted = module.oracle_evicted.repeat_interleave(4, 0)
    options = {"num_beams": 4, "num_return_sequences": 4, "new_tokens": new_tokens}
    expected = oracles.generate(copied, ids, full, **options)
    assert torch.equal(oracles.generate(model, ids, cache, **options), expected)


def test_sampling_runs_and_follows_the_seed(model):
    texts = []
    for _ in range(2):
        torch.manual_seed(3)
        texts.append(oracles.generate(model, PROMPTS[0], RankKVCache(model, **OPTIONS), do_sample=True))
    assert torch.equal(*texts)


def test_several_sequences_of_one_prompt(model):
    options = {"num_return_sequences": 3, "do_sample": True}
    torch.manual_seed(4)
    ours = oracles.generate(model, PROMPTS[0], RankKVCache(model, 1.0), **options)
    torch.manual_seed(4)
    assert torch.equal(ours, oracles.generate(model, PROMPTS[0], None, **options))


# -- taking tokens back -----------------------------------------------------------------------------


def test_cropping_generated_tokens(model, batch):
    ids, mask = batch
    chunks = oracles.next_chunks(3)
    cache = oracles.prefill(model, ids, mask, **OPTIONS)
    kept, seen = cache.kept_lengths, cache.seen_tokens
    expected = oracles.feed(model, cache.copy(), chunks, mask)
    oracles.feed(model, cache, oracles.next_chunks(3, (1, 4, 2), seed=7), mask)
    cache.crop(-7)
    assert (cache.kept_lengths, cache.seen_tokens) == (kept, seen)
    oracles.assert_bytes_match(cache)
    assert_same_logits(oracles.feed(model, cache, chunks, mask), expected)


def test_cropping_some_of_the_generated_tokens(llama):
    steps = oracles.next_chunks(1, (1, 1, 1, 1))
    later = oracles.next_chunks(1, (1, 3), seed=11)
    cache = oracles.prefill(llama, PROMPTS[0], **OPTIONS)
    reference = cache.copy()
    oracles.feed(llama, reference, steps[:2])
    oracles.feed(llama, cache, steps)
    cache.crop(-2)
    assert_same_logits(oracles.feed(llama, cache, later), oracles.feed(llama, reference, later))


def test_cropping_by_a_tensor_equals_cropping_by_a_number(model, batch):
    # So transformers 5.17 removes a rejected draft.
    ids, mask = batch
    chunks = oracles.next_chunks(3)
    cache = oracles.prefill(model, ids, mask, **OPTIONS)
    oracles.feed(model, cache, oracles.next_chunks(3, (2, 3), seed=7), mask)
    reference = cache.copy()
    cache.crop(torch.tensor(-4))
    reference.crop(-4)
    mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)
    assert (cache.kept_lengths, cache.seen_tokens) == (reference.kept_lengths, reference.seen_tokens)
    assert_same_logits(oracles.feed(model, cache, chunks, mask), oracles.feed(model, reference, chunks, mask))


def test_cropping_into_the_compressed_prompt_is_refused(llama):
    cache = oracles.prefill(llama, PROMPTS[0], **OPTIONS)
    oracles.feed(llama, cache, oracles.next_chunks(1, (2,)))
    kept = cache.kept_lengths
    with pytest.raises(CacheStateError, match=r"cannot remove 3 tokens: .*compressed after 80 of its 82"):
        cache.crop(-3)
    assert cache.kept_lengths == kept
    assert cache.seen_tokens == 82


def test_cropping_a_prompt_that_lost_nothing(llama):
    cache = oracles.prefill(llama, PROMPTS[0], compression_ratio=1.0)
    cache.crop(-30)
    assert cache.seen_tokens == 50
    whole = oracles.prefill(llama, PROMPTS[0][:, :50], compression_ratio=1.0)
    chunks = oracles.next_chunks(1)
    assert_same_logits(oracles.feed(llama, cache, chunks), oracles.feed(llama, whole, chunks))


def test_rewinding(llama):
    cache = oracles.prefill(llama, PROMPTS[0], **OPTIONS)
    chunks = oracles.next_chunks(1)
    expected = oracles.feed(llama, cache.copy(), chunks)
    oracles.feed(llama, cache, oracles.next_chunks(1, (5, 1), seed=7))
    assert cache.rewind(80) is cache
    assert cache.seen_tokens == 80
    assert_same_logits(oracles.feed(llama, cache, chunks), expected)
    cache.rewind(cache.seen_tokens)
    for wrong in (0, -1, cache.seen_tokens + 1):
        with pytest.raises(CacheStateError, match=f"cannot rewind to {wrong} tokens"):
            cache.rewind(wrong)
    with pytest.raises(CacheStateError, match="evicted"):
        cache.rewind(79)


def test_resetting(model):
    cache = oracles.prefill(model, PROMPTS[0], **OPTIONS)
    oracles.feed(model, cache, oracles.next_chunks(1))
    cache.reset()
    assert (cache.seen_tokens, cache.kept_lengths, cache.budgets) == (0, [0] * len(cache.layers), [])
    oracles.forward(model, cache, PROMPTS[1])
    fresh = oracles.prefill(model, PROMPTS[1], **OPTIONS)
    assert oracles.kept_tokens(cache) == oracles.kept_tokens(fresh)
    assert cache.budgets == fresh.budgets
    oracles.assert_equals_masked_oracle(model, cache, PROMPTS[1])


# -- one context, many questions -----------------------------------------------------------------------------


@pytest.mark.parametrize("duplicate", [RankKVCache.copy, copy.deepcopy], ids=["copy", "deepcopy"])
def test_questions_on_copies_are_independent(model, duplicate):
    context = compress(model, PROMPTS[0], **OPTIONS)
    a, b = oracles.random_prompt(6, seed=21), oracles.random_prompt(9, seed=22)
    ask = lambda question, cache: oracles.generate(model, torch.cat([PROMPTS[0], question], 1), cache)  # noqa: E731
    expected = ask(b, compress(model, PROMPTS[0], **OPTIONS))
    answer_a = ask(a, duplicate(context))
    assert torch.equal(ask(b, duplicate(context)), expected)
    assert torch.equal(ask(a, duplicate(context)), answer_a)
    assert context.seen_tokens == 80


def test_a_copy_shares_no_memory(llama):
    cache = oracles.prefill(llama, PROMPTS[0], **OPTIONS)
    copied = cache.copy()
    for mine, its in zip(cache.layers, copied.layers, strict=True):
        assert mine.keys.untyped_storage().data_ptr() != its.keys.untyped_storage().data_ptr()
        assert torch.equal(mine.keys, its.keys)
    assert copied.summary() == cache.summary()


def test_rewinding_between_questions(model):
    context = compress(model, PROMPTS[0], **OPTIONS)
    question = torch.cat([PROMPTS[0], oracles.random_prompt(9, seed=22)], 1)
    expected = oracles.generate(model, question, context.copy())
    oracles.generate(model, torch.cat([PROMPTS[0], oracles.random_prompt(6, seed=21)], 1), context)
    assert torch.equal(oracles.generate(model, question, context.rewind(80)), expected)


def test_compress_then_score_a_continuation(model, batch):
    ids, mask = batch
    cache = compress(model, ids, mask, **OPTIONS)
    assert cache.seen_tokens == ids.shape[1]
    assert not any(layer.keys.requires_grad for layer in cache.layers)
    oracles.assert_equals_masked_oracle(model, cache, ids, mask, chunks=oracles.next_chunks(3, (7, 1)))


def test_compress_then_forward_without_mask_or_positions(model):
    # Positions continue from the tokens seen: giving none must mean the same as giving the true ones.
    cache = compress(model, PROMPTS[0], **OPTIONS)
    chunk = oracles.next_chunks(1, (5,))
    explicit = oracles.feed(model, cache.copy(), chunk, torch.ones_like(PROMPTS[0]))
    assert_same_logits(oracles.feed(model, cache, chunk), explicit)


def test_prefill_by_hand_then_generate(model):
    # The next token stands at the true length of the prompt, not at the number of slots.
    prompt = PROMPTS[0]
    cache = oracles.prefill(model, prompt[:, :-1], **OPTIONS)
    copied, full = oracles.masked_oracle(model, cache, prompt[:, :-1])
    assert torch.equal(oracles.generate(model, prompt, cache), oracles.generate(copied, prompt, full))


def test_different_questions_keep_different_tokens(llama):
    # With the question inside the prompt the window observes it; a compressed context does not know it.
    kept = [
        oracles.kept_tokens(oracles.prefill(llama, torch.cat([PROMPTS[0], oracles.random_prompt(32, s)], 1)))
        for s in (31, 32)
    ]
    assert kept[0] != kept[1]


# -- turns -----------------------------------------------------------------------------


def test_three_turns_with_all_ids(model):
    cache = RankKVCache(model, **OPTIONS)
    ids = PROMPTS[0]
    for turn in range(3):
        answer = oracles.generate(model, ids, cache, new_tokens=5)
        assert cache.seen_tokens == ids.shape[1] + 4
        if turn == 0:
            kept = cache.kept_lengths
        ids = torch.cat([ids, answer, oracles.random_prompt(7, seed=turn)], 1)
    # Only the first prompt is compressed; what followed is kept whole.
    assert cache.kept_lengths == [n + 2 * 12 for n in kept]
    for layer_idx in cache.layer_indices:
        for head in oracles.kept_positions(cache, layer_idx)[0]:
            assert head == sorted(set(head))
            assert head[-28:] == list(range(cache.seen_tokens - 28, cache.seen_tokens))


def test_second_turn_equals_the_masked_full_cache(model):
    prompt = PROMPTS[0]
    cache = oracles.prefill(model, prompt, **OPTIONS)
    copied, full = oracles.masked_oracle(model, cache, prompt)
    ids = torch.cat([prompt, oracles.random_prompt(8, seed=41)], 1)
    for turn in range(2):
        answer = oracles.generate(model, ids, cache, new_tokens=5)
        assert torch.equal(answer, oracles.generate(copied, ids, full, new_tokens=5))
        ids = torch.cat([ids, answer, oracles.random_prompt(6, seed=turn)], 1)


@oracles.needs_recent_generate
def test_second_turn_with_new_ids_only(llama):
    cache = oracles.prefill(llama, PROMPTS[0], **OPTIONS)
    new = oracles.random_prompt(8, seed=41)
    whole = oracles.generate(llama, torch.cat([PROMPTS[0], new], 1), cache.copy(), new_tokens=5)
    mask = torch.ones(1, 88, dtype=torch.long)
    answer = oracles.generate(llama, new, cache, new_tokens=5, mask=mask)
    assert torch.equal(answer, whole)


def refuses(message):
    """Expect the cache's error; an older generate() stops before the cache is asked."""
    if oracles.OLD_GENERATE:
        return pytest.raises(IndexError, match="out of bounds")
    return pytest.raises(CacheStateError, match=message)


@pytest.mark.parametrize("ratio", [0.3, 1.0])
def test_a_turn_that_adds_nothing_raises(model, ratio):
    # transformers would feed the whole prompt once more, at the positions it already has.
    cache = oracles.prefill(model, PROMPTS[0], compression_ratio=ratio)
    with refuses(r"start at position 0, but the cache has seen 80 .*all ids came again"):
        oracles.generate(model, PROMPTS[0], cache)


def test_a_mask_that_misses_the_new_token_raises(model):
    # It would give the token the position of the one before it, with wrong text and no error.
    cache = oracles.prefill(model, PROMPTS[0], **OPTIONS)
    old_mask = torch.ones_like(PROMPTS[0])
    with refuses(r"start at position 79, but the cache has seen 80"):
        oracles.generate(model, oracles.random_prompt(1), cache, mask=old_mask)


# -- a cache as an object -----------------------------------------------------------------------------


def test_a_cache_is_safe_in_truth_tests_and_loops(llama):
    empty = RankKVCache(llama)
    assert bool(empty)
    assert len(empty) == len(list(empty.layers)) == 3
    assert isinstance(empty, Cache)
    assert isinstance(empty, DynamicCache)
    assert empty.seen_tokens == 0
    cache = oracles.prefill(llama, PROMPTS[0])
    assert bool(cache)
    assert len(cache) == 3
    assert not cache.is_compileable


def test_iterating_gives_each_layers_tensors(llama):
    cache = oracles.prefill(llama, PROMPTS[0], head_budgets=None)
    entries = list(cache)
    assert len(entries) == 3
    for entry, layer in zip(entries, cache.layers, strict=True):
        assert entry[0] is layer.keys
        assert entry[1] is layer.values


def test_an_empty_cache_answers_every_question(llama):
    cache = RankKVCache(llama)
    assert cache.kept_lengths == [0, 0, 0]
    assert (cache.budgets, cache.layer_ranks, cache.budgets_per_row, cache.layer_ranks_per_row) == (
        [],
        [],
        [],
        [],
    )
    assert cache.cache_bytes() == cache.full_cache_bytes() == 0
    assert "0 tokens seen" in cache.summary()
    assert cache.copy().seen_tokens == 0
    assert cache.finish() is cache


def test_text_generation_pipeline(embedded):
    model, tokenizer = embedded
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = {"max_new_tokens": 4, "do_sample": False, "return_full_text": False}
    prompt = "A list of words: " + "apple, pear, plum, " * 12
    plain = pipe(prompt, **options)[0]["generated_text"]
    cache = RankKVCache(model, compression_ratio=1.0)
    from rankkv.models.compat import cache_argument

    assert pipe(prompt, **options, **cache_argument(cache))[0]["generated_text"] == plain
    assert cache.seen_tokens > 40


def test_a_sliding_layer_frees_what_lies_outside_its_window():
    """Its keys are a view of the whole prompt's: the storage behind them counts."""
    layer, whole = SimpleNamespace(), torch.rand(1, 2, 100, 8)
    layer.keys, layer.values = whole[:, :, -31:], torch.rand(1, 2, 31, 8)
    kept, values = layer.keys.clone(), layer.values
    release_hidden(layer)
    assert layer.keys.untyped_storage().nbytes() == 31 * 2 * 8 * 4
    assert torch.equal(layer.keys, kept)
    # A tensor that fills its storage is not copied.
    assert layer.values is values


@pytest.mark.parametrize("length", [20, 90])
def test_bytes_of_sliding_layers_are_those_of_their_windows(length):
    model = families.build("Gemma 3")
    cache = compress(model, oracles.random_prompt(length), compression_ratio=0.3)
    for index in set(range(4)) - set(cache.layer_indices):
        layer = cache.layers[index]
        slots = min(length, families.WINDOW - 1)
        assert layer.keys.shape[-2] == layer.values.shape[-2] == slots
        for tensor in (layer.keys, layer.values):
            assert tensor.untyped_storage().nbytes() == slots * 2 * 16 * 4
