"""Decoding in place: a step writes its token behind the others, and nothing that anyone else holds changes."""

from __future__ import annotations

import copy

import hypothesis.strategies as st
import oracles
import pytest
import torch
from hypothesis import given

from rankkv import RankKVCache, compress
from rankkv.cache.storage import ROOM, PlainStorage

PROMPT = oracles.random_prompt(90, seed=1)
SHORT = oracles.random_prompt(33, seed=2)
KEEP = {"compression_ratio": 0.3, "min_budget": 8, "window_size": 8, "profile": None}
#: Equal heads, and heads of different lengths.
HEADS = [
    {"head_budgets": None},
    {"head_budgets": "adaptive", "head_floor": 0.0},
    {"head_budgets": "distortion"},
]
SLOT_BYTES = 2 * 2 * 16 * 4


@pytest.fixture(params=HEADS, ids=str)
def options(request):
    return {**KEEP, **request.param}


def draw(count: int, seed: int) -> torch.Tensor:
    return torch.randn(2, 3, count, 4, generator=torch.Generator().manual_seed(seed))


# -- one storage ----------------------------------------------------------------------------------------------


@given(steps=st.lists(st.sampled_from([0, 1, 1, 1, 2, 5, 70, -1, -2]), max_size=80))
def test_appending_in_place_gives_what_joining_gives(steps):
    """0 copies and goes on with the copy, a negative number crops, the others are new tokens."""
    storage, expected = PlainStorage(), draw(7, 0)
    storage.put(expected)
    shown = []
    with torch.no_grad():
        for place, step in enumerate(steps):
            if step > 0:
                new = draw(step, place + 1)
                expected = torch.cat([expected, new], dim=-2)
                assert torch.equal(storage.append(new), expected)
            elif step < 0 and expected.shape[-2] > -step:
                expected = expected[..., :step, :]
                storage.put(storage.get()[..., :step, :].clone())
            else:
                left, storage = storage, copy.deepcopy(storage)
                left.append(draw(1, -1))
            assert torch.equal(storage.get(), expected)
            shown.append((storage.get(), expected))
    for seen, then in shown:
        assert torch.equal(seen, then)


def test_a_step_copies_no_other_token_and_a_copy_has_no_room():
    storage = PlainStorage()
    storage.put(draw(10, 0))
    with torch.no_grad():
        places = {storage.append(draw(1, step)).data_ptr() for step in range(ROOM)}
        assert len(places) == 1
        assert storage.get().untyped_storage().nbytes() == 2 * 3 * 4 * 4 * (10 + ROOM)
        assert storage.append(draw(1, 0)).data_ptr() not in places
    copied = copy.deepcopy(storage)
    assert torch.equal(copied.get(), storage.get())
    assert copied.get().untyped_storage().nbytes() == copied.get().nbytes


def test_nothing_is_written_in_place_where_that_would_be_wrong():
    storage = PlainStorage()
    storage.put(draw(3, 0).requires_grad_())
    shown = storage.append(draw(1, 1))
    loss = shown.pow(2).sum()
    with torch.no_grad():
        for step in range(3):
            storage.append(draw(1, step))
    # What a gradient needs has not changed.
    loss.backward()
    # Memory made in inference mode takes no token outside of it, so it is made anew.
    with torch.inference_mode():
        storage.append(draw(1, 5))
    with torch.no_grad():
        assert storage.append(draw(1, 6)).shape[-2] == 9
    assert torch.equal(storage.get()[..., -2:, :], torch.cat([draw(1, 5), draw(1, 6)], dim=-2))


# -- whole caches ---------------------------------------------------------------------------------------------


def count_slots(cache: RankKVCache) -> int:
    """Slots over all layers, rows and heads that hold a token or padding of a shorter row."""
    return sum(sum(map(sum, layer)) for layer in cache.kept_per_head)


