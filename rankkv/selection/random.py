"""Random selection: the control that any method must beat."""

from __future__ import annotations

import torch
from torch import Tensor

from ..observation import Observation


def score_random(observation: Observation, seed: int = 0) -> Tensor:
    """Score each key by a uniform random number that depends on the seed, the layer, the head and the token.

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
    scores = torch.zeros(len(observation.lengths), observation.kv_heads, observation.key_length)
    valid = observation.valid.cpu()
    for row, length in enumerate(observation.lengths):
        # Drawn for the row alone, so that padding or neighbours in the batch do not change what it keeps.
        generator = torch.Generator().manual_seed(seed * 100_003 + observation.layer_idx)
        scores[row][:, valid[row]] = torch.rand(observation.kv_heads, length, generator=generator)
    return scores.to(observation.keys.device)
