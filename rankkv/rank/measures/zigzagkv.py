"""ZigZagKV's layer uncertainty: the share of tokens that holds most of a layer's attention."""

from __future__ import annotations

import torch
from torch import Tensor

from ...observe.observation import Observation
from .base import count_window_rows


def compute_layer_uncertainty(observation: Observation, mass: float = 0.9) -> Tensor:
    """Compute the share of tokens that holds ``mass`` of the observation window's attention.

    For each query head, the fewest tokens whose attention, averaged over the window's rows, sums to ``mass`` of the
    whole. This number is averaged over the heads and divided by the number of tokens.

    Parameters
    ----------
    observation : Observation
        The layer's queries and keys.
    mass : float, default 0.9
        Fraction of the attention to hold, in (0, 1].

    Returns
    -------
    Tensor
        ``[batch]`` float64, in (0, 1]; NaN where the attention is not finite.

    Notes
    -----
    With B tokens per layer on average, ZigZagKV first gives each of L layers a minimum budget b, and then distributes
    the rest by the uncertainty u: ``b + (B - b) * L * u / sum u``.  Here the whole budget is distributed, as with ``b =
    0``, and a layer below the floor of all strategies is raised to it.

    References
    ----------
    Zhong et al., "ZigZagKV: Dynamic KV Cache Compression for Long-context Modeling based on Layer Uncertainty", 2024,
    arXiv:2412.09036 (the least budget that maintains a layer's attention).
    """
    window = observation.window_attention
    votes = window.sum(dim=-2, dtype=torch.float64)
    votes = votes / count_window_rows(observation, window.shape[-2])[:, None, None]
    held = votes.sort(dim=-1, descending=True).values.cumsum(dim=-1)
    # A little less than the whole, so that float noise cannot put mass=1 out of reach.
    wanted = mass * held[..., -1:] * (1 - 1e-12)
    needed = (held < wanted).sum(dim=-1) + 1
    tokens = torch.tensor(observation.available, device=held.device).clamp(min=1)
    needed = observation.gather_over_shards(needed)
    share = needed.to(torch.float64).mean(dim=-1) / tokens
    whole = observation.gather_over_shards(held[..., -1])
    return torch.where(torch.isfinite(whole).all(dim=-1), share, torch.nan)
