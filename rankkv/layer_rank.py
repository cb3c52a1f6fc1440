"""The effective rank of one observed layer, in each of the three scopes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .observation import Observation
from .rank_aggregation import compute_aggregated_rank, get_aggregation
from .rank_kernels import compute_gram, compute_rank_from_gram, round_ranks

#: Scope "full" ranks the whole attention matrix up to this many tokens ...
EXACT_TOKENS = 1024
#: ... and beyond it this many query rows, spread evenly over the prompt.
SAMPLED_ROWS = 512


def compute_layer_ranks(
    observation: Observation, scope: str = "evictable", aggregation: str = "concat", normalize: bool = False
) -> Tensor:
    """Compute the effective rank of the attention of one layer, row by row of the batch.

    The matrix ranked is, by scope, ``"evictable"``: the observation window's rows, and of the columns those that could
    be evicted (neither sinks nor recent), not renormalised; ``"window"``: the same rows, all columns; ``"full"``: all
    query rows (beyond ``EXACT_TOKENS`` tokens, ``SAMPLED_ROWS`` evenly spread ones: an estimate that compares layers
    of one prompt, bounded by the number of rows).

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
                _compute_full_rank(observation.take_row(row), aggregation, normalize)
                for row in range(len(observation.lengths))
            ]
        )
    else:
        window = observation.window_attention
        if scope == "evictable":
            window = _cut_evictable(window, observation)
        if window.shape[-1] == 0:
            return torch.zeros(window.shape[0], dtype=torch.float64)
        ranks, _ = compute_aggregated_rank(window, aggregation, normalize)
    return round_ranks(ranks.cpu())


def _cut_evictable(window: Tensor, observation: Observation) -> Tensor:
    sinks, recent = observation.sink_size, observation.window_size
    if {*observation.lengths, *observation.available} == {observation.key_length}:
        # Without padding or earlier evictions the evictable columns are one stretch: a view, no copy.
        return window[..., sinks : max(sinks, observation.key_length - recent)]
    index = observation.real_index
    newest = torch.tensor(observation.lengths, device=index.device).view(-1, 1, 1) - recent
    columns = (index >= sinks) & (index < newest)
    if columns.shape[1] > 1:
        columns = columns.repeat_interleave(window.shape[1] // columns.shape[1], dim=1)
    return window * columns[:, :, None, :]


def _compute_full_rank(observation: Observation, aggregation: str, normalize: bool) -> Tensor:
    count = observation.query_length
    if count == 0:
        return torch.zeros((), dtype=torch.float64, device=observation.keys.device)
    if count > EXACT_TOKENS:
        spread = (torch.arange(SAMPLED_ROWS, device=observation.keys.device) + 0.5) * (count / SAMPLED_ROWS)
        rows: slice | Tensor = spread.long()
    else:
        rows = slice(0, count)
    matrices = _head_matrices(observation, rows)
    known = get_aggregation(aggregation)
    if aggregation == "concat":
        gram = compute_gram(next(matrices))
        for matrix in matrices:
            gram += compute_gram(matrix)
        rank = compute_rank_from_gram(gram)
    elif known.reduce is None:
        # Every row of a whole attention matrix sums to 1, so all heads have the same mass already.
        total = next(matrices).clone()
        for matrix in matrices:
            total += matrix
        rank = compute_rank_from_gram(compute_gram(total))
    else:
        per_head = torch.stack([compute_rank_from_gram(compute_gram(matrix)) for matrix in matrices])
        rank = known.reduce(per_head[None])[0]
    row_count = SAMPLED_ROWS if count > EXACT_TOKENS else count
    return rank / min(row_count, observation.key_length) if normalize else rank


def _head_matrices(observation: Observation, rows: slice | Tensor) -> Iterator[Tensor]:
    """Yield ``[row, key]`` float32 a head: the heads' matrices never stand in memory together."""
    groups = observation.query.shape[1] // observation.keys.shape[1]
    for head in range(observation.query.shape[1]):
        yield observation.take_head(head, head // groups).compute_attention(rows)[0, 0]
