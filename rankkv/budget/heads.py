"""From measured sensitivities of key/value heads to how a layer's budget is spread over its heads."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from ..errors import ProfileError
from ..limits import make_budget_grid
from ..profile.record import RankProfile
from .apportion import FloatArray, IntArray, allocate_integers, allocate_shares
from .calibrated import SENSITIVITY_FLOOR
from .distortion import compute_hull, fit_decreasing

#: Below 1, since what was measured on a few texts is less even than what it estimates.
_EXPONENT = 0.75


# Asked for when a cache is built and again by the plan of each row.
@functools.lru_cache(maxsize=8)
def compute_head_weights(profile: RankProfile) -> tuple[FloatArray, ...]:
    """Compute what each key/value head counts for, ``[layer][kv_head]``.

    ``weight = max(gain, floor / heads) ** 0.75``, where the gain is how much nearer the model comes to itself with a
    full cache when this head alone gets its full cache back, nats a token, and the floor 0.002.

    Parameters
    ----------
    profile : RankProfile
        With ``head_gain_divergence``.

    Raises
    ------
    ProfileError
        If its heads were not measured.

    Examples
    --------
    >>> profile = RankProfile({}, [], [0], [0.1], [[0.1]], [[0.1]], [0], [0.1], 0.1,
    ...     head_gain_divergence=[[0.0001, 0.016]])
    >>> [weights.round(4).tolist() for weights in compute_head_weights(profile)]
    [[0.0056, 0.045]]
    """
    if not profile.head_gain_divergence:
        raise ProfileError(
            "head_budgets='profile' needs a profile whose heads were measured, and this one holds layers only: "
            "calibrate again with heads (rankkv calibrate), or use head_budgets=None."
        )
    rows = [np.asarray(row, dtype=np.float64) for row in profile.head_gain_divergence]
    return tuple(np.maximum(row, SENSITIVITY_FLOOR / len(row)) ** _EXPONENT for row in rows)


def join_heads(profile: RankProfile) -> RankProfile:
    """Return a profile whose layers count for what their heads count for together.

    Heads that need all their tokens next to heads that need none take a smaller budget than a layer whose heads keep
    the same number of tokens.

    Raises
    ------
    ProfileError
        As `compute_head_weights`.
    """
    return replace(profile, gain_divergence=tuple(float(row.sum()) for row in compute_head_weights(profile)))


class HeadSplit(Protocol):
    """How a layer's budget is split over its key/value heads."""

    @property
    def heads(self) -> int:
        """Key/value heads of the layer."""

    def split(self, budget: int, room: Sequence[int], final: bool = True) -> IntArray:
        """Split the budget, see :func:`allocate_head_budgets`."""


