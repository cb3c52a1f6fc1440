"""LAVa's layer entropy: how evenly a layer's scores are spread over its heads and tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ...observe.observation import Observation
from .base import compute_past_attention, count_window_rows, pool_scores


def compute_layer_entropy(observation: Observation, kernel_size: int = 7) -> Tensor:
    """Compute the entropy of a layer's LAVa scores.

    The score of token j in key/value head h is ``mean over window rows of A[i, j] * max_k ||V_k||_1``, max-pooled along
    the tokens; of the query heads of a group the largest counts.  All scores of the layer, divided by their sum, form
    one distribution p.  The measure is ``-sum p log p / log n`` with n scores, in [0, 1].

    Parameters
    ----------
    observation : Observation
        The layer's queries, keys and values.
    kernel_size : int, default 7
        Width of the pooling, odd; 1 means none.

    Returns
    -------
    Tensor
        ``[batch]`` float64; 0 if there is no token before the window.

    References
    ----------
    Shen et al., "LAVa: Layer-wise KV Cache Eviction with Dynamic Budget Allocation", 2025, arXiv:2509.09754,
    section 4; pooling, the largest of a group and the division by ``log n`` as in the authors' code.
    """
    attention, columns = compute_past_attention(observation)
    batch, heads, rows, keys = attention.shape
    votes = attention.sum(dim=-2) / count_window_rows(observation, rows)[:, None, None]
    pooled = pool_scores(votes, columns, kernel_size)
    grouped = pooled.view(batch, observation.kv_heads, heads // observation.kv_heads, keys).amax(dim=2)
    past = columns.expand(-1, heads, -1).reshape(batch, observation.kv_heads, -1, keys)[:, :, 0]
    norms = observation.values.float().abs().sum(dim=-1)
    if norms.shape[1] != observation.kv_heads:
        norms = observation.compute_group_mean(norms)
    scores = (grouped * norms.masked_fill(~past, 0.0).amax(dim=-1, keepdim=True)).to(torch.float64)
    scores = observation.gather_over_shards(scores)
    total = scores.sum(dim=(1, 2), keepdim=True)
    share = scores / torch.where(total > 0, total, 1.0)
    entropy = torch.special.entr(share).sum(dim=(1, 2))
    count = observation.sum_over_shards(past.sum(dim=(1, 2)))
    return entropy / count.clamp(min=2).log()
