"""SqueezeAttention's importance of a layer: how far its attention turns the hidden state."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import CacheStateError
from ...observe.observation import Observation


def compute_layer_change(observation: Observation) -> Tensor:
    """Compute the cosine distance between the hidden states before and after a layer's attention.

    ``mean over the tokens of 1 - cos(x, x + a)``; SqueezeAttention uses the cosine itself, which groups layers alike.

    Parameters
    ----------
    observation : Observation
        Of a cache that watches hidden states.

    Returns
    -------
    Tensor
        ``[batch]`` float64, in [0, 2].

    Raises
    ------
    CacheStateError
        If no hidden state of this layer was seen.

    References
    ----------
    Wang et al., "SqueezeAttention: 2D Management of KV-Cache in LLM Inference via Layer-wise Optimal Budget", 2024,
    arXiv:2404.04793, section 4.
    """
    changes = observation.changes
    if changes is None:
        raise CacheStateError(
            f"no hidden state of layer {observation.layer_idx} was seen: build the cache with this strategy, before "
            "the prompt runs."
        )
    start = torch.tensor(observation.row_start, device=changes.device).view(-1, 1)
    real = torch.arange(changes.shape[1], device=changes.device) >= start
    return changes.masked_fill(~real, 0.0).cpu().to(torch.float64).sum(dim=-1) / real.cpu().sum(dim=-1).clamp(
        min=1
    )
