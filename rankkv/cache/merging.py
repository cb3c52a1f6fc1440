"""What becomes of evicted tokens when they are merged: folded into the kept token with the most similar key."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from ..observe.observation import BLOCK_ELEMENTS

# As good as equal: a token whose similarity is the mean itself passes, whatever the order of the additions.
_TOLERANCE = 1e-6


def fold_evicted(
    keys: Tensor, values: Tensor, kept: Tensor, is_real: Tensor, mode: str
) -> tuple[Tensor, Tensor]:
    """Fold the evicted tokens of a layer into the kept ones.

    ``u_i = max over kept c of cos(k_i, k_c)`` and ``c(i)`` the kept token where it is reached.  A token is folded if
    ``u_i >= tau``, the mean of u over the evicted tokens of its row and head; the others are dropped.  With
    ``Z_c = e + sum over the folded i with c(i) = c of exp(u_i)``, each kept token becomes
    ``v_c <- (e v_c + sum exp(u_i) v_i) / Z_c``, and its key likewise where keys are folded too.

    Parameters
    ----------
    keys, values : Tensor
        ``[batch, kv_head, slot, head_dim]``, keys as they are cached (with their rotary positions).
    kept : Tensor
        Int64 ``[batch, kv_head or 1, kept]``, slots of the kept tokens; -1 where a row or head keeps fewer.
    is_real : Tensor
        Bool ``[batch, kv_head or 1, slot]``: False where a slot holds padding or nothing.
    mode : {"values", "keys_and_values"}
        What is folded.

    Returns
    -------
    tuple of Tensor
        Keys and values of the kept tokens, ``[batch, kv_head, kept, head_dim]``; a token into which none was folded
        stays exactly as it was.

    Notes
    -----
    D2O's threshold follows the evictions while decoding, as a moving average; here each eviction has a mean of its own.
    The authors' program has one threshold a layer, by which a token is folded in all heads or in none, and takes the
    plain mean of the kept token and the folded ones, each of these times its similarity, in place of the weights above.

    References
    ----------
    Wan et al., "D2O: Dynamic Discriminative Operations for Efficient Long-Context Inference of Large Language Models",
    2024, arXiv:2406.13035, token-level merging (tau as after a prefill; it folds keys and values).

    Zhang et al., "CaM: Cache Merging for Memory-efficient LLMs Inference", ICML 2024: folding values alone.

    Examples
    --------
    >>> keys = torch.tensor([[[[1.0, 0.0], [0.0, 1.0], [2.0, 0.1]]]])
    >>> values = torch.tensor([[[[1.0], [2.0], [3.0]]]])
    >>> kept, real = torch.tensor([[[0, 1]]]), torch.ones(1, 1, 3, dtype=torch.bool)
    >>> fold_evicted(keys, values, kept, real, "values")[1].flatten().round(decimals=2).tolist()
    [2.0, 2.0]
    """
    batch, heads, slots, _ = keys.shape
    kept = kept.expand(batch, heads, -1)
    is_empty, index = kept < 0, kept.clamp(min=0)
    is_kept = torch.zeros(batch, heads, slots + 1, dtype=torch.bool, device=keys.device)
    is_kept.scatter_(-1, kept.masked_fill(is_empty, slots), True)
    evicted = is_real.expand(batch, heads, slots) & ~is_kept[..., :slots]
    similarity, target = _find_nearest(keys, index, is_empty)
    similarity = similarity.masked_fill(~evicted, 0.0)
    threshold = similarity.sum(dim=-1, keepdim=True) / evicted.sum(dim=-1, keepdim=True).clamp(min=1)
    folded = evicted & (similarity >= threshold - _TOLERANCE)
    weight = similarity.exp().masked_fill(~folded, 0.0)
    total = torch.zeros_like(index, dtype=torch.float32).scatter_add_(-1, target, weight)

    def fold(tensor: Tensor) -> Tensor:
        own = _gather(tensor, index)
        place = target[..., None].expand(-1, -1, -1, tensor.shape[-1])
        # A padding slot may hold anything: its weight of zero does not silence what is not a number.
        given = (weight[..., None] * tensor.float()).masked_fill(~folded[..., None], 0.0)
        joined = (own.float() * math.e).scatter_add_(2, place, given) / (total + math.e)[..., None]
        return torch.where((total > 0)[..., None], joined.to(tensor.dtype), own)

    return fold(keys) if mode == "keys_and_values" else _gather(keys, index), fold(values)


def _find_nearest(keys: Tensor, index: Tensor, is_empty: Tensor) -> tuple[Tensor, Tensor]:
    """Find for every slot the kept token with the most similar key: cosine and place, ``[batch, kv_head, slot]``."""
    unit = functional.normalize(keys.float(), dim=-1)
    kept = _gather(unit, index).transpose(-1, -2)
    batch, heads, slots, _ = keys.shape
    rows = max(1, BLOCK_ELEMENTS // max(1, batch * heads * index.shape[-1]))
    found = [
        (unit[:, :, start : start + rows] @ kept).masked_fill(is_empty[:, :, None], -2.0).max(dim=-1)
        for start in range(0, slots, rows)
    ]
    return torch.cat([best.values for best in found], dim=-1), torch.cat(
        [best.indices for best in found], dim=-1
    )


def _gather(tensor: Tensor, index: Tensor) -> Tensor:
    return tensor.gather(2, index[..., None].expand(-1, -1, -1, tensor.shape[-1]))
