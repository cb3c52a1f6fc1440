"""LagKV: keep the tokens whose keys and values vary most relative to the next partition."""

from __future__ import annotations

import torch
from torch import Tensor

from ..observe.observation import Observation
from .scoring import check_integer_option, without_padding


@without_padding
def score_lagkv(observation: Observation, lag_size: int = 128, across: bool = False) -> Tensor:
    """Score each token by the spread of its key and value relative to the next partition.

    After the sinks, tokens are cut into partitions of ``lag_size``. Let ``lo, hi [head_dim]`` be the least and the
    greatest value of each channel in partition p + 1. For the tokens j of partition p,

    ``s_j = (softmax_j std_c((k_jc - lo_c) / (hi_c - lo_c)) + the same of v) / 2``, the softmax over the tokens of p,

    and ``score_j = rank of s_j in p / lag_size``, so that each partition keeps an equal share. The last partition and
    the incomplete one after it have no full partition after them. They score 1 like the sinks, above the rest. With
    fewer than ``sink_size + 2 * lag_size`` tokens no partition can be compared, and the newest tokens are kept.

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
        ``[batch, kv_head, key]`` float32; ``s`` is the mean if attention sees more key heads than the cache has.

    Raises
    ------
    ConfigError
        If ``lag_size`` is not an integer of at least 2.

    Notes
    -----
    The paper compresses each partition as soon as the next is full. Here a compression scores all tokens of the layer
    at once, as kvpress does. A channel with ``hi = lo`` counts as 0.

    References
    ----------
    Liang et al., "LagKV: Lag-Relative Information of the KV Cache Tells Which Tokens Are Important", 2025,
    arXiv:2504.04704, equations 1 to 6.
    """
    check_integer_option("lagkv", "lag_size", lag_size, 2)
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
        observation.compute_group_mean(_compute_spreads(states[:, :, first:last].float(), lag_size))
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


def _compute_spreads(states: Tensor, lag_size: int) -> Tensor:
    """Compute the softmax of the spreads relative to the next partition, ``[batch, head, partition, token]``."""
    parts = states.unflatten(-2, (-1, lag_size))
    scored, following = parts[:, :, :-1], parts[:, :, 1:]
    low, high = following.amin(dim=-2, keepdim=True), following.amax(dim=-2, keepdim=True)
    spread = torch.where(high > low, (scored - low) / (high - low), 0.0)
    return spread.std(dim=-1).softmax(dim=-1)
