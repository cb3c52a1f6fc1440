"""Budgets from a profile: least total distortion under the total, and weights from measured sensitivities."""

from __future__ import annotations

import functools

import numpy as np

from ..limits import check_number
from ..profile.record import RankProfile
from .apportion import FloatArray, IntArray
from .distortion import fit_decreasing

#: Nats a token below which a measured sensitivity is noise; no layer counts as less sensitive than this.
SENSITIVITY_FLOOR = 0.002
#: Budgets at which a layer's distortion curve is evaluated, spread evenly in the logarithm.
_KNOTS = 96


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