def test_a_resting_cache_has_no_room_and_a_decoding_one_a_little(tiny_llama, options, tmp_path):
    model = tiny_llama()
    cache = compress(model, PROMPT, **options)
    token_bytes = SLOT_BYTES // 2
    assert cache.cache_bytes() == count_slots(cache) * token_bytes
    heads = 3 * 2
    before = cache.cache_bytes()
    oracles.feed(model, cache, oracles.next_chunks(1, (1,)))
    oracles.feed(model, cache, oracles.next_chunks(1, (1, 1)))
    assert before < cache.cache_bytes() == oracles.storage_bytes(cache)
    assert cache.cache_bytes() <= before + heads * ROOM * token_bytes
    assert count_slots(cache) * token_bytes < cache.cache_bytes()
    exact = count_slots(cache) * token_bytes
    assert cache.copy().cache_bytes() == exact
    assert RankKVCache.load(cache.save(tmp_path / "cache.safetensors"), model).cache_bytes() == exact
    oracles.feed(model, cache, oracles.next_chunks(1, (1,) * (ROOM + 3)))
    assert cache.cache_bytes() <= (count_slots(cache) + heads * ROOM) * token_bytes
    cache.crop(-5)
    assert cache.cache_bytes() == count_slots(cache) * token_bytes


@pytest.mark.parametrize("rows", [1, 2], ids=["single", "padded"])
def test_two_copies_taken_while_decoding_answer_as_if_alone(tiny_llama, options, rows):
    model = tiny_llama()
    ids, mask = oracles.left_pad([PROMPT, SHORT][:rows])
    cache = oracles.prefill(model, ids, mask, **options)
    oracles.feed(model, cache, oracles.next_chunks(rows, (1, 1, 1)), mask)
    mask = torch.cat([mask, mask.new_ones(rows, 3)], dim=-1)
    other = cache.copy()
    ours, theirs = (oracles.next_chunks(rows, (1,) * 70, seed=seed) for seed in (3, 4))
    alone = [oracles.feed(model, cache.copy(), chunks, mask) for chunks in (ours, theirs)]
    # In turn, so that a token written into shared memory would be read by the other.
    for step, (mine, yours) in enumerate(zip(ours, theirs, strict=True)):
        seen = torch.cat([mask, mask.new_ones(rows, step)], dim=-1)
        torch.testing.assert_close(oracles.feed(model, cache, [mine], seen)[0], alone[0][step])
        torch.testing.assert_close(oracles.feed(model, other, [yours], seen)[0], alone[1][step])


def test_turns_and_crops_between_steps_equal_the_masked_full_cache(tiny_llama, options):
    model = tiny_llama()
    cache = oracles.prefill(model, PROMPT, **options)
    chunks = oracles.next_chunks(1, (1, 1, 5, 1, 1, 3, *(1,) * 67))
    oracles.assert_equals_masked_oracle(model, cache, PROMPT, chunks=chunks)


def test_a_cropped_cache_goes_on_as_if_the_tokens_had_not_come(tiny_llama, options):
    model = tiny_llama()
    cache = oracles.prefill(model, PROMPT, **options)
    first, wrong, last = (oracles.next_chunks(1, (1,) * 4, seed=seed) for seed in (1, 2, 3))
    expected = oracles.feed(model, cache.copy(), [*first, *last])[4:]
    oracles.feed(model, cache, [*first, *wrong])
    cache.crop(-4)
    for ours, theirs in zip(oracles.feed(model, cache, last), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_changed_rows_go_on_as_their_rows(tiny_llama, options):
    model = tiny_llama()
    ids, mask = oracles.left_pad([PROMPT, SHORT])
    cache = oracles.prefill(model, ids, mask, **options)
    chunks = oracles.next_chunks(2, (1,) * 6)
    oracles.feed(model, cache, chunks[:3], mask)
    mask = torch.cat([mask, mask.new_ones(2, 3)], dim=-1)
    expected = oracles.feed(model, cache.copy(), chunks[3:], mask)
    cache.reorder_cache(torch.tensor([1, 0]))
    swapped = oracles.feed(model, cache, [chunk.flip(0) for chunk in chunks[3:]], mask.flip(0))
    for ours, theirs in zip(swapped, expected, strict=True):
        torch.testing.assert_close(ours, theirs.flip(0))


def test_gradients_flow_through_a_cache_that_decoded_in_place(tiny_llama, options):
    model = tiny_llama()
    cache = oracles.prefill(model, PROMPT, **options)
    token = oracles.next_chunks(1, (1,))[0]
    oracles.feed(model, cache, [token, token])
    expected = oracles.forward(model, cache.copy(), token)
    logits = model(token, past_key_values=cache, position_ids=torch.tensor([[92]])).logits
    torch.testing.assert_close(logits, expected)
    # Steps after it change nothing that the gradient needs.
    oracles.feed(model, cache, [token, token])
    logits.sum().backward()
    model.zero_grad()
