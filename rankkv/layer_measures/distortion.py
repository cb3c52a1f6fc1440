"""What evicting costs a layer, measured on queries that had no say in it, and weighted by the layer's rank."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..budget_distortion import make_budget_grid
from ..layer_rank import compute_layer_ranks
from ..observation import Observation
from ..output_projection import compute_projection_matrix, find_output_projection
from ..rank_kernels import round_ranks

_POOL = 5


def compute_eviction_errors(
    observation: Observation,
    rank_exponent: float = 2.0,
    scope: str = "evictable",
    aggregation: str = "concat",
) -> Tensor:
    """Compute how wrong a layer's attention output gets when only so many tokens are kept.

    The observation window is split.  Its first half selects: of the keys before the second half it keeps the b that it
    attends to most, as SnapKV does.  Its second half, which had no say, is attended with these keys and with all:
    ``e(b) = ||W_o o_kept - W_o o_all|| / ||W_o o_all||`` (root mean square over the rows), at each b of
    :func:`rankkv.budget_distortion.make_budget_grid`, times the layer's effective rank to the power of
    ``rank_exponent``.  Where the output projection W_o is not found, the heads' outputs are taken side by side.

    Parameters
    ----------
    observation : Observation
        The layer's queries, keys and values.
    rank_exponent : float, default 2
        0 leaves the rank out.
    scope, aggregation : str
        Of the rank; see :func:`rankkv.layer_rank.compute_layer_ranks`.

    Returns
    -------
    Tensor
        ``[batch, budget]`` float64, rounded to 6 significant digits; zeros at the end of a shorter row, and for a
        window of fewer than 2 queries.
    """
    whole = {*observation.lengths, *observation.available} == {observation.key_length}
    count = len(observation.lengths)
    rows = [observation] if count == 1 and whole else [observation.take_row(row) for row in range(count)]
    curves = [_compute_row(row) for row in rows]
    widest = max(len(curve) for curve in curves)
    table = torch.stack([functional.pad(curve, (0, widest - len(curve))) for curve in curves])
    if rank_exponent:
        ranks = compute_layer_ranks(observation, scope, aggregation)
        table = table * (ranks**rank_exponent)[:, None]
    return round_ranks(table)


def _compute_row(observation: Observation) -> Tensor:
    """Return the errors of one row without padding, ``[budget]`` float64 on the CPU."""
    window = observation.window_attention[0]
    length = observation.key_length
    grid = make_budget_grid(length)
    heads, rows = window.shape[:2]
    held_out = rows // 2
    if held_out == 0 or not grid:
        return torch.zeros(max(1, len(grid)), dtype=torch.float64)
    chosen = rows - held_out
    cut = length - held_out
    scores = _pool(window[:, :chosen, :cut].mean(dim=1), cut - chosen)
    scores = observation.compute_group_mean(scores[None])[0]
    seen = window[:, chosen:]
    values = observation.values[0].float()
    values = values.repeat_interleave(heads // values.shape[0], dim=0)
    width = heads * values.shape[-1]
    parts = 1 if observation.shards is None else observation.shards.size
    projection = find_output_projection(observation.module, width, parts)
    matrix = None if projection is None else compute_projection_matrix(projection, width, values, parts)

    def measure(outputs: Tensor) -> Tensor:
        joined = outputs.transpose(0, 1).reshape(held_out, width)
        if matrix is None:
            # Heads side by side: their squares add up.
            return observation.sum_over_shards(joined.pow(2).sum())
        return observation.sum_over_shards(joined @ matrix).pow(2).sum()

    size = measure(seen @ values)
    errors = []
    for budget in grid:
        kept = _keep(scores, min(budget, cut), chosen, observation.sink_size)
        kept = functional.pad(kept, (0, held_out), value=True).repeat_interleave(
            heads // scores.shape[0], dim=0
        )
        left = seen * kept[:, None]
        left = left / left.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(left.dtype).tiny)
        errors.append(measure((left - seen) @ values))
    ratio = torch.stack(errors) / size.clamp(min=torch.finfo(size.dtype).tiny)
    return ratio.sqrt().to("cpu", torch.float64)


def _pool(votes: Tensor, split: int) -> Tensor:
    """Pool ``[head, key]`` along the keys before the selecting rows, and leave those rows' own keys as they are."""
    if split <= 0:
        return votes
    pooled = functional.max_pool1d(votes[:, :split], _POOL, stride=1, padding=_POOL // 2)
    return torch.cat([pooled, votes[:, split:]], dim=-1)


def _keep(scores: Tensor, budget: int, newest: int, sinks: int) -> Tensor:
    """Return bool ``[kv_head, key]``: the newest half of a budget, its sinks, and the best scores."""
    scores = scores.clone()
    recent = min(newest, budget // 2)
    if recent:
        scores[:, -recent:] = float("inf")
    scores[:, : min(sinks, budget // 4)] = float("inf")
    # Stable, so that of neighbours pooled to one score the earlier is kept, on any machine.
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :budget]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
