"""Block masks of flex_attention, which are functions of indices, not tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedModelError

BACKEND = "flex_attention"


def is_block_mask(mask: Any) -> bool:
    """Tell whether a mask is a block mask."""
    return callable(getattr(mask, "mask_mod", None))


def evaluate(block_mask: Any, queries: Tensor, keys: Tensor) -> Tensor:
    """Evaluate a block mask at pairs of indices.

    Parameters
    ----------
    block_mask : BlockMask
        As transformers makes it: a function of batch, head, query and key index, counted within the call.
    queries, keys : Tensor
        Int64 indices that broadcast against each other, ``[batch or 1, head or 1, query, key]``.

    Returns
    -------
    Tensor
        Bool, ``[batch, head or 1, query, key]``.
    """
    batch, heads = block_mask.shape[0], max(queries.shape[1], keys.shape[1])
    rows = torch.arange(batch, device=keys.device).view(-1, 1, 1, 1)
    head = torch.arange(heads, device=keys.device).view(1, -1, 1, 1)
    visible = block_mask.mask_mod(rows, head, queries, keys)
    shape = torch.broadcast_shapes(rows.shape, head.shape, queries.shape, keys.shape)
    return visible.expand(shape)


def reduce_block_mask(block_mask: Any, query_length: int, key_length: int, heads: int = 1) -> Tensor:
    """Turn a block mask into a tensor, as small as possible.

    Parameters
    ----------
    block_mask : BlockMask
        As transformers or :func:`build_block_mask` makes it.
    query_length, key_length : int
        Shape of the call.
    heads : int, default 1
        Number of query heads, if the mask may differ between them.

    Returns
    -------
    Tensor
        ``[batch, key]`` bool, True for real keys, if the mask hides only padding and later tokens, the same in all
        heads. Otherwise the whole mask, ``[batch, 1 or head, query, key]`` bool.

    Raises
    ------
    UnsupportedModelError
        If the mask is not a block mask.

    Examples
    --------
    >>> from torch.nn.attention.flex_attention import create_block_mask
    >>> mask = create_block_mask(lambda b, h, q, k: (k <= q) & (k > 0), 1, None, 3, 3, device="cpu")
    >>> reduce_block_mask(mask, 3, 3)
    tensor([[False,  True,  True]])
    """
    if not is_block_mask(block_mask):
        raise UnsupportedModelError(
            f"attention masks of type {type(block_mask).__name__} are not supported; load the model with "
            "attn_implementation='sdpa'."
        )
    device = block_mask.kv_indices.device
    keys = torch.arange(key_length, device=device).view(1, 1, 1, -1)
    if heads > 1:
        queries = torch.arange(query_length, device=device).view(1, 1, -1, 1)
        return evaluate(block_mask, queries, keys.expand(1, heads, 1, -1))
    newest = evaluate(block_mask, keys.new_full((1, 1, 1, 1), query_length - 1), keys)[:, 0, 0]
    if query_length == key_length:
        real = evaluate(block_mask, keys, keys)[:, 0, 0]
    else:
        real = torch.ones_like(newest)
    if bool((real & ~newest).any()):
        # A real key that the newest query does not see: a sliding or chunked mask.
        return evaluate(block_mask, torch.arange(query_length, device=device).view(1, 1, -1, 1), keys)
    return real


def build_block_mask(visible: Tensor) -> Any:
    """Build a block mask from a dense mask, ``[batch, head or 1, query, key]`` bool."""
    from torch.nn.attention.flex_attention import create_block_mask

    batch, heads, queries, keys = visible.shape
    visible = visible.contiguous()
    if heads == 1:
        return create_block_mask(
            lambda b, h, q, k: visible[b, 0, q, k], batch, None, queries, keys, device=str(visible.device)
        )
    return create_block_mask(
        lambda b, h, q, k: visible[b, h, q, k], batch, heads, queries, keys, device=str(visible.device)
    )


def project_block_mask(
    block_mask: Any, positions: Tensor, slot_valid: Tensor | None, query_length: int, query_heads: int
) -> Any:
    """Rebuild a block mask over seen tokens as one over the slots of a layer.

    Parameters
    ----------
    block_mask : BlockMask or None
        The mask that transformers made for all layers; None hides only later tokens.
    positions : Tensor
        ``[batch, kv_head or 1, slot]`` int64, logical position of each slot (ascending).
    slot_valid : Tensor, optional
        ``[batch, 1 or head, slot]`` bool; None if every slot holds a token.
    query_length, query_heads : int
        Shape of the call.

    Returns
    -------
    BlockMask or None
        None if nothing is hidden from the one query of a decode step.
    """
    if positions.shape[1] > 1:
        positions = positions.repeat_interleave(query_heads // positions.shape[1], dim=1)
    keys = positions[:, :, None, :]
    queries = torch.arange(query_length, device=positions.device).view(1, 1, -1, 1)
    if block_mask is None:
        slots = positions.shape[-1]
        # The queries' own keys are in the last slots.
        order = torch.arange(slots, device=positions.device).view(1, 1, 1, -1)
        visible = (order <= queries + slots - query_length).expand(positions.shape[0], 1, -1, -1)
    else:
        visible = evaluate(block_mask, queries, keys)
    if slot_valid is not None:
        visible = visible & slot_valid[:, :, None, :]
    if query_length == 1 and bool(visible.all()):
        return None
    return build_block_mask(visible)
