"""Tails: keys and values of the tokens that one conversation adds behind a context that others share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Tail:
    """Keys and values of some tokens, for every layer; its tensors are never changed.

    Parameters
    ----------
    keys, values : sequence of Tensor
        One for each layer, ``[kv_head, token, head_dim]``.

    Examples
    --------
    >>> tail = Tail([torch.zeros(2, 3, 4)], [torch.zeros(2, 3, 4)])
    >>> tail.length, tail.join(tail).length, tail.nbytes
    (3, 6, 192)
    """

    keys: Sequence[Tensor]
    values: Sequence[Tensor]

    @property
    def length(self) -> int:
        """Number of tokens."""
        return int(self.keys[0].shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def join(self, later: Tail) -> Tail:
        """Return a tail with the tokens of this one, then those of ``later``."""
        return Tail(*([torch.cat(pair, dim=1) for pair in zip(own, other, strict=True)] for own, other in (
            (self.keys, later.keys), (self.values, later.values)
        )))  # fmt: skip
