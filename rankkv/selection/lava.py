"""LAVa: window attention times the layer's largest value, so that scores compare across heads."""

from __future__ import annotations

import torch
from torch import Tensor

from ..observe.observation import Observation
from .snapkv import pool_votes


def score_lava(observation: Observation, pooling: str = "max", kernel_size: int = 7) -> Tensor:
    """Score each key by the observation window's attention times its head's largest value norm.

    ``score_j = max over the heads of the group of (pool_j(mean over window rows i of A[i, j]) * max_k ||v_k||_1)``, k
    over the keys before the window. The factor is the same for all keys of a head. It does not change the order inside
    a head, but it decides between heads that share a budget. ``strategy="lava"`` gives the paper's layer budgets.

    Parameters
    ----------
    observation : Observation
        The layer's queries, keys and values.
    pooling : {"max", "avg"}, default "max"
        Pooling over neighbouring keys, as in SnapKV.
    kernel_size : int, default 7
        Width of the pooling, odd; 1 means none.

    Returns
    -------
    Tensor
        ``[batch, kv_head, key]`` float32.

    Raises
    ------
    ConfigError
        If ``pooling`` is unknown or ``kernel_size`` is not odd and positive.

    References
    ----------
    Shen et al., "LAVa: Layer-wise KV Cache Eviction with Dynamic Budget Allocation", 2025, arXiv:2509.09754
    (the score of a layer's entries); pooling and the maximum over a group as in the authors' code.
    """
    votes = pool_votes(observation, "lava", pooling, kernel_size)
    norms = observation.values.float().abs().sum(dim=-1)
    lengths = torch.tensor(observation.lengths, device=norms.device).view(-1, 1, 1)
    index = observation.real_index
    # In a prompt no longer than the window, no key comes before the window; use all keys.
    stops = torch.where(lengths > observation.window_size, lengths - observation.window_size, lengths)
    largest = norms.masked_fill((index < 0) | (index >= stops), 0.0).amax(dim=-1)
    groups = votes.shape[1] // largest.shape[1]
    weighed = votes * largest.repeat_interleave(groups, dim=1)[..., None]
    batch, heads, keys = weighed.shape
    return weighed.view(batch, observation.kv_heads, heads // observation.kv_heads, keys).amax(dim=2)
