"""Budgets of one prompt: ceilings while layers arrive, floors, totals, layers without a rank."""

from __future__ import annotations

import itertools
import re
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankkv import BudgetAllocator, RankKVConfig
from rankkv.budget.plan import BudgetPlan
from rankkv.budget_allocation import STRATEGIES
from rankkv.config import PROFILE_USERS
from rankkv.errors import BudgetError, ConfigError, UnknownNameError
from rankkv.limits import make_budget_grid

#: Strategies that measure each layer, and need no profile of the model.
MEASURED = [name for name, known in STRATEGIES.items() if known.measure and name not in PROFILE_USERS]

RANK = st.one_of(st.just(0.0), st.floats(1.0, 32.0), st.sampled_from([1.0, 32.0]))


def fill(config, length, ranks, **options):
    """Add all ranks and return the plan and the ceilings after each layer but the last."""
    plan = BudgetPlan(config, length, list(range(len(ranks))), **options)
    ceilings = []
    for number, rank in enumerate(ranks):
        plan.add_layer(rank if plan.measure is not None else None)
        if number < len(ranks) - 1:
            ceilings.append(plan.compute_ceilings())
    return plan, ceilings


@given(
    st.lists(RANK, min_size=1, max_size=9),
    st.integers(1, 300),
    st.floats(0.01, 1.0),
    st.sampled_from(sorted(STRATEGIES)),
    st.one_of(st.none(), st.integers(1, 40)),
)
def test_ceilings_only_fall_and_never_below_the_budget(ranks, length, ratio, strategy, min_budget):
    plan, ceilings = fill(RankKVConfig(ratio, strategy=strategy, min_budget=min_budget), length, ranks)
    steps = [*ceilings, plan.finish()]
    for earlier, later in itertools.pairwise(steps):
        assert all(before >= after for before, after in zip(earlier, later, strict=False))


