"""Weight functions of the strategies, and the checks of the measures that they read."""

from __future__ import annotations

import math
import numbers
from typing import Any

import numpy as np

from ..errors import ConfigError, DegenerateAttentionError, InputError
from ..limits import Limits, check_number
from .apportion import FloatArray, check_integer


def check_ranks(layer_ranks: Any) -> FloatArray:
    """Convert ranks (list, array or tensor) to ``[layer]`` float64, finite and non-negative.

    Raises
    ------
    InputError
        If they are not a flat sequence of numbers.
    DegenerateAttentionError
        If they are empty, or a rank is NaN, infinite or negative; the message names the layer.

    Examples
    --------
    >>> check_ranks([3, 1.5]).tolist()
    [3.0, 1.5]
    """
    values = layer_ranks.tolist() if hasattr(layer_ranks, "tolist") else layer_ranks
    if isinstance(values, (str, bytes, dict, set)) or not hasattr(values, "__iter__"):
        raise InputError(
            f"layer_ranks must be a list of numbers, one per layer; got {type(layer_ranks).__name__}."
        )
    ranks = []
    for i, value in enumerate(values):
        # Zero-dimensional tensors and array scalars inside a list.
        number = value.tolist() if hasattr(value, "tolist") else value
        if isinstance(number, bool) or not isinstance(number, numbers.Real):
            raise InputError(f"layer {i}: a rank must be a number, got {value!r} ({type(value).__name__}).")
        if not math.isfinite(number) or number < 0:
            raise DegenerateAttentionError(
                f"layer {i}: rank {number!r} is not a finite number >= 0; check that layer's attention for "
                "NaN, or use strategy='uniform' with ranks of 1."
            )
        ranks.append(float(number))
    if not ranks:
        raise DegenerateAttentionError(
            "layer_ranks is empty: give one rank per layer, for at least one layer."
        )
    return np.array(ranks, dtype=np.float64)


def check_measures(measures: Any, strategy: str, scalar: bool) -> FloatArray:
    """Convert a strategy's measures to float64, ``[layer]`` if ``scalar``, otherwise ``[layer, ...]``.

    Raises
    ------
    InputError, DegenerateAttentionError
        As `check_ranks`, which checks measures of one number per layer.
    """
    if scalar:
        return check_ranks(measures)
    try:
        values = np.asarray(measures, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"the measures of {strategy!r} must be numbers, equally many for every layer: {error}."
        ) from error
    if values.ndim == 0 or values.size == 0:
        raise DegenerateAttentionError(
            f"the measures of {strategy!r} are empty: give them for at least one layer."
        )
    wrong = np.flatnonzero(~((values >= 0) & (values < np.inf)).reshape(len(values), -1).all(axis=1))
    if len(wrong):
        raise DegenerateAttentionError(
            f"layer {wrong[0]}: a measure of {strategy!r} is not a finite number >= 0; check that layer's attention."
        )
    return values


def weigh_proportional(ranks: FloatArray) -> FloatArray:
    """Weigh each layer by its rank."""
    return ranks


def weigh_power(ranks: FloatArray, exponent: float = 1.0) -> FloatArray:
    """Weigh each layer by a power of its rank."""
    # Dividing by the maximum keeps the power finite and leaves the ratios as they are.
    return (ranks / ranks.max()) ** check_number("exponent", exponent, 0.0, 64.0)


def weigh_softmax(ranks: FloatArray, temperature: float = 1.0) -> FloatArray:
    """Weigh layers by a softmax over their ranks, in units of the mean rank."""
    logits = ranks / ranks.max()
    logits = logits / (logits.mean() * check_number("temperature", temperature, 1e-6, 1e6))
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()


def weigh_adaptive(
    ranks: FloatArray,
    low_percentile: float = 25.0,
    high_percentile: float = 75.0,
    low_factor: float = 0.5,
    high_factor: float = 1.5,
) -> FloatArray:
    """Weigh each layer by its rank, less below one percentile of the ranks and more above another."""
    low_percentile = check_number("low_percentile", low_percentile, 0.0, 100.0)
    high_percentile = check_number("high_percentile", high_percentile, low_percentile, 100.0)
    # Factors on the far side of 1 would give a higher rank fewer tokens.
    low_factor = check_number("low_factor", low_factor, 0.0, 1.0, open_low=True)
    high_factor = check_number("high_factor", high_factor, 1.0, 1e6)
    low, high = np.percentile(ranks, [low_percentile, high_percentile])
    factors = np.ones_like(ranks)
    factors[(ranks <= low) & (ranks < high)] = low_factor
    factors[(ranks >= high) & (ranks > low)] = high_factor
    return ranks * factors


def weigh_uniform(ranks: FloatArray) -> FloatArray:
    """Weigh every layer the same."""
    return np.ones_like(ranks)


def weigh_threshold(ranks: FloatArray, threshold: float = 0.01) -> FloatArray:
    """Weigh every layer the same: the scores that reach the threshold decide.

    Parameters
    ----------
    ranks : ndarray
        ``[layer]``; only their number counts.
    threshold : float, default 0.01
        Smallest score that stays, in the units of the selector's scores, from 0 on.  For ``"kvzip"`` it is a share of a
        query's attention.

    Raises
    ------
    ConfigError
        If ``threshold`` is outside [0, 1e6].
    """
    check_number("threshold", threshold, 0.0, 1e6)
    return np.ones_like(ranks)


