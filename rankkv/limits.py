"""Limits of a budget: the total, the prompt's length, the floor, and the grid of budgets that are tried."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass

from .errors import ConfigError

#: The smallest budget tried, and how much larger each next one is.
FIRST_BUDGET, BUDGET_STEP = 8.0, 2.0**0.5


@dataclass(frozen=True)
class Limits:
    """What a formula that speaks of tokens must know.

    Parameters
    ----------
    total_budget : int
        Tokens over all layers.
    length : int, optional
        Tokens of the prompt, where known.
    window_size : int, default 32
        The newest tokens, which the papers keep in every layer on top of what they share out.
    floor : int, default 1
        Fewest tokens a layer keeps.
    """

    total_budget: int
    length: int | None = None
    window_size: int = 32
    floor: int = 1


def check_number(name: str, value: object, low: float, high: float, open_low: bool = False) -> float:
    """Return a strategy option as a float inside its range, or raise a ConfigError that names it."""
    number = float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan
    if not low <= number <= high or (open_low and number == low):
        bracket = "(" if open_low else "["
        raise ConfigError(f"{name} must be a number in {bracket}{low:g}, {high:g}], got {value!r}.")
    return number


def make_budget_grid(length: int) -> list[int]:
    """Make the budgets, in tokens, at which a prompt of ``length`` tokens is tried.

    Examples
    --------
    >>> make_budget_grid(40)
    [8, 11, 16, 23, 32]
    """
    grid, exact = [], FIRST_BUDGET
    while round(exact) < length:
        grid.append(round(exact))
        exact *= BUDGET_STEP
    return grid
