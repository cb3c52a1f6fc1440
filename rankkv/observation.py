"""What one layer's attention looks like during the prefill: the input of ranks and selectors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError

#: Elements of one block of attention weights (float32): 32 Mi elements are 128 MiB.
BLOCK_ELEMENTS = 1 << 25


@dataclass
class Observation:
    """Queries, keys and values of one layer, as its own attention just used them.

    Attention weights are computed from them on demand, in float32, a block of query rows at a time, so that nothing
    larger than ``heads x rows x keys`` ever stands in memory.

    Parameters
    ----------
    layer_idx : int
        Index of the layer in the model.
    query : Tensor
        Queries after rotary embedding, ``[batch, head, query, key_dim]``; the queries are the last ones of the keys.
    keys, values : Tensor
        Keys and values, ``[batch, kv_head, key, head_dim]``.
    valid : Tensor
        Bool, ``[batch, key]``: False where the slot is padding.
    lengths : list of int
        Number of valid keys of each row.
    kv_heads : int
        Key/value heads of the cache, which may be fewer than those of ``keys``.
    scaling : float
        Factor on the dot products.
    attention_mask : Tensor, optional
        The mask the layer's attention got, bool or additive, ``[batch, 1 or head, query, key]``; None means causal.
    position_bias, softcap, sink_logits
        What else enters the softmax: an additive bias, a tanh cap on the logits, one extra logit a head that takes
        mass away (attention sinks learned by the model).
    window_size, sink_size : int
        The observation window and the number of protected first tokens.
    """

    layer_idx: int
    query: Tensor
    keys: Tensor
    values: Tensor
    valid: Tensor
    lengths: list[int]
    kv_heads: int
    scaling: float
    attention_mask: Tensor | None = None
    position_bias: Tensor | None = None
    softcap: float | None = None
    sink_logits: Tensor | None = None
    window_size: int = 32
    sink_size: int = 4

    @property
    def query_length(self) -> int:
        """Number of query rows."""
        return self.query.shape[-2]

    @property
    def key_length(self) -> int:
        """Number of keys, padding included."""
        return self.keys.shape[-2]

    @cached_property
    def real_index(self) -> Tensor:
        """Index of each key among its row's valid keys, ``[batch, key]`` int64, -1 for padding."""
        return torch.where(self.valid, self.valid.cumsum(-1) - 1, -1)

    @cached_property
    def window_attention(self) -> Tensor:
        """Attention of the observation window, ``[batch, head, min(window_size, query), key]`` float32."""
        rows = min(self.window_size, self.query_length)
        return self.compute_attention(slice(self.query_length - rows, self.query_length))

    def compute_attention(self, rows: slice | Tensor, key_stop: int | None = None) -> Tensor:
        """Compute the attention weights of some query rows.

        ``softmax(scaling * q k^T + mask)`` over all visible keys, in float32; rows and columns of padding are zero.

        Parameters
        ----------
        rows : slice or Tensor
            Query rows, counted from the first query (a tensor: int64 indices).
        key_stop : int, optional
            Leave out keys from here on (they must all be invisible to these rows).

        Returns
        -------
        Tensor
            ``[batch, head, row, key_stop]`` float32.
        """
        key_stop = self.key_length if key_stop is None else key_stop
        query = self.query[:, :, rows]
        keys = self.keys[:, :, :key_stop]
        batch, heads, count, dim = query.shape
        grouped = query.reshape(batch, keys.shape[1], heads // keys.shape[1] * count, dim)
        logits = torch.matmul(grouped, keys.transpose(-1, -2)).view(batch, heads, count, key_stop).float()
        logits = logits * self.scaling
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        if self.position_bias is not None:
            logits = logits + self.position_bias[..., rows, :key_stop].float()
        allowed, bias = self._allowed(rows, key_stop)
        if bias is not None:
            logits = logits + bias
        logits = logits.masked_fill(~allowed, float("-inf"))
        if self.sink_logits is not None:
            sink = self.sink_logits.float().reshape(1, -1, 1, 1).expand(batch, heads, count, 1)
            weights = torch.cat([logits, sink], dim=-1).softmax(dim=-1)[..., :-1]
        else:
            weights = logits.softmax(dim=-1)
        # A row of padding has no visible key: its softmax is 0/0, and it must not reach a rank or a score.
        return weights.masked_fill(~allowed, 0.0)

    def attention_blocks(self) -> Iterator[Tensor]:
        """Yield the weights of consecutive blocks of query rows of the whole causal attention.

        Each is ``[batch, head, row, visible keys]`` float32; keys after the block's last row are left out, since no row
        of the block sees them.
        """
        batch, heads = self.query.shape[:2]
        rows = max(16, BLOCK_ELEMENTS // (batch * heads * self.key_length))
        offset = self.key_length - self.query_length
        for start in range(0, self.query_length, rows):
            stop = min(start + rows, self.query_length)
            key_stop = offset + stop if self.attention_mask is None else self.key_length
            yield self.compute_attention(slice(start, stop), key_stop)

    def compute_group_mean(self, per_head: Tensor) -> Tensor:
        """Average ``[batch, head, ...]`` over the query heads that share a key/value head.

        Returns
        -------
        Tensor
            ``[batch, kv_head, ...]``.
        """
        batch, heads = per_head.shape[:2]
        return per_head.reshape(batch, self.kv_heads, heads // self.kv_heads, *per_head.shape[2:]).mean(dim=2)

    def take_row(self, row: int) -> Observation:
        """Return the observation of one row of the batch alone, without its padding."""
        real = self.valid[row].nonzero()[:, 0]
        offset = self.key_length - self.query_length
        queries = real[real >= offset] - offset

        def pick(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            return tensor.expand(len(self.lengths), -1, -1, -1)[row : row + 1, :, queries][..., real]

        return replace(
            self,
            query=self.query[row : row + 1, :, queries],
            keys=self.keys[row : row + 1, :, real],
            values=self.values[row : row + 1, :, real],
            valid=self.valid[row : row + 1, real],
            lengths=self.lengths[row : row + 1],
            attention_mask=pick(self.attention_mask),
            position_bias=pick(self.position_bias),
        )

    def take_head(self, head: int, key_head: int) -> Observation:
        """Return the observation of one query head and its key head alone."""
        mask, bias, sinks = self.attention_mask, self.position_bias, self.sink_logits
        return replace(
            self,
            query=self.query[:, head : head + 1],
            keys=self.keys[:, key_head : key_head + 1],
            values=self.values[:, key_head : key_head + 1],
            kv_heads=1,
            attention_mask=mask if mask is None or mask.shape[1] == 1 else mask[:, head : head + 1],
            position_bias=bias if bias is None or bias.shape[1] == 1 else bias[:, head : head + 1],
            sink_logits=sinks if sinks is None else sinks.reshape(-1)[head : head + 1],
        )

    def _allowed(self, rows: slice | Tensor, key_stop: int) -> tuple[Tensor, Tensor | None]:
        offset = self.key_length - self.query_length
        real = self.valid[:, None, None, :key_stop] & self.valid[:, None, offset:, None][:, :, rows]
        if self.attention_mask is None:
            index = torch.arange(self.key_length, device=self.keys.device)
            return real & (index[:key_stop] <= index[offset:][rows][:, None]), None
        mask = self.attention_mask[:, :, rows, :key_stop]
        if mask.dtype == torch.bool:
            return real & mask, None
        # Half of the dtype's minimum separates "masked" from any honest additive bias.
        return real & (mask > torch.finfo(mask.dtype).min / 2), mask.float()


def observe(
    layer_idx: int,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    options: Mapping[str, Any],
    *,
    kv_heads: int,
    window_size: int,
    sink_size: int,
) -> Observation:
    """Gather an :class:`Observation` from the arguments of one call of a layer's attention function.

    Parameters
    ----------
    layer_idx : int
        Index of the layer.
    module : nn.Module
        The attention module (asked for ``scaling`` where the call does not say it).
    query, key, value : Tensor
        ``[batch, head or kv_head, query or key, head_dim]``.
    attention_mask : Tensor or None
        4-D, flash attention's 2-D ``[batch, key]``, or None.
    options : mapping
        The call's keyword arguments: ``scaling``, ``softcap``, ``s_aux``, ``position_bias``.
    kv_heads, window_size, sink_size : int
        See :class:`Observation`.

    Raises
    ------
    InputError
        If a row of the batch holds no real token.
    """
    batch, key_length = key.shape[0], key.shape[-2]
    if attention_mask is None:
        valid = torch.ones(batch, key_length, dtype=torch.bool, device=key.device)
        lengths = [key_length] * batch
    else:
        if attention_mask.dim() == 2:
            valid, attention_mask = attention_mask[:, -key_length:].bool(), None
        else:
            # Real tokens are those that the newest query may see.
            newest = attention_mask[:, 0, -1, :key_length]
            valid = newest if newest.dtype == torch.bool else newest > torch.finfo(newest.dtype).min / 2
        valid = valid.expand(batch, -1)
        lengths = [int(n) for n in valid.sum(-1).tolist()]
        if min(lengths) == 0:
            raise InputError(
                f"row {lengths.index(0)} of the batch holds no real token: remove it or give it at least one token."
            )
    scaling = options.get("scaling")
    if scaling is None:
        scaling = getattr(module, "scaling", None)
    return Observation(
        layer_idx=layer_idx,
        query=query.detach(),
        keys=key.detach(),
        values=value.detach(),
        valid=valid,
        lengths=lengths,
        kv_heads=kv_heads,
        scaling=key.shape[-1] ** -0.5 if scaling is None else scaling,
        attention_mask=attention_mask,
        position_bias=options.get("position_bias"),
        softcap=options.get("softcap"),
        sink_logits=options.get("s_aux"),
        window_size=window_size,
        sink_size=sink_size,
    )
