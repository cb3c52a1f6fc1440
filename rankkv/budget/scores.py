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
    def values(self) -> FloatArray:
        """Scores of all heads, descending."""
        flat = self.table.ravel()
        # Stable, because it merges what is sorted already.
        return -np.sort(-flat, kind="stable")[: int(np.isfinite(flat).sum())]

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
        best = count_best(list(self.table), [1.0] * self.heads, min(max(0, left), len(self.values)))
        taken = np.minimum(best, high - result)
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
        self._places: list[int] = []
        # Scores of each layer that still have a place, descending.
        self._scores: list[FloatArray] = []
        # A token of the layer's budget is one token in each of its heads.
        self._costs: list[float] = []

    def add(self, place: int, scores: HeadScores, lower: int, upper: int) -> None:
        """Add the scores of the layer at ``place``, as far as they lie between its bounds."""
        first, last = ((bound - scores.floor) * scores.heads for bound in (lower, upper))
        self._places.append(place)
        self._scores.append(scores.values[max(0, first) : max(0, last)])
        self._costs.append(1.0 / scores.heads)

    def share(self, places: float) -> None:
        """Keep the best scores that fit, and forget the others: they can only lose again."""
        counts = count_best(self._scores, self._costs, places)
        self._scores = [scores[:count] for scores, count in zip(self._scores, counts.tolist(), strict=True)]

    def count(self, layers: int) -> FloatArray:
        """Return the tokens that each layer gets beyond its lower bound, ``[layer]`` float64."""
        result = np.zeros(layers)
        for place, scores, cost in zip(self._places, self._scores, self._costs, strict=True):
            result[place] = len(scores) * cost
        return result


def count_best(rows: Sequence[FloatArray], costs: Sequence[float], places: float) -> IntArray:
    """Count the scores of each row among the best of all rows, as many as find a place.

    Equal scores of an earlier row come first.  Rows are searched, not merged, so the time hardly grows with them.

    Parameters
    ----------
    rows : sequence of ndarray
        Descending scores.
    costs : sequence of float
        Places that one score of each row takes.
    places : float
        Places of all rows.

    Returns
    -------
    ndarray
        ``[row]`` int64.

    Examples
    --------
    >>> count_best([np.array([9.0, 5.0, 5.0]), np.array([8.0, 5.0])], [1.0, 1.0], 4).tolist()
    [3, 1]
    """
    limit, cost = places + 1e-9, np.asarray(costs, dtype=np.float64)
    ascending = [-row for row in rows]
    # At least and at most so many of each row are among the best.
    low, high = np.zeros(len(rows), dtype=np.int64), np.array([len(row) for row in rows], dtype=np.int64)
    if float(high @ cost) <= limit:
        return high
    while (high > low).any():
        widest = int((high - low).argmax())
        pivot = ascending[widest][(low[widest] + high[widest]) // 2]
        above = np.array([row.searchsorted(pivot, side="left") for row in ascending])
        level = np.array([row.searchsorted(pivot, side="right") for row in ascending])
        above, level = above.clip(low, high), level.clip(low, high)
        if float(level @ cost) <= limit:
            low = level
        elif float(above @ cost) > limit:
            high = above
        else:
            left = limit - float(above @ cost)
            for place, (ties, price) in enumerate(zip((level - above).tolist(), costs, strict=True)):
                taken = min(ties, int(left / price))
                above[place] += taken
                left -= taken * price
                if taken < ties:
                    break
            return above
    return low
