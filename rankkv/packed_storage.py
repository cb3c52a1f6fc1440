"""Heads that keep different numbers of tokens: at rest only the slots that hold one, packed; padded for attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .cache.storage import PlainStorage


@dataclass(frozen=True)
class SlotLayout:
    """Which slots of ``[batch, kv_head, slot]`` hold a token, as indices both ways.

    Parameters
    ----------
    shape : tuple of int
        ``(batch, kv_head, slot)``.
    held : Tensor
        ``[token]`` int64, flat index of the slot of each packed token.
    source : Tensor
        ``[batch * kv_head * slot]`` int64, packed token of each slot; an empty slot shows some other token.
    counts : list of list of int
        Packed tokens, ``[row][kv_head]``.

    Examples
    --------
    >>> layout = SlotLayout.of(torch.tensor([[[True, True], [False, True]]]))
    >>> packed = layout.pack(torch.tensor([[[[1.0], [2.0]], [[0.0], [3.0]]]]))
    >>> packed.flatten().tolist(), layout.unpack(packed)[:, :, -1].flatten().tolist()
    ([1.0, 2.0, 3.0], [2.0, 3.0])
    """

    shape: tuple[int, ...]
    held: Tensor
    source: Tensor
    counts: list[list[int]]

    @classmethod
    def of(cls, valid: Tensor) -> SlotLayout:
        """Build the layout of ``valid [batch, kv_head, slot]`` bool."""
        flat = valid.flatten()
        source = (flat.cumsum(0) - 1).clamp(min=0)
        return cls(tuple(valid.shape), flat.nonzero()[:, 0], source, valid.sum(-1).tolist())

    def pack(self, tensor: Tensor) -> Tensor:
        """Pack ``[batch, kv_head, slot, head_dim]`` to ``[token, head_dim]``."""
        return tensor.reshape(-1, tensor.shape[-1]).index_select(0, self.held)

    def unpack(self, packed: Tensor) -> Tensor:
        """Pad ``[token, head_dim]`` to ``[batch, kv_head, slot, head_dim]``; empty slots hold finite numbers."""
        if not len(packed):
            return packed.new_zeros((*self.shape, packed.shape[-1]))
        return packed.index_select(0, self.source).view(*self.shape, packed.shape[-1])


class PackedStorage(PlainStorage):
    """Holds what was kept at the last compression packed, and what came later as it is.

    The padded form exists from :meth:`append` to :meth:`rest`: for one attention call.

    Parameters
    ----------
    build : callable
        Builds the storage of each of the two parts, so that they can rest as int8 or in CPU memory.
    """

    def __init__(self, build: Callable[[], PlainStorage]) -> None:
        # The inherited tensor is the padded form.
        super().__init__()
        self._kept, self._later = build(), build()
        #: Where the packed tokens stand; None if all are held as they are.
        self.layout: SlotLayout | None = None

    def put(self, tensor: Tensor | None) -> None:
        """Hold ``tensor [batch, kv_head, slot, head_dim]`` in full, until :meth:`pack`."""
        self._tensor = self.layout = None
        self._kept.put(None)
        self._later.put(tensor)

    def get(self) -> Tensor | None:
        """Return the padded form, ``[batch, kv_head, slot, head_dim]``."""
        if self._tensor is not None:
            return self._tensor
        later = self._later.get()
        return None if later is None else self._join(later)

    def append(self, states: Tensor) -> Tensor:
        """Add the states of new tokens and return the padded form."""
        earlier = self._later.get()
        later = states if earlier is None else torch.cat([earlier, states], dim=-2)
        self._later.put(later)
        self._tensor = self._join(later)
        return self._tensor

    def _join(self, later: Tensor) -> Tensor:
        kept = self._kept.get()
        if self.layout is None or kept is None:
            return later
        return torch.cat([self.layout.unpack(kept), later], dim=-2)

    def pack(self, layout: SlotLayout) -> None:
        """Pack the first slots, those of ``layout``; later slots all hold a token."""
        tensor = self._later.get()
        if tensor is None:
            return
        slots = layout.shape[-1]
        self._kept.put(layout.pack(tensor[..., :slots, :]))
        # A copy, so that no view keeps the padded form in memory.
        self._later.put(tensor[..., slots:, :].clone(memory_format=torch.contiguous_format))
        self.layout = layout

    @property
    def slots(self) -> int:
        """Slots of the padded form."""
        held = self._later.held()
        return (0 if self.layout is None else self.layout.shape[-1]) + (held[0].shape[-2] if held else 0)

    def rest(self) -> None:
        """Drop the padded form; both parts go over to the form in which they wait."""
        self._tensor = None
        self._kept.rest()
        self._later.rest()

    def held(self) -> list[Tensor]:
        """Return the tensors that take memory now."""
        return [*super().held(), *self._kept.held(), *self._later.held()]