@given(
    st.lists(RANK, min_size=1, max_size=9),
    st.integers(1, 300),
    st.floats(0.01, 1.0),
    # Strategies by scores have another floor: tests/budget/test_global.py.
    st.sampled_from(sorted(name for name, known in STRATEGIES.items() if not known.by_scores)),
)
def test_budgets_lie_within_floor_and_length_and_sum_to_the_total(ranks, length, ratio, strategy):
    plan, _ = fill(RankKVConfig(ratio, strategy=strategy), length, ranks)
    budgets = plan.finish()
    asked = round(ratio * length * len(ranks))
    floor = min(length, max(16, asked // len(ranks) // 2))
    assert sum(budgets) == plan.total_budget == max(asked, floor * len(ranks))
    assert all(floor <= budget <= length for budget in budgets)
    assert plan.floor == floor


@given(st.lists(st.floats(1.0, 32.0), min_size=2, max_size=9), st.integers(80, 300))
def test_equals_the_allocator_within_the_same_bounds(ranks, length):
    plan, _ = fill(RankKVConfig(0.5, strategy="proportional"), length, ranks)
    allocator = BudgetAllocator("proportional", min_budget=plan.floor, max_budget=length)
    assert plan.finish() == allocator.allocate(ranks, plan.total_budget).budgets


@pytest.mark.parametrize("strategy", [name for name, known in STRATEGIES.items() if not known.layerwise])
def test_strategies_that_need_all_layers_release_nothing_before(strategy):
    plan, ceilings = fill(RankKVConfig(0.3, strategy=strategy), 100, [2.0, 9.0, 4.0])
    if plan.measure is not None:
        assert ceilings == [[100], [100, 100]]
    else:
        # Known from the start.
        budgets = plan.finish()
        assert all(c - b in (0, 1) for row in ceilings for c, b in zip(row, budgets, strict=False))


def test_the_last_ceilings_hardly_exceed_the_budgets():
    plan, ceilings = fill(RankKVConfig(0.3, strategy="power"), 1000, [3.0, 5.0, 8.0, 2.0])
    assert sum(ceilings[0]) == 1000  # One layer may take the whole total that fits in it.
    assert sum(ceilings[-1]) <= plan.total_budget + 3


def test_the_default_gives_tokens_where_the_errors_fall_most():
    plan = BudgetPlan(RankKVConfig(0.5, min_budget=16, profile=None), 64, [0, 1])
    assert plan.strategy == "distortion"
    # Errors at 8, 11, 16, 23, 32 and 45 tokens: layer 1 gains nothing from 32 tokens on, layer 0 much.
    plan.add_layer(np.array([9.0, 8.0, 7.0, 5.0, 3.0, 1.0]), rank=2.0)
    plan.add_layer(np.array([9.0, 8.0, 0.1, 0.1, 0.0, 0.0]), rank=2.0)
    assert plan.finish() == [48, 16]
    assert plan.layer_ranks == [2.0, 2.0]


@pytest.mark.parametrize(("ranks", "budgets"), [([4.0, 1.0], [48, 16]), ([1.0, 4.0], [16, 48])])
def test_the_default_weighs_the_same_errors_by_rank(ranks, budgets):
    plan = BudgetPlan(RankKVConfig(0.5, min_budget=16, profile=None), 64, [0, 1])
    for rank in ranks:
        plan.add_layer(np.array([0.9, 0.8, 0.7, 0.5, 0.3, 0.1]), rank=rank)
    assert plan.finish() == budgets


def test_all_zero_ranks_are_uniform():
    plan, _ = fill(RankKVConfig(0.5), 90, [0.0, 0.0, 0.0])
    assert plan.finish() == [45, 45, 45]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_layer_without_a_rank_gets_its_uniform_share(bad, place):
    ranks = [4.0, 4.0, 8.0]
    ranks[place] = bad
    with pytest.warns(UserWarning, match=rf"attention of layer {place} is not finite.* share of 50 tokens"):
        plan, ceilings = fill(RankKVConfig(0.5, strategy="proportional"), 100, ranks)
    budgets = plan.finish()
    assert budgets[place] == 50
    assert sum(budgets) == 150
    assert plan.layer_ranks[place] == 0.0
    assert any(f"layer {place} has no finite rank" in note for note in plan.notes)
    for row in ceilings:
        assert all(c >= b for c, b in zip(row, budgets, strict=False))


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("strategy", MEASURED)
def test_its_uniform_share_is_neither_less_nor_more(strategy, place):
    """Zero in place of what is unknown would be weighed: high by some strategies, low by others."""
    known = STRATEGIES[strategy]
    plan = BudgetPlan(RankKVConfig(0.5, strategy=strategy, head_budgets=None), 100, [0, 1, 2])
    falling = 0.9 ** np.arange(len(make_budget_grid(100)))
    for layer, size in enumerate([4.0, 2.0, 8.0]):
        measured = size if known.scalar else size * falling
        measured = measured * np.nan if layer == place else measured
        rank = size if known.ranked else None
        if layer == place:
            with pytest.warns(UserWarning, match=f"attention of layer {place} is not finite"):
                plan.add_layer(measured, rank=rank)
        else:
            plan.add_layer(measured, rank=rank)
        if layer < 2:
            ceilings = plan.compute_ceilings()
            assert place > layer or ceilings[place] == 50
    budgets = plan.finish()
    assert (budgets[place], sum(budgets)) == (50, 150)


def test_one_warning_for_one_layer():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fill(RankKVConfig(0.5), 100, [4.0, float("nan"), 8.0])[0].finish()
    assert len(caught) == 1


def test_the_warning_names_the_layer_of_the_model():
    plan = BudgetPlan(RankKVConfig(0.5), 100, [5, 11, 17])
    plan.add_layer(2.0)
    with pytest.warns(UserWarning, match="layer 11"):
        plan.add_layer(float("nan"))


# -- totals -------------------------------------------------------------------------------------------------


def test_a_ratio_below_the_floor_is_raised_and_noted():
    plan, _ = fill(RankKVConfig(0.01), 200, [1.0, 1.0])
    assert plan.total_budget == 32
    assert plan.finish() == [16, 16]
    assert re.search(r"gives 4 tokens, raised to 32: the floor is 16 per layer", plan.notes[0])


def test_an_explicit_budget_below_the_floor_names_the_least():
    with pytest.raises(
        BudgetError, match=r"budget=15 .*floor of 16 .*2 layers .*budget=16 \(total_budget=32\)"
    ):
        BudgetPlan(RankKVConfig(budget=15), 200, [0, 1])
    with pytest.raises(BudgetError, match=r"total_budget=31 .*total_budget=32"):
        BudgetPlan(RankKVConfig(), 200, [0, 1], total_budget=31)
    assert BudgetPlan(RankKVConfig(budget=16), 200, [0, 1]).total_budget == 32
    assert BudgetPlan(RankKVConfig(budget=2, min_budget=2), 200, [0, 1]).total_budget == 4


def test_a_prompt_within_the_floor_keeps_all():
    for length in range(1, 17):
        plan, _ = fill(RankKVConfig(0.1), length, [3.0, 1.0])
        assert plan.finish() == [length, length]


def test_a_budget_above_the_prompt_keeps_all():
    for options in ({"total_budget": 10_000}, {}):
        plan, _ = fill(RankKVConfig(budget=5_000), 40, [3.0, 1.0], **options)
        assert plan.finish() == [40, 40]


def test_total_overrides_budget_and_budget_overrides_ratio():
    config = RankKVConfig(0.9, budget=30)
    assert BudgetPlan(config, 200, [0, 1]).total_budget == 60
    assert BudgetPlan(config, 200, [0, 1], total_budget=80).total_budget == 80


# -- checks before any model runs ---------------------------------------------------------------------------


def test_check_names_what_is_wrong():
    BudgetPlan.check(RankKVConfig())
    with pytest.raises(UnknownNameError, match=r"strategy 'proportionl'; did you mean 'proportional'\?"):
        BudgetPlan.check(RankKVConfig(strategy="proportionl"))
    with pytest.raises(ConfigError, match=r"no option 'exponnt'; did you mean 'exponent'\?"):
        BudgetPlan.check(RankKVConfig(strategy="power", strategy_options={"exponnt": 2}))
    with pytest.raises(ConfigError, match="temperature"):
        BudgetPlan.check(RankKVConfig(strategy="softmax", strategy_options={"temperature": 0}))
