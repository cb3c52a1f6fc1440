"""Limits of a budget: total, prompt length and floor, and the grid of budgets to try."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass

from .errors import ConfigError

#: The smallest budget of the grid, and the factor from each budget to the next.
FIRST_BUDGET, BUDGET_STEP = 8.0, 2.0**0.5


@dataclass(frozen=True)
class Limits:
    """Hold the token counts that budget formulas need.

    Parameters
    ----------
    total_budget : int
        Tokens over all layers.
    length : int, optional
        Tokens of the prompt, if known.
    window_size : int, default 32
        Number of newest tokens. The papers keep them in every layer, in addition to the budget they distribute.
    floor : int, default 1
        Fewest tokens a layer keeps.
    """

    total_budget: int
    length: int | None = None
    window_size: int = 32
    floor: int = 1


def check_number(name: str, value: object, low: float, high: float, open_low: bool = False) -> float:
    """Return a strategy option as a float inside its range.

    Raises
    ------
    ConfigError
        If the value is not a number in the range; the message names the option.
    """
    number = float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan
    if not low <= number <= high or (open_low and number == low):
        bracket = "(" if open_low else "["
        raise ConfigError(f"{name} must be a number in {bracket}{low:g}, {high:g}], got {value!r}.")
    return number


def make_budget_grid(length: int) -> list[int]:
    """List the budgets, in tokens, to try on a prompt of ``length`` tokens.

    ``round(8 * sqrt(2) ** i)`` for ``i = 0, 1, ...``, as long as it is below ``length``.

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
