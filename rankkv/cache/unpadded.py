"""Heads of different lengths without padding: one head after the other in memory, each with room for tokens to come."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .storage import ROOM, SlotLayout, may_write

# What flash attention's kernels for sequences of different lengths can run.
_VARLEN_DTYPES, _LARGEST_HEAD, _HEAD_STEP = (torch.float16, torch.bfloat16), 256, 8
_OLDEST_CARD = (8, 0)


class UnpaddedHeads:
    """Keys and values of one layer while it decodes: no slot is empty but those of the room behind each head.

    ``keys`` and ``values`` are ``[slot, head_dim]``.  Each head has its kept tokens, its later tokens, then its room.

    Parameters
    ----------
    layout : SlotLayout
        How many tokens each head kept.
    kept : (Tensor, Tensor)
        Keys and values of the kept tokens, ``[token, head_dim]``, head after head.
    later : (Tensor, Tensor)
        Keys and values of later tokens, ``[batch, kv_head, token, head_dim]``.
    """

    def __init__(self, layout: SlotLayout, kept: tuple[Tensor, Tensor], later: tuple[Tensor, Tensor]) -> None:
        self._layout = layout
        self._counts = [count for row in layout.counts for count in row]
        device = kept[0].device
        #: Later tokens of each head, and how many of them there were when the room was made.
        self.later = self._earlier = later[0].shape[-2]
        room = self._earlier + ROOM
        self._starts = [0]
        for count in self._counts:
            self._starts.append(self._starts[-1] + count + room)
        counts = torch.tensor(self._counts, device=device)
        #: First slot of each head, and the end, ``[head + 1]``.
        starts = torch.tensor(self._starts, device=device)
        self._tokens = torch.arange(len(kept[0]), device=device) + torch.repeat_interleave(
            starts[:-1] - (counts.cumsum(0) - counts), counts, output_size=len(kept[0])
        )
        #: Slot of each later token, ``[token, head]``.
        self._slots = starts[:-1] + counts + torch.arange(room, device=device)[:, None]
        #: Tokens of each head after each later token, ``[token, head]``, as the kernels want them.
        self._used = (counts + torch.arange(1, room + 1, device=device)[:, None]).to(torch.int32)
        self._bounds = starts.to(torch.int32)
        self._queries = torch.arange(len(self._starts), dtype=torch.int32, device=device)
        self.keys, self.values = (self._lay_out(tokens, new) for tokens, new in zip(kept, later, strict=True))

    def _lay_out(self, kept: Tensor, later: Tensor) -> Tensor:
        # Zeros, so that a kernel that loads whole blocks meets no NaN in the room behind a head.
        flat = kept.new_zeros((self._starts[-1], kept.shape[-1]))
        flat.index_copy_(0, self._tokens, kept)
        if self.later:
            index = self._slots[: self.later].T.flatten()
            flat.index_copy_(0, index, later.reshape(-1, later.shape[-1]))
        return flat

    def split(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return kept and later tokens of the keys, then of the values, in memory of their own and without room."""
        index = self._slots[: self.later].T.flatten()
        shape = (*self._layout.shape[:2], self.later)
        keys, values = (
            (flat.index_select(0, self._tokens), flat.index_select(0, index).view(*shape, flat.shape[-1]))
            for flat in (self.keys, self.values)
        )
        return keys, values

    def has_room(self, states: Tensor) -> bool:
        """Return True if one more token of each head can be written here."""
        left = ROOM - (self.later - self._earlier)
        # One head after the other has no axes of rows and heads, so only dtype and device must agree.
        return left > 0 and may_write(self.keys[None, None], states[:1, :1])

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Write one token of each head, ``[batch, kv_head, 1, head_dim]``."""
        slots = self._slots[self.later]
        for flat, states in ((self.keys, keys), (self.values, values)):
            flat.index_copy_(0, slots, states.reshape(-1, states.shape[-1]))
        self.later += 1

    def held(self) -> list[Tensor]:
        """Return the tensors that hold keys and values."""
        return [self.keys, self.values]

    @property
    def room_bytes(self) -> int:
        """Bytes held for tokens to come."""
        used = sum(self._counts) + self.later * len(self._counts)
        return sum(flat.nbytes - used * flat.shape[-1] * flat.element_size() for flat in self.held())

    def attend(self, query: Tensor, scaling: float | None) -> Tensor:
        """Let one query of each query head attend to all tokens of its key/value head.

        Parameters
        ----------
        query : Tensor
            ``[batch, head, 1, head_dim]``.
        scaling : float, optional
            Factor on the dot products; None for ``head_dim ** -0.5``.

        Returns
        -------
        Tensor
            ``[batch, 1, head, head_dim]``, as transformers' attention functions return it.
        """
        batch, heads = query.shape[:2]
        count = len(self._counts)
        # The query heads of a key/value head stand together, and attend as the rows of one product.
        groups = query.reshape(count, heads * batch // count, query.shape[-1])
        kernel = find_varlen() if query.device.type != "cpu" else None
        attend = self._attend_in_turn if kernel is None else self._attend_at_once
        return attend(groups, scaling).view(batch, 1, heads, -1)

    def _attend_in_turn(self, groups: Tensor, scaling: float | None) -> Tensor:
        """Attend head by head: one product over exactly the tokens that the head has."""
        scale = groups.shape[-1] ** -0.5 if scaling is None else scaling
        plain = groups.dtype in (torch.float32, torch.float64)
        outputs = []
        for query, start, count in zip(groups.unbind(), self._starts, self._counts, strict=False):
            stop = start + count + self.later
            keys, values = self.keys[start:stop], self.values[start:stop]
            if plain:
                # The same as below, started in less time.
                logits = torch.mm(query, keys.T).mul_(scale)
                outputs.append(torch.mm(torch.softmax(logits, dim=-1), values))
            else:
                # In half precision the kernel adds up in float32, as it does over the padded heads.
                # Four axes, as its kernels for a CPU want them.
                one, all_keys, all_values = query[None, None], keys[None, None], values[None, None]
                outputs.append(scaled_dot_product_attention(one, all_keys, all_values, scale=scale)[0, 0])
        return torch.cat(outputs)

    def _attend_at_once(self, groups: Tensor, scaling: float | None) -> Tensor:
        """Attend with one kernel, for which each head of each row is a sequence of its own length."""
        kernel: Any = find_varlen()
        return kernel(
            groups,
            self.keys[:, None],
            self.values[:, None],
            self._queries,
            self._bounds,
            1,
            max(self._counts) + self.later,
            scale=scaling,
            enable_gqa=True,
            # The room behind a head's tokens holds nothing yet.
            seqused_k=self._used[self.later - 1],
        )


@functools.cache
def find_varlen() -> Callable[..., Any] | None:
    """Return torch's attention over sequences of different lengths; None if this torch has none that fits."""
    try:
        from torch.nn.attention import varlen
    except ImportError:
        varlen = None  # type: ignore[assignment]
    if varlen is not None and {"seqused_k", "enable_gqa", "scale"} <= set(
        inspect.signature(varlen.varlen_attn).parameters
    ):
        return varlen.varlen_attn
    # Before torch 2.12 the public function does not hand these arguments on, but the kernel takes them.
    operator = getattr(torch.ops.aten, "_flash_attention_forward", None)
    if operator is None:
        return None
    names = {argument.name for argument in operator.default._schema.arguments}
    return _attend_with_flash if {"seqused_k", "scale"} <= names else None


