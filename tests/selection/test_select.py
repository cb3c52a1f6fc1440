"""Selectors against slow plain formulas, and the laws of the one routine that turns scores into kept tokens."""

from __future__ import annotations

import re

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from selector_conformance import CHECKS

from rankkv.errors import ConfigError, RankKVError, UnknownNameError
from rankkv.selection import (
    SELECTORS,
    Selector,
    get_selector,
    list_protected,
    rank_tokens,
    select_tokens,
)

LENGTH, WINDOW = 64, 16
PROMPTS = (oracles.random_prompt(LENGTH, seed=1), oracles.random_prompt(23, seed=2))


@pytest.fixture(scope="module", params=["llama", "neox"])
def model(request, tiny_llama, tiny_neox):
    return {"llama": tiny_llama, "neox": tiny_neox}[request.param]()


@pytest.fixture(scope="module")
def layer(model):
    return oracles.observe_layers(model, PROMPTS[0], window_size=WINDOW)[1]


@pytest.fixture(scope="module")
def attention(model):
    return oracles.eager_attentions(model, PROMPTS[0])[1][0]


def average_groups(per_head, layer):
    groups = per_head.shape[0] // layer.keys.shape[1]
    return torch.stack([per_head[i : i + groups].mean(0) for i in range(0, per_head.shape[0], groups)])


# -- each method against a plain formula --------------------------------------------------------------------


def test_h2o_is_the_column_sums_of_the_whole_attention(layer, attention):
    heads = attention.shape[0]
    sums = torch.zeros(heads, LENGTH)
    for head in range(heads):
        for key in range(LENGTH):
            sums[head, key] = sum(float(attention[head, query, key]) for query in range(LENGTH))
    scores = get_selector("h2o").compute_scores(layer)
    torch.testing.assert_close(scores[0], average_groups(sums, layer), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kernel_size", [1, 5, 9])
@pytest.mark.parametrize("pooling", ["max", "avg"])
def test_snapkv_is_the_pooled_attention_of_the_window(layer, attention, pooling, kernel_size):
    heads, split, half = attention.shape[0], LENGTH - WINDOW, kernel_size // 2
    pooled = torch.zeros(heads, LENGTH)
    for head in range(heads):
        votes = [float(attention[head, split:, key].mean()) for key in range(LENGTH)]
        for key in range(LENGTH):
            # Keys before the window and those inside it are pooled among themselves.
            first, last = (0, split) if key < split else (split, LENGTH)
            near = votes[max(first, key - half) : min(last, key + half + 1)]
            # The average counts the zeros beyond either end.
            pooled[head, key] = max(near) if pooling == "max" else sum(near) / kernel_size
    scores = get_selector("snapkv", pooling=pooling, kernel_size=kernel_size).compute_scores(layer)
    torch.testing.assert_close(scores[0], average_groups(pooled, layer), atol=1e-5, rtol=1e-4)


def test_snapkv_of_a_prompt_shorter_than_the_window(model):
    layer = oracles.observe_layers(model, PROMPTS[0][:, :9], window_size=WINDOW)[1]
    attention = oracles.eager_attentions(model, PROMPTS[0][:, :9])[1][0]
    scores = get_selector("snapkv", kernel_size=1).compute_scores(layer)
    torch.testing.assert_close(scores[0], average_groups(attention.mean(1), layer), atol=1e-5, rtol=1e-4)


def test_streaming_llm_orders_by_recency(layer):
    scores = get_selector("streaming_llm").compute_scores(layer)
    assert scores.shape[1] == 1
    assert scores[0, 0].argsort().tolist() == list(range(LENGTH))


def test_random_follows_the_seed_and_differs_by_head_and_layer(model):
    layers = oracles.observe_layers(model, PROMPTS[0])
    scores = [get_selector("random").compute_scores(layer)[0] for layer in layers]
    assert torch.equal(scores[0], get_selector("random").compute_scores(layers[0])[0])
    assert not torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[0][0], scores[0][1])
    assert not torch.equal(scores[0], get_selector("random", seed=1).compute_scores(layers[0])[0])


def test_random_keeps_every_token_about_equally_often(layer):
    kept = torch.zeros(LENGTH)
    for seed in range(300):
        scores = get_selector("random", seed=seed).compute_scores(layer)[0, 0]
        kept[scores.topk(16).indices] += 1
    # 300 draws of probability 1/4: mean 75, standard deviation 7.5.
    assert 75 - 5 * 7.5 < kept.min() <= kept.max() < 75 + 5 * 7.5


# -- what every selector must do ----------------------------------------------------------------------------


@pytest.mark.parametrize("check", [name for name in CHECKS if name not in ("cache", "batch")])
@pytest.mark.parametrize("name", [name for name, known in SELECTORS.items() if not known.required])
def test_every_selector_conforms(model, name, check):
    if check == "decoding" and SELECTORS[name].replays:
        with pytest.raises(ConfigError, match="a cache alone cannot use it"):
            CHECKS[check](name, model)
        return
    CHECKS[check](name, model)


