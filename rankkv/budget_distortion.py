"""Budgets of least total distortion from what evicting costs each layer of this very prompt."""

from __future__ import annotations

import numpy as np

from .budget_profile import allocate_by_distortion, fit_decreasing
from .budget_shares import FloatArray
from .budget_weights import Limits, check_number

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
    errors: FloatArray, rank_exponent: float = 2.0, limits: Limits | None = None
) -> FloatArray:
    """Weigh each layer by the budget it has where the sum of all layers' errors is least.

    Parameters
    ----------
    errors : ndarray
        ``[layer, budget]`` at the budgets of :func:`make_budget_grid`, 0 from the prompt's length on; ``[layer]``
        numbers are taken as weights.
    rank_exponent : float, default 2
        Of the layer's rank, by which the errors were multiplied when they were measured.
    limits : Limits, optional
        Total, length and floor.

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
    layers, count = errors.shape
    length = limits.length or round(_FIRST * _STEP**count)
    floor = min(limits.floor, length)
    grid = [budget for budget in make_budget_grid(length)[:count] if budget > floor]
    budgets = np.array([floor, *grid, length] if floor < length else [length])
    # Linear in the logarithm between the measured budgets, as damage is.
    measured = np.log([*make_budget_grid(length)[:count], length])
    curves = []
    for row in errors:
        values = fit_decreasing([*row[: len(measured) - 1], 0.0])
        curves.append((budgets, np.interp(np.log(budgets), measured, values)))
    total = max(limits.total_budget, floor * layers)
    low, high = np.full(layers, floor), np.full(layers, length)
    return allocate_by_distortion(curves, min(total, length * layers), low, high).astype(np.float64)
