"""Head budgets: the heads of a layer keep different numbers of tokens, and the memory is that of the tokens kept."""

from __future__ import annotations

import conformance
import families
import oracles
import pytest
import torch

from rankkv import RankKVCache, RankKVConfig, compress
from rankkv.budget.plan import BudgetPlan
from rankkv.cache.masks import project_mask
from rankkv.cache.storage import ROOM
from rankkv.errors import ConfigError, UnknownNameError, UnsupportedModelError

PROMPT = oracles.random_prompt(90, seed=1)
SHORT = oracles.random_prompt(33, seed=2)
#: No floor, so that the heads have much to differ by.
SPREAD = {"head_budgets": "adaptive", "head_floor": 0.0}
KEEP = {"compression_ratio": 0.3, "min_budget": 3, "window_size": 8, **SPREAD}
#: Selectors whose scores compare across heads.
COMPETING = ("snapkv", "h2o")
HEADS, HEAD_DIM = 2, 16


@pytest.fixture(scope="module", params=["llama", "neox"])
def model(request, tiny_llama, tiny_neox):
    return {"llama": tiny_llama, "neox": tiny_neox}[request.param]()


@pytest.fixture(params=[1, 2], ids=["single", "padded"])
def batch(request):
    return oracles.left_pad([PROMPT, SHORT][: request.param])


def assert_same_kept(ours: RankKVCache, theirs: RankKVCache) -> None:
    assert ours.budgets_per_row == theirs.budgets_per_row
    assert ours.kept_per_head == theirs.kept_per_head
    for index in ours.layer_indices:
        assert oracles.kept_positions(ours, index) == oracles.kept_positions(theirs, index)


def held_bytes(cache: RankKVCache) -> int:
    return sum(
        {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for layer in cache.layers
            for tensor in layer.held()
        }.values()
    )


def count_tokens(cache: RankKVCache) -> int:
    return sum(count for layer in cache.kept_per_head for row in layer for count in row)


# -- what is kept ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("selector", COMPETING)
def test_heads_differ_and_the_budget_holds(model, batch, selector):
    cache = oracles.prefill(model, *batch, selector=selector, **KEEP)
    differ = 0
    for place, layer in enumerate(cache.kept_per_head):
        for row, heads in enumerate(layer):
            assert sum(heads) == cache.budgets_per_row[row][place] * len(heads)
            assert heads == [len(head) for head in oracles.kept_positions(cache, place)[row]]
            differ += len(set(heads)) > 1
    assert differ
    # The average over the heads, of the row that keeps most.
    assert cache.kept_lengths == [max(row[place] for row in cache.budgets_per_row) for place in range(3)]
    counts = cache.kept_per_head[0][0]
    assert f"its heads now hold {min(counts)} to {max(counts)}" in cache.summary()


@pytest.mark.parametrize("head_floor", [0.2, 0.9, 1.0])
def test_every_head_keeps_its_floor(model, head_floor):
    cache = oracles.prefill(model, PROMPT, **{**KEEP, "head_floor": head_floor})
    for budget, layer in zip(cache.budgets, cache.kept_per_head, strict=True):
        assert min(layer[0]) >= int(head_floor * budget)


