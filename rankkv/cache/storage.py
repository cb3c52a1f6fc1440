"""Storage of kept keys and values between two forwards: unchanged, int8, in CPU memory, or without empty slots."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from ..utils.devices import send_numbers

#: Slots of the room that a decode step makes: its own token's, and those of tokens to come.
ROOM = 64


class PlainStorage:
    """Hold a tensor unchanged; a decode step makes room behind its tokens for those to come."""

    def __init__(self) -> None:
        self._tensor: Tensor | None = None
        # The memory of which the tensor is the first part; None if the tensor has memory of its own.
        self._buffer: Tensor | None = None

    def put(self, tensor: Tensor | None) -> None:
        """Hold ``tensor [batch, kv_head, slot, head_dim]`` in full until :meth:`rest`."""
        self._tensor, self._buffer = tensor, None

    def get(self) -> Tensor | None:
        """Return the tensor, on its device and in its dtype."""
        return self._tensor

    def append(self, states: Tensor, room: bool = True) -> Tensor:
        """Add the states of new tokens and return all tokens.

        A single token is written into room behind the others, so that a decode step copies no other token.  Where
        nothing may be written in place, and without ``room``, the tokens are copied and joined.
        """
        held, buffer = self.get(), self._buffer
        if held is None:
            self.put(states)
            return states
        width, new = held.shape[-2], states.shape[-2]
        if buffer is None or buffer.shape[-2] < width + new or not may_write(buffer, states):
            buffer = self._make_room(held, states) if room else None
        if buffer is None:
            joined = torch.cat([held, states], dim=-2)
            self.put(joined)
            return joined
        buffer[..., width : width + new, :] = states
        # The tokens before are never written again: a view that someone holds stays as it is.
        self._tensor, self._buffer = buffer[..., : width + new, :], buffer
        return self._tensor

    def _make_room(self, held: Tensor, states: Tensor) -> Tensor | None:
        """Return a copy of the tokens with room behind them, or None if ``states`` is not a decode step's token."""
        *lead, width, size = held.shape
        if width == 0 or states.shape[-2] != 1 or not may_write(held, states):
            return None
        buffer = held.new_empty((*lead, width + ROOM, size))
        buffer[..., :width, :] = held
        return buffer

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return a copy without room."""
        if self._buffer is not None and self._tensor is not None:
            memo[id(self._tensor)] = self._tensor.clone(memory_format=torch.contiguous_format)
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(
            {name: copy.deepcopy(value, memo) for name, value in vars(self).items() if name != "_buffer"}
        )
        copied._buffer = None
        return copied

    @property
    def room_bytes(self) -> int:
        """Bytes held for tokens to come."""
        return (
            0 if self._buffer is None or self._tensor is None else self._buffer.nbytes - self._tensor.nbytes
        )

    def rest(self) -> None:
        """Convert the tensor to its stored form; it waits there for the next forward."""

    def held(self) -> list[Tensor]:
        """Return the tensors that use memory now."""
        return [] if self._tensor is None else [self._tensor]


def may_write(memory: Tensor, states: Tensor) -> bool:
    """Return True if ``states`` may be written into ``memory`` in place.

    Not while gradients are recorded: a saved tensor must not change.  Nor into memory of inference mode outside it.
    """
    usable = torch.is_inference_mode_enabled() or not memory.is_inference()
    return (
        usable
        and not torch.is_grad_enabled()
        and memory.dtype == states.dtype
        and memory.device == states.device
        and memory.shape[:-2] == states.shape[:-2]
    )


class Int8Storage(PlainStorage):
    """Store a tensor as int8 with one float32 scale per token and head: ``x ~ q * max|x| / 127``.

    Storing the result again changes nothing: the largest entry of a token gives the same scale.
    """

    def __init__(self) -> None:
        super().__init__()
        self._quantized: tuple[Tensor, Tensor] | None = None
        self._dtype = torch.float32

    def put(self, tensor: Tensor | None) -> None:
        """Hold ``tensor`` in full until :meth:`rest`."""
        super().put(tensor)
        self._quantized = None

    def get(self) -> Tensor | None:
        """Return the tensor in full, dequantized if it is stored."""
        if self._quantized is None:
            return self._tensor
        quantized, scale = self._quantized
        return (quantized * scale).to(self._dtype)

    def _make_room(self, held: Tensor, states: Tensor) -> Tensor | None:
        """Return None: every step converts all tokens anyway."""
        return None

    def rest(self) -> None:
        """Quantize the tensor held in full."""
        if self._tensor is None:
            return
        # Clamped, so that an all-zero token does not divide by zero.
        scale = (
            self._tensor.abs().amax(dim=-1, keepdim=True).float().clamp(min=torch.finfo(torch.float32).tiny)
            / 127
        )
        self._dtype = self._tensor.dtype
        self._quantized = ((self._tensor / scale).round().to(torch.int8), scale)
        self._tensor = None

    def held(self) -> list[Tensor]:
        """Return the tensors that use memory now."""
        return super().held() if self._quantized is None else list(self._quantized)


class OffloadStorage(PlainStorage):
    """Store a tensor in CPU memory; :meth:`get` moves it back to its device."""

    def __init__(self) -> None:
        super().__init__()
        self._device: torch.device | None = None

    def put(self, tensor: Tensor | None) -> None:
        """Hold ``tensor`` on its device until :meth:`rest`."""
        super().put(tensor)
        self._device = None if tensor is None else tensor.device

    def get(self) -> Tensor | None:
        """Return the tensor on the device it came from."""
        return None if self._tensor is None else self._tensor.to(self._device)

    def _make_room(self, held: Tensor, states: Tensor) -> Tensor | None:
        """Return None: every step moves all tokens anyway."""
        return None

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
    """Map the slots of ``[batch, kv_head, slot]`` that hold a token to a list of tokens, and back.

    Parameters
    ----------
    shape : tuple of int
        ``(batch, kv_head, slot)``.
    counts : list of list of int
        Tokens held, ``[row][kv_head]``.
    device : torch.device
        Where the layout is used.
    slots : Tensor, optional
        ``[token]`` int64, see :attr:`held`; None if the empty slots of each head stand first.
    found : Tensor, optional
        ``[batch * kv_head * slot]``, see :attr:`source`; None if the empty slots of each head stand first.

    Examples
    --------
    >>> layout = SlotLayout.of(torch.tensor([[[True, True], [False, True]]]))
    >>> tokens = layout.unpad(torch.tensor([[[[1.0], [2.0]], [[0.0], [3.0]]]]))
    >>> tokens.flatten().tolist(), layout.pad(tokens)[:, :, -1].flatten().tolist()
    ([1.0, 2.0, 3.0], [2.0, 3.0])
    """

    shape: tuple[int, ...]
    counts: list[list[int]]
    device: torch.device
    slots: Tensor | None = None
    found: Tensor | None = None

    @classmethod
    def of(cls, valid: Tensor) -> SlotLayout:
        """Build the layout of ``valid [batch, kv_head, slot]`` bool; the host waits for the device."""
        counts = valid.sum(-1)
        # An empty slot shows a token of its own head: that of another row could carry its NaN into this one.
        first = counts.flatten().cumsum(0).view_as(counts) - counts
        source = first[..., None] + (valid.cumsum(-1) - 1).clamp(min=0)
        kept = counts.tolist()
        held = valid.flatten().nonzero()[:, 0]
        return cls(tuple(valid.shape), kept, valid.device, held, source.flatten())

    @classmethod
    def of_counts(cls, counts: list[list[int]], slots: int, device: torch.device) -> SlotLayout:
        """Build the layout of heads whose empty slots stand first; the host does not wait for the device.

        Parameters
        ----------
        counts : list of list of int
            Tokens held, ``[row][kv_head]``.
        slots : int
            Slots of every head.
        device : torch.device
            Where the layout is used.

        Examples
        --------
        >>> SlotLayout.of_counts([[2, 1]], 2, torch.device("cpu")).held.tolist()
        [0, 1, 3]
        """
        return cls((len(counts), len(counts[0]), slots), counts, device)

    def is_like(self, counts: list[list[int]], slots: int) -> bool:
        """Return True if :meth:`of_counts` would build the same layout from these counts."""
        return self.found is None and self.counts == counts and self.shape[-1] == slots

    @cached_property
    def held(self) -> Tensor:
        """Flat index of each token's slot, ``[token]`` int64."""
        if self.slots is not None:
            return self.slots
        flat = [count for row in self.counts for count in row]
        total, start, shifts = sum(flat), 0, []
        for head, count in enumerate(flat):
            # From a token's number to its slot.
            shifts.append((head + 1) * self.shape[-1] - count - start)
            start += count
        shift, sizes = send_numbers([*shifts, *flat], self.device).view(2, -1)
        numbers = torch.arange(total, device=self.device)
        return torch.repeat_interleave(shift, sizes, output_size=total) + numbers

    @cached_property
    def blank(self) -> Tensor | None:
        """Row and key/value head of each head without a token, ``[head, 2]`` int64; its slots are zeros."""
        return _find_blank(self.counts, self.device)

    @cached_property
    def source(self) -> Tensor:
        """Token of each slot, ``[batch * kv_head * slot]`` int64; an empty slot points to a token of its own head."""
        if self.found is not None:
            return self.found
        flat = [count for row in self.counts for count in row]
        starts = [0, *itertools.accumulate(flat)][:-1]
        # Token of slot 0, if the empty slots before the first token counted too.
        before = [start + count - self.shape[-1] for start, count in zip(starts, flat, strict=True)]
        first, least = send_numbers([*before, *starts], self.device).view(2, -1, 1)
        return torch.maximum(torch.arange(self.shape[-1], device=first.device) + first, least).flatten()

    def unpad(self, tensor: Tensor) -> Tensor:
        """Drop the empty slots: ``[batch, kv_head, slot, head_dim]`` to ``[token, head_dim]``."""
        return tensor.reshape(-1, tensor.shape[-1]).index_select(0, self.held)

    def pad(self, tokens: Tensor) -> Tensor:
        """Pad ``[token, head_dim]`` to ``[batch, kv_head, slot, head_dim]``; empty slots hold finite numbers."""
        if not len(tokens):
            return tokens.new_zeros((*self.shape, tokens.shape[-1]))
        # A head without a token may point past the end.
        source = self.source if self.blank is None else self.source.clamp(max=len(tokens) - 1)
        padded = tokens.index_select(0, source).view(*self.shape, tokens.shape[-1])
        if self.blank is not None:
            padded[self.blank[:, 0], self.blank[:, 1]] = 0
        return padded


