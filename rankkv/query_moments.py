"""Mean and covariance of a layer's queries, which outlive the queries: all that some methods need of them."""

from __future__ import annotations

import torch
from torch import Tensor

from .observe.observation import Observation

#: What a method may ask to be kept of past queries: as attention saw them, or turned back to position 0.
PAST_QUERIES = ("turned", "unturned")


def compute_query_moments(observation: Observation, kind: str) -> Tensor:
    """Compute the moments of all queries of a layer so far: those observed, joined to those that are gone.

    One symmetric matrix a head, ``[[S, m], [m^T, n]]``, with the number ``n`` of queries, their mean ``m`` and
    ``S = sum of (q - m)(q - m)^T``.

    Parameters
    ----------
    observation : Observation
        Its queries, ``past_moments``, and ``rotation`` where they are to be turned back.
    kind : {"turned", "unturned"}
        ``"turned"``: all queries, as attention saw them.  ``"unturned"``: turned back to position 0, and without those
        of the sinks, which are unlike any other.

    Returns
    -------
    Tensor
        ``[batch, head, key_dim + 1, key_dim + 1]`` float32; additive over queries by :func:`merge_moments`.
    """
    queries, used = observation.query.float(), observation.query_valid
    if kind == "unturned":
        used = used & (observation.query_index >= observation.sink_size)
        if observation.rotation is not None:
            frequencies = observation.rotation.frequencies.to(queries.device)
            angles = observation.query_rotary_positions[..., None] * frequencies
            queries = observation.rotation.turn(queries, -angles)
    weights = used[:, None, :, None]
    # Padding may hold anything, and 0 times that may not be a number.
    queries = queries.masked_fill(~weights, 0.0)
    count = weights.sum(dim=-2, keepdim=True).float().expand(-1, queries.shape[1], -1, -1)
    mean = queries.sum(dim=-2, keepdim=True) / count.clamp(min=1)
    centred = (queries - mean).masked_fill(~weights, 0.0)
    spread = centred.mT @ centred
    moments = torch.cat([torch.cat([spread, mean], dim=-2), torch.cat([mean.mT, count], dim=-2)], dim=-1)
    return moments if observation.past_moments is None else merge_moments(observation.past_moments, moments)


def merge_moments(one: Tensor, other: Tensor) -> Tensor:
    """Merge the moments of two sets of queries, without loss by cancellation.

    ``n = n_1 + n_2``, ``m = (n_1 m_1 + n_2 m_2) / n``, ``S = S_1 + S_2 + n_1 n_2 / n (m_1 - m_2)(m_1 - m_2)^T``.

    Examples
    --------
    >>> one, other = torch.tensor([[0.0, 2.0], [2.0, 1.0]]), torch.tensor([[0.0, 4.0], [4.0, 1.0]])
    >>> merge_moments(one, other).tolist()
    [[2.0, 3.0], [3.0, 2.0]]
    """
    (spread, mean, count), (spread_2, mean_2, count_2) = split_moments(one), split_moments(other)
    total = count + count_2
    safe = total.clamp(min=1)
    apart = mean_2 - mean
    joined = (count * mean + count_2 * mean_2) / safe
    spread = spread + spread_2 + (count * count_2 / safe) * apart.mT @ apart
    return torch.cat([torch.cat([spread, joined], dim=-2), torch.cat([joined.mT, total], dim=-2)], dim=-1)


def split_moments(moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split moments into ``S [..., dim, dim]``, the mean ``[..., 1, dim]`` and the number ``[..., 1, 1]``."""
    return moments[..., :-1, :-1], moments[..., -1:, :-1], moments[..., -1:, -1:]
