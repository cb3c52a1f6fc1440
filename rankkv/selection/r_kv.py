"""R-KV: keep the keys that are attended to and unlike the others, for long generated reasoning."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError
from ..observe.observation import Observation
from .scoring import without_padding


def refine_r_kv(
    scores: Tensor, observation: Observation, weight: float = 0.07, threshold: float = 0.5
) -> Tensor:
    """Mix attention scores with the redundancy of each key, its mean cosine to the others.

    ``weight s_j - (1 - weight) softmax_j(mean over i of c_ij)``, where ``c_ij`` is the cosine of keys i and j, and 0 if
    i = j. The newest j whose cosine to i exceeds ``threshold`` also counts 0: of similar keys the newest stays.

    Parameters
    ----------
    scores : Tensor
        The base's scores, ``[batch, kv_head or 1, key]``; attention that sums to about 1 over the keys.
    observation : Observation
        The layer's keys.
    weight : float, default 0.07
        Weight of the attention, in [0, 1].
    threshold : float, default 0.5
        Cosine above which two keys are similar.

    Returns
    -------
    Tensor
        ``[batch, kv_head, key]`` float32.

    Raises
    ------
    ConfigError
        If an option is outside its range.

    Notes
    -----
    Made for ``decode="periodic"`` (the authors compress every 128 tokens) and ``"bounded"``. Three points differ from
    the authors' code. The option ``base`` (default SnapKV) gives the attention: pooled over 5 keys, theirs over 7, and
    a mean over the heads of a group, where theirs takes the largest logit of the group. It reads ``window_size``
    queries, theirs 8. If no key is similar, none is spared; theirs then spares the first.

    References
    ----------
    Cai et al., "R-KV: Redundancy-aware KV Cache Compression for Reasoning Models", 2025, arXiv:2505.24133.

    Examples
    --------
    >>> from rankkv.selection import get_selector
    >>> str(get_selector("r_kv", weight=0.1))
    'r_kv(weight=0.1)'
    """
    for name, value, low in (("weight", weight, 0.0), ("threshold", threshold, -1.0)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= 1:
            raise ConfigError(f"{name}={value!r} of selector 'r_kv' must be a number in [{low:g}, 1].")
    return weight * scores.float() - (1 - weight) * _compute_redundancy(observation, threshold)


@without_padding
def _compute_redundancy(observation: Observation, threshold: float) -> Tensor:
    """Compute the softmax of each key's mean cosine to the others, ``[batch, kv_head, key]``."""
    keys = torch.nn.functional.normalize(observation.keys.float(), dim=-1)
    tokens = keys.shape[-2]
    index = torch.arange(tokens, device=keys.device)
    sums = keys.new_zeros(keys.shape[:3])
    # Blocks of rows bound the memory: all cosines would grow with the square of the length.
    step = observation.count_block_rows(tokens)
    for start in range(0, tokens, step):
        rows = index[start : start + step]
        cosines = keys[:, :, rows] @ keys.mT
        cosines.masked_fill_(index == rows[:, None], 0.0)
        newest = torch.where(cosines > threshold, index, -1).amax(dim=-1, keepdim=True)
        cosines.masked_fill_(index == newest, 0.0)
        sums += cosines.sum(dim=-2)
    return observation.compute_group_mean((sums / tokens).softmax(dim=-1))
