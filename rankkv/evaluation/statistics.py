"""Statistics over texts: means, ratios and iso-quality shares with bootstrap intervals, paired by text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ..errors import InputError

#: Bootstrap resamples of the texts for one interval.
RESAMPLES = 9999


@dataclass(frozen=True)
class Estimate:
    """Hold a mean over texts with its bootstrap interval.

    Attributes
    ----------
    mean, low, high : float
        The mean, and the bounds of the interval.
    samples : int
        Number of texts.
    """

    mean: float
    low: float
    high: float
    samples: int

    def __str__(self) -> str:
        return f"{self:}"

    def __format__(self, spec: str) -> str:
        """Format mean and interval; ``"+"`` adds signs, for a difference."""
        if spec not in ("", "+"):
            return format(str(self), spec)
        return self.show(3, spec)

    def show(self, digits: int, sign: str = "") -> str:
        """Return mean and interval with so many decimals; ``sign="+"`` adds signs.

        Examples
        --------
        >>> Estimate(0.5, 0.25, 0.75, 4).show(2, "+")
        '+0.50 [+0.25, +0.75]'
        """
        form = f"{sign}.{digits}f"
        return f"{self.mean:{form}} [{self.low:{form}}, {self.high:{form}}]"


def compute_mean(values: ArrayLike, confidence: float = 0.95, seed: int = 0) -> Estimate:
    """Compute the mean of one number per text, with its percentile bootstrap interval.

    For a paired interval, pass the differences of two methods on the same texts.

    Parameters
    ----------
    values : array_like
        ``[text]``.
    confidence : float, default 0.95
        Level of the interval.
    seed : int, default 0
        Seed of the resamples.

    Returns
    -------
    Estimate
        With a single text, or equal values, the interval is the mean itself.

    Raises
    ------
    InputError
        If there is no text, or a value is not finite.

    Examples
    --------
    >>> str(compute_mean([1.0, 1.0, 1.0]))
    '1.000 [1.000, 1.000]'
    """
    numbers = _check(values)
    mean = float(numbers.mean())
    if len(numbers) == 1 or np.ptp(numbers) == 0.0:
        return Estimate(mean, mean, mean, len(numbers))
    from scipy.stats import bootstrap

    interval = bootstrap(
        (numbers,),
        np.mean,
        confidence_level=confidence,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(mean, float(interval.low), float(interval.high), len(numbers))


def compute_ratio(
    numerator: ArrayLike, denominator: ArrayLike, confidence: float = 0.95, seed: int = 0
) -> Estimate:
    """Compute the ratio of two means over the same texts, with a paired bootstrap interval.

    Resamples whose denominator's mean is not positive are left out of the interval.

    Raises
    ------
    InputError
        If the two have different lengths, or the denominator's mean is not positive.

    Examples
    --------
    >>> compute_ratio([1.0, 2.0], [2.0, 4.0]).mean
    0.5
    """
    a, b = _check(numerator), _check(denominator)
    if len(a) != len(b):
        raise InputError(
            f"the ratio has {len(a)} numerators and {len(b)} denominators: give both for the same texts."
        )
    if b.mean() <= 0.0:
        raise InputError(
            f"the denominator's mean {b.mean():.3g} is not positive: give values with a positive mean."
        )
    draws = np.random.default_rng(seed).integers(0, len(a), (RESAMPLES, len(a)))
    means = b[draws].mean(axis=1)
    ratios = a[draws].mean(axis=1)[means > 0.0] / means[means > 0.0]
    low, high = _compute_interval(ratios, confidence)
    return Estimate(float(a.mean() / b.mean()), low, high, len(a))


def compute_iso_quality_ratio(
    excess: Mapping[float, Sequence[float]],
    reference: Sequence[float],
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Compute the share of the cache at which a method loses as much as a reference.

    The mean excess loss is interpolated linearly over the logarithm of the share kept.  The result is the smallest
    share from which on the method is no worse than the reference, within the range of the measured shares.

    Parameters
    ----------
    excess : mapping
        Maps each share kept to the method's excess loss, one number per text.
    reference : sequence of float
        Excess loss of the reference on the same texts, such as uniform budgets at 0.2.
    confidence, seed
        Level and seed of the paired bootstrap interval over texts.

    Raises
    ------
    InputError
        If fewer than two shares are given, or the texts do not match.

    Examples
    --------
    >>> compute_iso_quality_ratio({0.1: [0.3, 0.3], 0.2: [0.1, 0.1]}, [0.3, 0.3]).mean
    0.1
    """
    shares = np.array(sorted(excess))
    curves = np.array([_check(excess[share]) for share in shares])
    wanted = _check(reference)
    if len(shares) < 2 or curves.shape[1] != len(wanted):
        raise InputError(
            f"{len(shares)} shares of {curves.shape[1:]} texts against {len(wanted)} texts: give at least two shares "
            "and the same texts for all."
        )

    # The smallest share from which on the curve stays at or below the target.
    def cross(curve: np.ndarray, target: float) -> float:
        worse = np.nonzero(curve > target)[0]
        if len(worse) == 0:
            return float(shares[0])
        last = int(worse[-1])
        if last == len(shares) - 1:
            return float(shares[-1])
        part = (curve[last] - target) / (curve[last] - curve[last + 1])
        return float(np.exp((1.0 - part) * np.log(shares[last]) + part * np.log(shares[last + 1])))

    draws = np.random.default_rng(seed).integers(0, len(wanted), (RESAMPLES, len(wanted)))
    means, targets = curves[:, draws].mean(axis=-1), wanted[draws].mean(axis=-1)
    found = np.array([cross(means[:, i], targets[i]) for i in range(RESAMPLES)])
    low, high = _compute_interval(found, confidence)
    return Estimate(cross(curves.mean(axis=1), float(wanted.mean())), low, high, len(wanted))


def _compute_interval(resampled: np.ndarray, confidence: float) -> tuple[float, float]:
    """Return the percentile interval of resampled statistics."""
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(resampled, [tail, 1.0 - tail])
    return float(low), float(high)


def _check(values: ArrayLike) -> np.ndarray:
    numbers = np.asarray(values, dtype=np.float64).ravel()
    if len(numbers) == 0:
        raise InputError("there are no values to average: give one per text.")
    if not np.isfinite(numbers).all():
        first = int(np.nonzero(~np.isfinite(numbers))[0][0])
        raise InputError(
            f"value {first} is not finite: {numbers[first]}; give a finite number for each text."
        )
    return numbers
