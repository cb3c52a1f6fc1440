"""Budgets of least total distortion: monotone fits, convex hulls, and allocation by steepest slope."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from ..errors import BudgetError
from ..limits import BUDGET_STEP, FIRST_BUDGET, Limits, check_number, make_budget_grid
from .apportion import FloatArray, IntArray


def fit_decreasing(values: ArrayLike) -> FloatArray:
    """Fit the nearest non-increasing sequence (least squares, pool adjacent violators).

    Parameters
    ----------
    values : array_like
        ``[point]``, measured at ascending ratios or budgets.

    Returns
    -------
    ndarray
        ``[point]`` float64, non-increasing, with the same sum.

    Examples
    --------
    >>> fit_decreasing([3.0, 1.0, 2.0, 0.5]).tolist()
    [3.0, 1.5, 1.5, 0.5]
    """
    given = np.asarray(values, dtype=np.float64)
    if (given[1:] <= given[:-1]).all():
        return given.copy()
    pools: list[tuple[float, int]] = []
    for value in given.tolist():
        total, count = value, 1
        while pools and pools[-1][0] / pools[-1][1] < total / count:
            earlier_total, earlier_count = pools.pop()
            total, count = total + earlier_total, count + earlier_count
        pools.append((total, count))
    return np.concatenate([np.full(count, total / count) for total, count in pools])


def compute_hull(budgets: ArrayLike, values: ArrayLike) -> IntArray:
    """Find the points on the lower convex hull of a curve.

    Parameters
    ----------
    budgets : array_like
        ``[point]``, ascending.
    values : array_like
        ``[point]``, the distortion at each.

    Returns
    -------
    ndarray
        ``[hull point]`` int64 indices, ascending; the first and the last point are included.

    Examples
    --------
    >>> compute_hull([0, 1, 2, 3], [9.0, 8.0, 1.0, 0.0]).tolist()
    [0, 2, 3]
    """
    # Lists, because reading single numbers of an array is slow.
    x, y = (np.asarray(line, dtype=np.float64).tolist() for line in (budgets, values))
    kept: list[int] = []
    for i in range(len(x)):
        while len(kept) > 1:
            a, b = kept[-2], kept[-1]
            if (y[b] - y[a]) * (x[i] - x[b]) < (y[i] - y[b]) * (x[b] - x[a]):
                break
            kept.pop()
        kept.append(i)
    return np.array(kept, dtype=np.int64)


def allocate_by_distortion(
    curves: Sequence[tuple[ArrayLike, ArrayLike]], total: int, lower: ArrayLike, upper: ArrayLike
) -> IntArray:
    """Allocate whole tokens so that the sum of the layers' distortions is least.

    ``min sum_i D_i(b_i)  subject to  sum_i b_i = total,  lower_i <= b_i <= upper_i``

    D_i is the lower convex hull of the layer's curve, linear between its points. Tokens go to the steepest slope
    first, which is optimal for convex curves. Equal slopes go to the earlier layer. Adding a layer never raises the
    budget of another.

    Parameters
    ----------
    curves : sequence of (array_like, array_like)
        For each layer, whole budgets, ascending from its lower to its upper bound, and the distortion at each.
    total : int
        Tokens over all layers. If it exceeds the sum of the upper bounds, the upper bounds are returned.
    lower, upper : array_like
        ``[layer]`` bounds, tokens.

    Returns
    -------
    ndarray
        ``[layer]`` int64, summing to the total.

    Raises
    ------
    BudgetError
        If the total is below the sum of the lower bounds.

    References
    ----------
    Shoham and Gersho, "Efficient bit allocation for an arbitrary set of quantizers", IEEE Transactions on Acoustics,
    Speech, and Signal Processing 36 (9), 1988.

    Examples
    --------
    >>> allocate_by_distortion([([1, 5], [4.0, 0.0]), ([1, 5], [8.0, 0.0])], 8, [1, 1], [5, 5]).tolist()
    [3, 5]
    """
    low, high = np.asarray(lower, dtype=np.int64), np.asarray(upper, dtype=np.int64)
    left = int(total) - int(low.sum())
    if left < 0:
        raise BudgetError(
            f"a total of {total} tokens is below the layers' minimum; raise it to at least {int(low.sum())}."
        )
    steps = []
    for layer, (budgets, values) in enumerate(curves):
        x, y = np.asarray(budgets, dtype=np.int64).tolist(), np.asarray(values, dtype=np.float64).tolist()
        for place, (one, other) in enumerate(itertools.pairwise(compute_hull(x, y).tolist())):
            width = x[other] - x[one]
            steps.append(((y[other] - y[one]) / width, layer, place, width))
    result = low.copy()
    for _, layer, _, width in sorted(steps):
        taken = min(left, width)
        result[layer] += taken
        left -= taken
        if left == 0:
            break
    return np.minimum(result, high)


def weigh_distortion(
    errors: FloatArray,
    rank_exponent: float = 2.0,
    limits: Limits | None = None,
    ranks: FloatArray | None = None,
) -> FloatArray:
    """Weigh each layer by its budget at the least rank-weighted sum of eviction errors.

    ``min sum_i rank_i ** rank_exponent * e_i(b_i)  subject to  sum_i b_i = total``

    Each curve is replaced by its lower convex hull. No budget lies below the floor.

    Parameters
    ----------
    errors : ndarray
        ``[layer, budget]`` at the budgets of :func:`rankkv.limits.make_budget_grid`, 0 from the prompt's length on.
        One number per layer, ``[layer]``, is used as a weight.
    rank_exponent : float, default 2
        Exponent of the layer's effective rank; 0 ignores the rank.
    limits : Limits, optional
        Total, length and floor.
    ranks : ndarray, optional
        ``[layer]`` effective ranks; None weighs every layer the same.

    Returns
    -------
    ndarray
        ``[layer]`` tokens.

    Raises
    ------
    ConfigError
        If ``rank_exponent`` is outside [0, 8].
    """
    check_number("rank_exponent", rank_exponent, 0.0, 8.0)
    if errors.ndim == 1 or limits is None:
        return errors.reshape(len(errors), -1).sum(axis=1)
    if ranks is not None:
        errors = errors * (ranks**rank_exponent)[:, None]
    if not errors.any():
        # Nothing can be evicted.
        return np.ones(len(errors))
    layers = len(errors)
    length = limits.length or round(FIRST_BUDGET * BUDGET_STEP ** errors.shape[1])
    floor = min(limits.floor, length)
    curves = [_fit_error_curve_once(tuple(row), length, floor) for row in errors.tolist()]
    total = max(limits.total_budget, floor * layers)
    low, high = np.full(layers, floor), np.full(layers, length)
    return allocate_by_distortion(curves, min(total, length * layers), low, high).astype(np.float64)


def fit_error_curve(errors: Sequence[float], length: int, floor: int) -> tuple[IntArray, FloatArray]:
    """Fit a non-increasing error curve at the budgets from floor to length.

    Parameters
    ----------
    errors : sequence of float
        ``[budget]`` at the budgets of :func:`rankkv.limits.make_budget_grid`; missing ones count as 0.
    length : int
        Tokens of the prompt, at least 1; the error there is 0.
    floor : int
        Fewest tokens kept, at most ``length``.

    Returns
    -------
    budgets, errors : ndarray
        ``[point]`` int64 tokens, ascending, and float64 errors, linear in the logarithm between measured budgets.

    Examples
    --------
    >>> budgets, errors = fit_error_curve([0.9, 0.1], length=16, floor=8)
    >>> budgets.tolist(), errors.round(6).tolist()
    ([8, 11, 16], [0.9, 0.1, 0.0])
    """
    grid = make_budget_grid(length)
    # A layer that holds fewer tokens than the prompt has fewer errors: larger budgets evict nothing there.
    known = np.zeros(len(grid) + 1)
    known[: min(len(errors), len(grid))] = errors[: len(grid)]
    inside = [budget for budget in grid if budget > floor]
    budgets = np.array([floor, *inside, length] if floor < length else [length])
    # Errors fall about linearly with the logarithm of the budget.
    return budgets, np.interp(np.log(budgets), np.log([*grid, length]), fit_decreasing(known))


# The curves of earlier layers are needed again with each new layer.
_fit_error_curve_once = functools.lru_cache(maxsize=1024)(fit_error_curve)
