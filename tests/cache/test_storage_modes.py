"""Evict first, then store: compressed caches that wait as int8 or in CPU memory."""

from __future__ import annotations

import copy

import oracles
import pytest
import torch

from rankkv import RankKVCache, compress

PROMPT = oracles.random_prompt(90, seed=1)
SHORT = oracles.random_prompt(33, seed=2)
KEEP = {"compression_ratio": 0.3, "min_budget": 3}
HEADS, HEAD_DIM = 2, 16


@pytest.fixture(scope="module", params=["llama", "neox"])
def model(request, tiny_llama, tiny_neox):
    return {"llama": tiny_llama, "neox": tiny_neox}[request.param]()


@pytest.fixture(params=[1, 2], ids=["single", "padded"])
def batch(request):
    return oracles.left_pad([PROMPT, SHORT][: request.param])


# -- int8 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decode", ["grow", "bounded", "periodic"])
def test_int8_bytes_are_the_arithmetic(tiny_llama, batch, decode):
    model = tiny_llama()
    ids, mask = batch
    options = {"storage": "int8", "decode": decode, "decode_interval": 3, "head_budgets": None, **KEEP}
    cache = oracles.prefill(model, ids, mask, **options)
    for chunk in ((), (1,), (1, 1), (4, 1)):
        oracles.feed(model, cache, oracles.next_chunks(len(ids), chunk), mask)
        mask = torch.cat([mask, mask.new_ones(len(ids), sum(chunk))], dim=-1)
        expected = sum(2 * len(ids) * slots * (HEAD_DIM + 4) * HEADS for slots in cache.kept_lengths)
        held = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for layer in cache.layers
            for tensor in layer.held()
        }
        assert cache.cache_bytes() == expected == sum(held.values())
    # What it is compared with is the plain cache, in the model's dtype.
    assert cache.full_cache_bytes() == 3 * 2 * len(ids) * cache.seen_tokens * HEAD_DIM * HEADS * 4


def test_int8_keeps_the_tokens_that_full_storage_keeps(model, batch):
    # Evicted first, in full precision.
    for selector in oracles.ONE_PASS:
        int8, full = (
            oracles.prefill(model, *batch, storage=s, selector=selector, **KEEP) for s in ("int8", "full")
        )
        assert int8.budgets_per_row == full.budgets_per_row
        assert oracles.kept_tokens(int8) == oracles.kept_tokens(full)
        for ours, theirs in zip(int8.layers, full.layers, strict=True):
            for name in ("keys", "values"):
                exact, stored = getattr(theirs, name), getattr(ours, name)
                step = exact.abs().amax(dim=-1, keepdim=True) / 127
                assert ((stored - exact).abs() <= step * 0.51).all()


def test_int8_first_steps_are_close(model, batch):
    ids, mask = batch
    int8, full = (
        oracles.prefill(model, ids, mask, compression_ratio=1.0, storage=s) for s in ("int8", "full")
    )
    chunks = oracles.next_chunks(len(ids))
    for ours, theirs in zip(
        oracles.feed(model, int8, chunks, mask), oracles.feed(model, full, chunks, mask), strict=True
    ):
        # A random model amplifies; what int8 does must still be small beside what the logits say.
        assert (ours - theirs).abs().max() < 0.2 * theirs.std()


