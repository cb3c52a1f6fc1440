"""Budgets: reference values worked out by hand, both ways to give the total, and what bad input is told."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from rankkv.budget.strategies import NEEDS
from rankkv.budget_allocation import (
    STRATEGIES,
    BudgetAllocator,
    allocate_integers,
    allocate_shares,
    ceil_shares,
    check_options,
    compute_weights,
    get_strategy,
)
from rankkv.errors import (
    BudgetError,
    ConfigError,
    DegenerateAttentionError,
    InputError,
    UnknownNameError,
)

RANKS = [2.0, 4.0, 6.0, 8.0]


def ratios(weights):
    return (np.asarray(weights) / np.sum(weights)).tolist()


def test_proportional_budgets_follow_the_ranks():
    assert BudgetAllocator("proportional").allocate(RANKS, 100).budgets == [10, 20, 30, 40]


def test_what_a_capped_layer_cannot_take_goes_to_the_others_in_proportion():
    # Of 10:20:30:40 the last is over the cap; its ten tokens would lift 30 to 35, so that one is capped too,
    # and the remaining 40 tokens split 1:2.
    allocation = BudgetAllocator("proportional", max_budget=30).allocate(RANKS, 100)
    assert allocation.budgets == [13, 27, 30, 30]


def test_a_raised_minimum_is_paid_by_the_others():
    assert BudgetAllocator("proportional", min_budget=19).allocate(RANKS, 100).budgets == [19, 19, 27, 35]


def test_the_weights_of_each_strategy():
    assert ratios(compute_weights(RANKS, "power", exponent=2)) == pytest.approx(
        [4 / 120, 16 / 120, 36 / 120, 64 / 120]
    )
    assert ratios(compute_weights(RANKS, "power", exponent=0)) == pytest.approx([0.25] * 4)
    exponentials = np.exp(np.array(RANKS) / 5 / 0.5)
    assert ratios(compute_weights(RANKS, "softmax", temperature=0.5)) == pytest.approx(ratios(exponentials))
    # Percentiles 25 and 75 of RANKS are 3.5 and 6.5, so only the outer two layers change.
    assert ratios(compute_weights(RANKS, "adaptive")) == pytest.approx(ratios([1, 4, 6, 12]))
    assert ratios(compute_weights(RANKS, "uniform")) == pytest.approx([0.25] * 4)
    assert compute_weights(RANKS, "pyramid").tolist() == pytest.approx(
        [1.8, 1.8 - 1.6 / 3, 1.8 - 3.2 / 3, 0.2]
    )
    assert compute_weights(RANKS, "pyramid", steepness=0).tolist() == pytest.approx([1] * 4)
    assert ratios(compute_weights([0.0, *RANKS], "inverse")) == pytest.approx(
        ratios([1 / 2, 1 / 2, 1 / 4, 1 / 6, 1 / 8])
    )


def test_random_weights_come_from_their_seed():
    first, again = (compute_weights(RANKS, "random", seed=3).tolist() for _ in range(2))
    assert first == again
    assert first != compute_weights(RANKS, "random", seed=4).tolist()


def test_adaptive_weighs_equal_ranks_equally():
    assert ratios(compute_weights([3.0] * 5, "adaptive")) == pytest.approx([0.2] * 5)
    # Both percentiles are 5 here: layers at both of them keep factor 1.
    assert ratios(compute_weights([1, 5, 5, 5, 9], "adaptive")) == pytest.approx(ratios([0.5, 5, 5, 5, 13.5]))


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_all_zero_ranks_give_uniform_budgets(name):
    assert BudgetAllocator(name).allocate([0.0] * 4, 100).budgets == [25] * 4


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_one_layer_gets_the_total(name):
    assert BudgetAllocator(name).allocate([5.0], 77).budgets == [77]


def test_extreme_ranks_do_not_overflow():
    for name in STRATEGIES:
        budgets = BudgetAllocator(name, min_budget=1).allocate([1e-300, 1.0, 1e300], 99).budgets
        assert sum(budgets) == 99
    assert BudgetAllocator("power", exponent=64).allocate([1.0, 4096.0], 100).budgets == [4, 96]


def test_equal_shares_round_by_position():
    assert BudgetAllocator("uniform").allocate([1.0, 9.0, 5.0], 20).budgets == [7, 7, 6]


def test_equal_remainders_round_by_weight():
    assert allocate_integers([2.5, 3.5], 6, 0, 10, weights=[5.0, 7.0]).tolist() == [2, 4]
    assert allocate_integers([2.5, 3.5], 6, 0, 10, weights=[7.0, 5.0]).tolist() == [3, 3]


def test_a_share_next_to_an_integer_counts_as_that_integer():
    assert allocate_integers([2.9999999999999, 4.0000000000001], 7, 0, 10).tolist() == [3, 4]
    assert allocate_integers([9.0000000000001, 0.9999999999999], 10, 1, 9).tolist() == [9, 1]
    assert ceil_shares([2.9999999999999, 4.0000000000001, 4.001]).tolist() == [3, 4, 5]


def test_zero_weights_stay_at_their_minimum_until_the_rest_is_full():
    assert allocate_shares([0, 1, 0], 30, lower=5, upper=40).tolist() == pytest.approx([5, 20, 5])
    assert allocate_shares([0, 1, 0], 60, lower=[5, 5, 15], upper=[50, 20, 50]).tolist() == pytest.approx(
        [20, 20, 20]
    )


def test_weights_hundreds_of_orders_apart_are_filled_one_after_the_other():
    shares = allocate_shares([1e300, 1.0, 1e-300, 0.0], 70, lower=0, upper=[20, 20, 20, 20])
    assert shares.tolist() == pytest.approx([20, 20, 20, 10])


def test_weights_a_million_apart_still_share_in_proportion():
    assert allocate_shares([1, 1e-6], 1_000_001, 0, np.inf).tolist() == pytest.approx([1_000_000, 1])


def test_an_open_end_takes_the_whole_total():
    assert allocate_shares([1, 3], 40, 0, np.inf).tolist() == pytest.approx([10, 30])
    assert allocate_shares([1], 40, 0, np.inf, partial=True).tolist() == [40]


def test_partial_shares_stop_at_the_upper_bounds():
    assert allocate_shares([1, 2], 100, 0, [30, 40], partial=True).tolist() == [30, 40]
    with pytest.raises(BudgetError, match="can hold, 70"):
        allocate_shares([1, 2], 100, 0, [30, 40])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (([1, 1], 5, 3, 9), "sums to 6.*at least 6"),
        (([1, 1], 50, 3, 9), "can hold, 18.*at most 18"),
        (([1, 1], 5, [3, 9], [4, 8]), "layer 1: bounds.*lower=9, upper=8"),
        (([1, 1], 5, -1, 8), "layer 0: bounds.*lower=-1"),
        (([1, 1], 5, 0, float("nan")), "layer 0: bounds"),
        (([1, -2], 5, 0, 8), "layer 1: weight.*-2"),
        (([float("nan"), 1], 5, 0, 8), "layer 0: weight"),
        (([1, 1], float("nan"), 0, 8), "total must be finite"),
        (([1, 1], -5, 0, 8), "total must be finite and >= 0, got -5"),
        (([], 5, 0, 8), "at least one layer"),
        (([1, 1], 5, [0, 0, 0], 8), "lower must be one number or 2 numbers"),
    ],
)
def test_shares_that_cannot_be_are_refused_with_the_numbers(arguments, said):
    with pytest.raises(BudgetError, match=said):
        allocate_shares(*arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (([2.5, 2.5], 6, 0, 9), "sum to 5, not to the total 6"),
        (([2.5, 2.5], 5.5, 0, 9), "total must be an integer"),
        (([2.5, 2.5], 5, 0.5, 9), "bounds must be integers"),
        (([2.5, 12.5], 15, 0, 9), r"layer 1: share 12.5 lies outside its bounds \[0, 9\]"),
        (([float("nan"), 2.5], 5, 0, 9), "finite"),
        (([2.5, 2.5], 5, 0, 9, [1.0]), "one weight a layer"),
    ],
)
def test_shares_that_cannot_be_rounded_are_refused(arguments, said):
    with pytest.raises(BudgetError, match=said):
        allocate_integers(*arguments)


def test_both_ways_to_give_the_total_agree():
    allocator = BudgetAllocator("proportional")
    by_ratio = allocator.allocate(RANKS, seq_len=200, compression_ratio=0.3)
    assert by_ratio.total_budget == 240
    assert by_ratio.budgets == allocator.allocate(RANKS, 240, seq_len=200).budgets
    assert by_ratio.compression_ratio == pytest.approx(0.3)
    assert by_ratio.average_budget == 60
    assert allocator.allocate(RANKS, 240).compression_ratio is None


def test_a_full_ratio_keeps_every_token():
    for name in STRATEGIES:
        assert BudgetAllocator(name).allocate(RANKS, seq_len=123, compression_ratio=1.0).budgets == [123] * 4


def test_a_layer_never_keeps_more_than_the_prompt_holds():
    allocation = BudgetAllocator("power", exponent=8, min_budget=10).allocate(
        RANKS, seq_len=50, compression_ratio=0.5
    )
    assert max(allocation.budgets) == 50
    assert min(allocation.budgets) == 10


def test_a_prompt_shorter_than_the_minimum_is_kept_whole():
    assert BudgetAllocator(min_budget=16).allocate(RANKS, seq_len=5, compression_ratio=1.0).budgets == [5] * 4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "total is unknown"),
        ({"seq_len": 10}, "total is unknown"),
        ({"compression_ratio": 0.3}, "total is unknown"),
        ({"total_budget": 80, "compression_ratio": 0.3, "seq_len": 10}, "both set the total"),
        ({"compression_ratio": 0.0, "seq_len": 10}, r"\(0, 1\].*fraction of the KV cache kept"),
        ({"compression_ratio": 1.5, "seq_len": 10}, r"\(0, 1\], got 1.5"),
        ({"compression_ratio": float("nan"), "seq_len": 10}, "nan"),
        ({"compression_ratio": "0.3", "seq_len": 10}, "'0.3'"),
        ({"compression_ratio": 0.3, "seq_len": 0}, "seq_len must be an integer >= 1, got 0"),
        ({"total_budget": 80.5}, "total_budget must be an integer, got 80.5"),
        ({"total_budget": True}, "total_budget"),
        ({"total_budget": -3}, "total_budget must be an integer >= 0, got -3"),
    ],
)
def test_a_total_given_wrongly_is_named(options, said):
    with pytest.raises(ConfigError, match=said):
        BudgetAllocator().allocate(RANKS, **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"total_budget": 15}, "15 tokens over 4 layers is below the minimum of 16"),
        ({"total_budget": 100, "seq_len": 20}, "above the maximum of 80"),
        ({"seq_len": 10, "compression_ratio": 0.1}, "4 tokens over 4 layers is below the minimum of 16"),
    ],
)
def test_an_infeasible_total_says_which_one_is_feasible(options, said):
    with pytest.raises(BudgetError, match=said):
        BudgetAllocator().allocate(RANKS, **options)


@pytest.mark.parametrize(
    ("ranks", "error", "said"),
    [
        ([1.0, float("nan")], DegenerateAttentionError, "layer 1: rank nan"),
        ([1.0, 2.0, float("inf")], DegenerateAttentionError, "layer 2: rank inf"),
        ([-1.0], DegenerateAttentionError, "layer 0: rank -1.0"),
        ([], DegenerateAttentionError, "empty"),
        (None, InputError, "NoneType"),
        ("123", InputError, "str"),
        (5.0, InputError, "float"),
        ({"a": 1.0}, InputError, "dict"),
        ([1.0, "2"], InputError, "layer 1: .*str"),
        ([1.0, None], InputError, "layer 1: .*NoneType"),
        ([[1.0, 2.0]], InputError, "layer 0: .*list"),
        (torch.ones(2, 2), InputError, "layer 0"),
        (torch.tensor(3.0), InputError, "Tensor"),
    ],
)
def test_bad_ranks_name_the_layer(ranks, error, said):
    with pytest.raises(error, match=said):
        BudgetAllocator().allocate(ranks, 100)


@pytest.mark.parametrize(
    "ranks",
    [
        (2, 4, 6, 8),
        np.array(RANKS, dtype=np.float32),
        torch.tensor(RANKS, dtype=torch.bfloat16),
        torch.tensor(RANKS, requires_grad=True),
        [torch.tensor(rank) for rank in RANKS],
        (rank for rank in RANKS),
    ],
)
def test_ranks_come_in_any_container(ranks):
    assert BudgetAllocator().allocate(ranks, 100).budgets == [10, 20, 30, 40]


@pytest.mark.parametrize(
    ("name", "options", "error", "said"),
    [
        ("proportinal", {}, UnknownNameError, "did you mean 'proportional'"),
        (None, {}, UnknownNameError, "unknown strategy None"),
        ("power", {"exponnt": 2}, ConfigError, "no option 'exponnt'; did you mean 'exponent'"),
        ("uniform", {"exponent": 2}, ConfigError, "no option 'exponent'.*none"),
        ("power", {"exponent": -1}, ConfigError, r"exponent must be a number in \[0, 64\], got -1"),
        ("power", {"exponent": "2"}, ConfigError, "exponent.*'2'"),
        ("power", {"exponent": float("nan")}, ConfigError, "exponent.*nan"),
        ("softmax", {"temperature": 0}, ConfigError, "temperature"),
        (
            "adaptive",
            {"low_percentile": 80, "high_percentile": 20},
            ConfigError,
            r"high_percentile.*\[80, 100\]",
        ),
        ("adaptive", {"low_factor": 1.2}, ConfigError, r"low_factor.*\(0, 1\]"),
        ("adaptive", {"high_factor": 0.9}, ConfigError, "high_factor"),
        ("pyramid", {"steepness": 1.1}, ConfigError, "steepness"),
        ("random", {"seed": -1}, ConfigError, "seed"),
        ("random", {"seed": 1.5}, ConfigError, "seed"),
        ("uniform", {"min_budget": -1}, ConfigError, "min_budget must be an integer >= 0"),
        ("uniform", {"max_budget": 0}, ConfigError, "max_budget must be an integer >= 1"),
        ("uniform", {"min_budget": 9, "max_budget": 8}, ConfigError, "max_budget=8 is below min_budget=9"),
    ],
)
def test_a_bad_option_is_named_at_construction(name, options, error, said):
    with pytest.raises(error, match=said):
        BudgetAllocator(name, **options)


def test_options_are_recorded_with_their_defaults():
    assert check_options("adaptive", {"low_factor": 0.25}) == {
        "low_percentile": 25.0,
        "high_percentile": 75.0,
        "low_factor": 0.25,
        "high_factor": 1.5,
    }
    allocation = BudgetAllocator("power", exponent=4).allocate(RANKS, 100)
    assert allocation.strategy_options == {"exponent": 4}
    assert get_strategy("power").defaults == {"exponent": 1.0}


def test_the_record_is_json_and_adds_up():
    allocation = BudgetAllocator("softmax", max_budget=60).allocate(RANKS, seq_len=200, compression_ratio=0.2)
    record = json.loads(json.dumps(allocation.to_dict()))
    assert sum(record["budgets"]) == record["total_budget"] == 160
    assert record["layer_ranks"] == RANKS
    assert record["max_budget"] == 60
    assert record["compression_ratio"] == pytest.approx(0.2)


def test_the_summary_has_a_bar_per_layer_as_long_as_its_budget():
    lines = BudgetAllocator().allocate([1.0, 2.0], 30, seq_len=50).summary().splitlines()
    assert "proportional" in lines[0]
    assert "30 tokens" in lines[0]
    assert "30.0% of the cache kept" in lines[0]
    first, second = lines[-2:]
    assert first.split()[:3] == ["0", "1.000", "10"]
    assert second.split()[:3] == ["1", "2.000", "20"]
    assert second.count("#") == 2 * first.count("#")


def test_nothing_to_keep_still_has_a_summary():
    assert "0 tokens" in BudgetAllocator(min_budget=0).allocate([1.0, 2.0], 0).summary()


def test_compare_spends_the_same_total_under_every_strategy():
    allocations = BudgetAllocator.compare(RANKS, seq_len=100, compression_ratio=0.4)
    assert list(allocations) == [key for key, known in STRATEGIES.items() if known.measure in ("rank", None)]
    for name, allocation in allocations.items():
        assert allocation.strategy == name
        assert sum(allocation.budgets) == 160
        assert allocation.budgets == BudgetAllocator(name).allocate(RANKS, 160, seq_len=100).budgets
    assert list(BudgetAllocator.compare(RANKS, 80, strategies=["inverse", "uniform"])) == [
        "inverse",
        "uniform",
    ]
    assert list(BudgetAllocator.compare(RANKS, 80, strategies="power")) == ["power"]
    with pytest.raises(UnknownNameError, match="did you mean 'uniform'"):
        BudgetAllocator.compare(RANKS, 80, strategies=["unifrom"])


def test_a_strategy_says_what_it_reads_and_costs():
    for name, known in STRATEGIES.items():
        assert known.needs in NEEDS, name
        assert known.cost.startswith("O("), name
        assert known.source, name
        assert (known.measure is None and not known.by_scores) == (known.needs == "nothing"), name
        assert known.by_scores == (known.needs == "scores"), name
        assert (known.measure == "rank") == (known.needs == "ranks"), name
