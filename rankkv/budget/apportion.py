"""Weights to real-valued shares (water-filling) to integers (largest remainder), in two separate halves."""

from __future__ import annotations

import math
import operator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rankkv.errors import BudgetError, ConfigError

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

# A share this close to an integer is that integer: lambda * w carries a few units of float noise.
_SNAP = 1e-9
# Weights further apart than this are filled one level after the other, so that bound / weight stays finite.
_LEVEL = 1e-200


def _sum(values: FloatArray) -> float:
    """Add exactly rounded, so that the order of the layers does not matter."""
    return math.fsum(values.tolist())


def _bounds(lower: ArrayLike, upper: ArrayLike, count: int) -> tuple[FloatArray, FloatArray]:
    """Broadcast both bounds to one value a layer and check them."""
    arrays = []
    for name, bound in (("lower", lower), ("upper", upper)):
        array = np.asarray(bound, dtype=np.float64)
        if array.ndim > 1 or (array.ndim == 1 and len(array) != count):
            raise BudgetError(
                f"{name} must be one number or {count} numbers, one a layer; got shape {array.shape}."
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
    # Between two neighbouring breakpoints the set of layers strictly inside their bounds is constant.
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
    of weight zero stay at their lower bound until every other layer is at its upper bound; then they share
    the rest equally within their bounds (the limit of equal tiny weights). All-zero weights are thus uniform.

    Law used by the cascade: with the total, the bounds and the other weights fixed, appending a layer never
    raises an earlier layer's share; multiplying all weights by one positive number changes nothing.

    Parameters
    ----------
    weights : array_like
        ``[layer]``, finite and >= 0; only their ratios count.
    total : float
        Tokens to spend over all layers.
    lower, upper : float or array_like
        Bounds in tokens, one for all layers or one a layer; ``upper`` may be infinite.
    partial : bool, default False
        If all layers at their upper bound cannot take the total, return ``upper`` instead of raising (more
        layers are still to come).

    Returns
    -------
    ndarray
        ``[layer]`` float64, tokens.

    Raises
    ------
    BudgetError
        Weights or bounds are negative, not finite or crossed, or the total lies outside
        [sum(lower), sum(upper)]; the message carries the sums.

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
            f"weights must be one number a layer, at least one layer; got shape {values.shape}."
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
    shares, open_ = low.copy(), np.ones(len(values), dtype=bool)
    while True:
        remaining = spend - _sum(shares[~open_]) if not open_.all() else spend
        largest = values[open_].max()
        chosen = open_ & (values > largest * _LEVEL) if largest > 0 else open_
        scaled = values[chosen] / largest if largest > 0 else np.ones(int(chosen.sum()))
        rest = open_ & ~chosen
        reachable = min(remaining - _sum(low[rest]), _sum(high[chosen]))
        shares[chosen] = _fill(scaled, reachable, low[chosen], high[chosen])
        open_ = rest
        if not rest.any():
            return shares


def _snapped(shares: FloatArray, tolerance: float) -> FloatArray:
    nearest = np.rint(shares)
    close = np.abs(shares - nearest) <= tolerance * np.maximum(1.0, np.abs(shares))
    return np.where(close, nearest, shares)


def ceil_shares(shares: ArrayLike) -> IntArray:
    """Round shares up to whole tokens, taking a share within 5e-10 of an integer as that integer.

    While a cascade is under way a layer keeps ``ceil_shares(share)`` tokens: never fewer than the integer
    that `allocate_integers` gives it after the last layer.

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
    return np.ceil(_snapped(np.asarray(shares, dtype=np.float64), _SNAP / 2)).astype(np.int64)


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
        The integer bounds that the shares were computed under (``upper`` may be infinite).
    weights : array_like, optional
        ``[layer]``, breaks ties; the shares themselves by default.

    Returns
    -------
    ndarray
        ``[layer]`` int64, summing to ``total`` exactly.

    Raises
    ------
    BudgetError
        The shares do not sum to the total or leave the bounds, or a bound or the total is not an integer.

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
        raise BudgetError(f"shares must be one finite number a layer, at least one layer; got {shares!r}.")
    low, high = _bounds(lower, upper, len(values))
    if (low != np.floor(low)).any() or (high != np.floor(high)).any():
        raise BudgetError(f"bounds must be integers, got lower={lower!r}, upper={upper!r}.")
    snapped = _snapped(values, _SNAP)
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
    order = np.lexsort((np.arange(len(values)), -order_by, -np.round(remainders, 9)))
    result: IntArray = floors.astype(np.int64)
    result[order[:missing]] += 1
    return result


def check_integer(name: str, value: object, minimum: int) -> int:
    """Return ``value`` as an int of at least ``minimum``, or raise a ConfigError that names it."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ConfigError(f"{name} must be an integer, got {value!r} ({type(value).__name__}).") from None
    if isinstance(value, bool) or number < minimum:
        raise ConfigError(f"{name} must be an integer >= {minimum}, got {value!r}.")
    return number
