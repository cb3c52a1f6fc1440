"""Attention masks of one layer: masks of all tokens seen, restricted to the slots that the layer keeps."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedModelError
from ..observe import block_masks
from ..observe.hook import SUPPORTED_BACKENDS
from ..observe.observation import is_visible
from ..utils.devices import send_numbers
from .layer import SlotMap

# Decode steps that one stored mask covers, and a number that divides the length of its rows.
_AHEAD, _ROW_STEP = 256, 8


def project_mask(
    attention_mask: Any,
    positions: Tensor,
    slot_valid: Tensor | None,
    query_length: int,
    query_heads: int,
    backend: str | None,
    dtype: torch.dtype,
) -> Any:
    """Restrict a mask over all tokens seen to the slots that one layer keeps.

    Parameters
    ----------
    attention_mask : Tensor or None
        The mask transformers made for all layers: 4-D ``[batch, 1 or head, query, seen]``, flash attention's 2-D
        ``[batch, seen]``, flex_attention's block mask, or None.
    positions : Tensor
        ``[batch, kv_head or 1, slot]`` int64, logical position of each slot (ascending).
    slot_valid : Tensor, optional
        ``[batch, slot]`` bool, False where a shorter row is padded, or ``[batch, kv_head, slot]`` if the heads of a row
        keep different numbers of tokens; None if every slot holds a token.
    query_length, query_heads : int
        Shape of the call.
    backend : str, optional
        Attention backend; eager adds its mask to the logits, so it gets an additive mask.
    dtype : torch.dtype
        Dtype of the additive mask.

    Returns
    -------
    Tensor or None
        ``[batch, 1 or query_heads, query, slot]``, ``[batch, slot]``, flex_attention's block mask, or None if
        nothing needs masking.

    Raises
    ------
    UnsupportedModelError
        If the kind of mask cannot express which tokens the layer keeps.
    """
    if slot_valid is not None:
        slot_valid = _spread(slot_valid, query_heads, backend)
    flex = backend == block_masks.BACKEND
    if flex and (attention_mask is None or block_masks.is_block_mask(attention_mask)):
        return block_masks.project_block_mask(
            attention_mask, positions, slot_valid, query_length, query_heads
        )
    if attention_mask is None:
        return _mask_from_slots(positions, slot_valid, query_length, backend, dtype)
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() not in (2, 4):
        raise UnsupportedModelError(
            f"an attention mask of type {type(attention_mask).__name__} cannot be restricted to the kept tokens; "
            f"use one of the attention backends {', '.join(SUPPORTED_BACKENDS)}."
        )
    if attention_mask.dim() == 2:
        if positions.shape[1] != 1:
            raise UnsupportedModelError(
                "flash attention has one mask for all heads, so a padded batch needs a selector that keeps the same "
                "tokens in all heads (streaming_llm), no padding, or attn_implementation='sdpa'."
            )
        gathered = attention_mask.gather(-1, positions[:, 0])
        return gathered if slot_valid is None else gathered * slot_valid[:, 0]
    slots = positions.shape[-1]
    mask = attention_mask.expand(positions.shape[0], -1, -1, -1)
    heads = max(mask.shape[1], positions.shape[1], 1 if slot_valid is None else slot_valid.shape[1])
    if heads > 1:
        heads = query_heads
        if positions.shape[1] > 1:
            positions = positions.repeat_interleave(heads // positions.shape[1], dim=1)
        mask = mask.expand(-1, heads, -1, -1)
    index = positions[:, :, None, :].expand(-1, heads, mask.shape[2], slots)
    mask = mask.gather(-1, index)
    if slot_valid is not None:
        hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        mask = mask.masked_fill(~slot_valid[:, :, None, :], hidden)
    if query_length == 1 and mask.device.type == "cpu" and _hides_nothing(mask):
        # Without a mask, faster kernels can run.  On other devices this check would stall the stream.
        return None
    # flex_attention would use the first head of a dense mask for all heads.
    return block_masks.build_block_mask(is_visible(mask)) if flex else mask


class StepMask:
    """Cache what the decode masks of one layer are made of: its slots stay the same until the next compression."""

    def __init__(self) -> None:
        self._valid: Tensor | None = None
        self._mask: Tensor | None = None
        # The slots of a compression, and positions and valid slots of it and of the steps to come.
        self._slots: SlotMap | None = None
        self._ahead: tuple[Tensor, Tensor | None] | None = None

    def get(
        self, slots: SlotMap, query_heads: int, backend: str | None, dtype: torch.dtype, mask: Any = None
    ) -> Any:
        """Return the mask ``[batch, 1 or query_heads, 1, slot]`` for one query.

        Without a ``mask`` over all tokens seen it sees every slot with a token, and some slots are empty.

        Parameters
        ----------
        slots : SlotMap
            Slots of the layer.
        query_heads, backend, dtype, mask
            See :func:`rankkv.cache.masks.project_mask`.
        """
        count = slots.kept_positions.shape[-1] + slots.seen - slots.compressed_at
        if mask is not None:
            positions, valid = self._locate(slots, count)
            valid = None if valid is None else valid[..., :count]
            return project_mask(mask, positions[..., :count], valid, 1, query_heads, backend, dtype)
        if self._mask is None or self._valid is not slots.kept_valid or self._mask.shape[-1] < count:
            where = _look_ahead(slots, count)
            made = project_mask(None, *where, 1, query_heads, backend, dtype)
            if made.dtype == torch.bool and made.device.type != "cpu":
                # Kernels of GPUs add the mask; made once, it need not be converted in every step.
                made = torch.zeros(made.shape, dtype=dtype, device=made.device).masked_fill(
                    ~made, torch.finfo(dtype).min
                )
            self._mask, self._valid = made, slots.kept_valid
        return self._mask[..., :count]

    def _locate(self, slots: SlotMap, count: int) -> tuple[Tensor, Tensor | None]:
        """Return positions and valid slots of the layer, and of steps to come."""
        known, ahead = self._slots, self._ahead
        same = known is not None and (
            known.kept_positions is slots.kept_positions and known.kept_valid is slots.kept_valid
        )
        if ahead is None or not same or ahead[0].shape[-1] < count:
            self._slots, self._ahead = slots, _look_ahead(slots, count)
            return self._ahead
        return ahead


def _look_ahead(slots: SlotMap, count: int) -> tuple[Tensor, Tensor | None]:
    """Return positions and valid slots, also of steps to come; ``count`` is the number of slots now."""
    # GPU kernels want rows of masks that start at a multiple of 8 numbers.
    ahead = replace(slots, seen=slots.seen + _AHEAD + -(count + _AHEAD) % _ROW_STEP)
    return ahead.compute_positions(), ahead.compute_valid()


class PaddingCheck:
    """Check once a forward whether its mask hides nothing but padding: all layers get the same mask."""

    def __init__(self) -> None:
        self._known: tuple[weakref.ref[Tensor], bool] | None = None

    def forget(self) -> None:
        """Forget the mask of the forward before, which may have changed in place."""
        self._known = None

    def hides_only_padding(
        self, mask: Any, seen: int, row_start: Sequence[int], may_wait: bool = False
    ) -> bool:
        """Return True if every token after a row's padding is visible, without a bias, to the one new query.

        On other devices than the CPU it is False unless the host may wait, once a forward, for the mask.

        Parameters
        ----------
        mask : Tensor
            The mask of all tokens seen, ``[batch, 1, 1, seen]``.
        seen : int
            Number of tokens seen, the new one included.
        row_start : sequence of int
            Number of padding tokens before each row's first real token.
        may_wait : bool, default False
            True to read the mask of a GPU too.
        """
        if not isinstance(mask, Tensor) or mask.dim() != 4:
            return False
        if mask.device.type != "cpu" and not may_wait:
            return False
        if self._known is None or self._known[0]() is not mask:
            plain = mask.shape[1:] == (1, 1, seen) and mask.shape[0] in (1, len(row_start))
            if plain:
                real = torch.arange(seen, device=mask.device) >= send_numbers(row_start, mask.device)[:, None]
                # An additive mask may also carry a bias, which is no padding.
                visible = mask[:, 0, 0] if mask.dtype == torch.bool else mask[:, 0, 0] == 0
                plain = bool((visible | ~real).all())
            self._known = weakref.ref(mask), plain
        return self._known[1]


def can_mask_heads(backend: str | None) -> bool:
    """Return True if masks of the backend can hide different slots in each head."""
    return backend is None or not backend.startswith("flash")


def check_head_budgets(backend: str | None) -> None:
    """Check that masks of the backend can hide different slots in each head.

    Raises
    ------
    UnsupportedModelError
        For flash attention, which has one mask for all heads.
    """
    if not can_mask_heads(backend):
        raise UnsupportedModelError(
            f"head_budgets needs a mask for each head, which {backend} does not support; use "
            "attn_implementation='sdpa', or head_budgets=None."
        )


def _spread(slot_valid: Tensor, query_heads: int, backend: str | None) -> Tensor:
    """Return ``[batch, 1, slot]``, or ``[batch, query_heads, slot]`` if heads differ."""
    if slot_valid.dim() == 2:
        return slot_valid[:, None]
    check_head_budgets(backend)
    return slot_valid.repeat_interleave(query_heads // slot_valid.shape[1], dim=1)


def _hides_nothing(mask: Tensor) -> bool:
    return bool(mask.all()) if mask.dtype == torch.bool else not bool(mask.any())


def _mask_from_slots(
    positions: Tensor, slot_valid: Tensor | None, query_length: int, backend: str | None, dtype: torch.dtype
) -> Tensor | None:
    flash = backend is not None and backend.startswith("flash")
    if slot_valid is not None and flash:
        return slot_valid[:, 0]
    if query_length == 1 or flash:
        visible = None if slot_valid is None else slot_valid[:, :, None, :]
    else:
        # Kept slots precede all queries, and the queries' own slots are last: the mask is causal over slots.
        slots = positions.shape[-1]
        rows = torch.arange(slots - query_length, slots, device=positions.device)
        visible = (torch.arange(slots, device=positions.device) <= rows[:, None])[None, None]
        if slot_valid is not None:
            visible = visible & slot_valid[:, :, None, :]
    if visible is None or backend != "eager":
        return visible
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(
        ~visible, torch.finfo(dtype).min
    )
