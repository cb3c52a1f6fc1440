"""Budgets of heads from their errors: least in sum, whole, and never more of a smaller budget."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankkv.budget.distortion import fit_error_curve
from rankkv.budget.heads import HeadCurves, allocate_by_head_curves, fit_head_curves
from rankkv.limits import make_budget_grid

LENGTH, FLOOR = 24, 6
GRID = make_budget_grid(LENGTH)


def curves_strategy(most=4):
    errors = st.lists(st.floats(0.0, 1.0), min_size=len(GRID), max_size=len(GRID))
    rows = st.integers(1, most).flatmap(lambda count: st.lists(errors, min_size=count, max_size=count))
    return rows.map(lambda table: fit_head_curves(table, LENGTH, FLOOR))


def tabulate(curves: HeadCurves) -> list[list[float]]:
    """Return each head's error at every budget from the floor to the length, above that with all tokens."""
    tables = []
    for head in range(curves.heads):
        steps = [
            slope
            for slope, width, owner in zip(curves.slopes, curves.widths, curves.owners, strict=True)
            for _ in range(width)
            if owner == head
        ]
        steps = [*steps, *[0.0] * (LENGTH - FLOOR - len(steps))]
        tables.append([-sum(steps[spent:]) for spent in range(LENGTH - FLOOR + 1)])
    return tables


def test_between_measured_budgets_errors_are_linear_in_the_logarithm():
    """A floor between two budgets, and a prompt's length above the last: both ends of the curve, by hand."""
    assert make_budget_grid(40)[:4] == [8, 11, 16, 23]
    errors = [0.9, 0.7, 0.4, 0.3, 0.1]
    budgets, fitted = fit_error_curve(errors, length=40, floor=13)
    part = np.log(13 / 11) / np.log(16 / 11)
    assert budgets.tolist() == [13, 16, 23, 32, 40]
    assert fitted == pytest.approx([0.7 - 0.3 * part, 0.4, 0.3, 0.1, 0.0])
    curves = fit_head_curves([errors], length=40, floor=13)
    assert curves.widths.tolist() == [3, 16, 8]
    assert curves.slopes == pytest.approx([(0.4 - fitted[0]) / 3, -0.3 / 16, -0.1 / 8])


@given(curves=curves_strategy(3), budget=st.integers(FLOOR, LENGTH))
def test_a_split_has_the_least_error_of_all(curves, budget):
    tables = tabulate(curves)

    def compute_error(split):
        return sum(table[count - FLOOR] for table, count in zip(tables, split, strict=True))

    split = curves.split(budget, [LENGTH] * curves.heads)
    assert split.sum() == budget * curves.heads
    every = itertools.product(range(FLOOR, LENGTH + 1), repeat=curves.heads)
    least = min(compute_error(other) for other in every if sum(other) == budget * curves.heads)
    assert compute_error(split.tolist()) == pytest.approx(least, abs=1e-9)


@given(
    curves=curves_strategy(),
    budgets=st.lists(st.integers(0, 2 * LENGTH), min_size=2, max_size=2),
    room=st.integers(0, 2 * LENGTH),
)
def test_no_head_gets_more_of_a_smaller_budget(curves, budgets, room):
    rooms = [max(0, room - 3 * head) for head in range(curves.heads)]
    smaller, larger = (curves.split(budget, rooms) for budget in sorted(budgets))
    assert (smaller <= larger).all()
    assert (larger <= rooms).all()
    assert smaller.sum() == min(curves.heads * min(budgets), sum(rooms))
    assert (smaller >= np.minimum(min(FLOOR, *budgets), rooms)).all()


@given(layers=st.lists(curves_strategy(), min_size=1, max_size=4), share=st.floats(0.0, 1.0))
def test_layers_get_what_their_heads_get_in_one_division(layers, share):
    count = len(layers)
    total = round(count * (FLOOR + share * (LENGTH - FLOOR)))
    bounds = np.full(count, FLOOR), np.full(count, LENGTH)
    budgets = allocate_by_head_curves(layers, total, *bounds)
    assert budgets.sum() == pytest.approx(total)
    assert (budgets >= FLOOR).all()
    assert (budgets <= LENGTH).all()
    # Greedy over all pieces of all heads, token by token of a layer: no step left is worth more than one taken.
    taken, left = [], []
    for curves, budget in zip(layers, budgets, strict=True):
        spent = (budget - FLOOR) * curves.heads
        ends = np.cumsum(curves.widths)
        worth = -curves.slopes * curves.heads
        taken += worth[ends <= spent + 1e-6].tolist()
        left += worth[ends - curves.widths >= spent - 1e-6].tolist()
    assert min(taken, default=np.inf) >= max(left, default=0.0) - 1e-12


@given(layers=st.lists(curves_strategy(), min_size=2, max_size=5), total=st.integers(30, 130))
def test_a_layer_that_is_added_raises_no_other(layers, total):
    known = np.full(len(layers), np.inf)
    for count in range(1, len(layers) + 1):
        bounds = np.full(count, FLOOR), np.full(count, LENGTH)
        budgets = allocate_by_head_curves(layers[:count], total, *bounds)
        assert (budgets <= known[:count] + 1e-9).all()
        known[:count] = budgets


def test_a_layer_has_its_own_bounds():
    layers = [fit_head_curves([[1.0, 0.5, 0.2, 0.1]] * 2, LENGTH, FLOOR) for _ in range(3)]
    budgets = allocate_by_head_curves(layers, 40, [10, 6, 6], [24, 9, 24])
    assert budgets[0] >= 10
    assert budgets[1] <= 9
    assert budgets.sum() == pytest.approx(40)


def test_where_nothing_can_be_lost_budgets_are_even():
    layers = [fit_head_curves(np.zeros((2, len(GRID))), LENGTH, FLOOR) for _ in range(3)]
    assert allocate_by_head_curves(layers, 45, [FLOOR] * 3, [LENGTH] * 3).tolist() == [15.0] * 3
    assert layers[0].split(15, [LENGTH, LENGTH]).tolist() == [15, 15]


def test_a_head_with_all_the_error_gets_all_that_is_left():
    errors = np.zeros((3, len(GRID)))
    errors[1] = np.linspace(1.0, 0.2, len(GRID))
    assert fit_head_curves(errors, LENGTH, FLOOR).split(12, [LENGTH] * 3).tolist() == [6, 24, 6]
    # What it counts for is a factor of its error.
    even = fit_head_curves(np.ones((2, len(GRID))), LENGTH, FLOOR, [0.0, 2.0])
    assert set(even.owners.tolist()) == {1}


def test_a_prompt_too_short_to_evict_from():
    for length in (0, 1, 4):
        curves = fit_head_curves(np.zeros((2, 1)), length, 16)
        assert curves.split(length, [length, length]).tolist() == [length, length]


@given(curves=curves_strategy(), budget=st.integers(0, LENGTH))
def test_written_down_and_read_again(curves, budget):
    copied = HeadCurves.from_dict(json.loads(json.dumps(curves.to_dict())))
    room = [LENGTH] * curves.heads
    assert copied.split(budget, room).tolist() == curves.split(budget, room).tolist()