def _attend_with_flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
) -> Tensor:
    """Do what ``varlen_attn`` of torch 2.12 does, for older ones; the kernel groups query heads unasked."""
    return torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        0.0,
        False,
        False,
        scale=scale,
        seqused_k=seqused_k,
    )[0]


def can_attend_unpadded(keys: Tensor, values: Tensor) -> bool:
    """Return True if one new token's attention can run without padding.

    On a CPU it always can.  On a GPU it takes flash attention's kernels: half precision, heads of up to 256 numbers,
    and a card of compute capability 8.0 or newer.

    Parameters
    ----------
    keys, values : Tensor
        States of the new token, ``[batch, kv_head, 1, head_dim]``.
    """
    if keys.dtype != values.dtype or keys.device != values.device or torch.is_grad_enabled():
        return False
    if keys.device.type == "cpu":
        return True
    size = keys.shape[-1]
    fits = size == values.shape[-1] and size <= _LARGEST_HEAD and size % _HEAD_STEP == 0
    return (
        fits
        and keys.device.type == "cuda"
        and keys.dtype in _VARLEN_DTYPES
        and find_varlen() is not None
        and _get_capability(keys.device) >= _OLDEST_CARD
    )


@functools.cache
def _get_capability(device: torch.device) -> tuple[int, int]:
    """Return a card's compute capability; asked in each layer of each step."""
    return torch.cuda.get_device_capability(device)
