"""Weights of the strategies that come from papers, against their formulas written down another way."""

from __future__ import annotations

import itertools

import numpy as np
import oracles
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankkv import BudgetAllocator
from rankkv.budget.strategies import compute_weights
from rankkv.errors import ConfigError
from rankkv.limits import Limits


def official_pyramid(capacity, window, length, layers, beta=20):
    """PyramidKV's lengths in whole numbers: of each layer, the window included."""
    base = capacity - window
    if length < capacity:
        return [length] * layers
    if length < 2 * base:
        return [capacity] * layers
    last = base // beta
    first = 2 * base - last
    if first >= length - window:
        first = length - window
        last = 2 * base - first
    step = (first - last) // (layers - 1)
    return [first - layer * step + window for layer in range(layers)]


# Capacities whose steps are whole numbers: there the integer divisions lose nothing.
WHOLE = [(352, 32, 4096, 9, 20), (128, 8, 2000, 5, 20), (528, 16, 1024, 17, 2), (840, 40, 1640, 11, 20)]


@pytest.mark.parametrize(("capacity", "window", "length", "layers", "beta"), WHOLE)
def test_pyramid_with_beta_has_the_official_lengths(capacity, window, length, layers, beta):
    expected = official_pyramid(capacity, window, length, layers, beta)
    assert sum(expected) == capacity * layers
    limits = Limits(capacity * layers, length, window)
    lengths = compute_weights([1.0] * layers, "pyramid", beta=beta, limits=limits)
    assert lengths.tolist() == pytest.approx(expected, abs=1e-9)
    if window == 32:
        allocator = BudgetAllocator("pyramid", min_budget=1, beta=beta)
        assert allocator.allocate([1.0] * layers, capacity * layers, seq_len=length).budgets == expected


def test_a_cache_keeps_the_official_lengths(tiny_llama):
    expected = official_pyramid(48, 8, 120, 3, beta=4)
    assert expected == [78, 48, 18]
    cache = oracles.prefill(
        tiny_llama(3),
        oracles.random_prompt(120),
        budget=48,
        min_budget=1,
        window_size=8,
        strategy="pyramid",
        strategy_options={"beta": 4},
    )
    assert cache.budgets == cache.kept_lengths == expected


@given(st.integers(2, 40), st.integers(0, 64), st.integers(1, 600), st.integers(40, 4000), st.integers(1, 40))
def test_pyramid_with_beta_stays_near_the_official_lengths_and_within_the_total(
    layers, window, room, length, beta
):
    capacity = window + room
    expected = official_pyramid(capacity, window, length, layers, beta)
    lengths = compute_weights(
        [1.0] * layers, "pyramid", beta=beta, limits=Limits(capacity * layers, length, window)
    )
    shares = lengths / lengths.sum() * capacity * layers
    assert (np.diff(shares) <= 1e-9).all()
    if length >= 2 * room and length - window >= room:
        assert 0 <= sum(expected) - capacity * layers <= layers * (layers - 1) // 2 + layers
        assert np.abs(shares - expected).max() <= layers + 1


def test_a_pyramid_is_drawn_in_one_way():
    with pytest.raises(ConfigError, match=r"steepness=0\.5 and beta=20"):
        BudgetAllocator("pyramid", steepness=0.5, beta=20)
    with pytest.raises(ConfigError, match="beta must be a number"):
        BudgetAllocator("pyramid", beta=0.5)


def least_spread(values, groups):
    """Divide by trying every way to cut the sorted numbers."""
    ordered = sorted(set(values))
    best = None
    for cuts in itertools.combinations(range(1, len(ordered)), min(groups, len(ordered)) - 1):
        parts = [ordered[a:b] for a, b in itertools.pairwise((0, *cuts, len(ordered)))]
        members = [[v for v in values if v in part] for part in parts]
        spread = sum(sum((v - np.mean(m)) ** 2 for v in m) for m in members)
        if best is None or spread < best[0]:
            best = (spread, members)
    return best[0]


def test_dynamickv_counts_the_best_scores_of_all_layers():
    # Two heads a layer; 8 tokens a layer beyond the window of 4, so the best 3 x 2 x 8 = 48 scores are counted.
    scores = np.random.default_rng(3).random((3, 2, 30)) * np.array([1.0, 0.5, 2.0])[:, None, None]
    limits = Limits(total_budget=3 * 12, length=100, window_size=4)
    ranked = sorted(((score, layer) for layer in range(3) for score in scores[layer].ravel()), reverse=True)
    counts = [sum(layer == wanted for _, layer in ranked[:48]) for wanted in range(3)]
    expected = [4 + count / 48 * 24 for count in counts]
    assert compute_weights(scores, "dynamickv", limits=limits).tolist() == pytest.approx(expected)
    allocation = BudgetAllocator("dynamickv", min_budget=1).allocate(scores, 3 * 40)
    assert sum(allocation.budgets) == 120
    assert allocation.layer_ranks == []
    assert np.array(allocation.layer_measures).shape == (3, 2, 30)


def test_dynamickv_gives_a_layer_r_max_times_the_average_beyond_its_window_at_most():
    # The measure hands over the best r_max x 8 = 20 scores of a head; those of the first layer exceed all others.
    scores = np.random.default_rng(4).random((4, 2, 20)) + np.array([9.0, 0.0, 0.0, 0.0])[:, None, None]
    limits = Limits(total_budget=4 * 12, length=100, window_size=4)
    weights = compute_weights(scores, "dynamickv", r_max=2.5, limits=limits)
    assert weights[0] == pytest.approx(4 + 2.5 * 8)
    assert weights.sum() == pytest.approx(4 * 12)


def test_zigzagkv_shares_out_all_and_raises_a_layer_to_the_floor():
    shares = [0.05, 0.15, 0.3]
    assert BudgetAllocator("zigzagkv", min_budget=1).allocate(shares, 300).budgets == [30, 90, 180]
    raised = BudgetAllocator("zigzagkv", min_budget=60).allocate(shares, 300).budgets
    assert raised == [60, 80, 160]


def test_of_equal_scores_the_first_layers_are_counted():
    scores = np.full((4, 1, 10), 0.5)
    limits = Limits(total_budget=4 * 6, length=100, window_size=4)
    assert compute_weights(scores, "dynamickv", limits=limits).tolist() == [4 + 8, 4, 4, 4]
    # Better ones of another layer come before them.
    scores[3, 0, :3] = 0.9
    assert compute_weights(scores, "dynamickv", limits=limits).tolist() == [4 + 5, 4, 4, 4 + 3]


def test_random_weights_fill_their_range():
    weights = compute_weights(np.ones(3000), "random", seed=1)
    assert 0.2 <= weights.min() < 0.21
    assert 1.79 < weights.max() <= 1.8
