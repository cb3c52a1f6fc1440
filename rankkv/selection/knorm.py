"""Knorm: keep the keys of low norm."""

from __future__ import annotations

import torch
from torch import Tensor

from ..observe.observation import Observation
from .scoring import merge_ties, without_padding


@without_padding
def score_knorm(observation: Observation) -> Tensor:
    """Score each key by its norm, the lower the better.

    ``score_j = - ||k_j||_2``, in float32.  Keys of low norm get high attention in most layers; the paper leaves the
    first two layers uncompressed, where this does not hold, which is a matter of budgets and not done here.

    Parameters
    ----------
    observation : Observation
        The layer's keys.

    Returns
    -------
    Tensor
        ``[batch, kv_head, key]`` float32; where attention sees more key heads than the cache has, their mean.

    Notes
    -----
    As with every selector the newest token is always kept, whatever it scores (``recent_fraction=0.0`` protects no
    other); kvpress protects none.  Norms that are equal but for rounding, as those of a token that
    comes again are in the first layer, tie, and the earlier one is kept.

    References
    ----------
    Devoto et al., "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression", 2024, arXiv:2406.11430,
    section 3.
    """
    norms = torch.linalg.vector_norm(observation.keys, dim=-1, dtype=torch.float32)
    return merge_ties(-observation.compute_group_mean(norms))
