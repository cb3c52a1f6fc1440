"""Slots in the order of their scores: how a layer holds its tokens while its budget may still shrink."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..selection import list_protected, rank_tokens
from ..utils.devices import spread_numbers


@dataclass(frozen=True)
class Choice:
    """Tokens that each of some rows keeps; the rows are those of the batch, or their heads, one after the other.

    Attributes
    ----------
    counts : list of int
        Tokens to keep.
    budgets, lengths : list of int
        Budget, and real tokens seen.
    how : dict
        Other arguments of :func:`rankkv.selection.select_tokens`.
    """

    counts: list[int]
    budgets: list[int]
    lengths: list[int]
    how: dict[str, Any]

    @property
    def protected(self) -> tuple[list[int], list[int]]:
        """Return what the budgets protect; see :func:`rankkv.selection.list_protected`."""
        return list_protected(self.lengths, self.budgets, **self.how)


@dataclass
class RankedSlots:
    """Order of a layer's slots, the best token first, so that fewer tokens are the first slots.

    A shrink then copies the first slots and sorts nothing.  That holds for budgets that protect equally many tokens.

    Attributes
    ----------
    order : Tensor
        ``[row, kv_head or 1, slot]`` int32, each slot's key.
    counts : list of int
        Tokens kept now, one entry per row of ``order``.
    protected : (list of int, list of int)
        What the budgets protect; see :func:`rankkv.selection.list_protected`.
    """

    order: Tensor
    counts: list[int]
    protected: tuple[list[int], list[int]]

    @classmethod
    def of(cls, scores: Tensor, real_index: Tensor, choice: Choice, in_order: bool) -> RankedSlots:
        """Rank ``scores [row, kv_head or 1, key]``; see :func:`rankkv.selection.rank_tokens`."""
        protected = choice.protected
        spans = {name: choice.how[name] for name in ("protect", "protect_before")}
        order = rank_tokens(scores, real_index, choice.lengths, protected, in_order=in_order, **spans)
        return cls(order[..., : max(choice.counts)], choice.counts, protected)

    def compact(self) -> None:
        """Hold the order in as little memory as it takes."""
        self.order = self.order.to(torch.int32, memory_format=torch.contiguous_format)

    def sort(self, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the first ``counts`` keys of each row in ascending order, and their slots here.

        Returns
        -------
        keys, slots : Tensor
            ``[row, kv_head or 1, max(counts)]`` int64.  A row that keeps fewer starts with -1.
        """
        width = max(counts)
        order = self.order[..., :width]
        if min(counts) < width:
            place = torch.arange(width, device=order.device)
            order = order.masked_fill(place >= spread_numbers(counts, order.device), -1)
        keys, slots = order.sort(dim=-1)
        return keys.to(torch.int64), slots
