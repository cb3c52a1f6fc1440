"""Budgets per key/value head: from the heads' sensitivities in a profile, or from their errors on the prompt."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from ..errors import ProfileError
from ..profile.record import RankProfile
from .apportion import (
    FloatArray,
    IntArray,
    allocate_integers,
    allocate_shares,
    spread_shares,
    spread_tokens,
)
from .calibrated import SENSITIVITY_FLOOR
from .distortion import compute_hull, fit_error_curve

# Below 1, because sensitivities measured on a few texts spread more than the true ones.
_EXPONENT = 0.75


class HeadSplit(Protocol):
    """Splits a layer's budget over its key/value heads."""

    @property
    def heads(self) -> int:
        """Key/value heads of the layer."""

    def split(self, budget: int, room: Sequence[int], final: bool = True) -> IntArray:
        """Split the budget, see :func:`allocate_head_budgets`."""


# Needed when a cache is built and again by the plan of each row.
@functools.lru_cache(maxsize=8)
def compute_head_weights(profile: RankProfile) -> tuple[FloatArray, ...]:
    """Compute the weight of each key/value head, ``[layer][kv_head]``.

    ``weight = max(gain, 0.002 / heads) ** 0.75``, with the gain in nats per token: the drop in divergence from the full
    cache when this head alone gets its full cache back.

    Parameters
    ----------
    profile : RankProfile
        With ``head_gain_divergence``.

    Raises
    ------
    ProfileError
        If the profile's heads were not measured.

    Examples
    --------
    >>> profile = RankProfile({}, [], [0], [0.1], [[0.1]], [[0.1]], [0], [0.1], 0.1,
    ...     head_gain_divergence=[[0.0001, 0.016]])
    >>> [weights.round(4).tolist() for weights in compute_head_weights(profile)]
    [[0.0056, 0.045]]
    """
    if not profile.head_gain_divergence:
        raise ProfileError(
            "head_budgets='profile' needs a profile whose heads were measured, but this one holds layers only: "
            "calibrate again with heads (rankkv calibrate), or use head_budgets=None."
        )
    rows = [np.asarray(row, dtype=np.float64) for row in profile.head_gain_divergence]
    return tuple(np.maximum(row, SENSITIVITY_FLOOR / len(row)) ** _EXPONENT for row in rows)


def join_heads(profile: RankProfile) -> RankProfile:
    """Return a copy of the profile in which a layer's sensitivity is the sum over its heads.

    If some heads need all their tokens and others few, the layer needs a smaller budget than if all kept equally many.

    Raises
    ------
    ProfileError
        As `compute_head_weights`.
    """
    return replace(profile, gain_divergence=tuple(float(row.sum()) for row in compute_head_weights(profile)))


@dataclass(frozen=True)
class HeadWeights:
    """Split of a layer's budget by fixed weights.

    Parameters
    ----------
    weights : sequence of float
        ``[kv_head]``, positive.
    head_floor : float
        Fraction of the budget that every head keeps, in [0, 1].
    """

    weights: Sequence[float]
    head_floor: float

    @property
    def heads(self) -> int:
        """Key/value heads of the layer."""
        return len(self.weights)

    def split(self, budget: int, room: Sequence[int], final: bool = True) -> IntArray:
        """Split the budget, see :func:`allocate_head_budgets`."""
        return allocate_head_budgets(self.weights, budget, room, self.head_floor, final)


def allocate_head_budgets(
    weights: ArrayLike, budget: int, upper: Sequence[int], head_floor: float, final: bool = True
) -> IntArray:
    """Allocate a layer's budget to its heads: ``b_h = clip(lambda w_h, head_floor * budget, upper_h)``.

    Parameters
    ----------
    weights : array_like
        ``[kv_head]``, positive; only ratios count.
    budget : int
        Tokens of the layer, an average over its heads.
    upper : sequence of int
        Tokens that each head holds.
    head_floor : float
        Fraction of the budget that every head keeps, in [0, 1].
    final : bool, default True
        True returns whole tokens that sum to ``heads * budget``, or to all that the heads hold. False returns an upper
        bound instead: a smaller budget of the layer never raises it.

    Returns
    -------
    ndarray
        ``[kv_head]`` int64 tokens.

    Examples
    --------
    >>> allocate_head_budgets([1.0, 8.0, 1.0], 50, [90, 90, 90], 0.2).tolist()
    [30, 90, 30]
    """
    values = np.asarray(weights, dtype=np.float64)
    high = np.asarray(upper, dtype=np.int64)
    total = min(len(values) * int(budget), int(high.sum()))
    low = np.minimum(head_floor * budget, high)
    shares = allocate_shares(values, total, low, high, partial=True)
    if final:
        return allocate_integers(shares, total, np.floor(low), high, values)
    return np.minimum(np.floor(shares).astype(np.int64) + 1, high)