def test_int8_does_not_drift(model):
    cache = oracles.prefill(model, PROMPT, storage="int8", **KEEP)
    before = [(layer.keys, layer.values) for layer in cache.layers]
    oracles.feed(model, cache, oracles.next_chunks(1, (1,) * 30))
    for layer, (keys, values) in zip(cache.layers, before, strict=True):
        slots = keys.shape[-2]
        assert torch.equal(layer.keys[:, :, :slots], keys)
        assert torch.equal(layer.values[:, :, :slots], values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("storage", ["int8", "offload"])
def test_the_dtype_stays_and_two_questions_run(model, storage, dtype):
    half = copy.deepcopy(model).to(dtype)
    context = compress(half, PROMPT, storage=storage, **KEEP)
    for cache in (context.copy(), context):
        for seed in (1, 2):
            question = torch.cat([PROMPT, oracles.random_prompt(9, seed)], dim=-1)
            assert oracles.generate(half, question, cache, 5).shape == (1, 5)
            assert {layer.keys.dtype for layer in cache.layers} == {dtype}
            assert cache.seen_tokens == 90 + 9 + 4
            cache.rewind(90)


@pytest.mark.parametrize("storage", ["int8", "offload"])
def test_questions_in_a_row_equal_those_on_fresh_copies(model, storage):
    context = compress(model, PROMPT, storage=storage, **KEEP)
    kept = context.kept_lengths
    questions = [torch.cat([PROMPT, oracles.random_prompt(n, n)], dim=-1) for n in (5, 12)]
    expected = [oracles.generate(model, question, context.copy()) for question in questions]
    for question, answer in zip(questions, expected, strict=True):
        assert torch.equal(oracles.generate(model, question, context), answer)
        assert context.rewind(90).kept_lengths == kept


# -- rows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["int8", "offload"])
@pytest.mark.parametrize("how", ["reorder_cache", "batch_select_indices", "batch_repeat_interleave"])
@pytest.mark.parametrize("decode", ["grow", "bounded", "periodic"])
def test_mapping_rows_carries_all_their_state(model, storage, how, decode):
    ids, mask = oracles.left_pad([PROMPT, SHORT, oracles.random_prompt(60, 3)])
    options = {"selector": "h2o", "decode": decode, "decode_interval": 4, "head_budgets": None, **KEEP}
    cache = oracles.prefill(model, ids, mask, storage=storage, **options)
    oracles.feed(model, cache, oracles.next_chunks(3, (1, 1)), mask)
    mask = torch.cat([mask, mask.new_ones(3, 2)], dim=-1)
    chunks = oracles.next_chunks(3, (1, 1, 1, 1), seed=40)
    order = torch.tensor({"batch_repeat_interleave": [0, 0, 1, 1, 2, 2]}.get(how, [2, 0, 0]))
    expected = [logits[order] for logits in oracles.feed(model, cache.copy(), chunks, mask)]
    getattr(cache, how)(2 if how == "batch_repeat_interleave" else order)
    assert {len(tensor) for layer in cache.layers for tensor in layer.held()} == {len(order)}
    actual = oracles.feed(model, cache, [chunk[order] for chunk in chunks], mask[order])
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("storage", ["int8", "offload"])
def test_beams(model, storage):
    ids, mask = oracles.left_pad([PROMPT, SHORT])
    text = oracles.generate(model, ids, RankKVCache(model, storage=storage, **KEEP), mask=mask, num_beams=3)
    for row, prompt in enumerate((PROMPT, SHORT)):
        alone = oracles.generate(model, prompt, RankKVCache(model, storage=storage, **KEEP), num_beams=3)
        assert torch.equal(text[row], alone[0])


def test_reset_and_use_again(model):
    cache = oracles.prefill(model, PROMPT, storage="int8", **KEEP)
    cache.reset()
    assert cache.cache_bytes() == 0
    expected = oracles.generate(model, SHORT, RankKVCache(model, storage="int8", **KEEP))
    assert torch.equal(oracles.generate(model, SHORT, cache), expected)


# -- offload --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"decode": "bounded"},
        {"decode": "periodic", "decode_interval": 4},
        {"positions": "packed"},
        {"prefill": "chunked"},
    ],
    ids=str,
)
def test_offload_gives_the_same_tokens(model, batch, options):
    ids, mask = batch
    caches = [RankKVCache(model, storage=storage, **KEEP, **options) for storage in ("offload", "full")]
    chunk = 25 if "prefill" in options else None
    texts = [oracles.generate(model, ids, cache, 15, mask, prefill_chunk_size=chunk) for cache in caches]
    assert torch.equal(*texts)
    assert oracles.kept_tokens(caches[0]) == oracles.kept_tokens(caches[1])
    oracles.assert_bytes_match(caches[0])
    for layer in caches[0].layers:
        assert all(tensor.device.type == "cpu" for tensor in layer.held())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_offload_rests_on_the_cpu(model):
    on_gpu = copy.deepcopy(model).to("cuda")
    prompt = PROMPT.to("cuda")
    texts = []
    for storage in ("full", "offload"):
        cache = RankKVCache(on_gpu, storage=storage, **KEEP)
        texts.append(oracles.generate(on_gpu, prompt, cache, num_beams=2))
        devices = {tensor.device.type for layer in cache.layers for tensor in layer.held()}
        assert devices == ({"cpu"} if storage == "offload" else {"cuda"})
        cache.reorder_cache(torch.tensor([1, 0], device="cuda"))
    assert torch.equal(*texts)
