"""Knorm: keep the keys of low norm."""

from __future__ import annotations

import torch
from torch import Tensor

from ..observe.observation import Observation
from .scoring import merge_ties, without_padding


@without_padding
def score_knorm(observation: Observation) -> Tensor:
    """Score each key by its norm, the lower the better.

    ``score_j = - ||k_j||_2``, in float32. Keys of low norm get high attention in most layers. The first two layers are
    an exception, and the paper leaves them uncompressed. A selector does not set budgets, so this is not done here.

    Parameters
    ----------
    observation : Observation
        The layer's keys.

    Returns
    -------
    Tensor
        ``[batch, kv_head, key]`` float32; the mean if attention sees more key heads than the cache has.

    Notes
    -----
    As with every selector, the newest token is always kept, whatever it scores; ``recent_fraction=0.0`` protects no
    other token. kvpress protects none. Norms that differ only by rounding tie, and the earlier token is kept. Such ties
    occur in the first layer, where a repeated token has keys of equal norm.

    References
    ----------
    Devoto et al., "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression", 2024, arXiv:2406.11430,
    section 3.
    """
    norms = torch.linalg.vector_norm(observation.keys, dim=-1, dtype=torch.float32)
    return merge_ties(-observation.compute_group_mean(norms))