@pytest.mark.parametrize("name", SELECTORS)
def test_sources_are_papers(name):
    source = SELECTORS[name].source
    assert source in ("control", "this project") or re.fullmatch(
        r"arXiv:\d{4}\.\d{5}|OpenReview:\w{10}", source
    )


# -- select_tokens ------------------------------------------------------------------------------------------

score = st.one_of(
    st.floats(-3, 3, width=32), st.sampled_from([0.0, 1.0, float("nan"), float("inf"), -float("inf")])
)


@st.composite
def selections(draw):
    """Draw scores, the padding of every row, budgets and protections."""
    keys, heads = draw(st.integers(1, 24)), draw(st.integers(1, 3))
    padding = draw(st.lists(st.integers(0, keys - 1), min_size=1, max_size=3))
    lengths = [keys - pad for pad in padding]
    rows = len(padding)
    values = draw(st.lists(score, min_size=rows * heads * keys, max_size=rows * heads * keys))
    index = torch.stack([torch.cat([torch.full((pad,), -1), torch.arange(keys - pad)]) for pad in padding])[
        :, None
    ]
    return {
        "scores": torch.tensor(values).view(rows, heads, keys),
        "real_index": index,
        "lengths": lengths,
        "budgets": [draw(st.integers(1, keys)) for _ in padding],
        "selector": draw(st.sampled_from([get_selector("snapkv"), get_selector("h2o", recent_fraction=0.5)])),
        "window_size": draw(st.integers(1, 8)),
        "sink_size": draw(st.integers(0, 5)),
    }


def plain_selection(case):
    """Sort every row and head by (protected, score, earlier) and take as many as the budget says."""
    result = []
    for row, length in enumerate(case["lengths"]):
        budget = case["budgets"][row]
        recent, sinks = case["selector"].count_protected(budget, case["window_size"], case["sink_size"])
        padding = case["scores"].shape[-1] - length
        heads = []
        for head in range(case["scores"].shape[1]):
            entries = []
            for token in range(length):
                value = float(case["scores"][row, head, padding + token])
                value = torch.finfo(torch.float32).min if value != value else value
                value = max(min(value, torch.finfo(torch.float32).max), torch.finfo(torch.float32).min)
                protected = token < sinks or token >= length - recent
                entries.append((not protected, -value, token))
            heads.append(sorted(padding + token for _, _, token in sorted(entries)[: min(budget, length)]))
        result.append(heads)
    return result


def listed(kept):
    return [[[index for index in head if index >= 0] for head in row] for row in kept.tolist()]


@given(selections())
def test_selection_equals_a_plain_sort(case):
    kept = select_tokens(**case)
    assert listed(kept) == plain_selection(case)
    # A row that keeps fewer starts with empty slots.
    assert kept.shape[-1] == max(min(b, n) for b, n in zip(case["budgets"], case["lengths"], strict=True))
    assert torch.equal(kept, kept.sort(-1).values)


@given(selections())
def test_protected_tokens_are_kept(case):
    for row, heads in enumerate(listed(select_tokens(**case))):
        budget, length = case["budgets"][row], case["lengths"][row]
        padding = case["scores"].shape[-1] - length
        recent, sinks = case["selector"].count_protected(budget, case["window_size"], case["sink_size"])
        assert recent + sinks <= budget
        newest = set(range(padding + max(0, length - recent), padding + length))
        first = set(range(padding, padding + min(sinks, length)))
        for head in heads:
            assert newest | first <= set(head)
            assert min(head) >= padding
            assert len(head) == min(budget, length)


@given(selections(), st.data())
def test_selecting_again_from_what_was_kept_changes_nothing(case, data):
    # What a cascade needs. Protection shrinks with the budget, so that it keeps one token more on the way.
    larger = [
        min(n, data.draw(st.integers(b, b + 6)))
        for b, n in zip(case["budgets"], case["lengths"], strict=True)
    ]
    larger = [max(b, big) for b, big in zip(case["budgets"], larger, strict=True)]
    keep = [min(big + 1, n) for big, n in zip(larger, case["lengths"], strict=True)]
    first = select_tokens(**{**case, "budgets": larger}, keep=keep)
    index = first.clamp(min=0)
    heads = case["scores"].shape[1]
    case_after = {
        **case,
        "scores": case["scores"].gather(-1, index),
        "real_index": case["real_index"].expand(-1, heads, -1).gather(-1, index).masked_fill(first < 0, -1),
    }
    second = select_tokens(**case_after)
    mapped = index.gather(-1, second.clamp(min=0)).masked_fill(second < 0, -1)
    assert listed(mapped) == listed(select_tokens(**case))