def test_protected_tokens_stand_in_every_head(model, batch):
    cache = oracles.prefill(model, *batch, protect=[(6, 9)], **KEEP)
    kept = oracles.kept_tokens(cache, batch[1])
    lengths = batch[1].sum(-1).tolist()
    for place, layer in enumerate(kept):
        for row, heads in enumerate(layer):
            left = cache.budgets_per_row[row][place] - 3
            newest, sinks = min(8, left // 2), min(4, left // 4)
            for head in heads:
                wanted = {*range(sinks), *range(6, 9), *range(lengths[row] - newest, lengths[row])}
                assert wanted <= set(head)


@pytest.mark.parametrize("selector", ["streaming_llm", "chunkkv"])
def test_scores_that_are_the_same_for_all_heads_change_nothing(model, batch, selector):
    options = {**KEEP, "selector": selector}
    spread = oracles.prefill(model, *batch, **options)
    assert_same_kept(spread, oracles.prefill(model, *batch, **{**options, "head_budgets": None}))


def test_one_head_has_nobody_to_compete_with(tiny_llama):
    model = tiny_llama(num_key_value_heads=1)
    assert_same_kept(
        oracles.prefill(model, PROMPT, **KEEP),
        oracles.prefill(model, PROMPT, **{**KEEP, "head_budgets": None}),
    )


# -- it equals the full cache with the rest masked ------------------------------------------------------------


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("selector", COMPETING)
def test_equals_the_masked_full_cache(tiny_llama, batch, backend, selector):
    model = tiny_llama(attn_implementation=backend)
    cache = oracles.prefill(model, *batch, selector=selector, **KEEP)
    chunks = oracles.next_chunks(len(batch[0]), (1, 1, 5, 1))
    oracles.assert_equals_masked_oracle(model, cache, *batch, chunks=chunks)


def test_equals_the_masked_full_cache_on_other_rotary_parts(tiny_neox, batch):
    model = tiny_neox()
    oracles.assert_equals_masked_oracle(model, oracles.prefill(model, *batch, **KEEP), *batch)


@pytest.mark.parametrize(
    "options",
    [
        {"decode": "bounded"},
        {"decode": "periodic", "decode_interval": 3},
        {"recompress_turns": True},
        {"prefill": "streaming"},
    ],
    ids=str,
)
@pytest.mark.parametrize("selector", COMPETING)
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_every_step_equals_the_masked_full_cache(tiny_llama, batch, backend, selector, options):
    """Whatever a forward evicted is hidden from the next one of the full cache too."""
    model = tiny_llama(attn_implementation=backend)
    cache = RankKVCache(model, selector=selector, **options, **KEEP)
    assert oracles.assert_every_step_equals_masked(model, cache, *batch)


@pytest.mark.parametrize(
    "options",
    [
        {"decode": "bounded"},
        {"decode": "periodic", "decode_interval": 3},
        {"recompress_turns": True},
        {"prefill": "streaming"},
    ],
    ids=str,
)
@pytest.mark.parametrize("selector", COMPETING)
def test_all_backends_keep_the_same(tiny_llama, batch, selector, options):
    # Each says in its own way what a head has evicted.
    ids, mask = batch
    mask = torch.cat([mask, mask.new_ones(len(ids), 9)], dim=-1)
    caches = []
    for backend in ("sdpa", "eager", "flex_attention"):
        model = tiny_llama(attn_implementation=backend)
        cache = RankKVCache(model, selector=selector, **options, **KEEP)
        sizes = (30, 30, 30) if "prefill" in options else (90,)
        with torch.compiler.set_stance("force_eager"):
            for chunk in (*ids.split(sizes, dim=1), *oracles.next_chunks(len(ids), (1, 1, 5, 1, 1))):
                oracles.forward(model, cache, chunk, mask[:, : cache.seen_tokens + chunk.shape[1]])
        caches.append(cache)
    assert_same_kept(caches[0], caches[1])
    assert_same_kept(caches[0], caches[2])


@pytest.mark.parametrize(
    "options",
    [{}, {"decode": "bounded"}, {"prefill": "streaming"}],
    ids=str,
)
def test_a_floor_of_one_is_no_head_budget(model, batch, options):
    caches = []
    for head_budgets in (None, "adaptive"):
        given = {**KEEP, "head_budgets": head_budgets, "head_floor": 1.0}
        caches.append(oracles.prefill(model, *batch, **options, **given))
        oracles.feed(model, caches[-1], oracles.next_chunks(len(batch[0])), batch[1])
    assert_same_kept(*caches)


@pytest.mark.parametrize("options", [{}, {"storage": "int8"}, {"positions": "packed"}], ids=str)
def test_everything_kept_changes_no_token(model, batch, options):
    if "storage" in options:
        options = {**options, "storage": "offload"}
    oracles.assert_identity(model, *batch, compression_ratio=1.0, **SPREAD, **options)


@pytest.mark.parametrize("options", [{}, {"positions": "packed"}, {"storage": "int8"}], ids=str)
@pytest.mark.parametrize("decode", ["grow", "bounded", "periodic"])
def test_rows_are_treated_as_if_alone(model, options, decode):
    prompts = [PROMPT, SHORT, oracles.random_prompt(60, 3)]
    oracles.assert_batch_invariant(model, prompts, decode=decode, decode_interval=3, **options, **KEEP)


def test_calls_are_independent(tiny_llama):
    oracles.assert_calls_independent(tiny_llama(), tiny_llama(), PROMPT, SHORT, **KEEP)


# -- memory ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("storage", "width"), [("full", 4 * HEAD_DIM), ("offload", 4 * HEAD_DIM), ("int8", HEAD_DIM + 4)]
)
@pytest.mark.parametrize("decode", ["grow", "bounded", "periodic"])
def test_bytes_are_those_of_the_tokens_kept(tiny_llama, batch, storage, width, decode):
    model, (ids, mask) = tiny_llama(), batch
    # By ranks alone every layer has something to evict.
    by_rank = {"strategy": "power", "strategy_options": {"exponent": 4.0}}
    options = {**KEEP, **by_rank, "storage": storage, "decode": decode}
    cache = oracles.prefill(model, ids, mask, decode_interval=3, **options)
    for chunk in ((), (1,), (1, 1), (4, 1)):
        oracles.feed(model, cache, oracles.next_chunks(len(ids), chunk), mask)
        mask = torch.cat([mask, mask.new_ones(len(ids), sum(chunk))], dim=-1)
        # No slot of a shorter row, and none of a head that keeps less.
        resting = 2 * count_tokens(cache) * width
        assert cache.copy().cache_bytes() == resting
        # Between steps that need no padding each head has room for tokens to come.
        grows = chunk and decode == "grow" and storage == "full"
        room = 2 * 3 * len(ids) * HEADS * (ROOM - 1) * width if grows else 0
        assert resting <= cache.cache_bytes() == held_bytes(cache) <= resting + room
        assert all(layer.held()[0].dim() == 2 for layer in cache.layers)
    if decode == "grow":
        budgets = sum(map(sum, cache.budgets_per_row))
        assert count_tokens(cache) == HEADS * (budgets + 3 * 8 * len(ids))
    assert cache.full_cache_bytes() == 3 * 2 * len(ids) * cache.seen_tokens * HEAD_DIM * HEADS * 4


