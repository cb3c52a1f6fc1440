"""The effective rank of one observed layer, in each of the three scopes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..full_rank import compute_full_rank
from ..observe.observation import Observation
from .aggregation import compute_aggregated_rank
from .spectrum import compute_rank_from_gram, round_ranks


def compute_layer_ranks(
    observation: Observation, scope: str = "evictable", aggregation: str = "concat", normalize: bool = False
) -> Tensor:
    """Compute the effective rank of the attention of one layer, row by row of the batch.

    The matrix ranked is, by scope, ``"evictable"``: the observation window's rows, and of the columns those that could
    be evicted (neither sinks nor recent), not renormalised; ``"window"``: the same rows, all columns; ``"full"``: all
    query rows, in long prompts an estimate (see :func:`rankkv.full_rank.compute_full_rank`).

    Parameters
    ----------
    observation : Observation
        The layer's queries, keys and mask.
    scope : {"evictable", "window", "full"}
        Part of the attention.
    aggregation : str, default "concat"
        How heads are joined; see :func:`rankkv.analyze_attention_ranks`.
    normalize : bool, default False
        Divide by the number of singular values.

    Returns
    -------
    Tensor
        ``[batch]`` float64 on the CPU, rounded to 6 significant digits so that float noise does not move a token; 0
        where nothing can be evicted, NaN where the attention is not finite.

    References
    ----------
    Roy and Vetterli, "The effective rank: A measure of effective dimensionality", EUSIPCO 2007.
    """
    if scope == "full":
        ranks = torch.stack(
            [
                compute_full_rank(observation.take_row(row), aggregation, normalize)
                for row in range(len(observation.lengths))
            ]
        )
    else:
        if scope == "evictable" and aggregation == "concat" and not normalize:
            # Side by side, the Gram matrices of the key/value heads add up; what measures these has them already.
            gram = observation.sum_over_shards(observation.group_grams.sum(dim=1))
            return round_ranks(compute_rank_from_gram(gram).cpu())
        window = observation.evictable_attention if scope == "evictable" else observation.window_attention
        if window.shape[-1] == 0:
            return torch.zeros(window.shape[0], dtype=torch.float64)
        ranks, _ = compute_aggregated_rank(window, aggregation, normalize, shards=observation.shards)
    return round_ranks(ranks.cpu())


def compute_head_ranks(observation: Observation) -> Tensor:
    """Compute the effective rank of every query head's evictable attention.

    Parameters
    ----------
    observation : Observation
        The layer's queries, keys and mask.

    Returns
    -------
    Tensor
        ``[batch, head]`` float64 on the CPU, rounded as :func:`compute_layer_ranks` rounds; 0 where nothing can be
        evicted.
    """
    window = observation.evictable_attention
    if window.shape[-1] == 0:
        return torch.zeros(window.shape[:2], dtype=torch.float64)
    _, per_head = compute_aggregated_rank(window, "per_head")
    return round_ranks(per_head.cpu())  # type: ignore[union-attr]


def compute_group_ranks(observation: Observation) -> Tensor:
    """Compute the effective rank of every key/value head's evictable attention, its query heads side by side.

    Parameters
    ----------
    observation : Observation
        The layer's queries, keys and mask.

    Returns
    -------
    Tensor
        ``[batch, kv_head]`` float64 on the CPU, rounded as :func:`compute_layer_ranks` rounds; 0 where nothing can be
        evicted.
    """
    return round_ranks(compute_rank_from_gram(observation.group_grams).cpu())


def compute_group_concentration(observation: Observation) -> Tensor:
    """Compute how few evictable tokens each key/value head attends to at a time: 1 for one, 1 / n for n alike.

    ``mean_i sum_j p_ij^2`` with ``p_i`` a query's attention to what could be evicted, over its sum; the mean is over
    the queries of the window that have any, and over the query heads of the group.  Its inverse counts tokens for one
    query, as the effective rank counts directions over all of them.

    Parameters
    ----------
    observation : Observation
        The layer's queries, keys and mask.

    Returns
    -------
    Tensor
        ``[batch, kv_head]`` float64 on the CPU, in [0, 1], rounded as ranks are; 0 where nothing can be evicted.
    """
    window = observation.evictable_attention
    batch, heads = window.shape[:2]
    mass = window.sum(dim=-1)
    seen = mass > 0
    # Divided before it is squared: the mass may be so small that its square is not a float32.
    alone = (window / torch.where(seen, mass, 1.0)[..., None]).pow(2).sum(dim=-1)
    of_head = alone.sum(dim=-1) / seen.sum(dim=-1).clamp(min=1)
    grouped = of_head.view(batch, observation.kv_heads, heads // observation.kv_heads).mean(dim=-1)
    return round_ranks(grouped.cpu().to(torch.float64))
