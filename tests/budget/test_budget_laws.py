"""Laws of budget allocation: exact total, bounds, monotonicity, and what the cascade relies on."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from rankkv.budget_allocation import (
    STRATEGIES,
    BudgetAllocator,
    allocate_integers,
    allocate_shares,
    ceil_shares,
    compute_weights,
)

WEIGHT = st.one_of(st.just(0.0), st.floats(1e-6, 1e6), st.floats(1.0, 64.0), st.sampled_from([1.0, 2.0, 2.5]))
LAYERWISE = sorted(name for name, strategy in STRATEGIES.items() if strategy.layerwise)
# Ranks reach the allocator rounded to six digits, so that two of them never differ by float noise alone.
RANK = st.one_of(st.just(0.0), st.integers(10_000, 5_000_000).map(lambda units: units / 10_000))


@st.composite
def problems(draw, weight=WEIGHT, max_layers=12):
    """Weights, integer bounds per layer and a feasible integer total."""
    weights = draw(st.lists(weight, min_size=1, max_size=max_layers))
    lower = [draw(st.integers(0, 40)) for _ in weights]
    upper = [low + draw(st.one_of(st.just(0), st.integers(0, 400))) for low in lower]
    total = draw(st.integers(sum(lower), sum(upper)))
    return np.array(weights), total, np.array(lower), np.array(upper)


@st.composite
def allocations(draw, max_layers=12):
    """Ranks with common bounds and a feasible total, as the allocator takes them."""
    ranks = draw(st.lists(RANK, min_size=1, max_size=max_layers))
    minimum = draw(st.integers(0, 20))
    maximum = minimum + draw(st.integers(1, 300))
    total = draw(st.integers(minimum * len(ranks), maximum * len(ranks)))
    return ranks, total, minimum, maximum


def bisected_shares(weights, total, lower, upper):
    """Water-filling written independently: bisect the water level; positive weights only."""
    low, high = 0.0, max(1.0, float(np.max(upper / weights)))
    for _ in range(300):
        middle = (low + high) / 2
        if np.minimum(np.maximum(middle * weights, lower), upper).sum() < total:
            low = middle
        else:
            high = middle
    return np.minimum(np.maximum(high * weights, lower), upper)


@given(problems())
def test_shares_sum_to_the_total_within_bounds(problem):
    weights, total, lower, upper = problem
    shares = allocate_shares(weights, total, lower, upper)
    assert math.fsum(shares) == pytest.approx(total, rel=1e-12, abs=1e-9)
    assert (shares >= lower).all()
    assert (shares <= upper).all()


@given(problems(weight=st.floats(1e-3, 1e3)))
def test_shares_equal_an_independent_bisection(problem):
    weights, total, lower, upper = problem
    expected = bisected_shares(weights, total, lower, upper)
    np.testing.assert_allclose(allocate_shares(weights, total, lower, upper), expected, rtol=1e-7, atol=1e-7)


@given(problems())
def test_zero_weights_are_the_limit_of_equal_tiny_weights(problem):
    weights, total, lower, upper = problem
    assume((weights == 0).any())
    positive = weights[weights > 0]
    scale = positive.min() if len(positive) else 1.0
    tiny = np.where(weights == 0, scale * 1e-12, weights)
    expected = allocate_shares(tiny, total, lower, upper)
    np.testing.assert_allclose(allocate_shares(weights, total, lower, upper), expected, rtol=1e-6, atol=1e-6)


@given(problems(), st.floats(1e-30, 1e30))
def test_shares_depend_on_ratios_of_weights_only(problem, scale):
    weights, total, lower, upper = problem
    scaled = allocate_shares(weights * scale, total, lower, upper)
    np.testing.assert_allclose(scaled, allocate_shares(weights, total, lower, upper), rtol=1e-9, atol=1e-9)


@given(problems(), st.randoms(use_true_random=False))
def test_shares_follow_the_layers_when_they_are_permuted(problem, random):
    weights, total, lower, upper = problem
    order = list(range(len(weights)))
    random.shuffle(order)
    permuted = allocate_shares(weights[order], total, lower[order], upper[order])
    np.testing.assert_array_equal(permuted, allocate_shares(weights, total, lower, upper)[order])


@given(problems())
def test_integers_are_exact_bounded_and_nearest_to_their_shares(problem):
    weights, total, lower, upper = problem
    shares = allocate_shares(weights, total, lower, upper)
    budgets = allocate_integers(shares, total, lower, upper, weights)
    assert budgets.sum() == total
    assert (budgets >= lower).all()
    assert (budgets <= upper).all()
    assert (np.abs(budgets - shares) < 1).all()
    np.testing.assert_array_equal(budgets, allocate_integers(shares, total, lower, upper, weights))


@given(problems())
def test_largest_remainders_round_up(problem):
    weights, total, lower, upper = problem
    shares = allocate_shares(weights, total, lower, upper)
    budgets = allocate_integers(shares, total, lower, upper, weights)
    raised = budgets > shares + 1e-6
    lowered = budgets < shares - 1e-6
    remainders = shares - np.floor(shares)
    if raised.any() and lowered.any():
        assert remainders[raised].min() >= remainders[lowered].max() - 1e-6


@given(st.lists(WEIGHT, min_size=2, max_size=12), st.integers(0, 20), st.integers(0, 300), st.data())
def test_a_larger_weight_never_gets_fewer_tokens(weights, minimum, room, data):
    maximum = minimum + room
    total = data.draw(st.integers(minimum * len(weights), maximum * len(weights)))
    shares = allocate_shares(weights, total, minimum, maximum)
    budgets = allocate_integers(shares, total, minimum, maximum, weights)
    by_weight = budgets[np.argsort(weights, kind="stable")]
    distinct = np.diff(np.sort(weights)) > 0
    assert (np.diff(by_weight)[distinct] >= 0).all()


@given(problems())
def test_a_new_layer_never_raises_an_earlier_share(problem):
    weights, total, lower, upper = problem
    earlier = None
    for count in range(1, len(weights) + 1):
        shares = allocate_shares(weights[:count], total, lower[:count], upper[:count], partial=True)
        if earlier is not None:
            assert (shares[:-1] <= earlier * (1 + 1e-9) + 1e-9).all()
        earlier = shares


@given(problems())
def test_the_ceiling_of_any_earlier_share_covers_the_final_budget(problem):
    weights, total, lower, upper = problem
    final = allocate_integers(allocate_shares(weights, total, lower, upper), total, lower, upper, weights)
    for count in range(1, len(weights) + 1):
        shares = allocate_shares(weights[:count], total, lower[:count], upper[:count], partial=True)
        assert (ceil_shares(shares) >= final[:count]).all()


@pytest.mark.parametrize("name", LAYERWISE)
@given(ranks=st.lists(RANK, min_size=2, max_size=12), data=st.data())
def test_layerwise_weights_keep_their_ratios_when_layers_arrive(name, ranks, data):
    count = data.draw(st.integers(1, len(ranks)))
    options = {"exponent": data.draw(st.floats(0, 8))} if name == "power" else {}
    # Ranks that are all zero so far weigh uniformly, whatever comes: there is no ratio to keep.
    assume(any(ranks[:count]))
    whole = compute_weights(ranks, name, **options)[:count]
    part = compute_weights(ranks[:count], name, **options)
    np.testing.assert_allclose(part / part.max(), whole / whole.max(), rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize("name", LAYERWISE)
@given(allocation=allocations())
def test_layerwise_budgets_cascade(name, allocation):
    ranks, total, minimum, maximum = allocation
    final = BudgetAllocator(name, minimum, maximum).allocate(ranks, total).budgets
    for count in range(1, len(ranks) + 1):
        weights = compute_weights(ranks[:count], name)
        kept = ceil_shares(allocate_shares(weights, total, minimum, maximum, partial=True))
        assert (kept >= final[:count]).all()


@pytest.mark.parametrize("name", sorted(STRATEGIES))
@given(allocation=allocations())
def test_every_strategy_spends_the_total_exactly_within_bounds(name, allocation):
    ranks, total, minimum, maximum = allocation
    budgets = BudgetAllocator(name, minimum, maximum).allocate(ranks, total).budgets
    assert sum(budgets) == total
    assert all(minimum <= budget <= maximum for budget in budgets)
    assert budgets == BudgetAllocator(name, minimum, maximum).allocate(ranks, total).budgets


@pytest.mark.parametrize("name", ["proportional", "power", "softmax", "adaptive", "inverse"])
@given(allocation=allocations())
def test_budgets_are_monotone_in_rank(name, allocation):
    ranks, total, minimum, maximum = allocation
    assume(any(ranks))
    budgets = BudgetAllocator(name, minimum, maximum).allocate(ranks, total).budgets
    sign = -1 if name == "inverse" else 1
    for rank, budget in zip(ranks, budgets, strict=True):
        for other_rank, other_budget in zip(ranks, budgets, strict=True):
            # "inverse" gives rank 0 the weight of the smallest positive rank: those two are equal to it.
            if rank > other_rank and (name != "inverse" or other_rank > 0):
                assert sign * (budget - other_budget) >= 0


@pytest.mark.parametrize("name", ["proportional", "power"])
@given(allocation=allocations(), random=st.randoms(use_true_random=False))
def test_layerwise_budgets_follow_their_ranks_when_permuted(name, allocation, random):
    ranks, total, minimum, maximum = allocation
    shuffled = list(ranks)
    random.shuffle(shuffled)
    allocator = BudgetAllocator(name, minimum, maximum)
    budgets = allocator.allocate(ranks, total).budgets
    permuted = allocator.allocate(shuffled, total).budgets
    # Position tells equal ranks apart, so (rank, budget) pairs are compared, not positions.
    assert sorted(zip(ranks, budgets, strict=True)) == sorted(zip(shuffled, permuted, strict=True))


@given(allocation=allocations(), scale=st.floats(1e-3, 1e3))
def test_normalised_ranks_give_the_same_weights(allocation, scale):
    ranks = np.array(allocation[0])
    assume(ranks.any())
    for name in ("proportional", "power", "softmax", "adaptive", "inverse"):
        plain, scaled = compute_weights(ranks, name), compute_weights(ranks * scale, name)
        np.testing.assert_allclose(scaled / scaled.max(), plain / plain.max(), rtol=1e-9, atol=1e-12)
