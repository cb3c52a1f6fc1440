"""LagKV: keep the tokens whose keys and values stand out against those of the partition that follows."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError
from ..observe.observation import Observation
from .scoring import without_padding


@without_padding
def score_lagkv(observation: Observation, lag_size: int = 128, across: bool = False) -> Tensor:
    """Score each token by how far its key and value spread over the range of the next partition.

    After the sinks, tokens are cut into partitions of ``lag_size``.  For partition p, with the least and the greatest
    value ``lo, hi [head_dim]`` of each channel in partition p + 1,

    ``s_j = (softmax_j std_c((k_jc - lo_c) / (hi_c - lo_c)) + the same of v) / 2``, the softmax over the tokens of p,

    and ``score_j = rank of s_j in p / lag_size``, so that each partition keeps an equal share.  The last partition and
    what is left over are the reference that nothing follows: with the sinks they score 1, above the rest.  Fewer than
    ``sink_size + 2 * lag_size`` tokens have no partition to be compared, and the newest are kept.

    Parameters
    ----------
    observation : Observation
        The layer's keys and values.
    lag_size : int, default 128
        Tokens of a partition, at least 2.
    across : bool, default False
        Compare ``s_j`` itself between partitions, instead of its rank.

    Returns
    -------
    Tensor
        ``[batch, kv_head, key]`` float32; where attention sees more key heads than the cache has, ``s`` is their mean.

    Raises
    ------
    ConfigError
        If ``lag_size`` is no integer of at least 2.

    Notes
    -----
    The paper compresses a partition as soon as the next is full, again and again as tokens come in; here a compression
    scores what the layer holds, as kvpress does.  Where ``hi = lo`` the channel counts as 0.

    References
    ----------
    Liang et al., "LagKV: Lag-Relative Information of the KV Cache Tells Which Tokens Are Important", 2025,
    arXiv:2504.04704, equations 1 to 6.
    """
    if isinstance(lag_size, bool) or not isinstance(lag_size, int) or lag_size < 2:
        raise ConfigError(f"lag_size={lag_size!r} of selector 'lagkv' must be an integer of at least 2.")
    tokens = observation.key_length
    first = min(observation.sink_size, tokens)
    scores = torch.ones(
        (len(observation.lengths), observation.kv_heads, tokens), device=observation.keys.device
    )
    parts = (tokens - first) // lag_size
    if parts < 2:
        scores[..., first:] = torch.arange(tokens - first, device=scores.device) / max(1, tokens - first)
        return scores
    last = first + parts * lag_size
    spreads = [
        observation.compute_group_mean(_compare(states[:, :, first:last].float(), lag_size))
        for states in (observation.keys, observation.values)
    ]
    scored = (spreads[0] + spreads[1]) / 2
    if not across:
        order = scored.sort(dim=-1, descending=True, stable=True).indices
        rank = torch.empty_like(order).scatter_(
            -1, order, torch.arange(lag_size, device=order.device).expand_as(order)
        )
        scored = (lag_size - 1 - rank) / lag_size
    scores[..., first : last - lag_size] = scored.flatten(-2)
    return scores


def _compare(states: Tensor, lag_size: int) -> Tensor:
    parts = states.unflatten(-2, (-1, lag_size))
    scored, following = parts[:, :, :-1], parts[:, :, 1:]
    low, high = following.amin(dim=-2, keepdim=True), following.amax(dim=-2, keepdim=True)
    spread = torch.where(high > low, (scored - low) / (high - low), 0.0)
    return spread.std(dim=-1).softmax(dim=-1)
