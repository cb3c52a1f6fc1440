"""Budgets of least total distortion from what evicting costs each layer of this very prompt."""

from __future__ import annotations

import functools

import numpy as np

from .apportion import FloatArray, IntArray
from .calibrated import allocate_by_distortion, fit_decreasing
from .weights import Limits, check_number

#: The smallest budget tried, and how much larger each next one is.
_FIRST, _STEP = 8.0, 2.0**0.5


def make_budget_grid(length: int) -> list[int]:
    """Make the budgets, in tokens, at which a prompt of ``length`` tokens is tried.

    Examples
    --------
    >>> make_budget_grid(40)
    [8, 11, 16, 23, 32]
    """
    grid, exact = [], _FIRST
    while round(exact) < length:
        grid.append(round(exact))
        exact *= _STEP
    return grid


def weigh_distortion(
    errors: FloatArray,
    rank_exponent: float = 2.0,
    limits: Limits | None = None,
    ranks: FloatArray | None = None,
) -> FloatArray:
    """Weigh each layer by the budget it has where the layers' errors, weighted by their ranks, sum to least.

    ``min sum_i rank_i ** rank_exponent * e_i(b_i)  subject to  sum_i b_i = total``, each curve replaced by its lower
    convex hull and never below the floor.

    Parameters
    ----------
    errors : ndarray
        ``[layer, budget]`` at the budgets of :func:`make_budget_grid`, 0 from the prompt's length on; ``[layer]``
        numbers are taken as weights.
    rank_exponent : float, default 2
        Of the layer's effective rank; 0 leaves the rank out.
    limits : Limits, optional
        Total, length and floor.
    ranks : ndarray, optional
        ``[layer]`` effective ranks; None counts every layer the same.

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
    length = limits.length or round(_FIRST * _STEP ** errors.shape[1])
    floor = min(limits.floor, length)
    curves = [_fit_curve(tuple(row), length, floor) for row in errors.tolist()]
    total = max(limits.total_budget, floor * layers)
    low, high = np.full(layers, floor), np.full(layers, length)
    return allocate_by_distortion(curves, min(total, length * layers), low, high).astype(np.float64)


# A layer's curve is asked for again with each layer that arrives after it.
@functools.lru_cache(maxsize=1024)
def _fit_curve(errors: tuple[float, ...], length: int, floor: int) -> tuple[IntArray, FloatArray]:
    """Return the budgets from floor to length at which one layer was tried, and the errors fitted to them."""
    tried = make_budget_grid(length)
    # Where a layer holds fewer tokens than the row has seen, a budget beyond them costs nothing.
    known = np.zeros(len(tried) + 1)
    known[: min(len(errors), len(tried))] = errors[: len(tried)]
    inside = [budget for budget in tried if budget > floor]
    budgets = np.array([floor, *inside, length] if floor < length else [length])
    # Linear in the logarithm between the measured budgets, as damage is.
    return budgets, np.interp(np.log(budgets), np.log([*tried, length]), fit_decreasing(known))
