"""Strategy "global": one top-k of the scores over all heads and layers."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from rankkv import RankKVCache
from rankkv.budget.scores import HeadScores, ScorePool, count_best
from rankkv.errors import ConfigError
from rankkv.selection import SELECTORS, get_selector

LENGTH, FLOOR = 120, 20


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(9)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8,
        )
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 96, (1, LENGTH), generator=torch.Generator().manual_seed(4))


def take_scores(model, ids, selector, sinks=4):
    """Return every layer's scores, ``[layer, head, token]``, as a cache computes them."""
    taken = []
    cache = RankKVCache(model, selector=selector, strategy="global", compression_ratio=0.4, sink_size=sinks)
    compressor = cache._schedule.compressor
    compute = compressor._compute_lasting_scores
    compressor._compute_lasting_scores = lambda *given: taken.append(compute(*given)) or taken[-1]
    with torch.no_grad():
        model(ids, past_key_values=cache)
    return torch.stack([scores[0] for scores in taken])


def keep_globally(scores, average, sinks=4):
    """Keep the floor of each head, then the best of all: the rule, written without budgets or a cascade."""
    layers, heads, tokens = scores.shape
    scores = scores.clone()
    scores[..., :sinks] = scores[..., tokens - 16 :] = float("inf")
    floor = max(FLOOR, 16 + sinks, int(0.2 * average))
    kept = torch.zeros_like(scores, dtype=torch.bool)
    kept.scatter_(-1, scores.topk(floor, dim=-1).indices, True)
    rest = average * layers * heads - int(kept.sum())
    others = scores.masked_fill(kept, float("-inf")).flatten()
    kept.view(-1)[others.topk(rest).indices] = True
    return kept


@pytest.mark.parametrize("selector", ["echo", "snapkv", "h2o", "expected_attention"])
@pytest.mark.parametrize(("average", "sinks"), [(24, 4), (40, 4), (40, 9), (75, 0)])
def test_the_best_of_all_heads_and_layers_stay(model, ids, selector, average, sinks):
    options = {"selector": selector, "strategy": "global", "budget": average, "sink_size": sinks}
    cache = oracles.prefill(model, ids, **options)
    assert sum(cache.budgets) == average * 4
    expected = keep_globally(take_scores(model, ids, selector, sinks), average, sinks)
    different = 0
    for layer, rows in enumerate(oracles.kept_tokens(cache)):
        for head, tokens in enumerate(rows[0]):
            different += len(set(tokens) ^ set(expected[layer, head].nonzero()[:, 0].tolist()))
    # A layer's budget is a whole number of tokens for each of its heads, so each layer may miss by less than that.
    assert different <= 2 * 4


def test_layers_released_early_end_as_if_all_had_waited(model, ids):
    at_once = oracles.prefill(model, ids, selector="echo", compression_ratio=0.3, prefill="chunked").finish()
    early = oracles.prefill(model, ids, selector="echo", compression_ratio=0.3)
    assert oracles.kept_tokens(early) == oracles.kept_tokens(at_once)


@pytest.mark.parametrize("options", [{"strategy": "global", "head_budgets": None}, {"strategy": "kvcompose"}])
@pytest.mark.parametrize("selector", ["echo", "snapkv"])
def test_equal_heads_share_by_the_mean_of_their_curves(model, ids, selector, options):
    average = 40
    cache = oracles.prefill(model, ids, selector=selector, budget=average, **options)
    scores = take_scores(model, ids, selector)
    scores[..., :4] = scores[..., LENGTH - 16 :] = float("inf")
    curves = scores.sort(dim=-1, descending=True).values.mean(dim=1)[:, FLOOR:]
    best = curves.flatten().topk(4 * (average - FLOOR)).indices // curves.shape[1]
    assert cache.budgets == (FLOOR + torch.bincount(best, minlength=4)).tolist()
    assert all(len(set(map(len, rows[0]))) == 1 for rows in oracles.kept_tokens(cache))