def test_the_padded_form_is_gone_after_the_call(tiny_llama):
    model = tiny_llama()
    cache = oracles.prefill(model, PROMPT, **KEEP)
    widest = max(layer.width for layer in cache.layers)
    assert widest > max(cache.kept_lengths)
    seen = []
    hook = oracles.attention_modules(model)[1].register_forward_pre_hook(
        lambda *_: seen.append([sum(t.numel() for t in layer.held()) for layer in cache.layers])
    )
    try:
        oracles.feed(model, cache, oracles.next_chunks(1, (1,)))
    finally:
        hook.remove()
    # When the second layer is called, the first has no padded form, but room for tokens to come.
    expected = [2 * HEAD_DIM * sum(layer[0]) for layer in cache.kept_per_head]
    assert seen[0] == [
        expected[0] + 2 * HEAD_DIM * HEADS * (ROOM - 1),
        *(number - 2 * HEAD_DIM * HEADS for number in expected[1:]),
    ]


# -- while the prompt comes in --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selector", "strategy"),
    [*((name, None) for name in oracles.ONE_PASS), ("snapkv", "uniform"), ("snapkv", "softmax")],
)
@pytest.mark.parametrize("head_floor", [0.0, 0.2, 0.7, 0.95])
def test_cascade_equals_one_decision(tiny_llama, monkeypatch, strategy, selector, head_floor):
    model = tiny_llama(6)
    for seed, lengths in enumerate(((100,), (110, 20, 63))):
        ids, mask = oracles.left_pad([oracles.random_prompt(n, seed + n) for n in lengths])
        given = {"strategy": strategy, "selector": selector, "head_floor": head_floor, "min_budget": 1}
        cascade = oracles.prefill(model, ids, mask, **{**KEEP, **given})
        with monkeypatch.context() as patch:
            patch.setattr(BudgetPlan, "compute_ceilings", lambda plan: [plan.length] * plan._added)
            assert_same_kept(cascade, oracles.prefill(model, ids, mask, **{**KEEP, **given}))


