"""How a layer holds its kept keys and values between two forwards: as they are, as int8, or in CPU memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


class PlainStorage:
    """Holds a tensor as it is."""

    def __init__(self) -> None:
        self._tensor: Tensor | None = None

    def put(self, tensor: Tensor | None) -> None:
        """Hold ``tensor [batch, kv_head, slot, head_dim]``, in full until :meth:`rest`."""
        self._tensor = tensor

    def get(self) -> Tensor | None:
        """Return the tensor, on its device and in its dtype."""
        return self._tensor

    def rest(self) -> None:
        """Go over to the form in which the tensor waits for the next forward."""

    def held(self) -> list[Tensor]:
        """Return the tensors that take memory now."""
        return [] if self._tensor is None else [self._tensor]


class Int8Storage(PlainStorage):
    """Holds a tensor at rest as int8 with one float32 scale a token and head: ``x ~ q * max|x| / 127``.

    Going to rest again changes nothing: the largest entry of a token gives back the same scale.
    """

    def __init__(self) -> None:
        super().__init__()
        self._packed: tuple[Tensor, Tensor] | None = None
        self._dtype = torch.float32

    def put(self, tensor: Tensor | None) -> None:
        """Hold ``tensor`` in full until :meth:`rest`."""
        super().put(tensor)
        self._packed = None

    def get(self) -> Tensor | None:
        """Return the tensor, computed back from int8 where it rests."""
        if self._packed is None:
            return self._tensor
        quantized, scale = self._packed
        return (quantized * scale).to(self._dtype)

    def rest(self) -> None:
        """Quantize what is held in full."""
        if self._tensor is None:
            return
        scale = (
            self._tensor.abs().amax(dim=-1, keepdim=True).float().clamp(min=torch.finfo(torch.float32).tiny)
            / 127
        )
        self._dtype = self._tensor.dtype
        self._packed = ((self._tensor / scale).round().to(torch.int8), scale)
        self._tensor = None

    def held(self) -> list[Tensor]:
        """Return the tensors that take memory now."""
        return super().held() if self._packed is None else list(self._packed)


class OffloadStorage(PlainStorage):
    """Holds a tensor at rest in CPU memory, and brings it back to its device when it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self._device: torch.device | None = None

    def put(self, tensor: Tensor | None) -> None:
        """Hold ``tensor`` where it is until :meth:`rest`."""
        super().put(tensor)
        self._device = None if tensor is None else tensor.device

    def get(self) -> Tensor | None:
        """Return the tensor on the device it came from."""
        return self._tensor if self._tensor is None else self._tensor.to(self._device)

    def rest(self) -> None:
        """Move the tensor to the CPU."""
        if self._tensor is not None:
            self._tensor = self._tensor.to("cpu")


STORAGES: dict[str, type[PlainStorage]] = {
    "full": PlainStorage,
    "int8": Int8Storage,
    "offload": OffloadStorage,
}


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
        ``[batch * kv_head * slot]`` int64, packed token of each slot; an empty slot shows a token of its own head.
    counts : list of list of int
        Packed tokens, ``[row][kv_head]``.
    blank : Tensor, optional
        ``[head, 2]`` int64, row and key/value head of each head that holds no token; their slots are zeros.

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
    blank: Tensor | None = None

    @classmethod
    def of(cls, valid: Tensor) -> SlotLayout:
        """Build the layout of ``valid [batch, kv_head, slot]`` bool."""
        counts = valid.sum(-1)
        # An empty slot shows a token of its own head: that of another row could carry its NaN into this one.
        first = counts.flatten().cumsum(0).view_as(counts) - counts
        source = first[..., None] + (valid.cumsum(-1) - 1).clamp(min=0)
        kept = counts.tolist()
        blank = (counts == 0).nonzero() if not all(map(all, kept)) else None
        return cls(tuple(valid.shape), valid.flatten().nonzero()[:, 0], source.flatten(), kept, blank)

    def pack(self, tensor: Tensor) -> Tensor:
        """Pack ``[batch, kv_head, slot, head_dim]`` to ``[token, head_dim]``."""
        return tensor.reshape(-1, tensor.shape[-1]).index_select(0, self.held)

    def unpack(self, packed: Tensor) -> Tensor:
        """Pad ``[token, head_dim]`` to ``[batch, kv_head, slot, head_dim]``; empty slots hold finite numbers."""
        if not len(packed):
            return packed.new_zeros((*self.shape, packed.shape[-1]))
        # A head without any token is past the end where it is the last one.
        source = self.source if self.blank is None else self.source.clamp(max=len(packed) - 1)
        padded = packed.index_select(0, source).view(*self.shape, packed.shape[-1])
        if self.blank is not None:
            padded[self.blank[:, 0], self.blank[:, 1]] = 0
        return padded


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
