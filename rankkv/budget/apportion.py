"""Apportionment: weights to real-valued shares by water-filling, shares to integers by largest remainder."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import BudgetError, ConfigError

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

# A share this close to an integer counts as that integer: lambda * w carries a few units of rounding noise.
_SNAP = 1e-9
# Much smaller weights are filled in a later round: bound / weight would overflow beside the largest weight.
_LEVEL = 1e-200
# Tokens that rounding may leave unallocated.
_LEFT = 1e-6


def _sum(values: FloatArray) -> float:
    """Sum with a single rounding, so that the order of the layers does not matter."""
    return math.fsum(values.tolist())


def _bounds(lower: ArrayLike, upper: ArrayLike, count: int) -> tuple[FloatArray, FloatArray]:
    """Broadcast both bounds to one value per layer and check them."""
    arrays = []
    for name, bound in (("lower", lower), ("upper", upper)):
        array = np.asarray(bound, dtype=np.float64)
        if array.ndim > 1 or (array.ndim == 1 and len(array) != count):
            raise BudgetError(
                f"{name} must be one number or {count} numbers, one per layer; got shape {array.shape}."
            )
        arrays.append(np.broadcast_to(array, (count,)).copy())
    low, high = arrays
    wrong = np.flatnonzero(~(low >= 0) | ~(low <= high) | np.isinf(low))
    if len(wrong):
        i = int(wrong[0])
        raise BudgetError(
            f"layer {i}: bounds must satisfy 0 <= lower <= upper, got lower={low[i]:g}, upper={high[i]:g}; "
            "lower the minimum or raise the maximum."
        )
    return low, high


def _fill(weights: FloatArray, total: float, lower: FloatArray, upper: FloatArray) -> FloatArray:
    """Solve ``sum(clip(lambda * weights, lower, upper)) == total`` for positive weights."""

    def at(level: float) -> FloatArray:
        return np.clip(level * weights, lower, upper)

    # The sum grows with lambda and is linear between breakpoints, so bisect for the interval that holds the total.
    breaks = np.unique(np.concatenate([lower / weights, upper / weights]))
    low, high = 0, len(breaks) - 1
    while low < high:
        middle = (low + high) // 2
        if _sum(at(breaks[middle])) >= total:
            high = middle
        else:
            low = middle + 1
    right = breaks[low]
    left = breaks[low - 1] if low else 0.0
    # Between two neighbouring breakpoints the same layers lie strictly inside their bounds; solve for lambda there.
    inside = (lower / weights <= left) & (upper / weights >= right) & (lower < upper)
    if not inside.any():
        return at(right)
    fixed = np.where(lower / weights >= right, lower, upper)
    level = (total - _sum(fixed[~inside])) / _sum(weights[inside])
    return at(min(max(level, left), right))


def allocate_shares(
    weights: ArrayLike, total: float, lower: ArrayLike, upper: ArrayLike, partial: bool = False
) -> FloatArray:
    """Allocate a total by water-filling: ``share_i = clip(lambda w_i, lower_i, upper_i)``, sum ``total``.

    Solved exactly over the sorted breakpoints ``lower_i / w_i`` and ``upper_i / w_i``, in O(n log n). Layers
    of weight zero stay at their lower bound until every other layer is at its upper bound. They share the rest
    equally within their bounds (the limit of equal tiny weights). All-zero weights are thus uniform.

    The cascade relies on two laws. With the total, the bounds and the other weights fixed, appending a layer
    never raises an earlier layer's share. Multiplying all weights by one positive number changes nothing.

    Parameters
    ----------
    weights : array_like
        ``[layer]``, finite and >= 0; only their ratios count.
    total : float
        Tokens to spend over all layers.
    lower, upper : float or array_like
        Bounds in tokens, one for all layers or one per layer; ``upper`` may be infinite.
    partial : bool, default False
        Return ``upper`` instead of raising if the upper bounds sum to less than the total. Used while more
        layers are still to come.

    Returns
    -------
    ndarray
        ``[layer]`` float64, tokens.

    Raises
    ------
    BudgetError
        If weights or bounds are negative, not finite or crossed, or the total lies outside
        [sum(lower), sum(upper)]. The message names the sums.

    Examples
    --------
    >>> allocate_shares([1, 3, 8], 80, lower=12, upper=40).tolist()
    [12.0, 28.0, 40.0]
    >>> allocate_shares([0, 0], 10, lower=1, upper=40).tolist()
    [5.0, 5.0]
    """
    values = np.asarray(weights, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0:
        raise BudgetError(
            f"weights must be one number per layer, for at least one layer; got shape {values.shape}."
        )
    wrong = np.flatnonzero(~np.isfinite(values) | (values < 0))
    if len(wrong):
        i = int(wrong[0])
        raise BudgetError(f"layer {i}: weight must be finite and >= 0, got {values[i]:g}.")
    low, high = _bounds(lower, upper, len(values))
    spend = float(total)
    if not math.isfinite(spend) or spend < 0:
        raise BudgetError(f"the total must be finite and >= 0, got {total!r}.")
    minimum, maximum = _sum(low), _sum(high)
    if minimum > spend:
        raise BudgetError(
            f"a total of {spend:g} tokens cannot give {len(values)} layers their minimum, which sums to "
            f"{minimum:g}; raise the total to at least {minimum:g} or lower the minimum."
        )
    if maximum <= spend:
        if maximum < spend and not partial:
            raise BudgetError(
                f"a total of {spend:g} tokens exceeds what {len(values)} layers can hold, {maximum:g}; "
                f"lower the total to at most {maximum:g} or raise the maximum."
            )
        return high
    high = np.minimum(high, spend)
    shares, unfilled = low.copy(), np.ones(len(values), dtype=bool)
    # Each round fills the weights of one order of magnitude; weights of zero come last and share equally.
    while True:
        remaining = spend - _sum(shares[~unfilled]) if not unfilled.all() else spend
        largest = values[unfilled].max()
        chosen = unfilled & (values > largest * _LEVEL) if largest > 0 else unfilled
        scaled = values[chosen] / largest if largest > 0 else np.ones(int(chosen.sum()))
        rest = unfilled & ~chosen
        reachable = min(remaining - _sum(low[rest]), _sum(high[chosen]))
        shares[chosen] = _fill(scaled, reachable, low[chosen], high[chosen])
        unfilled = rest
        if not rest.any():
            return shares


def _snap(shares: FloatArray, tolerance: float) -> FloatArray:
    """Replace shares within a tolerance (relative, beyond 1) of an integer by that integer."""
    nearest = np.rint(shares)
    close = np.abs(shares - nearest) <= tolerance * np.maximum(1.0, np.abs(shares))
    return np.where(close, nearest, shares)


def ceil_shares(shares: ArrayLike) -> IntArray:
    """Round shares up to whole tokens.

    A share within 5e-10 of an integer counts as that integer. During a cascade a layer keeps
    ``ceil_shares(share)`` tokens. That is never fewer than `allocate_integers` gives it after the last layer.

    Parameters
    ----------
    shares : array_like
        ``[layer]`` from `allocate_shares`, tokens.

    Returns
    -------
    ndarray
        ``[layer]`` int64, tokens.

    Examples
    --------
    >>> ceil_shares([3.2, 4.0000000000001]).tolist()
    [4, 4]
    """
    return np.ceil(_snap(np.asarray(shares, dtype=np.float64), _SNAP / 2)).astype(np.int64)


def allocate_integers(
    shares: ArrayLike, total: int, lower: ArrayLike, upper: ArrayLike, weights: ArrayLike | None = None
) -> IntArray:
    """Allocate whole tokens by largest remainder: each result is the floor or the ceiling of its share.

    Ties in the remainder go to the higher weight, then to the lower index. A share within 1e-9 of an integer
    (relative, beyond 1) counts as that integer. Under equal bounds a larger weight never gets fewer tokens.

    Parameters
    ----------
    shares : array_like
        ``[layer]`` from `allocate_shares`, summing to ``total``.
    total : int
        Tokens to spend over all layers.
    lower, upper : int or array_like
        The integer bounds that the shares were computed with (``upper`` may be infinite).
    weights : array_like, optional
        ``[layer]``, break ties; the shares themselves by default.

    Returns
    -------
    ndarray
        ``[layer]`` int64, summing to ``total`` exactly.

    Raises
    ------
    BudgetError
        If the shares do not sum to the total or leave the bounds, or a bound or the total is not an integer.

    Examples
    --------
    >>> allocate_integers([2.5, 2.5, 5.0], 10, lower=0, upper=10).tolist()
    [3, 2, 5]
    """
    try:
        whole_total = operator.index(total)
    except TypeError:
        raise BudgetError(f"the total must be an integer number of tokens, got {total!r}.") from None
    values = np.asarray(shares, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0 or not np.isfinite(values).all():
        raise BudgetError(
            f"shares must be one finite number per layer, for at least one layer; got {shares!r}."
        )
    low, high = _bounds(lower, upper, len(values))
    if (low != np.floor(low)).any() or (high != np.floor(high)).any():
        raise BudgetError(f"bounds must be integers, got lower={lower!r}, upper={upper!r}.")
    snapped = _snap(values, _SNAP)
    wrong = np.flatnonzero((snapped < low) | (snapped > high))
    if len(wrong):
        i = int(wrong[0])
        raise BudgetError(
            f"layer {i}: share {values[i]:g} lies outside its bounds [{low[i]:g}, {high[i]:g}]."
        )
    floors = np.floor(snapped)
    remainders = snapped - floors
    missing = whole_total - int(_sum(floors))
    if not 0 <= missing <= np.count_nonzero(remainders) or abs(_sum(remainders) - missing) > 1e-6 * max(
        1, whole_total
    ):
        raise BudgetError(
            f"shares sum to {_sum(values):.9g}, not to the total {whole_total}; recompute the shares."
        )
    order_by = values if weights is None else np.asarray(weights, dtype=np.float64)
    if order_by.shape != values.shape:
        raise BudgetError(
            f"weights have shape {order_by.shape}, shares {values.shape}; give one weight a layer."
        )
    # The last key counts first. Remainders are rounded so that ties survive floating-point noise.
    order = np.lexsort((np.arange(len(values)), -order_by, -np.round(remainders, 9)))
    result: IntArray = floors.astype(np.int64)
    result[order[:missing]] += 1
    return result


def spread_shares(shares: FloatArray, left: float, upper: FloatArray) -> FloatArray:
    """Spread what is left evenly over the shares that lie below their upper bounds.

    Examples
    --------
    >>> spread_shares(np.array([1.0, 4.0]), 3.0, np.array([2.0, 9.0])).tolist()
    [2.0, 6.0]
    """
    while left > _LEFT and (shares < upper).any():
        waiting = shares < upper
        more = np.minimum(np.where(waiting, left / waiting.sum(), 0.0), upper - shares)
        shares, left = shares + more, left - float(more.sum())
    return shares


def spread_tokens(counts: IntArray, left: int, upper: Sequence[int]) -> IntArray:
    """Spread whole tokens evenly over the counts that lie below their upper bounds; earlier ones come first.

    Examples
    --------
    >>> spread_tokens(np.array([1, 4]), 3, [2, 9]).tolist()
    [2, 6]
    """
    counts = counts.copy()
    while left > 0:
        waiting = [index for index, bound in enumerate(upper) if counts[index] < bound]
        step = max(1, left // len(waiting))
        for index in waiting[:left]:
            taken = min(step, left, upper[index] - int(counts[index]))
            counts[index] += taken
            left -= taken
    return counts


def check_integer(name: str, value: object, minimum: int) -> int:
    """Check that an option is an integer of at least ``minimum`` and return it as an int.

    Raises
    ------
    ConfigError
        If it is not; the message names the option and its value.
    """
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ConfigError(f"{name} must be an integer, got {value!r} ({type(value).__name__}).") from None
    if isinstance(value, bool) or number < minimum:
        raise ConfigError(f"{name} must be an integer >= {minimum}, got {value!r}.")
    return number