@dataclass(frozen=True)
class HeadCurves:
    """Error curves of the heads of one layer, as linear segments sorted by slope, the steepest first.

    Attributes
    ----------
    heads : int
        Key/value heads of the layer.
    floor : int
        Tokens that every head keeps.
    slopes : ndarray
        ``[segment]`` change of the error per token, ascending (the most negative comes first).
    widths : ndarray
        ``[segment]`` int64 tokens of the segment.
    owners : ndarray
        ``[segment]`` int64, the head that the segment belongs to.
    """

    heads: int
    floor: int
    slopes: FloatArray
    widths: IntArray
    owners: IntArray

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain JSON types."""
        arrays = {name: getattr(self, name).tolist() for name in ("slopes", "widths", "owners")}
        return {"heads": self.heads, "floor": self.floor, **arrays}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> HeadCurves:
        """Build the curves from the record that :meth:`to_dict` returned."""
        slopes = np.array(record["slopes"], dtype=np.float64)
        widths, owners = (np.array(record[name], dtype=np.int64) for name in ("widths", "owners"))
        return cls(record["heads"], record["floor"], slopes, widths, owners)

    def split(self, budget: int, room: Sequence[int], final: bool = True) -> IntArray:
        """Split a layer's budget over its heads so that the sum of their errors is least.

        Parameters
        ----------
        budget : int
            Tokens of the layer, an average over its heads.
        room : sequence of int
            Tokens that each head holds.
        final : bool, default True
            False while the budget may still shrink. Has no effect here.

        Returns
        -------
        ndarray
            ``[kv_head]`` int64 tokens that sum to ``heads * budget``, or to all that the heads hold. A smaller budget
            never gives a head more.

        Examples
        --------
        >>> curves = fit_head_curves([[0.9, 0.1], [0.2, 0.1]], length=16, floor=4)
        >>> curves.split(8, [16, 16]).tolist()
        [12, 4]
        """
        result = np.minimum(min(self.floor, max(0, budget)), np.asarray(room, dtype=np.int64))
        left = min(self.heads * budget, sum(room)) - int(result.sum())
        for width, head in zip(self.widths.tolist(), self.owners.tolist(), strict=True):
            if left <= 0:
                break
            taken = min(left, width, room[head] - int(result[head]))
            result[head] += taken
            left -= taken
        # Tokens beyond the curves are spread evenly, for example when a layer outgrows the prompt while decoding.
        return spread_tokens(result, left, room)


def fit_head_curves(
    errors: ArrayLike, length: int, floor: int, factors: ArrayLike | None = None
) -> HeadCurves:
    """Fit the lower convex hull of the error of each head of a layer.

    Parameters
    ----------
    errors : array_like
        ``[kv_head, budget]`` at the budgets of :func:`rankkv.limits.make_budget_grid`; the error with all tokens is 0.
    length : int
        Tokens of the prompt.
    floor : int
        Tokens that every head keeps.
    factors : array_like, optional
        ``[kv_head]`` weight of each head's error.

    Examples
    --------
    >>> curves = fit_head_curves([[0.9, 0.1], [0.2, 0.1]], length=16, floor=8)
    >>> curves.owners.tolist(), curves.widths.tolist()
    ([0, 1, 0, 1], [3, 3, 5, 5])
    """
    rows = np.asarray(errors, dtype=np.float64)
    rows = rows if factors is None else rows * np.asarray(factors, dtype=np.float64)[:, None]
    floor = min(floor, length)
    segments: list[tuple[float, int, int, int]] = []
    # Without a token, as before the first chunk of a prompt, there is nothing to fit.
    for head, row in enumerate(rows if length else ()):
        budgets, values = fit_error_curve(row.tolist(), length, floor)
        for place, (one, other) in enumerate(itertools.pairwise(compute_hull(budgets, values))):
            width = int(budgets[other] - budgets[one])
            slope = (values[other] - values[one]) / width
            if slope < 0.0:
                segments.append((slope, head, place, width))
    segments.sort()
    return HeadCurves(
        len(rows),
        floor,
        np.array([slope for slope, *_ in segments]),
        np.array([width for *_, width in segments], dtype=np.int64),
        np.array([head for _, head, *_ in segments], dtype=np.int64),
    )


def allocate_by_head_curves(
    layers: Sequence[HeadCurves], total: int, lower: ArrayLike, upper: ArrayLike
) -> FloatArray:
    """Allocate budgets to layers so that the sum of the errors of all their heads is least.

    ``min sum_i sum_h e_ih(b_ih)  subject to  sum_i mean_h b_ih = total``

    Each curve is replaced by its lower convex hull. Tokens go to the steepest slope of all heads first. Equal slopes go
    to the earlier layer. Adding a layer never raises the budget of another.

    Parameters
    ----------
    layers : sequence of HeadCurves
        One per layer.
    total : int
        Tokens over all layers. Tokens beyond the curves are shared evenly.
    lower, upper : array_like
        ``[layer]`` bounds, tokens.

    Returns
    -------
    ndarray
        ``[layer]`` float64 tokens, an average over a layer's heads.

    Examples
    --------
    >>> curves = [fit_head_curves([[0.9, 0.1]], 16, 4), fit_head_curves([[0.2, 0.1]], 16, 4)]
    >>> allocate_by_head_curves(curves, 16, [4, 4], [16, 16]).tolist()
    [12.0, 4.0]
    """
    low, high = np.asarray(lower, dtype=np.float64), np.asarray(upper, dtype=np.float64)
    # A layer keeps at least what its heads keep.
    low = np.maximum(low, np.minimum([float(curves.floor) for curves in layers], high))
    slopes, widths, owners = [], [], []
    for place, (curves, least, most) in enumerate(zip(layers, low, high, strict=True)):
        # The lower bound already covers the steepest segments up to `least`; only the rest competes.
        ends = curves.floor + np.cumsum(curves.widths) / curves.heads
        starts = ends - curves.widths / curves.heads
        widths.append(np.clip(ends, least, most) - np.clip(starts, least, most))
        # A token of the layer's budget is one token in each of its heads.
        slopes.append(curves.slopes * curves.heads)
        owners.append(np.full(len(ends), place))
    slope, width, owner = (np.concatenate(parts) for parts in (slopes, widths, owners))
    order = np.argsort(slope, kind="stable")
    width, owner = width[order], owner[order]
    left = max(0.0, total - float(low.sum()))
    taken = np.clip(left - (np.cumsum(width) - width), 0.0, width)
    result = low + np.bincount(owner, weights=taken, minlength=len(low))
    left -= float(taken.sum())
    return spread_shares(result, left, high)