@given(selections(), st.data())
def test_the_first_ranked_tokens_are_the_selected_ones(case, data):
    how = {name: case[name] for name in ("selector", "window_size", "sink_size")}
    protected = list_protected(case["lengths"], case["budgets"], **how)
    tokens = case["scores"], case["real_index"], case["lengths"]
    padded = any(length < case["scores"].shape[-1] for length in case["lengths"])
    order = rank_tokens(*tokens, protected, in_order=not padded and data.draw(st.booleans()))
    # Fewer tokens are the first ones too, while equally many are protected.
    fewer = [data.draw(st.integers(1, budget)) for budget in case["budgets"]]
    kept = [min(count, length) for count, length in zip(fewer, case["lengths"], strict=True)]
    if list_protected(case["lengths"], fewer, **how) == protected:
        found = [[sorted(head[:n]) for head in row] for row, n in zip(order.tolist(), kept, strict=True)]
        assert found == listed(select_tokens(**{**case, "budgets": fewer}))


def test_ties_go_to_the_earlier_token():
    kept = select_tokens(
        torch.zeros(1, 1, 9), torch.arange(9).view(1, 1, 9), [9], [4], get_selector("snapkv"), 1, 0
    )
    assert kept.tolist() == [[[0, 1, 2, 8]]]


def test_a_score_that_is_not_a_number_loses_but_not_to_padding():
    scores = torch.tensor([[[5.0, 5.0, float("nan"), -7.0, float("nan"), 0.0]]])
    index = torch.tensor([[[-1, -1, 0, 1, 2, 3]]])
    pick = lambda budget: select_tokens(scores, index, [4], [budget], get_selector("snapkv"), 1, 0)  # noqa: E731
    assert pick(2).tolist() == [[[3, 5]]]
    assert pick(3).tolist() == [[[2, 3, 5]]]
    assert pick(6).tolist() == [[[2, 3, 4, 5]]]


@pytest.mark.parametrize("budget", range(1, 40))
def test_protection_is_at_most_the_budget(budget):
    recent, sinks = get_selector("snapkv").count_protected(budget, 32, 4)
    assert (recent, sinks) == (min(32, budget // 2), min(4, budget // 4))
    for fraction in (0.0, 0.5, 1.0):
        recent, sinks = get_selector("h2o", recent_fraction=fraction).count_protected(budget, 32, 4)
        assert 1 <= recent <= budget - sinks


# -- options ------------------------------------------------------------------------------------------------


def test_unknown_selector_lists_the_known_and_the_closest():
    with pytest.raises(UnknownNameError, match=r"unknown selector 'snapvk'; did you mean 'snapkv'\?.*h2o"):
        get_selector("snapvk")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "snapkv",
            {"pool": "max"},
            "no option 'pool'; its options are: pooling, kernel_size, recent_fraction",
        ),
        ("h2o", {"recent_fraction": 1.5}, r"recent_fraction=1.5 .* outside \[0, 1\]"),
        ("h2o", {"recent_fraction": -0.1}, r"recent_fraction=-0.1 .* outside \[0, 1\]"),
    ],
)
def test_wrong_options_are_named_at_once(name, options, message):
    with pytest.raises(ConfigError, match=message):
        get_selector(name, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "min"}, "pooling='min' .* avg, max"),
        ({"kernel_size": 4}, "kernel_size=4 .* odd"),
        ({"kernel_size": 0}, "kernel_size=0 .* odd"),
        ({"kernel_size": 2.5}, "kernel_size=2.5 .* odd"),
    ],
)
def test_wrong_values_are_named(layer, options, message):
    with pytest.raises(ConfigError, match=message):
        get_selector("snapkv", **options).compute_scores(layer)


def test_a_new_selector_is_one_function(tiny_llama):
    def score_oldest(observation):
        return -observation.real_index.float()

    model, prompt = tiny_llama(), PROMPTS[0]
    selector = Selector("oldest", score_oldest, "nothing", "test")
    cache = oracles.prefill(model, prompt, selector=selector, budget=20, strategy="uniform")
    expected = [*range(10), *range(LENGTH - 10, LENGTH)]
    assert oracles.kept_tokens(cache) == [[[expected] * 2]] * 3
    oracles.assert_equals_masked_oracle(model, cache, prompt)


def test_errors_are_of_the_package():
    assert issubclass(ConfigError, RankKVError)
    assert issubclass(ConfigError, ValueError)


def test_a_span_ends_before_its_stop_and_where_the_budget_was_made():
    scores = torch.tensor([[[0.9, 0.0, 0.0, 0.0, 0.8, 0.7, 0.6, 0.5]]])
    index = torch.arange(8).view(1, 1, 8)

    def kept(protect, **more):
        how = {"window_size": 0, "sink_size": 0, "protect": protect, **more}
        return select_tokens(scores, index, [8], [4], get_selector("snapkv"), **how).tolist()[0][0]

    assert kept([(1, 3)]) == [0, 1, 2, 4]
    assert kept([(1, 4)]) == [0, 1, 2, 3]
    # Tokens that came after the budget was made are in no span.
    assert kept([(6, 8)], protect_before=[7]) == [0, 4, 5, 6]