def test_peak_is_the_total_and_one_layer(tiny_llama):
    model, prompt = tiny_llama(12), oracles.random_prompt(400)
    cache = RankKVCache(model, 0.3, **SPREAD)
    held = []
    hooks = [
        module.register_forward_hook(lambda *_: held.append(held_bytes(cache)))
        for module in oracles.attention_modules(model).values()
    ]
    oracles.forward(model, cache, prompt)
    for hook in hooks:
        hook.remove()
    token_bytes = 2 * HEADS * HEAD_DIM * 4
    assert max(held) + 400 * token_bytes <= 1.05 * (sum(cache.budgets) + 400) * token_bytes


@oracles.needs_recent_generate
def test_a_prompt_in_chunks_keeps_what_one_in_one_piece_keeps(model, batch):
    ids, mask = batch
    caches = [RankKVCache(model, prefill=prefill, **KEEP) for prefill in ("single", "chunked")]
    texts = [
        oracles.generate(model, ids, cache, 8, mask, prefill_chunk_size=chunk)
        for cache, chunk in zip(caches, (None, 24), strict=True)
    ]
    assert_same_kept(*caches)
    assert torch.equal(*texts)


@pytest.mark.parametrize("selector", oracles.ONE_PASS)
def test_streaming_prefill_holds_the_budget(tiny_llama, batch, selector):
    model, (ids, mask) = tiny_llama(), batch
    cache = RankKVCache(model, prefill="streaming", selector=selector, **KEEP)
    for start in range(0, 90, 30):
        oracles.forward(model, cache, ids[:, start : start + 30], mask[:, : start + 30])
        assert cache.cache_bytes() == 2 * count_tokens(cache) * HEAD_DIM * 4
        for place, layer in enumerate(cache.kept_per_head):
            for row, heads in enumerate(layer):
                assert sum(heads) == len(heads) * cache.budgets_per_row[row][place]
    assert cache.finish().seen_tokens == 90


# -- turns, and a cache as an object --------------------------------------------------------------------------


@pytest.mark.parametrize("recompress_turns", [False, True])
def test_turns(model, recompress_turns):
    cache = RankKVCache(model, recompress_turns=recompress_turns, **KEEP)
    ids = PROMPT
    for turn in range(3):
        answer = oracles.generate(model, ids, cache, new_tokens=5)
        assert cache.seen_tokens == ids.shape[1] + 4
        for index in cache.layer_indices:
            for head in oracles.kept_positions(cache, index)[0]:
                assert head == sorted(set(head))
                assert head[-4:] == list(range(cache.seen_tokens - 4, cache.seen_tokens))
        ids = torch.cat([ids, answer, oracles.random_prompt(7, seed=turn)], 1)
    assert any(len(set(layer[0])) > 1 for layer in cache.kept_per_head)


def test_second_turn_equals_the_masked_full_cache(model):
    cache = oracles.prefill(model, PROMPT, **KEEP)
    copied, full = oracles.masked_oracle(model, cache, PROMPT)
    ids = torch.cat([PROMPT, oracles.random_prompt(8, seed=41)], 1)
    for turn in range(2):
        answer = oracles.generate(model, ids, cache, new_tokens=5)
        assert torch.equal(answer, oracles.generate(copied, ids, full, new_tokens=5))
        ids = torch.cat([ids, answer, oracles.random_prompt(6, seed=turn)], 1)


