"""Distortion curves and layer weights from a measured profile, for the strategies "profile" and "blend"."""

from __future__ import annotations

import functools

import numpy as np

from ..limits import check_number
from ..profile.record import RankProfile
from .apportion import FloatArray, IntArray
from .distortion import fit_decreasing

#: Nats per token. Sensitivities below it are measurement noise, so no layer counts as less sensitive.
SENSITIVITY_FLOOR = 0.002
# Budgets at which a layer's distortion curve is evaluated, spread evenly in the logarithm.
_KNOTS = 96


def compute_curve(
    profile: RankProfile, layer: int, length: int, lower: int, upper: int
) -> tuple[IntArray, FloatArray]:
    """Compute a layer's distortion at whole budgets between its bounds.

    The measured divergences are made non-increasing and 0 at the full cache. They are interpolated linearly in the
    logarithm of the ratio. Below the smallest measured ratio the first slope continues.

    Parameters
    ----------
    profile : RankProfile
        The measured curves.
    layer : int
        Index among the compressible layers.
    length : int
        Tokens of the prompt.
    lower, upper : int
        Bounds of the layer, tokens.

    Returns
    -------
    budgets, distortion : ndarray
        ``[point]`` int64 tokens, ascending, and float64 nats per token.
    """
    low, high = max(1, lower), max(1, upper)
    budgets = np.unique(np.rint(np.geomspace(low, high, _KNOTS)).astype(np.int64)) if high > low else [low]
    x, fitted = _fit_profile(profile)
    y = fitted[layer]
    points = np.log(np.asarray(budgets, dtype=np.float64) / max(1, length))
    values = np.interp(points, x, y)
    below = points < x[0]
    values[below] = y[0] + (points[below] - x[0]) * (y[1] - y[0]) / (x[1] - x[0])
    # Every curve falls at least a little. Flat curves would send all spare tokens to one layer.
    values -= SENSITIVITY_FLOOR * points / abs(x[0])
    grid = np.asarray(budgets, dtype=np.int64)
    # The logarithmic grid starts at 1; the curve must span the bounds exactly, even a lower bound of 0.
    if len(grid) > 1:
        grid[0], grid[-1] = lower, upper
    return grid, values


@functools.lru_cache(maxsize=8)
def _fit_profile(profile: RankProfile) -> tuple[FloatArray, FloatArray]:
    """Fit log ratios ``[point]`` and distortions ``[layer, point]``, the full cache included."""
    rows = [fit_decreasing([*np.maximum(row, 0.0), 0.0]) for row in np.array(profile.divergence)]
    return np.log(np.array([*profile.ratios, 1.0])), np.array(rows)


def compute_sensitivities(profile: RankProfile) -> FloatArray:
    """Compute each layer's sensitivity, ``[layer]`` nats per token.

    ``sensitivity = max(gain_divergence, 0.002)``. The gain is measured when the layer alone gets its full cache back
    and all others stay compressed. Gains below the floor are noise.

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
    """Weigh each layer by a power of its measured sensitivity.

    Without an exponent, budgets come from the distortion curves and these weights only break ties.
    """
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
    """Weigh each layer by powers of its measured sensitivity and of its rank in this prompt."""
    measured = weigh_profile(ranks, profile, check_number("profile_exponent", profile_exponent, 0.0, 64.0))
    return measured * (ranks / ranks.max()) ** check_number("rank_exponent", rank_exponent, 0.0, 64.0)
