"""Random selection: the control that any method must beat."""

from __future__ import annotations

import torch
from torch import Tensor

from ..observe.observation import Observation


def score_random(observation: Observation, seed: int = 0) -> Tensor:
    """Score each key by a uniform random number that depends on seed, layer, head and token.

    Parameters
    ----------
    observation : Observation
        The layer's keys.
    seed : int, default 0
        The same seed keeps the same tokens.

    Returns
    -------
    Tensor
        ``[batch, kv_head, key]`` float32.
    """
    index = observation.real_index.expand(-1, observation.kv_heads, -1).cpu()
    draws: list[Tensor] = []
    parts = 1 if observation.shards is None else observation.shards.size
    for length in observation.lengths:
        # Draw token by token, so that neither padding nor later tokens change a token's number.
        generator = torch.Generator().manual_seed(seed * 100_003 + observation.layer_idx)
        # A row of padding only, as a chunk may be, still needs one number for gather.
        drawn = torch.rand(max(1, length), observation.kv_heads * parts, generator=generator).T
        if observation.shards is not None:
            drawn = observation.shards.take_own(drawn, dim=0)
        draws.append(drawn.gather(-1, index[len(draws)].clamp(0, max(0, length - 1))))
    return torch.stack(draws).to(observation.keys.device)
