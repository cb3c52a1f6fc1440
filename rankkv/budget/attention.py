"""AttentionTable: the share of attention that the heads of one layer keep, by the number of tokens kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .apportion import FloatArray

#: Counts the protected newest and first tokens of a budget.
CountProtected = Callable[[int], tuple[int, int]]


@dataclass(frozen=True, eq=False)
class AttentionTable:
    """Cumulative attention of one layer's test queries to the tokens of each head.

    Parameters
    ----------
    newest, first, others : ndarray
        ``[kv_head, token + 1]`` shares of attention, each row from 0 on: to the newest tokens, the newest first; to
        the first tokens; to all others, the highest score first.
    """

    newest: FloatArray
    first: FloatArray
    others: FloatArray

    def sum_kept(self, counts: Sequence[int], count_protected: CountProtected) -> FloatArray:
        """Sum the attention to the tokens that the heads keep, ``[kv_head]``.

        Parameters
        ----------
        counts : sequence of int
            ``[kv_head]`` tokens kept.
        count_protected : callable
            Newest and first tokens that a number of tokens includes.

        Examples
        --------
        >>> table = AttentionTable(np.array([[0.0, 0.5]]), np.array([[0.0, 0.1]]), np.array([[0.0, 0.3, 0.4]]))
        >>> table.sum_kept([3], lambda count: (1, 1)).round(6).tolist()
        [0.9]
        """
        kept = np.zeros(len(self.others))
        for head, count in enumerate(counts):
            recent, first = count_protected(count)
            recent, first = min(recent, self.newest.shape[1] - 1), min(first, self.first.shape[1] - 1)
            rest = min(max(0, count - recent - first), self.others.shape[1] - 1)
            if rest + recent + first < count:
                # More tokens than there are others: the rest are newest and first ones.
                recent, first = self.newest.shape[1] - 1, self.first.shape[1] - 1
            kept[head] = self.newest[head, recent] + self.first[head, first] + self.others[head, rest]
        return kept


def compute_lost(tables: Sequence[AttentionTable], kept: Sequence[FloatArray]) -> float:
    """Compute the share of attention to evicted tokens, the mean over all heads of all layers.

    Parameters
    ----------
    tables : sequence of AttentionTable
        One per layer.
    kept : sequence of ndarray
        ``[layer][kv_head]``, of :meth:`AttentionTable.sum_kept`.
    """
    whole = np.concatenate(
        [table.newest[:, -1] + table.first[:, -1] + table.others[:, -1] for table in tables]
    )
    lost = 1.0 - np.concatenate(list(kept)) / np.where(whole > 0.0, whole, 1.0)
    return float(np.clip(np.where(whole > 0.0, lost, 1.0), 0.0, 1.0).mean())