def _find_blank(counts: list[list[int]], device: torch.device) -> Tensor | None:
    """Return row and head of each head without a token, ``[head, 2]`` int64, or None if there is none."""
    blank = [(row, head) for row, heads in enumerate(counts) for head, count in enumerate(heads) if not count]
    return send_numbers([place for pair in blank for place in pair], device).view(-1, 2) if blank else None


class UnpaddedStorage(PlainStorage):
    """Store the tokens of the last compression without empty slots, and later tokens unchanged.

    The padded form exists only from :meth:`append` to :meth:`rest`, for one attention call.

    Parameters
    ----------
    build : callable
        Builds the storage of each of the two parts: unchanged, int8 or in CPU memory.
    """

    def __init__(self, build: Callable[[], PlainStorage]) -> None:
        # The inherited tensor is the padded form.
        super().__init__()
        self._kept, self._later = build(), build()
        #: Slots of the tokens without padding; None if all tokens are held in full.
        self.layout: SlotLayout | None = None

    def put(self, tensor: Tensor | None) -> None:
        """Hold ``tensor [batch, kv_head, slot, head_dim]`` in full until :meth:`unpad`."""
        self._tensor = self.layout = None
        self._kept.put(None)
        self._later.put(tensor)

    def get(self) -> Tensor | None:
        """Return the padded form, ``[batch, kv_head, slot, head_dim]``."""
        if self._tensor is not None:
            return self._tensor
        later = self._later.get()
        return None if later is None else self._join(later)

    def append(self, states: Tensor, room: bool = True) -> Tensor:
        """Add the states of new tokens and return the padded form."""
        if self.layout is None:
            return self._later.append(states, room)
        # Joined without room: the padded form is made anew at every step anyway.
        earlier = self._later.get()
        if earlier is not None and earlier.shape[-2]:
            later = torch.cat([earlier, states], dim=-2)
        else:
            # A copy: the model's tensor may be part of a larger one, or memory that its next forward writes again.
            later = states.clone(memory_format=torch.contiguous_format)
        self._later.put(later)
        self._tensor = self._join(later)
        return self._tensor

    @property
    def parts(self) -> tuple[Tensor, Tensor] | None:
        """The tokens without padding, ``[token, head_dim]``, and the later tokens; None without a layout."""
        kept, later = self._kept.get(), self._later.get()
        return None if self.layout is None or kept is None or later is None else (kept, later)

    def take_parts(self) -> tuple[Tensor, Tensor] | None:
        """Give up the tokens without padding, ``[token, head_dim]``, and the later tokens; None without a layout."""
        parts = self.parts
        if parts is None:
            return None
        for part in (self._kept, self._later):
            part.put(None)
        self._tensor = None
        return parts

    def fill(self, kept: Tensor, later: Tensor) -> None:
        """Take back what :meth:`take_parts` gave, with more later tokens; the layout has stayed."""
        self._kept.put(kept)
        self._later.put(later)

    def pick(self, tokens: Tensor, layout: SlotLayout | None, shape: tuple[int, ...]) -> None:
        """Keep only some tokens, without ever padding them.

        Parameters
        ----------
        tokens : Tensor
            ``[token]`` int64, numbers of the tokens to keep, head after head.  Tokens of the present layout count
            first, then the later ones, head after head; without a layout every slot counts.
        layout : SlotLayout or None
            The new layout; None if all heads keep equally many.
        shape : tuple of int
            ``(batch, kv_head, slot)`` without a layout.
        """
        later = self._later.get()
        if later is None:
            return
        size = later.shape[-1]
        flat, kept = later.reshape(-1, size), self._kept.get()
        if self.layout is not None and kept is not None:
            flat = torch.cat([kept, flat]) if len(flat) else kept
        taken = flat.index_select(0, tokens)
        if layout is None:
            self.put(taken.view(*shape, size))
            return
        self._tensor, self.layout = None, layout
        self._kept.put(taken)
        self._later.put(taken.new_empty((*layout.shape[:2], 0, size)))

    def keep_first(self, layout: SlotLayout) -> None:
        """Keep only the first tokens of each head, as many as ``layout`` says, in memory of their own."""
        kept = self._kept.get()
        if self.layout is None or kept is None:
            return
        parts = kept.split([count for row in self.layout.counts for count in row])
        counts = [count for row in layout.counts for count in row]
        self._tensor, self.layout = None, layout
        self._kept.put(torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]))

    @property
    def room_bytes(self) -> int:
        """Bytes held for tokens to come."""
        return self._kept.room_bytes + self._later.room_bytes

    @property
    def is_plain(self) -> bool:
        """True if both parts are stored unchanged."""
        return type(self._kept) is PlainStorage

    def unpad(self, layout: SlotLayout) -> None:
        """Drop the empty slots of ``layout`` from the first slots; all later slots hold a token."""
        tensor = self._later.get()
        if tensor is None:
            return
        slots = layout.shape[-1]
        self._kept.put(layout.unpad(tensor[..., :slots, :]))
        # A copy, so that no view keeps the padded form in memory.
        self._later.put(tensor[..., slots:, :].clone(memory_format=torch.contiguous_format))
        self.layout = layout

    def rest(self) -> None:
        """Drop the padded form, and convert both parts to their stored form."""
        self._tensor = None
        self._kept.rest()
        self._later.rest()

    def held(self) -> list[Tensor]:
        """Return the tensors that use memory now."""
        return [*super().held(), *self._kept.held(), *self._later.held()]

    @property
    def slots(self) -> int:
        """Number of slots of the padded form."""
        held = self._later.held()
        return (0 if self.layout is None else self.layout.shape[-1]) + (held[0].shape[-2] if held else 0)

    def _join(self, later: Tensor) -> Tensor:
        kept = self._kept.get()
        if self.layout is None or kept is None:
            return later
        return torch.cat([self.layout.pad(kept), later], dim=-2)
