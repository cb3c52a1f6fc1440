"""Observation: queries, keys and values of one layer at compression, the input of ranks and selectors."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..utils.devices import send_numbers, spread_numbers

if TYPE_CHECKING:
    from ..models.tensor_parallel import HeadShards
    from .rotary import LayerRotation

MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)

#: Elements of one block of attention weights (float32): 32 Mi elements are 128 MiB.
BLOCK_ELEMENTS = 1 << 25
#: The same on a CPU: a block of 4 MiB fits into its cache.
CPU_BLOCK_ELEMENTS = 1 << 20


@dataclass
class Observation:
    """Queries, keys and values of one layer, as its own attention just used them.

    Attention weights are computed on demand, in float32, one block of query rows at a time.  So no tensor in memory is
    larger than ``heads x rows x keys``.

    Parameters
    ----------
    layer_idx : int
        Index of the layer in the model.
    query : Tensor
        Queries after rotary embedding, ``[batch, head, query, key_dim]``.
    keys, values : Tensor
        Keys and values, ``[batch, kv_head, key, head_dim]``.
    positions : Tensor
        Logical position of each key, ``[batch, kv_head or 1, key]`` int64, ascending.
    query_start : int
        Logical position of the first query; the others follow without a gap.
    valid, query_valid : Tensor
        Bool, False for padding and empty slots.  ``valid`` is ``[batch, key]``, or ``[batch, kv_head, key]`` if heads
        keep different numbers of tokens; ``query_valid`` is ``[batch, query]``.
    row_start : list of int
        Padding before the first real token, one entry per row.
    lengths : list of int
        Real tokens seen, including evicted ones, one entry per row.
    available : list of int
        Real tokens among the keys, one entry per row; the average over the heads if they differ.
    kv_heads : int
        Number of key/value heads of the cache, which may be less than that of ``keys``.
    scaling : float
        Factor on the dot products.
    attention_mask : Tensor, optional
        The mask of the layer's attention, bool or additive, ``[batch, 1 or head, query, key]``; None means causal.
    position_bias, softcap, sink_logits
        Other terms of the softmax: an additive bias, a tanh cap on the logits, one extra logit per head that takes mass
        away (attention sinks learned by the model).
    window_size, sink_size : int
        The observation window and the number of protected first tokens.
    module_ref : weakref.ref, optional
        Weak reference to the attention module.
    rotation : LayerRotation, optional
        How the layer turns queries and keys with position, if known and needed by the selector.
    packed : bool
        True if the queries are at consecutive positions after the kept keys, not at their original ones.
    past_moments : Tensor, optional
        Moments of the queries before these, ``[batch, head, key_dim + 1, key_dim + 1]``, if the selector needs them.
    shards : HeadShards, optional
        The tensor-parallel processes that hold the layer's other heads.  Values over several heads are joined over
        them.
    memory : dict, optional
        Measures of this layer that were computed before, if one observation is measured more than once.
    hidden : Tensor, optional
        Hidden states that entered the layer's attention, ``[batch, query, hidden]``; known in a replay only.
    gradient : Tensor, optional
        Norms of the gradient at the layer's attention output, ``[batch, query]`` float32; known in a replay that also
        runs backward.
    replayed : Tensor, optional
        Scores of the keys from a replay of the prompt, ``[batch, kv_head, key]``, if the selector needs them.
    part_of : tuple of int, optional
        First query head that is shown, and number of the layer's query heads, if only some heads are shown.
    slots : list of int, optional
        Keys of each row from the first one that is real in any head, if every later key is real in that head and the
        host knows them.
    """

    layer_idx: int
    query: Tensor
    keys: Tensor
    values: Tensor
    positions: Tensor
    query_start: int
    valid: Tensor
    query_valid: Tensor
    row_start: list[int]
    lengths: list[int]
    available: list[int]
    kv_heads: int
    scaling: float
    attention_mask: Tensor | None = None
    position_bias: Tensor | None = None
    softcap: float | None = None
    sink_logits: Tensor | None = None
    window_size: int = 32
    sink_size: int = 4
    # Weak: waiting queries keep their observation, and a copy of the cache must not copy the model.
    module_ref: weakref.ref[nn.Module] | None = None
    rotation: LayerRotation | None = None
    packed: bool = False
    past_moments: Tensor | None = None
    shards: HeadShards | None = None
    memory: dict[Any, Tensor] | None = None
    hidden: Tensor | None = None
    gradient: Tensor | None = None
    replayed: Tensor | None = None
    part_of: tuple[int, int] | None = None
    slots: list[int] | None = None

    @property
    def module(self) -> nn.Module | None:
        """The attention module; None if it is not known or no longer exists."""
        return None if self.module_ref is None else self.module_ref()

    def sum_over_shards(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the processes that share the layer's heads."""
        return tensor if self.shards is None else self.shards.sum(tensor)

    def gather_over_shards(self, per_head: Tensor) -> Tensor:
        """Return ``[batch, all heads, ...]`` from every process's ``[batch, head, ...]``."""
        return per_head if self.shards is None else self.shards.gather_heads(per_head)

    @property
    def query_length(self) -> int:
        """Number of query rows."""
        return self.query.shape[-2]

    @property
    def key_length(self) -> int:
        """Number of keys, padding included."""
        return self.keys.shape[-2]

    @property
    def query_index(self) -> Tensor:
        """Index of each query among its row's real tokens, ``[batch, query]`` int64; negative for padding."""
        index = torch.arange(self.query_start, self.query_start + self.query_length, device=self.query.device)
        return index - send_numbers(self.row_start, index.device)[:, None]

    @property
    def query_rotary_positions(self) -> Tensor:
        """Rotary position of each query, ``[batch, 1 or head, query]`` int64."""
        if not self.packed:
            return self.query_index[:, None]
        held = self._valid_heads.sum(dim=-1)
        if held.shape[1] > 1:
            held = held.repeat_interleave(self.query.shape[1] // held.shape[1], dim=1)
        evicted = send_numbers(self.lengths, held.device)[:, None] - held
        return self.query_index[:, None] - evicted[..., None]

    @property
    def hides_real_tokens(self) -> bool:
        """True if the newest query of a row cannot see all its real tokens (a sliding or chunked mask)."""
        if self.attention_mask is None:
            return False
        visible = is_visible(self.attention_mask[:, 0, -1]).expand(len(self.lengths), -1).sum(-1).tolist()
        return any(seen < length for seen, length in zip(visible, self.lengths, strict=True))

    @cached_property
    def real_index(self) -> Tensor:
        """Index of each key among its row's real tokens, ``[batch, kv_head or 1, key]`` int64, -1 for padding."""
        if not any(self.row_start) and {*self.lengths, *self.available} == {self.key_length}:
            return self.positions
        index = self.positions
        if any(self.row_start):
            index = index - spread_numbers(self.row_start, index.device)
        return index if self.is_full else index.masked_fill(~self._valid_heads, -1)

    @property
    def _valid_heads(self) -> Tensor:
        """Valid keys by head, ``[batch, kv_head or 1, key]`` bool."""
        return self.valid if self.valid.dim() == 3 else self.valid[:, None]

    @cached_property
    def window_attention(self) -> Tensor:
        """Attention of the observation window, ``[batch, head, min(window_size, query), key]`` float32."""
        rows = min(self.window_size, self.query_length)
        return self.compute_attention(slice(self.query_length - rows, self.query_length))

    @cached_property
    def evictable_attention(self) -> Tensor:
        """The window's attention to the keys that may be evicted, ``[batch, head, query, key]``.

        The columns of sinks and recent tokens are left out or zero.
        """
        window, sinks, recent = self.window_attention, self.sink_size, self.window_size
        if {*self.lengths, *self.available} == {self.key_length}:
            # Without padding or earlier evictions the evictable columns are consecutive: a view, no copy.
            return window[..., sinks : max(sinks, self.key_length - recent)]
        index = self.real_index
        newest = spread_numbers([length - recent for length in self.lengths], index.device)
        columns = (index >= sinks) & (index < newest)
        if columns.shape[1] > 1:
            columns = columns.repeat_interleave(window.shape[1] // columns.shape[1], dim=1)
        return window * columns[:, :, None, :]

    def remember(self, compute: Callable[[Observation], Tensor]) -> Tensor:
        """Return ``compute(self)``, computed once per observation and function."""
        known: dict[Any, Tensor] = vars(self).setdefault("_remembered", {})
        if compute not in known:
            known[compute] = compute(self)
        return known[compute]

    @cached_property
    def is_plainly_causal(self) -> bool:
        """True if query ``i`` sees exactly the first ``query_start + i + 1`` keys.

        That needs a layer without padding, eviction or mask.
        """
        # A row from a padded batch keeps its logical positions, which start after the padding.
        held = {*self.lengths, *self.available, self.query_start + self.query_length}
        return self.attention_mask is None and held == {self.key_length}

    @property
    def is_seen_whole(self) -> bool:
        """True if there is one query, it sees every key, and the host knows that."""
        return self.query_length == 1 and self.attention_mask is None and self.is_full

    @property
    def is_full(self) -> bool:
        """True if every key is a real token."""
        return self.valid.dim() == 2 and min(self.available) == self.key_length

    def compute_attention(self, rows: slice, key_stop: int | None = None) -> Tensor:
        """Compute the attention weights of some query rows.

        ``softmax(scaling * q k^T + mask)`` over all visible keys, in float32; rows and columns of padding are zero.

        Parameters
        ----------
        rows : slice
            Query rows, counted from the first query.
        key_stop : int, optional
            Leave out the keys from here on; they must be invisible to all these rows.

        Returns
        -------
        Tensor
            ``[batch, head, row, key_stop]`` float32.
        """
        key_stop = self.key_length if key_stop is None else key_stop
        query = self.query[:, :, rows]
        keys = self.keys[:, :, :key_stop]
        batch, heads, count, dim = query.shape
        kv_heads = keys.shape[1]
        # Stack the queries of a group as rows, so that no key is repeated.  All later steps work in place.
        grouped = query.reshape(batch * kv_heads, heads // kv_heads * count, dim)
        logits = grouped.new_empty(*grouped.shape[:2], key_stop)
        logits.baddbmm_(
            grouped, keys.reshape(len(grouped), key_stop, dim).mT, beta=0, alpha=float(self.scaling)
        )
        logits = logits.view(batch, heads, count, key_stop).float()
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        if self.position_bias is not None:
            logits += self.position_bias[..., rows, :key_stop].float()
        if self.is_seen_whole:
            return self.softmax(logits)
        if self.is_plainly_causal:
            # All rows see the keys up to the first row's own, so only later keys need a mask.
            first = rows.indices(self.query_length)[0]
            split = min(self.query_start + first + 1, key_stop)
            later = torch.arange(split, key_stop, device=logits.device)
            last = torch.arange(self.query_length, device=logits.device)[rows] + self.query_start
            logits[..., split:].masked_fill_(later > last[:, None], float("-inf"))
            return self.softmax(logits)
        allowed, bias = self._find_visible(rows, key_stop)
        if bias is not None:
            logits += bias
        hidden = ~allowed
        # A row of padding sees no key, so its softmax is 0/0.  Zero it: NaN must not reach a rank or a score.
        return self.softmax(logits.masked_fill_(hidden, float("-inf"))).masked_fill_(hidden, 0.0)

    def softmax(self, logits: Tensor) -> Tensor:
        """Compute the softmax of ``[batch, head, row, key]`` with the layer's learned sinks.

        In place without learned sinks, else in a copy.
        """
        if self.sink_logits is None:
            return torch.softmax(logits, dim=-1, out=logits)
        sink = self.sink_logits.float().reshape(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        return torch.cat([logits, sink], dim=-1).softmax(dim=-1)[..., :-1]

    def count_block_rows(self, columns: int) -> int:
        """Count the query rows of one block of weights over ``columns`` keys: on a CPU it fits into the cache."""
        batch, heads = self.query.shape[:2]
        elements = CPU_BLOCK_ELEMENTS if self.query.device.type == "cpu" else BLOCK_ELEMENTS
        return max(16, elements // (batch * heads * columns))

    def attention_blocks(self) -> Iterator[Tensor]:
        """Yield the whole causal attention in blocks of consecutive query rows.

        Each block is ``[batch, head, row, visible keys]`` float32.  Keys after the block's last row are left out, since
        no row of the block sees them.
        """
        rows = self.count_block_rows(self.key_length)
        # The queries' own keys are the last keys, so a block sees no key after its own last one.
        offset = self.key_length - self.query_length
        for start in range(0, self.query_length, rows):
            stop = min(start + rows, self.query_length)
            key_stop = offset + stop if self.attention_mask is None and offset >= 0 else self.key_length
            yield self.compute_attention(slice(start, stop), key_stop)

    def compute_column_sums(self) -> Tensor:
        """Compute the attention that each key gets from all query rows, ``[batch, kv_head, key]`` float32.

        Summed block by block, and averaged over the query heads of a group.
        """
        sums: Tensor | None = None
        for weights in self.attention_blocks():
            part = weights.sum(dim=-2)
            left_out = self.key_length - part.shape[-1]
            if sums is not None:
                sums[..., : part.shape[-1]] += part
            else:
                sums = functional.pad(part, (0, left_out)) if left_out else part
        if sums is None:
            sums = self.query.new_zeros((*self.query.shape[:2], self.key_length), dtype=torch.float32)
        return self.compute_group_mean(sums)

    def compute_group_mean(self, per_head: Tensor) -> Tensor:
        """Average ``[batch, head, ...]`` over the query heads that share a key/value head.

        Returns
        -------
        Tensor
            ``[batch, kv_head, ...]``.
        """
        batch, heads = per_head.shape[:2]
        return per_head.reshape(batch, self.kv_heads, heads // self.kv_heads, *per_head.shape[2:]).mean(dim=2)

    def take_queries(self, rows: slice) -> Observation:
        """Return an observation with a slice of the queries, in memory of its own."""
        first = rows.indices(self.query_length)[0]

        def pick(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[:, :, rows].clone()

        return replace(
            self,
            query=self.query[:, :, rows].clone(),
            query_start=self.query_start + first,
            query_valid=self.query_valid[:, rows],
            attention_mask=pick(self.attention_mask),
            position_bias=pick(self.position_bias),
            hidden=None if self.hidden is None else self.hidden[:, rows],
            gradient=None if self.gradient is None else self.gradient[:, rows],
        )

    def take_keys(self, index: Tensor) -> Observation:
        """Return an observation of some keys, ``index [key]`` ascending; the softmax is then over these alone."""

        def pick(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[..., index]

        valid = self.valid[..., index]
        return replace(
            self,
            keys=self.keys[:, :, index],
            values=self.values[:, :, index],
            positions=self.positions[..., index],
            valid=valid,
            available=count_real(valid),
            slots=None,
            attention_mask=pick(self.attention_mask),
            position_bias=pick(self.position_bias),
        )

    def is_padded_in_front(self, row: int) -> bool:
        """Return True if the keys of a row are its padding, then all its tokens, and the host knows that."""
        whole = self.query_start + self.query_length == self.key_length
        return whole and self.valid.dim() == 2 and self.lengths[row] == self.available[row]

    def take_row(self, row: int) -> Observation:
        """Return the observation of one batch row, without its padding."""
        first_query = max(0, self.row_start[row] - self.query_start)
        if self.is_padded_in_front(row):
            # Slices, so that the host need not ask where the tokens are.
            real: Any = slice(self.row_start[row], self.key_length)
            queries: Any = slice(first_query, self.query_length)
        elif self.slots is not None:
            # The same of a layer that evicted tokens: its empty slots stand first.
            real = slice(self.key_length - self.slots[row], self.key_length)
            queries = slice(first_query, self.query_length)
        else:
            real = self._valid_heads[row].any(dim=0).nonzero()[:, 0]
            queries = self.query_valid[row].nonzero()[:, 0]
            first_query = int(queries[0]) if len(queries) else 0

        def pick(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            return tensor.expand(len(self.lengths), -1, -1, -1)[row : row + 1, :, queries][..., real]

        return replace(
            self,
            query=self.query[row : row + 1, :, queries],
            keys=self.keys[row : row + 1, :, real],
            values=self.values[row : row + 1, :, real],
            positions=self.positions[row : row + 1, :, real],
            query_start=self.query_start + first_query,
            valid=self.valid[row : row + 1, ..., real],
            query_valid=self.query_valid[row : row + 1, queries],
            row_start=self.row_start[row : row + 1],
            lengths=self.lengths[row : row + 1],
            available=self.available[row : row + 1],
            slots=None if self.slots is None else self.slots[row : row + 1],
            attention_mask=pick(self.attention_mask),
            position_bias=pick(self.position_bias),
            past_moments=None if self.past_moments is None else self.past_moments[row : row + 1],
            hidden=None if self.hidden is None else self.hidden[row : row + 1, queries],
            gradient=None if self.gradient is None else self.gradient[row : row + 1, queries],
        )

    def take_group(self, row: int, key_head: int) -> Observation:
        """Return one row's observation of a key head and its query heads, without padding and empty slots."""
        groups = self.query.shape[1] // self.keys.shape[1]
        key_heads, heads = slice(key_head, key_head + 1), slice(key_head * groups, (key_head + 1) * groups)

        valid = self._valid_heads.expand(-1, self.keys.shape[1], -1)[:, key_head]
        group = replace(
            self,
            query=self.query[:, heads],
            keys=self.keys[:, key_heads],
            values=self.values[:, key_heads],
            positions=_pick_heads(self.positions, key_heads),
            valid=valid,
            available=count_real(valid),
            slots=None,
            kv_heads=1,
            shards=None,
            attention_mask=_pick_heads(self.attention_mask, heads),
            position_bias=_pick_heads(self.position_bias, heads),
            sink_logits=None if self.sink_logits is None else self.sink_logits.reshape(-1)[heads],
            past_moments=_pick_heads(self.past_moments, heads),
            part_of=self._count_part(heads.start),
        )
        return group.take_row(row)

    def take_head(self, head: int, key_head: int) -> Observation:
        """Return the observation of one query head and its key head."""
        heads, key_heads = slice(head, head + 1), slice(key_head, key_head + 1)
        position_head = key_head * self.positions.shape[1] // self.keys.shape[1]
        return replace(
            self,
            query=self.query[:, heads],
            keys=self.keys[:, key_heads],
            values=self.values[:, key_heads],
            positions=_pick_heads(self.positions, slice(position_head, position_head + 1)),
            valid=self.valid if self.valid.dim() == 2 else self.valid[:, key_head],
            slots=None,
            kv_heads=1,
            shards=None,
            attention_mask=_pick_heads(self.attention_mask, heads),
            position_bias=_pick_heads(self.position_bias, heads),
            sink_logits=None if self.sink_logits is None else self.sink_logits.reshape(-1)[heads],
            part_of=self._count_part(head),
        )

    def _count_part(self, head: int) -> tuple[int, int]:
        first, heads = (0, self.query.shape[1]) if self.part_of is None else self.part_of
        return first + head, heads

    def _find_visible(self, rows: slice, key_stop: int) -> tuple[Tensor, Tensor | None]:
        """Return the visible keys of some rows, ``[batch, 1 or head, row, key]`` bool, and an additive mask or None."""
        valid = self._valid_heads[:, :, None, :key_stop]
        if valid.shape[1] > 1:
            valid = valid.repeat_interleave(self.query.shape[1] // valid.shape[1], dim=1)
        real = valid & self.query_valid[:, None, :, None][:, :, rows]
        if self.attention_mask is not None:
            mask = self.attention_mask[:, :, rows, :key_stop]
            if mask.dtype == torch.bool:
                return real & mask, None
            return real & is_visible(mask), mask.float()
        newest = self.lengths[0] + self.row_start[0] - 1
        if self.query_length == 1 and self.query_start == newest:
            return real, None
        positions = self.positions[:, :, None, :key_stop]
        heads = positions.shape[1]
        if heads > 1:
            positions = positions.repeat_interleave(self.query.shape[1] // heads, dim=1)
        index = torch.arange(self.query_length, device=positions.device)[rows] + self.query_start
        return real & (positions <= index[:, None]), None


def count_real(valid: Tensor) -> list[int]:
    """Count the real tokens of each row.

    ``valid`` is ``[batch, key]``, or ``[batch, kv_head, key]``, which gives the average over heads, rounded down.
    """
    counts = valid.sum(-1) if valid.dim() == 2 else valid.sum((-2, -1)) // valid.shape[1]
    return [int(count) for count in counts.tolist()]


def is_visible(mask: Tensor) -> Tensor:
    """Return the visible entries of a bool or additive mask, as bool."""
    # No real additive bias is as low as half of the dtype's minimum.
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _pick_heads(tensor: MaybeTensor, heads: slice) -> MaybeTensor:
    """Take some heads of ``[batch, head or 1, ...]``; None, and a tensor that all heads share, stay as they are."""
    return tensor if tensor is None or tensor.shape[1] == 1 else tensor[:, heads]