@dataclass(frozen=True)
class HeadWeights:
    """Splits a layer's budget by fixed weights.

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
        Tokens that each head has.
    head_floor : float
        Fraction of the budget that every head keeps, in [0, 1].
    final : bool, default True
        Whole tokens that sum to ``heads * budget``, or to all that is there; otherwise what no smaller budget of the
        layer gives more than.

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


# Tokens that rounding may leave over.
_EPSILON = 1e-6


@dataclass(frozen=True)
class HeadCurves:
    """What more tokens are worth to the heads of one layer: pieces of equal worth, the most valuable first.

    Attributes
    ----------
    heads : int
        Key/value heads of the layer.
    floor : int
        Tokens that every head keeps.
    slopes : ndarray
        ``[piece]`` change of the error with a token, ascending (a large negative one comes first).
    widths : ndarray
        ``[piece]`` int64 tokens of the piece.
    owners : ndarray
        ``[piece]`` int64, the head whose tokens they are.
    """

    heads: int
    floor: int
    slopes: FloatArray
    widths: IntArray
    owners: IntArray

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain JSON-ready values."""
        arrays = {name: getattr(self, name).tolist() for name in ("slopes", "widths", "owners")}
        return {"heads": self.heads, "floor": self.floor, **arrays}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> HeadCurves:
        """Build what :meth:`to_dict` described."""
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
            Tokens that each head has.
        final : bool, default True
            Whether the budget will not shrink any more; makes no difference here.

        Returns
        -------
        ndarray
            ``[kv_head]`` int64 tokens that sum to ``heads * budget``, or to all that is there.  No head gets more of a
            smaller budget.

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
        # What no measured error asks for is spread evenly: beyond the prompt, say, as a layer grows while decoding.
        while left > 0:
            waiting = [head for head in range(self.heads) if result[head] < room[head]]
            step = max(1, left // len(waiting))
            for head in waiting[:left]:
                taken = min(step, left, room[head] - int(result[head]))
                result[head] += taken
                left -= taken
        return result


def fit_head_curves(
    errors: ArrayLike, length: int, floor: int, factors: ArrayLike | None = None
) -> HeadCurves:
    """Fit what more tokens are worth to each head of a layer: the lower convex hull of its errors.

    Parameters
    ----------
    errors : array_like
        ``[kv_head, budget]`` at the budgets of :func:`rankkv.limits.make_budget_grid`; 0 with all tokens.
    length : int
        Tokens of the prompt.
    floor : int
        Tokens that every head keeps.
    factors : array_like, optional
        ``[kv_head]`` what each head's error counts for.

    Examples
    --------
    >>> curves = fit_head_curves([[0.9, 0.1], [0.2, 0.1]], length=16, floor=8)
    >>> curves.owners.tolist(), curves.widths.tolist()
    ([0, 1, 0, 1], [3, 3, 5, 5])
    """
    rows = np.asarray(errors, dtype=np.float64)
    grid = make_budget_grid(length)
    rows = rows if factors is None else rows * np.asarray(factors, dtype=np.float64)[:, None]
    floor = min(floor, length)
    # A row may be too short to evict from, or hold nothing yet.
    rising = [floor, *(budget for budget in grid if budget > floor), length] if floor < length else [1]
    budgets = np.array(rising)
    pieces: list[tuple[float, int, int, int]] = []
    for head, row in enumerate(rows):
        known = np.zeros(len(grid) + 1)
        known[: min(len(row), len(grid))] = row[: len(grid)]
        # Linear in the logarithm between the budgets tried, as damage is.
        values = np.interp(np.log(budgets), np.log([*grid, max(1, length)]), fit_decreasing(known))
        hull = compute_hull(budgets, values)
        for place, (one, other) in enumerate(itertools.pairwise(hull)):
            width = int(budgets[other] - budgets[one])
            slope = (values[other] - values[one]) / width
            if slope < 0.0:
                pieces.append((slope, head, place, width))
    pieces.sort()
    return HeadCurves(
        len(rows),
        floor,
        np.array([slope for slope, *_ in pieces]),
        np.array([width for *_, width in pieces], dtype=np.int64),
        np.array([head for _, head, *_ in pieces], dtype=np.int64),
    )


def allocate_by_head_curves(
    layers: Sequence[HeadCurves], total: int, lower: ArrayLike, upper: ArrayLike
) -> FloatArray:
    """Allocate budgets to layers so that the sum of the errors of all their heads is least.

    ``min sum_i sum_h e_ih(b_ih)  subject to  sum_i mean_h b_ih = total``, each curve replaced by its lower convex hull.
    Tokens go to the steepest slope of all first; equal slopes go to the earlier layer.  A layer that is added never
    raises the budget of another.

    Parameters
    ----------
    layers : sequence of HeadCurves
        One a layer.
    total : int
        Tokens over all layers.
    lower, upper : array_like
        ``[layer]`` bounds, tokens; a total beyond what the curves know is shared out evenly.

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
    # No layer keeps less than all of its heads do.
    low = np.maximum(low, np.minimum([float(curves.floor) for curves in layers], high))
    slopes, widths, owners = [], [], []
    for place, (curves, least, most) in enumerate(zip(layers, low, high, strict=True)):
        # The layer keeps at least `least`: its most valuable pieces up to there are no longer to be shared out.
        ends = curves.floor + np.cumsum(curves.widths) / curves.heads
        starts = ends - curves.widths / curves.heads
        widths.append(np.clip(ends, least, most) - np.clip(starts, least, most))
        # An error of one head, a token of all of them.
        slopes.append(curves.slopes * curves.heads)
        owners.append(np.full(len(ends), place))
    slope, width, owner = (np.concatenate(parts) for parts in (slopes, widths, owners))
    order = np.argsort(slope, kind="stable")
    width, owner = width[order], owner[order]
    left = max(0.0, total - float(low.sum()))
    taken = np.clip(left - (np.cumsum(width) - width), 0.0, width)
    result = low + np.bincount(owner, weights=taken, minlength=len(low))
    left -= float(taken.sum())
    while left > _EPSILON and (result < high).any():
        waiting = result < high
        more = np.minimum(np.where(waiting, left / waiting.sum(), 0.0), high - result)
        result, left = result + more, left - float(more.sum())
    return result