@pytest.mark.parametrize("strategy", ["global", "kvcompose"])
@pytest.mark.parametrize(
    "name", [name for name, known in SELECTORS.items() if not known.comparable and not known.required]
)
def test_scores_that_do_not_compare_are_refused(model, name, strategy):
    with pytest.raises(ConfigError, match="only order the tokens of one head"):
        RankKVCache(model, selector=name, strategy=strategy)


def test_head_budgets_with_equal_heads_are_refused(model):
    with pytest.raises(ConfigError, match=r"head_budgets='adaptive' .* strategy='global'"):
        RankKVCache(model, strategy="kvcompose", head_budgets="adaptive")


def test_a_protected_fraction_of_each_budget_is_refused(model):
    with pytest.raises(ConfigError, match="recent_fraction"):
        RankKVCache(model, selector=get_selector("h2o", recent_fraction=0.5), strategy="global")


def test_protected_spans_stay_in_every_head(model, ids):
    cache = oracles.prefill(model, ids, selector="echo", compression_ratio=0.4, protect=[(30, 40)])
    for rows in oracles.kept_tokens(cache):
        for tokens in rows[0]:
            assert set(range(30, 40)) <= set(tokens)


tables = st.integers(1, 3).flatmap(
    lambda heads: st.lists(
        st.lists(st.floats(0, 1, width=32), min_size=8, max_size=8), min_size=heads, max_size=heads
    )
)


@given(tables, st.integers(0, 12))
def test_a_larger_budget_never_takes_a_token_from_a_head(rows, budget):
    scores = HeadScores(np.sort(np.array(rows))[:, ::-1], floor=3)
    room = [11] * scores.heads
    smaller, larger = scores.split(budget, room), scores.split(budget + 1, room)
    assert smaller.sum() == min(budget, 11) * scores.heads
    assert (larger >= smaller).all()
    settled = scores.settle(min(budget, 11))
    assert settled.split(min(budget, 11), room).tolist() == smaller.tolist()


@given(st.lists(tables, min_size=1, max_size=4), st.integers(0, 20))
def test_a_later_layer_only_takes_places_away(layers, places):
    pool, before = ScorePool(), np.zeros(0)
    for place, rows in enumerate(layers):
        pool.add(place, HeadScores(np.sort(np.array(rows))[:, ::-1], 3), 3, 11)
        pool.share(places)
        counts = pool.count(place + 1)
        assert counts.sum() <= places + 1e-6
        assert (counts[:place] <= before + 1e-9).all()
        before = counts


@given(
    st.lists(
        st.tuples(
            st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0]), max_size=9),
            st.sampled_from([0.25, 0.5, 1.0]),
        ),
        min_size=1,
        max_size=5,
    ),
    st.integers(0, 20),
)
def test_the_best_scores_of_all_rows_are_those_of_a_merged_list(rows, places):
    scores = [np.array(sorted(values, reverse=True)) for values, _ in rows]
    merged = sorted(
        (-value, row, cost)
        for row, (values, cost) in enumerate(rows)
        for value in sorted(values, reverse=True)
    )
    expected, spent = [0] * len(rows), 0.0
    for _, row, cost in merged:
        spent += cost
        if spent > places:
            break
        expected[row] += 1
    assert count_best(scores, [cost for _, cost in rows], places).tolist() == expected


def test_a_prefill_takes_only_options_that_it_has_not_read(model, ids):
    """What comes too late would be said by the summary and not be done."""
    cache = RankKVCache(model, 0.4, selector="knorm", strategy="uniform", prefill="chunked")
    with torch.no_grad():
        model(ids, past_key_values=cache)
    assert cache.copy_with(strategy="inverse", compression_ratio=0.5).finish().config.strategy == "inverse"
    with pytest.raises(ConfigError, match="only order the tokens of one head"):
        cache.copy_with(strategy="global")
    with pytest.raises(ConfigError, match="selector is read during the prefill"):
        cache.copy_with(selector="h2o")
    with pytest.raises(ConfigError, match="needs other cache layers"):
        cache.copy_with(head_budgets="adaptive")
