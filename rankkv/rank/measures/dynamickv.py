"""DynamicKV's best scores of a layer, which are ranked together with those of all other layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...limits import Limits
from ...observe.observation import Observation
from .base import compute_past_attention, pool_scores


def compute_best_scores(
    observation: Observation,
    r_max: float = 10.0,
    kernel_size: int = 5,
    limits: Sequence[Limits] | None = None,
    layers: int = 1,
) -> Tensor:
    """Compute the best scores of each query head.

    A token before the window scores the attention of the window's rows to it, summed over the rows and average-pooled
    along the tokens.  With a total budget of C tokens per layer and a window of W, the best ``r_max * (C - W)`` scores
    of each head are returned.

    Parameters
    ----------
    observation : Observation
        The layer's queries and keys.
    r_max : float, default 10.0
        Most tokens of one layer, in average budgets beyond the window.
    kernel_size : int, default 5
        Width of the pooling, odd; 1 means none.
    limits : sequence of Limits, optional
        Total and window of each row; None returns all scores.
    layers : int, default 1
        Number of layers that share the total.

    Returns
    -------
    Tensor
        ``[batch, head, k]`` float64, descending; 0 after a head's last score.

    Notes
    -----
    The authors' program counts all scores of a head, and then cuts a layer at ``r_max * (C - W)`` tokens.  Here no head
    contributes more than that many, which gives a layer the same maximum.  Their program also counts every few layers
    and cuts the earlier ones to their budgets at that time, so that memory falls during the prefill.  Here all layers
    are counted together, once, as in its last update.  Its scripts use ``r_max=10`` and a window of 8 tokens, pooled
    over 7 by the average or, for some models, the maximum.

    References
    ----------
    Zhou et al., "DynamicKV: Task-Aware Adaptive KV Cache Compression for Long Context LLMs", 2024, arXiv:2412.14838,
    algorithm 1.
    """
    attention, columns = compute_past_attention(observation)
    scores = pool_scores(attention.sum(dim=-2), columns, kernel_size, average=True)
    best = scores.sort(dim=-1, descending=True).values.to(torch.float64)
    if limits is None:
        return observation.gather_over_shards(best)
    most = [int(r_max * max(0.0, row.total_budget / layers - row.window_size)) for row in limits]
    best = best[..., : max(1, *most)]
    index = torch.arange(best.shape[-1], device=best.device)
    best = observation.gather_over_shards(best)
    return best * (index < torch.tensor(most, device=best.device)[:, None])[:, None]
