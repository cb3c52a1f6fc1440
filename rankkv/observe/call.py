"""An attention call, and the Observation built from its arguments."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..errors import InputError
from ..models.tensor_parallel import HeadShards
from .block_masks import reduce_block_mask
from .observation import Observation, count_real, is_visible

# Arguments by which an attention function does more than scale, add up and mask.
_UNUSUAL = ("softcap", "s_aux", "position_bias", "output_attentions", "dropout")
# Up to so many queries, a plan takes longer to build than it saves.
_FEW_QUERIES = 512


@dataclass(frozen=True)
class AttentionCall:
    """The arguments of one attention call, and the attention function to run.

    Parameters
    ----------
    inner : callable
        The attention function, of transformers or of the model's own module.
    module : nn.Module
        The attention module that calls it.
    query, key, value : Tensor
        ``[batch, head or kv_head, query or key, head_dim]``.
    mask : Tensor, BlockMask or None
        The mask that transformers made for the layer.
    options : dict
        The call's keyword arguments.
    """

    inner: Callable[..., Any]
    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    options: dict[str, Any]

    @property
    def steps(self) -> int:
        """Number of queries."""
        return self.query.shape[-2]

    @property
    def arguments(self) -> tuple[nn.Module, Tensor, Tensor, Tensor, Any, dict[str, Any]]:
        """The arguments in order: module, query, key, value, mask, options."""
        return self.module, self.query, self.key, self.value, self.mask, self.options

    @property
    def is_plain_sdpa(self) -> bool:
        """True if the call runs transformers' own sdpa function, and nothing but scaling, softmax and mask."""
        if self.inner is not sdpa_attention_forward:
            return False
        for name in _UNUSUAL:
            value = self.options.get(name)
            if value is not None and (isinstance(value, Tensor) or bool(value)):
                return False
        return True

    def run(self) -> Any:
        """Run the attention function and return its result."""
        return self.inner(self.module, self.query, self.key, self.value, self.mask, **self.options)

    def run_without_plans(self) -> Any:
        """Run the attention function, but not by cuDNN's attention, if there are few queries on a GPU.

        cuDNN builds a plan for each new number of keys, which takes milliseconds.  Layers and heads with budgets of
        their own differ in it, and it changes with every token.  torch's other kernels take any length at once.
        """
        backends = torch.backends.cuda
        if self.query.device.type != "cuda" or self.steps > _FEW_QUERIES or not backends.cudnn_sdp_enabled():
            return self.run()
        if not backends.math_sdp_enabled():
            # The user allows some kernels alone: without cuDNN's there may be none for this call.
            return self.run()
        backends.enable_cudnn_sdp(False)
        try:
            return self.run()
        finally:
            backends.enable_cudnn_sdp(True)


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
    positions: Tensor | None = None,
    slot_valid: Tensor | None = None,
    seen: int | None = None,
    row_start: list[int] | None = None,
    more_to_come: bool = False,
    shards: HeadShards | None = None,
    reads: MaskReads | None = None,
    available: list[int] | None = None,
) -> Observation:
    """Build an :class:`Observation` from the arguments of one call of a layer's attention function.

    Parameters
    ----------
    layer_idx : int
        Index of the layer.
    module : nn.Module
        The attention module; its ``scaling`` counts if the call gives none.
    query, key, value : Tensor
        ``[batch, head or kv_head, query or key, head_dim]``; the queries' own keys are the last ones.
    attention_mask : Tensor, BlockMask or None
        4-D, flash attention's 2-D ``[batch, key]``, a block mask, or None.
    options : mapping
        The call's keyword arguments: ``scaling``, ``softcap``, ``s_aux``, ``position_bias``.
    kv_heads, window_size, sink_size : int
        See :class:`Observation`.
    positions : Tensor, optional
        Logical positions of the keys if some were evicted; None if all tokens are there.
    slot_valid : Tensor, optional
        ``[batch, kv_head, key]`` bool, True for slots with a token, if the heads of a layer keep different numbers of
        them. None if every slot holds a token, or the mask tells.
    seen : int, optional
        Number of tokens seen, including this call's; None means the number of keys.
    row_start : list of int, optional
        Padding before each row's first real token, if an earlier call found it.
    more_to_come : bool, default False
        True if this may be a chunk of the prompt; a row may then hold only padding so far.
    shards : HeadShards, optional
        The tensor-parallel processes of the model, if there are several.
    reads : MaskReads, optional
        Remembers, over the layers of one forward, what the host read of their mask.
    available : list of int, optional
        Tokens of each row among the keys, an average over its heads, if the host knows them: nothing is read then.

    Returns
    -------
    Observation
        Its queries, keys and values share memory with the call's.

    Raises
    ------
    InputError
        If a row of the batch holds no real token, or ends in padding.
    UnsupportedModelError
        If this process does not hold an equal part of the layer's heads.
    """
    batch, key_length, query_length = key.shape[0], key.shape[-2], query.shape[-2]
    seen = key_length if seen is None else seen
    given_mask = attention_mask
    reads = MaskReads() if reads is None else reads
    lengths = (query_length, key_length)
    known = reads if slot_valid is None and reads.has(given_mask, lengths) else None
    if attention_mask is None:
        valid = torch.ones(batch, key_length, dtype=torch.bool, device=key.device)
        available = [key_length] * batch if available is None else available
    else:
        if not isinstance(attention_mask, Tensor):
            heads = 1 if slot_valid is None else query.shape[1]
            attention_mask = reduce_block_mask(attention_mask, query_length, key_length, heads)
        if attention_mask.dim() == 2:
            valid, attention_mask = attention_mask[:, -key_length:].bool(), None
        else:
            # A real token sees itself.  Without the earlier queries, the real keys are those that the newest sees.
            whole = query_length == key_length
            seen_keys = attention_mask[:, 0].diagonal(dim1=-2, dim2=-1) if whole else attention_mask[:, 0, -1]
            valid = is_visible(seen_keys[:, :key_length])
        valid = valid.expand(batch, -1)
        if slot_valid is not None and available is not None:
            # The one query sees every token, so the slots say all.
            valid, attention_mask = slot_valid, None
        elif slot_valid is not None and attention_mask is not None:
            # In each head, the real keys are those that the newest query sees.
            newest = attention_mask[
                :, :: max(1, attention_mask.shape[1] // slot_valid.shape[1]), -1, :key_length
            ]
            valid = slot_valid & is_visible(newest)
        if available is None:
            available = count_real(valid) if known is None else list(known.available)
        if not more_to_come:
            check_rows(available)
    # All heads hold the queries' own keys.
    query_valid = (valid if valid.dim() == 2 else valid[:, 0])[:, key_length - query_length :]
    if row_start is None and given_mask is not None and known is None:
        ends_real = [end or count == 0 for end, count in zip(valid[:, -1].tolist(), available, strict=True)]
        if not all(ends_real):
            raise InputError(
                f"row {ends_real.index(False)} of the batch ends in padding, but its last queries must be real: pad on "
                "the left (tokenizer.padding_side = 'left')."
            )
    if row_start is None:
        # Nothing was evicted yet, so the keys before a row's first real token are padding.
        if known is not None and known.row_start is not None:
            row_start = list(known.row_start)
        elif attention_mask is None and min(available) == key_length:
            row_start = [0] * batch
        else:
            row_start = _first_valid(valid)
        if slot_valid is None and known is None:
            # Nothing here depends on the layer.
            reads.note(given_mask, lengths, available, row_start)
    elif max(row_start) >= seen - query_length > 0:
        # A row of only padding so far may start in this call.
        past = seen - query_length
        starts = _first_valid(query_valid)
        row_start = [
            past + new if start >= past else start for start, new in zip(row_start, starts, strict=True)
        ]
    if positions is None:
        positions = torch.arange(key_length, device=key.device).view(1, 1, -1).expand(batch, 1, -1)
    scaling = options.get("scaling")
    if scaling is None:
        scaling = getattr(module, "scaling", None)
    return Observation(
        layer_idx=layer_idx,
        query=query.detach(),
        keys=key.detach(),
        values=value.detach(),
        positions=positions,
        query_start=seen - query_length,
        valid=valid,
        query_valid=query_valid,
        row_start=row_start,
        lengths=[seen - start for start in row_start],
        available=available,
        kv_heads=kv_heads,
        scaling=key.shape[-1] ** -0.5 if scaling is None else scaling,
        attention_mask=attention_mask,
        position_bias=options.get("position_bias"),
        softcap=options.get("softcap"),
        sink_logits=options.get("s_aux"),
        window_size=window_size,
        sink_size=sink_size,
        module_ref=weakref.ref(module),
        shards=None if shards is None else shards.of_layer(layer_idx, module, query.shape[1], kv_heads),
    )


class MaskReads:
    """Remember what the host read of one forward's mask: all layers get the same one, and each read is a wait."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Forget the mask, at the start of a forward: it may have changed in place."""
        self._mask: weakref.ref[Any] | None = None
        self._key: tuple[int, int] = (0, 0)
        #: Real tokens of each row, and padding before them if it was looked for.
        self.available: list[int] = []
        self.row_start: list[int] | None = None

    def has(self, mask: Any, key: tuple[int, int]) -> bool:
        """Return True if this is the mask that was read, for so many queries and keys."""
        return mask is not None and self._mask is not None and self._mask() is mask and self._key == key

    def note(self, mask: Any, key: tuple[int, int], available: list[int], row_start: list[int]) -> None:
        """Note what was read of a mask."""
        if isinstance(mask, Tensor):
            self._mask, self._key = weakref.ref(mask), key
            self.available, self.row_start = list(available), list(row_start)


def check_rows(tokens: list[int]) -> None:
    """Raise if a row of the batch has no real token.

    Parameters
    ----------
    tokens : list of int
        Number of real tokens of each row.

    Raises
    ------
    InputError
        With the number of the row.
    """
    if min(tokens) <= 0:
        raise InputError(
            f"row {tokens.index(min(tokens))} of the batch has no real token: remove it or give it at least one token."
        )


def _first_valid(valid: Tensor) -> list[int]:
    # A row without a real token counts as padding only.
    """Return the index of each row's first real token."""
    first = torch.where(valid.any(dim=-1), valid.int().argmax(dim=-1), valid.shape[-1])
    return [int(index) for index in first.tolist()]
