"""Budgets from a profile: least total distortion under the total, and weights from measured sensitivities."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from ..config import PROFILE_USERS, RankKVConfig
from ..errors import BudgetError, ProfileError
from ..profile.record import RankProfile
from .apportion import FloatArray, IntArray
from .weights import check_number

#: Nats a token below which a measured sensitivity is noise; no layer counts as less sensitive than this.
SENSITIVITY_FLOOR = 0.002
#: Budgets at which a layer's distortion curve is evaluated, spread evenly in the logarithm.
_KNOTS = 96


def fit_decreasing(values: ArrayLike) -> FloatArray:
    """Fit the nearest non-increasing sequence (least squares, pool adjacent violators).

    Parameters
    ----------
    values : array_like
        ``[ratio]``, measured at ascending ratios.

    Returns
    -------
    ndarray
        ``[ratio]`` float64, non-increasing, with the same sum.

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
    """Compute which points lie on the lower convex hull of a curve.

    Parameters
    ----------
    budgets : array_like
        ``[point]``, ascending.
    values : array_like
        ``[point]``, the distortion at each.

    Returns
    -------
    ndarray
        ``[hull point]`` int64 indices, ascending; the first and the last point are among them.

    Examples
    --------
    >>> compute_hull([0, 1, 2, 3], [9.0, 8.0, 1.0, 0.0]).tolist()
    [0, 2, 3]
    """
    # Lists: single numbers of an array are slow to read.
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

    ``min sum_i D_i(b_i)  subject to  sum_i b_i = total,  lower_i <= b_i <= upper_i``, where D_i is the lower convex
    hull of the layer's curve, linear between its points. Tokens go to the steepest slope first, which is optimal for
    convex curves; equal slopes go to the earlier layer. A layer that is added never raises the budget of another.

    Parameters
    ----------
    curves : sequence of (array_like, array_like)
        For each layer whole budgets, ascending, from its lower to its upper bound, and the distortion at each.
    total : int
        Tokens over all layers; where it exceeds the upper bounds, these are returned.
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
            f"a total of {total} tokens is below the layers' minimum, {int(low.sum())}; raise it to that at least."
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


def compute_curve(
    profile: RankProfile, layer: int, length: int, lower: int, upper: int
) -> tuple[IntArray, FloatArray]:
    """Compute a layer's distortion at whole budgets between its bounds.

    The measured divergences, made non-increasing and 0 at the full cache, are interpolated linearly in the logarithm
    of the ratio, and continued below the smallest measured ratio with the slope found there.

    Parameters
    ----------
    profile : RankProfile
        The measured curves.
    layer : int
        Place among the compressible layers.
    length : int
        Tokens of the prompt.
    lower, upper : int
        Bounds of the layer, tokens.

    Returns
    -------
    budgets, distortion : ndarray
        ``[point]`` int64 tokens, ascending, and float64 nats a token.
    """
    low, high = max(1, lower), max(1, upper)
    budgets = np.unique(np.rint(np.geomspace(low, high, _KNOTS)).astype(np.int64)) if high > low else [low]
    x, fitted = _fit_profile(profile)
    y = fitted[layer]
    points = np.log(np.asarray(budgets, dtype=np.float64) / max(1, length))
    values = np.interp(points, x, y)
    below = points < x[0]
    values[below] = y[0] + (points[below] - x[0]) * (y[1] - y[0]) / (x[1] - x[0])
    # A slope no layer is without: tokens that no measurement asks for are spread instead of heaped on one layer.
    values -= SENSITIVITY_FLOOR * points / abs(x[0])
    grid = np.asarray(budgets, dtype=np.int64)
    if len(grid) > 1:
        grid[0], grid[-1] = lower, upper
    return grid, values


@functools.lru_cache(maxsize=8)
def _fit_profile(profile: RankProfile) -> tuple[FloatArray, FloatArray]:
    """Return log ratios ``[point]`` and fitted distortions ``[layer, point]``, the full cache included."""
    rows = [fit_decreasing([*np.maximum(row, 0.0), 0.0]) for row in np.array(profile.divergence)]
    return np.log(np.array([*profile.ratios, 1.0])), np.array(rows)


def compute_sensitivities(profile: RankProfile) -> FloatArray:
    """Compute how much each layer matters, ``[layer]`` nats a token.

    The gain in divergence when the layer gets its full cache back while all others stay compressed, floored where
    a measurement is noise.

    Examples
    --------
    >>> profile = RankProfile({}, [], [0, 1], [0.1], [[0.1], [0.2]], [[0.1], [0.2]], [0, 0], [-0.001, 0.3], 0.1)
    >>> compute_sensitivities(profile).tolist()
    [0.002, 0.3]
    """
    return np.maximum(np.array(profile.gain_divergence), SENSITIVITY_FLOOR)


def weigh_profile(
    ranks: FloatArray, profile: RankProfile | None = None, exponent: float | None = None
) -> FloatArray:
    """Weigh each layer by a power of its measured sensitivity; without an exponent the weights only break ties."""
    power = 1.0 if exponent is None else check_number("exponent", exponent, 0.0, 64.0)
    if profile is None:
        return np.ones_like(ranks)
    sensitivities = compute_sensitivities(profile)[: len(ranks)]
    return (sensitivities / sensitivities.max()) ** power


def weigh_blend(
    ranks: FloatArray,
    profile: RankProfile | None = None,
    profile_exponent: float = 1.0,
    rank_exponent: float = 1.0,
) -> FloatArray:
    """Weigh each layer by a power of its measured sensitivity times a power of its rank in this prompt."""
    measured = weigh_profile(ranks, profile, check_number("profile_exponent", profile_exponent, 0.0, 64.0))
    return measured * (ranks / ranks.max()) ** check_number("rank_exponent", rank_exponent, 0.0, 64.0)


def find_used_profile(config: RankKVConfig, strategy: str, layer_indices: list[int]) -> RankProfile | None:
    """Return the profile that a strategy uses, None where it uses none.

    Raises
    ------
    ProfileError
        If it needs one and none is known, or that one has other layers.
    """
    if strategy not in PROFILE_USERS:
        return None
    profile = config.profile
    if not isinstance(profile, RankProfile):
        raise ProfileError(
            f"strategy {strategy!r} needs a profile of the model and none is known: measure one with rankkv calibrate, "
            "or give profile=RankProfile.load(path)."
        )
    if list(profile.layer_indices) != layer_indices:
        raise ProfileError(
            f"the profile has layers {list(profile.layer_indices)}, the model compresses {layer_indices}: it is one of "
            "another model; calibrate this one."
        )
    return profile