@pytest.mark.parametrize("storage", ["full", "int8", "offload"])
def test_copies_and_rewinding(model, storage):
    context = compress(model, PROMPT, storage=storage, **KEEP)
    kept = context.kept_per_head
    questions = [torch.cat([PROMPT, oracles.random_prompt(n, n)], dim=-1) for n in (5, 12)]
    expected = [oracles.generate(model, question, context.copy()) for question in questions]
    for question, answer in zip(questions, expected, strict=True):
        assert torch.equal(oracles.generate(model, question, context), answer)
        assert context.rewind(90).kept_per_head == kept
        assert context.cache_bytes() == held_bytes(context)


@pytest.mark.parametrize("storage", ["full", "int8"])
@pytest.mark.parametrize("how", ["reorder_cache", "batch_select_indices", "batch_repeat_interleave"])
@pytest.mark.parametrize("decode", ["grow", "bounded", "periodic"])
def test_mapping_rows_carries_all_their_state(model, storage, how, decode):
    ids, mask = oracles.left_pad([PROMPT, SHORT, oracles.random_prompt(60, 3)])
    options = {"selector": "h2o", "decode": decode, "decode_interval": 4, "storage": storage, **KEEP}
    cache = oracles.prefill(model, ids, mask, **options)
    oracles.feed(model, cache, oracles.next_chunks(3, (1, 1)), mask)
    mask = torch.cat([mask, mask.new_ones(3, 2)], dim=-1)
    chunks = oracles.next_chunks(3, (1, 1, 1, 1), seed=40)
    order = torch.tensor({"batch_repeat_interleave": [0, 0, 1, 1, 2, 2]}.get(how, [2, 0, 0]))
    rows = [[layer[row] for row in order.tolist()] for layer in cache.kept_per_head]
    expected = [logits[order] for logits in oracles.feed(model, cache.copy(), chunks, mask)]
    getattr(cache, how)(2 if how == "batch_repeat_interleave" else order)
    assert cache.kept_per_head == rows
    actual = oracles.feed(model, cache, [chunk[order] for chunk in chunks], mask[order])
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_beams(model):
    ids, mask = oracles.left_pad([PROMPT, SHORT])
    text = oracles.generate(model, ids, RankKVCache(model, **KEEP), mask=mask, num_beams=3)
    for row, prompt in enumerate((PROMPT, SHORT)):
        alone = oracles.generate(model, prompt, RankKVCache(model, **KEEP), num_beams=3)
        assert torch.equal(text[row], alone[0])


def test_assisted_decoding(model):
    plain = oracles.generate(model, PROMPT, RankKVCache(model, **KEEP), 10)
    drafted = oracles.generate(model, PROMPT, RankKVCache(model, **KEEP), 10, prompt_lookup_num_tokens=3)
    assert torch.equal(plain, drafted)


