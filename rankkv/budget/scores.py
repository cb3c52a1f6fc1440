"""Budgets by one top-k of the scores over all heads and layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .apportion import FloatArray, IntArray, spread_tokens
from .heads import HeadCurves


@dataclass(frozen=True, eq=False)
class HeadScores:
    """Scores of one layer's tokens, by which its heads compete.

    Parameters
    ----------
    table : ndarray
        ``[kv_head, token]`` float, each row descending: the scores of the tokens that the floor leaves out.  Minus
        infinity fills the end of a head that holds fewer tokens.
    floor : int
        Tokens that every head keeps anyway.
    """

    table: FloatArray
    floor: int

    @property
    def heads(self) -> int:
        """Key/value heads of the layer."""
        return len(self.table)

    @cached_property
    def _ranked(self) -> tuple[FloatArray, IntArray]:
        """Scores of all heads, the best first, and the head of each; ties go to the lower head."""
        flat = self.table.ravel()
        order = np.argsort(-flat, kind="stable")[: int(np.isfinite(flat).sum())]
        return flat[order], order // max(1, self.table.shape[1])

    @property
    def values(self) -> FloatArray:
        """Scores of all heads, descending."""
        return self._ranked[0]

    def average(self) -> HeadScores:
        """Return the mean of the heads' descending scores, for heads that keep equally many tokens.

        The same mean decides in KVCompose (Akulov et al., 2025, arXiv:2509.05165).
        """
        return HeadScores(self.table.mean(axis=0, keepdims=True), self.floor)

    def split(self, budget: int, room: Sequence[int], final: bool = True) -> IntArray:
        """Split a layer's budget over its heads by their best scores.

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
        >>> scores = HeadScores(np.array([[9.0, 8.0, 7.0], [8.5, 1.0, 0.5]]), floor=2)
        >>> scores.split(4, [5, 5]).tolist()
        [5, 3]
        """
        high = np.asarray(room, dtype=np.int64)
        result = np.minimum(min(self.floor, max(0, budget)), high)
        left = min(self.heads * budget, int(high.sum())) - int(result.sum())
        owners = self._ranked[1][: max(0, left)]
        taken = np.minimum(np.bincount(owners, minlength=self.heads), high - result)
        result, left = result + taken, left - int(taken.sum())
        # Tokens beyond the scores are spread evenly, such as when a layer outgrows the prompt while decoding.
        return spread_tokens(result, left, room)

    def settle(self, budget: int) -> HeadCurves:
        """Return the split of this one budget in a form that needs no scores.

        Examples
        --------
        >>> scores = HeadScores(np.array([[9.0, 8.0, 7.0], [8.5, 1.0, 0.5]]), floor=2)
        >>> scores.settle(4).split(4, [5, 5]).tolist()
        [5, 3]
        """
        room = self.floor + np.isfinite(self.table).sum(axis=1)
        counts = self.split(budget, room.tolist())
        floor = int(counts.min())
        above = np.flatnonzero(counts > floor)
        return HeadCurves(self.heads, floor, np.full(len(above), -1.0), counts[above] - floor, above)


class ScorePool:
    """Best scores of the layers so far, of which a layer's budget is the number that are its own.

    ``b_i = lower_i + (number of scores of layer i among the best of all layers) / heads_i``

    A layer that arrives later only takes places away, so budgets of earlier layers never grow.

    Examples
    --------
    >>> pool = ScorePool()
    >>> pool.add(0, HeadScores(np.array([[9.0, 5.0], [4.0, 1.0]]), 2), lower=2, upper=4)
    >>> pool.add(1, HeadScores(np.array([[8.0, 7.0], [6.0, 2.0]]), 2), lower=2, upper=4)
    >>> pool.share(places=2.0)
    >>> pool.count(2).tolist()
    [0.5, 1.5]
    """

    def __init__(self) -> None:
        self._scores = np.zeros(0)
        self._owners = np.zeros(0, dtype=np.int64)
        # A token of the layer's budget is one token in each of its heads.
        self._costs = np.zeros(0)

    def add(self, place: int, scores: HeadScores, lower: int, upper: int) -> None:
        """Add the scores of the layer at ``place``, as far as they lie between its bounds."""
        first, last = ((bound - scores.floor) * scores.heads for bound in (lower, upper))
        new = scores.values[max(0, first) : max(0, last)]
        self._scores = np.concatenate([self._scores, new])
        self._owners = np.concatenate([self._owners, np.full(len(new), place)])
        self._costs = np.concatenate([self._costs, np.full(len(new), 1.0 / scores.heads)])

    def share(self, places: float) -> None:
        """Keep the best scores that fit, and forget the others: they can only lose again."""
        # Both parts are sorted already, which a stable sort merges in linear time.  Ties go to the earlier layer.
        order = np.argsort(-self._scores, kind="stable")
        spent = np.cumsum(self._costs[order])
        kept = order[: int(np.searchsorted(spent, places + 1e-9, side="right"))]
        self._scores, self._owners, self._costs = self._scores[kept], self._owners[kept], self._costs[kept]

    def count(self, layers: int) -> FloatArray:
        """Return the tokens that each layer gets beyond its lower bound, ``[layer]`` float64."""
        return np.bincount(self._owners, weights=self._costs, minlength=layers).astype(np.float64)
