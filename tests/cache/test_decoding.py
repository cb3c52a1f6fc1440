"""What a cache keeps while tokens are generated: everything, a fixed budget, or a new selection every so often."""

from __future__ import annotations

import itertools

import oracles
import pytest
import torch

from rankkv import RankKVCache
from rankkv.errors import BudgetError
from rankkv.models.compat import cache_argument
from rankkv.selection import SELECTORS

PROMPT = oracles.random_prompt(90, seed=1)
SHORT = oracles.random_prompt(21, seed=2)


@pytest.fixture(scope="module", params=["llama-sdpa", "neox-eager"])
def model(request, tiny_llama, tiny_neox):
    family, backend = request.param.split("-")
    return {"llama": tiny_llama, "neox": tiny_neox}[family](attn_implementation=backend)


@pytest.fixture(scope="module")
def llama(tiny_llama):
    return tiny_llama()


@pytest.fixture(params=["single", "padded"])
def batch(request):
    return oracles.left_pad([PROMPT, SHORT] if request.param == "padded" else [PROMPT])


def count_newest(selector: str) -> int:
    """Return how many newest tokens a head protects, if its budget leaves room: 16 where all heads compete."""
    return 16 if SELECTORS[selector].strategy == "global" else 32


def steps_of(rows: int, count: int, seed: int = 50) -> list[torch.Tensor]:
    """Return ``count`` single-token steps, ``[rows, 1]`` each."""
    return oracles.next_chunks(rows, (1,) * count, seed)


def assert_every_step_equals_the_masked_oracle(model, cache, ids, mask, chunks):
    """O2 for a cache that evicts while decoding: before each step, what it does not hold now is masked."""
    copied, full = oracles.masked_oracle(model, cache, ids, mask)
    for chunk in chunks:
        for layer_idx in cache.layer_indices:
            rows = oracles.kept_positions(cache, layer_idx)
            evicted = torch.ones(len(rows), len(rows[0]), cache.seen_tokens, dtype=torch.bool)
            for row, heads in enumerate(rows):
                for head, kept in enumerate(heads):
                    evicted[row, head, kept] = False
            oracles.attention_modules(copied)[layer_idx].oracle_evicted = evicted
        expected = oracles.feed(copied, full, [chunk], mask)[0]
        actual = oracles.feed(model, cache, [chunk], mask)[0]
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
        mask = torch.cat([mask, mask.new_ones(chunk.shape)], dim=-1)


