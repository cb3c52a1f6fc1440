"""From measured sensitivities of key/value heads to how a layer's budget is spread over its heads."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike

from ..config import RankKVConfig
from ..errors import ProfileError
from ..profile.record import RankProfile
from .apportion import FloatArray, IntArray, allocate_integers, allocate_shares
from .calibrated import SENSITIVITY_FLOOR

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


def weigh_heads(config: RankKVConfig, profile: RankProfile | None) -> Sequence[HeadSplit]:
    """Return how each layer's budget is split by what a profile says of its heads; nothing if it is not asked.

    Parameters
    ----------
    config : RankKVConfig
        All options.
    profile : RankProfile, optional
        The one the strategy uses; None takes that of the options.
    """
    used = profile if profile is not None else config.profile
    if config.head_budgets != "profile" or not isinstance(used, RankProfile):
        return []
    return [HeadWeights(row.tolist(), config.head_floor) for row in compute_head_weights(used)]