@pytest.mark.parametrize("storage", ["full", "int8", "offload"])
@pytest.mark.parametrize("decode", ["grow", "bounded", "periodic"])
def test_saved_and_loaded(model, batch, tmp_path, storage, decode):
    ids, mask = batch
    options = {"storage": storage, "decode": decode, "decode_interval": 4, "selector": "h2o", **KEEP}
    cache = oracles.prefill(model, ids, mask, **options)
    oracles.feed(model, cache, oracles.next_chunks(len(ids), (1,)), mask)
    mask = torch.cat([mask, mask.new_ones(len(ids), 1)], dim=-1)
    loaded = RankKVCache.load(cache.save(tmp_path / "cache.safetensors"), model)
    assert loaded.kept_per_head == cache.kept_per_head
    # What waits on disk has no room for tokens to come.
    assert loaded.cache_bytes() == cache.copy().cache_bytes() == held_bytes(loaded) <= cache.cache_bytes()
    chunks = oracles.next_chunks(len(ids), (1, 1, 1, 1), seed=7)
    for ours, theirs in zip(
        oracles.feed(model, loaded, chunks, mask), oracles.feed(model, cache, chunks, mask), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_a_step_does_not_hold_a_larger_tensor_of_the_model(tiny_neox):
    """One projection gives queries, keys and values: a view of it would keep all three in memory."""
    model = tiny_neox()
    cache = oracles.prefill(model, PROMPT, selector="h2o", storage="offload", **KEEP)
    oracles.feed(model, cache, oracles.next_chunks(1, (1,)))
    tokens = sum(sum(row) for layer in cache.kept_per_head for row in layer)
    head_dim = model.config.hidden_size // model.config.num_attention_heads
    assert cache.copy().cache_bytes() == tokens * head_dim * 2 * 4


def test_reset_and_use_again(model):
    cache = oracles.prefill(model, PROMPT, **KEEP)
    cache.reset()
    assert cache.cache_bytes() == 0
    expected = oracles.generate(model, SHORT, RankKVCache(model, **KEEP))
    assert torch.equal(oracles.generate(model, SHORT, cache), expected)


def test_bounded_decoding_holds_the_budget(model, batch):
    ids, mask = batch
    cache = oracles.prefill(model, ids, mask, decode="bounded", **KEEP)
    oracles.feed(model, cache, oracles.next_chunks(len(ids), (1,) * 12), mask)
    for place, layer in enumerate(cache.kept_per_head):
        for row, heads in enumerate(layer):
            assert sum(heads) <= len(heads) * cache.budgets_per_row[row][place]
            newest = [head[-1] for head in oracles.kept_positions(cache, place)[row]]
            assert newest == [cache.seen_tokens - 1] * len(heads)


# -- families, and what is refused ----------------------------------------------------------------------------

#: A softmax of another kind, layers left alone, keys shared by layers, one latent head, all heads with keys.
FAMILIES = ("Gemma 2", "gpt-oss", "Gemma 3n", "DeepSeek-V3", "Qwen3-MoE", "GPT-2")


@pytest.mark.parametrize("way", ["compressed", "padded", "beam", "chunked", "second turn", "bfloat16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_families(monkeypatch, name, way):
    plain = conformance.run_way(name, families.FAMILIES[name].backends[0], way)
    for option, value in SPREAD.items():
        monkeypatch.setitem(conformance.KEEP, option, value)
    assert conformance.run_way(name, families.FAMILIES[name].backends[0], way) == plain


@pytest.mark.parametrize("way", ["compressed", "padded"])
def test_flex_attention(monkeypatch, way):
    for option, value in SPREAD.items():
        monkeypatch.setitem(conformance.KEEP, option, value)
    assert conformance.run_way("Llama", "flex_attention", way) == "pass"


def test_flash_attention_is_refused_by_name(tiny_llama):
    model = tiny_llama()
    message = "head_budgets needs a mask for each head, which flash_attention_2 does not support.*'sdpa'"
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UnsupportedModelError, match=message):
        RankKVCache(model, **KEEP)
    # Or later, where the backend was changed under a cache.
    positions, valid = torch.arange(3).view(1, 1, 3), torch.tensor([[[True] * 3, [False, True, True]]])
    with pytest.raises(UnsupportedModelError, match=message):
        project_mask(None, positions, valid, 1, 4, "flash_attention_2", torch.float32)


@pytest.mark.parametrize("head_floor", [-0.1, 1.5, float("nan"), True, "0.2", None])
def test_a_floor_outside_its_range(head_floor):
    with pytest.raises(ConfigError, match=r"head_floor=.* is outside \[0, 1\]"):
        RankKVConfig(head_budgets="adaptive", head_floor=head_floor)


def test_a_mode_that_is_not_known():
    with pytest.raises(UnknownNameError, match="unknown head_budgets 'adaptiv'; did you mean 'adaptive'"):
        RankKVConfig(head_budgets="adaptiv")