# -- what the host knows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", ["distortion", "adaptive", None])
@pytest.mark.parametrize("decode", ["bounded", "periodic"])
def test_the_host_counts_the_tokens_that_the_slots_hold(llama, batch, decode, heads):
    """Without asking the device; after a change of rows it does not know them until the next step."""
    ids, mask = batch
    options = {"budget": 25, "min_budget": 5, "decode": decode, "head_budgets": heads, "window_size": 8}
    cache = oracles.prefill(llama, ids, mask, decode_interval=4, **options)
    known = 0
    for number, step in enumerate(steps_of(len(ids), 12)):
        if number == 5:
            cache.reorder_cache(torch.arange(len(ids)))
        oracles.feed(llama, cache, [step], mask)
        mask = torch.cat([mask, mask.new_ones(step.shape)], dim=-1)
        for index in cache.layer_indices:
            layer = cache.layers[index]
            counted = layer.count_tokens(cache.row_start)
            if counted is not None:
                assert counted == [sum(row) // len(row) for row in layer.kept_per_head]
                known += 1
    assert known == 12 * len(cache.layer_indices)


def test_a_token_that_a_mask_hides_while_decoding_is_not_counted(llama):
    ids, mask = oracles.left_pad([PROMPT, SHORT])
    cache = oracles.prefill(llama, ids, mask, budget=25, min_budget=5, decode="bounded", window_size=8)
    steps = steps_of(2, 3)
    # The second row's first new token stays hidden.
    for step, seen in zip(steps, ([1, 1], [1, 0, 1], [1, 0, 1, 1]), strict=True):
        given = torch.cat([mask, torch.ones(2, len(seen) - 1, dtype=mask.dtype)], dim=-1)
        given[1, mask.shape[1] :] = torch.tensor(seen[1:])
        positions = (given.cumsum(-1) - 1)[:, -1:]
        with torch.no_grad():
            logits = llama(step, attention_mask=given, position_ids=positions, **cache_argument(cache)).logits
        assert torch.isfinite(logits).all()
    assert not any(layer.sees_all for layer in cache.layers)


# -- bounded --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("selector", oracles.ONE_PASS)
def test_bounded_stays_at_its_budgets(model, selector):
    options = {"budget": 30, "min_budget": 10, "selector": selector, "decode": "bounded"}
    cache = oracles.prefill(model, PROMPT, head_budgets=None, **options)
    budgets, held = cache.budgets, cache.cache_bytes()
    assert sum(budgets) == 3 * 30
    for step in steps_of(1, 60):
        oracles.feed(model, cache, [step])
        assert cache.kept_lengths == cache.budgets == budgets
        assert cache.cache_bytes() == held
        for budget, layer in zip(budgets, oracles.kept_tokens(cache), strict=True):
            seen = cache.seen_tokens
            newest = min(count_newest(selector), budget // 2)
            protected = {*range(min(4, budget // 4)), *range(seen - newest, seen)}
            for head in layer[0]:
                assert protected <= set(head)
                assert len(set(head)) == budget
    oracles.assert_bytes_match(cache)


@pytest.mark.parametrize("selector", ["snapkv", "random"])
def test_generated_tokens_earn_a_place(model, selector):
    # A new token starts without a score: were only the newest kept, none would ever last.  (H2O's sums over a long
    # prompt are a lead that few generated tokens catch up with.)
    cache = oracles.prefill(model, PROMPT, budget=40, selector=selector, decode="bounded", window_size=8)
    oracles.feed(model, cache, steps_of(1, 50))
    lasting = [
        position
        for layer in oracles.kept_tokens(cache)
        for head in layer[0]
        for position in head
        if 90 <= position < cache.seen_tokens - 8
    ]
    assert lasting


@pytest.mark.parametrize("selector", oracles.ONE_PASS)
def test_bounded_equals_the_masked_oracle_at_every_step(model, batch, selector):
    ids, mask = batch
    cache = oracles.prefill(model, ids, mask, budget=25, min_budget=5, selector=selector, decode="bounded")
    # A later turn of several tokens evicts as many at once.
    chunks = oracles.next_chunks(len(ids), (*[1] * 20, 9, 1, 1), seed=50)
    assert_every_step_equals_the_masked_oracle(model, cache, ids, mask, chunks)
    widest = [max(column) for column in zip(*cache.budgets_per_row, strict=True)]
    assert cache.kept_lengths == widest


def test_streaming_llm_keeps_sinks_and_the_newest_exactly(model):
    options = {"budget": 24, "selector": "streaming_llm", "decode": "bounded"}
    cache = oracles.prefill(model, PROMPT, head_budgets=None, **options)
    for step in steps_of(1, 40):
        oracles.feed(model, cache, [step])
        for budget, layer in zip(cache.budgets, oracles.kept_tokens(cache), strict=True):
            sinks = min(4, budget // 4)
            newest = range(cache.seen_tokens - (budget - sinks), cache.seen_tokens)
            assert layer[0] == [[*range(sinks), *newest]] * len(layer[0])


def test_h2o_accumulates_the_attention_of_every_query(tiny_llama):
    model = tiny_llama(attn_implementation="eager")
    options = {"budget": 30, "min_budget": 10, "selector": "h2o", "decode": "bounded"}
    cache = oracles.prefill(model, PROMPT, head_budgets=None, **options)
    expected = []
    for weights in oracles.eager_attentions(model, PROMPT):
        sums = weights[0].sum(dim=1).view(2, 2, -1).mean(dim=1)
        expected.append([dict(enumerate(head)) for head in sums.tolist()])
    for step in steps_of(1, 25):
        before = [oracles.kept_positions(cache, layer_idx)[0] for layer_idx in range(3)]
        position = cache.seen_tokens
        with torch.no_grad():
            output = model(step, output_attentions=True, use_cache=True, **cache_argument(cache))
        for layer_idx, weights in enumerate(output.attentions):
            paid = weights[0, :, 0].view(2, 2, -1).mean(dim=1)
            for head in range(2):
                for slot, kept in enumerate([*before[layer_idx][head], position]):
                    totals = expected[layer_idx][head]
                    totals[kept] = totals.get(kept, 0.0) + float(paid[head, slot])
        for layer_idx in range(3):
            for head, kept in enumerate(oracles.kept_positions(cache, layer_idx)[0]):
                ours = cache.layers[layer_idx].running_scores[0, head]
                theirs = torch.tensor([expected[layer_idx][head][position] for position in kept])
                torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("selector", oracles.ONE_PASS)
def test_a_short_prompt_grows_to_its_budget_and_stays(model, selector):
    prompt = oracles.random_prompt(10)
    cache = RankKVCache(model, budget=64, selector=selector, decode="bounded")
    plain = oracles.generate(model, prompt, None, 54)
    assert torch.equal(oracles.generate(model, prompt, cache.copy(), 54), plain)
    oracles.forward(model, cache, prompt)
    lengths = []
    for step in steps_of(1, 80):
        oracles.feed(model, cache, [step])
        lengths.append(cache.kept_lengths)
    assert lengths == [[min(11 + number, 64)] * 3 for number in range(80)]


@pytest.mark.parametrize("selector", oracles.ONE_PASS)
@pytest.mark.parametrize("budget", [20, 48])
def test_bounded_rows_equal_the_rows_alone(model, selector, budget):
    # With 48 the long row is at its budgets while the short one still grows; prompts within the budget both grow.
    options = {"budget": budget, "min_budget": 5, "selector": selector, "decode": "bounded"}
    for prompts in ([PROMPT, SHORT], [oracles.random_prompt(n, n) for n in (40, 36, 12)]):
        ids, mask = oracles.left_pad(prompts)
        cache = RankKVCache(model, **options)
        text = oracles.generate(model, ids, cache, 40, mask)
        kept = oracles.kept_tokens(cache, mask)
        for row, prompt in enumerate(prompts):
            alone = RankKVCache(model, **options)
            assert torch.equal(text[row], oracles.generate(model, prompt, alone, 40)[0])
            assert cache.budgets_per_row[row] == alone.budgets
            assert [layer[row] for layer in kept] == [layer[0] for layer in oracles.kept_tokens(alone)]


@pytest.mark.parametrize("selector", oracles.ONE_PASS)
def test_bounded_beam_search(model, selector):
    ids, mask = oracles.left_pad([PROMPT, SHORT])
    options = {"budget": 20, "min_budget": 5, "selector": selector, "decode": "bounded"}
    cache = RankKVCache(model, **options)
    text = oracles.generate(model, ids, cache, 15, mask, num_beams=3)
    for row, prompt in enumerate((PROMPT, SHORT)):
        alone = oracles.generate(model, prompt, RankKVCache(model, **options), 15, num_beams=3)
        assert torch.equal(text[row], alone[0])
    assert sum(cache.budgets) == 60


def test_uniform_budgets_that_hold_everything_change_nothing(model, batch):
    ids, mask = batch
    options = {"budget": 105, "strategy": "uniform", "decode": "bounded"}
    for beams in (1, 3):
        plain = oracles.generate(model, ids, None, 15, mask, num_beams=beams)
        ours = oracles.generate(model, ids, RankKVCache(model, **options), 15, mask, num_beams=beams)
        assert torch.equal(ours, plain)


def test_a_bounded_budget_below_the_floor_is_refused(llama):
    for prompt in (PROMPT, oracles.random_prompt(5)):
        with pytest.raises(BudgetError, match=r"budget=15 .* floor of 16 .* at least budget=16"):
            oracles.prefill(llama, prompt, budget=15, decode="bounded")


def test_a_ratio_below_the_floor_is_raised_and_said(llama):
    cache = oracles.prefill(llama, oracles.random_prompt(20), compression_ratio=0.1, decode="bounded")
    oracles.feed(llama, cache, steps_of(1, 30))
    assert cache.kept_lengths == [16] * 3
    assert "raised to 48: the floor is 16" in cache.summary()


@pytest.mark.parametrize("selector", oracles.ONE_PASS)
def test_a_span_beyond_the_prompt_does_not_take_the_newest_tokens_place(model, selector):
    # Budgets were made for the part of a span that the prompt has; kept whole, later tokens would fill them for good.
    options = {
        "budget": 50,
        "min_budget": 10,
        "selector": selector,
        "decode": "bounded",
        "protect": [(5, 200)],
    }
    prompts = [oracles.random_prompt(n, n) for n in (30, 12)]
    ids, mask = oracles.left_pad(prompts)
    cache = oracles.prefill(model, ids, mask, **options)
    oracles.feed(model, cache, steps_of(2, 100), mask)
    for layer, budgets in zip(
        oracles.kept_tokens(cache, mask), zip(*cache.budgets_per_row, strict=True), strict=True
    ):
        for heads, budget, prompt in zip(layer, budgets, prompts, strict=True):
            length = prompt.shape[1] + 100
            free = budget - (prompt.shape[1] - 5)
            newest = {*range(length - min(count_newest(selector), free // 2), length)}
            assert all({*range(5, prompt.shape[1])} | newest <= set(head) for head in heads)


# -- periodic -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("selector", oracles.ONE_PASS)
def test_periodic_compresses_every_so_many_tokens(model, batch, selector):
    ids, mask = batch
    options = {
        "budget": 25,
        "min_budget": 5,
        "selector": selector,
        "decode": "periodic",
        "decode_interval": 7,
    }
    cache = oracles.prefill(model, ids, mask, **options)
    widest = lambda: [max(column) for column in zip(*cache.budgets_per_row, strict=True)]  # noqa: E731
    assert cache.kept_lengths == widest()
    budgets = [widest()]
    for number, step in enumerate(steps_of(len(ids), 30), start=1):
        logits = oracles.feed(model, cache, [step], mask)[0]
        mask = torch.cat([mask, mask.new_ones(step.shape)], dim=-1)
        assert torch.isfinite(logits).all()
        if number % 7 == 0:
            budgets.append(widest())
            assert all(sum(row) <= 75 for row in cache.budgets_per_row)
        # A saw tooth: the budget just after a compression, and no more than an interval above it before the next.
        assert cache.kept_lengths == [budget + number % 7 for budget in budgets[-1]]
    assert len(budgets) == 5


@pytest.mark.parametrize("selector", oracles.ONE_PASS)
def test_periodic_equals_the_masked_oracle_at_every_step(model, batch, selector):
    ids, mask = batch
    options = {
        "budget": 25,
        "min_budget": 5,
        "selector": selector,
        "decode": "periodic",
        "decode_interval": 6,
    }
    cache = oracles.prefill(model, ids, mask, **options)
    assert_every_step_equals_the_masked_oracle(model, cache, ids, mask, steps_of(len(ids), 20))


@pytest.mark.parametrize("selector", oracles.ONE_PASS)
def test_periodic_rows_equal_the_rows_alone(model, selector):
    options = {"compression_ratio": 0.4, "min_budget": 5, "selector": selector}
    options |= {"decode": "periodic", "decode_interval": 9}
    ids, mask = oracles.left_pad([PROMPT, SHORT])
    cache = RankKVCache(model, **options)
    text = oracles.generate(model, ids, cache, 40, mask)
    kept = oracles.kept_tokens(cache, mask)
    for row, prompt in enumerate((PROMPT, SHORT)):
        alone = RankKVCache(model, **options)
        assert torch.equal(text[row], oracles.generate(model, prompt, alone, 40)[0])
        assert [layer[row] for layer in kept] == [layer[0] for layer in oracles.kept_tokens(alone)]


def test_periodic_snapkv_keeps_what_a_plain_formula_keeps(tiny_llama):
    model = tiny_llama(attn_implementation="eager")
    options = {"budget": 24, "min_budget": 8, "window_size": 4, "decode": "periodic", "decode_interval": 6}
    cache = oracles.prefill(model, PROMPT, head_budgets=None, **options)
    rows = [[], [], []]
    for number, step in enumerate(steps_of(1, 18), start=1):
        before = [oracles.kept_positions(cache, layer_idx)[0] for layer_idx in range(3)]
        position = cache.seen_tokens
        with torch.no_grad():
            output = model(step, output_attentions=True, use_cache=True, **cache_argument(cache))
        for layer_idx, weights in enumerate(output.attentions):
            rows[layer_idx].append(weights[0, :, 0])
        if number % 6:
            continue
        for layer_idx, (held, budget) in enumerate(zip(rows, cache.budgets, strict=True)):
            slots = len(before[layer_idx][0]) + 1
            window = [torch.cat([row, row.new_zeros(4, slots - row.shape[-1])], dim=-1) for row in held[-4:]]
            votes = torch.stack(window).mean(dim=0)
            pooled = votes.clone()
            for slot in range(slots - 4):
                pooled[:, slot] = votes[:, max(0, slot - 2) : min(slots - 4, slot + 3)].max(dim=-1).values
            for slot in range(slots - 4, slots):
                pooled[:, slot] = votes[:, max(slots - 4, slot - 2) : slot + 3].max(dim=-1).values
            scores = pooled.view(2, 2, slots).mean(dim=1)
            for head in range(2):
                positions = [*before[layer_idx][head], position]
                newest = position + 1 - min(4, budget // 2)
                protected = [p for p in positions if p >= newest or p < min(4, budget // 4)]
                rest = [slot for slot, p in enumerate(positions) if p not in protected]
                rest.sort(key=lambda slot, head=head, scores=scores: (-float(scores[head, slot]), slot))
                best = [positions[slot] for slot in rest[: budget - len(protected)]]
                assert oracles.kept_positions(cache, layer_idx)[0][head] == sorted(protected + best)
        rows = [[], [], []]


# -- grow, and everything kept --------------------------------------------------------------------------------


@pytest.mark.parametrize("selector", oracles.ONE_PASS)
@pytest.mark.parametrize("decode", ["grow", "periodic"])
def test_everything_kept_changes_nothing(model, batch, selector, decode):
    options = {"compression_ratio": 1.0, "decode": decode, "decode_interval": 5, "selector": selector}
    oracles.assert_identity(model, *batch, new_tokens=20, **options)


@pytest.mark.parametrize("decode", ["grow", "bounded", "periodic"])
def test_calls_are_independent(tiny_llama, decode):
    a, b = oracles.random_prompt(90, 3), oracles.random_prompt(41, 4)
    options = {"decode": decode, "decode_interval": 5, "selector": "h2o", "min_budget": 3}
    oracles.assert_calls_independent(tiny_llama(), tiny_llama(), a, b, **options)


@pytest.mark.parametrize("decode", ["bounded", "periodic"])
def test_positions_stay_in_order(llama, decode):
    cache = RankKVCache(llama, budget=20, decode=decode, decode_interval=4)
    oracles.generate(llama, PROMPT, cache, 60)
    for layer_idx in range(3):
        for head in oracles.kept_positions(cache, layer_idx)[0]:
            assert all(a < b for a, b in itertools.pairwise(head))
            assert head[-1] == cache.seen_tokens - 1