def weigh_pyramid(
    ranks: FloatArray, steepness: float = 0.8, beta: float | None = None, limits: Limits | None = None
) -> FloatArray:
    """Weigh layers less the deeper they are.

    Without ``beta`` the weights fall linearly in depth, from ``1 + steepness`` to ``1 - steepness``.

    With ``beta`` they follow PyramidKV's formula. Let C be the average budget and W the window, which every layer
    keeps. Beyond the window the lengths fall in equal steps from ``2 (C - W) - (C - W) / beta`` to ``(C - W) / beta``
    tokens. A first layer longer than the prompt is cut to it, and the last layer is raised by the same amount. For a
    prompt shorter than ``2 (C - W)`` the weights are uniform.

    Notes
    -----
    The authors' code rounds in between and spends up to ``(layers - 1) / 2`` tokens per layer more than C. Here the
    lengths stay real numbers, and the total is met exactly. kvpress counts the window inside the pyramid, which falls
    more steeply to the same mean. It is uniform if the last layer would hold less than the window. A cache's floor
    applies to this strategy too: with ``min_budget=1`` the lengths are exactly the formula's.

    Raises
    ------
    ConfigError
        If an option is outside its range, or both are given.
    """
    steepness = check_number("steepness", steepness, 0.0, 1.0)
    layers = len(ranks)
    if beta is None:
        return np.linspace(1.0 + steepness, 1.0 - steepness, layers) if layers > 1 else np.ones(1)
    if steepness != 0.8:
        raise ConfigError(
            f"steepness={steepness:g} and beta={beta!r} both set the shape of the pyramid; give one of them."
        )
    beta = check_number("beta", beta, 1.0, 1e6)
    window = 0 if limits is None else limits.window_size
    base = 1.0 if limits is None else limits.total_budget / layers - window
    length = None if limits is None else limits.length
    if base <= 0 or layers == 1 or (length is not None and length < 2 * base):
        return np.ones(layers)
    first = 2 * base - base / beta
    if length is not None:
        first = max(base, min(first, length - window))
    # Tokens that the first layer cannot hold go to the last, so that the mean stays the base.
    return window + np.linspace(first, 2 * base - first, layers)


def weigh_inverse(ranks: FloatArray) -> FloatArray:
    """Weigh each layer by the inverse of its rank; rank 0 counts as the smallest positive one."""
    smallest = ranks[ranks > 0].min()
    return smallest / np.maximum(ranks, smallest)


def weigh_random(ranks: FloatArray, seed: int = 0) -> FloatArray:
    """Weigh each layer by a number drawn uniformly from 0.2 to 1.8."""
    return np.random.default_rng(check_integer("seed", seed, 0)).uniform(0.2, 1.8, len(ranks))


def weigh_cake(preferences: FloatArray, tau1: float = 1.0, tau2: float = 1.0) -> FloatArray:
    """Weigh each layer by its CAKE preference, measured with the two temperatures."""
    # The measure has used the temperatures already; they are only checked here. Likewise in the next two functions.
    check_number("tau1", tau1, 0.0, 1e3, open_low=True)
    check_number("tau2", tau2, 0.0, 1e3, open_low=True)
    return preferences


def weigh_lava(entropies: FloatArray, kernel_size: int = 7) -> FloatArray:
    """Weigh each layer by the entropy of its scores, pooled with ``kernel_size``."""
    _check_kernel_size(kernel_size)
    return entropies


def weigh_zigzagkv(uncertainties: FloatArray, mass: float = 0.9) -> FloatArray:
    """Weigh each layer by the share of tokens that holds ``mass`` of its attention."""
    check_number("mass", mass, 0.0, 1.0, open_low=True)
    return uncertainties


def weigh_dynamickv(
    scores: FloatArray, r_max: float = 10.0, kernel_size: int = 5, limits: Limits | None = None
) -> FloatArray:
    """Weigh each layer by how many of the best scores of all layers are its own.

    ``scores`` are ``[layer, head, k]``, the best of each head, padded with 0. Let C be the average budget and W the
    window, which every layer keeps. The best ``(C - W) x heads x layers`` scores over all layers are counted per layer.
    The counts then share ``(C - W) x layers`` tokens.
    """
    check_number("r_max", r_max, 1.0, 1e3)
    _check_kernel_size(kernel_size)
    layers = len(scores)
    heads = scores.shape[1] if scores.ndim > 1 else 1
    table = scores.reshape(layers, -1)
    window = 0 if limits is None else limits.window_size
    base = math.inf if limits is None else limits.total_budget / layers - window
    if base <= 0:
        return np.ones(layers)
    wanted = min(base * heads * layers, float(np.count_nonzero(table)))
    counts = _count_best(table, int(wanted))
    if not counts.any():
        return np.ones(layers)
    return counts if limits is None else window + counts / counts.sum() * base * layers


def _check_kernel_size(kernel_size: int) -> None:
    if check_integer("kernel_size", kernel_size, 1) % 2 == 0:
        raise ConfigError(
            f"kernel_size={kernel_size} must be odd, for equally many neighbours on either side; 1 means no pooling."
        )


def _count_best(table: FloatArray, wanted: int) -> FloatArray:
    """Count the ``wanted`` largest numbers row by row; ties count for the first rows."""
    if wanted == 0:
        return np.zeros(len(table))
    least = np.partition(table, table.size - wanted, axis=None)[table.size - wanted]
    counts = (table > least).sum(axis=1)
    missing = wanted - int(counts.sum())
    for row, ties in enumerate((table == least).sum(axis=1)):
        taken = min(missing, int(ties))
        counts[row] += taken
        missing -= taken
    return counts.astype(np.float64)
