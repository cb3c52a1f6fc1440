"""What evicting costs a layer, measured on queries that had no say in it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..budget_distortion import make_budget_grid
from ..observation import Observation
from ..output_projection import compute_projection_matrix, find_output_projection
from ..rank_kernels import round_ranks

_POOL = 5


def compute_eviction_errors(observation: Observation) -> Tensor:
    """Compute how wrong a layer's attention output gets when only so many tokens are kept.

    The ``window_size`` queries before the observation window select: of the keys before the window they keep the b
    that they attend to most, as SnapKV does.  The window itself, which had no say, is attended with these keys and with
    all: ``e(b) = ||W_o o_kept - W_o o_all|| / ||W_o o_all||`` (root mean square over the rows), at each b of
    :func:`rankkv.budget_distortion.make_budget_grid`.  Of fewer than ``2 * window_size`` queries the older half
    selects.  Where the output projection W_o is not found, the heads' outputs are taken side by side.

    Parameters
    ----------
    observation : Observation
        The layer's queries, keys and values.

    Returns
    -------
    Tensor
        ``[batch, budget]`` float64, rounded to 6 significant digits; zeros at the end of a shorter row, and for fewer
        than 2 queries.
    """
    whole = {*observation.lengths, *observation.available} == {observation.key_length}
    count = len(observation.lengths)
    rows = [observation] if count == 1 and whole else [observation.take_row(row) for row in range(count)]
    curves = [_compute_row(row) for row in rows]
    widest = max(len(curve) for curve in curves)
    table = torch.stack([functional.pad(curve, (0, widest - len(curve))) for curve in curves])
    return round_ranks(table)


def _compute_row(observation: Observation) -> Tensor:
    """Return the errors of one row without padding, ``[budget]`` float64 on the CPU."""
    length, queries = observation.key_length, observation.query_length
    grid = make_budget_grid(length)
    held_out = min(observation.window_size, queries // 2)
    if held_out == 0 or not grid:
        return torch.zeros(max(1, len(grid)), dtype=torch.float64)
    chosen = min(observation.window_size, queries - held_out)
    cut = length - held_out
    last = queries - held_out
    votes = observation.compute_attention(slice(last - chosen, last))[0, :, :, :cut].mean(dim=1)
    scores = observation.compute_group_mean(_pool(votes, cut - chosen)[None])[0]
    outputs, full = _attend_with_fewer(observation, scores, grid, held_out, chosen)

    width = outputs.shape[-1]
    parts = 1 if observation.shards is None else observation.shards.size
    projection = find_output_projection(observation.module, width, parts)
    wrong = torch.cat([outputs - full, full[None]])
    if projection is None:
        # Heads side by side: their squares add up.
        squares = observation.sum_over_shards(wrong.pow(2).sum(dim=(-2, -1)))
    else:
        # Read in the dtype the model computes in: some modules take no other.
        matrix = compute_projection_matrix(projection, width, observation.values, parts)
        projected = wrong @ matrix.float()
        squares = observation.sum_over_shards(projected).pow(2).sum(dim=(-2, -1))
    errors = squares[:-1] / squares[-1].clamp(min=torch.finfo(squares.dtype).tiny)
    return errors.sqrt().to("cpu", torch.float64)


def _attend_with_fewer(
    observation: Observation, scores: Tensor, grid: list[int], held_out: int, chosen: int
) -> tuple[Tensor, Tensor]:
    """Attend from the held-out rows with each budget's keys, ``[budget, row, width]``, and with all, ``[row, width]``.

    What a larger budget keeps holds what a smaller one keeps, so the keys are sorted by the first budget that keeps
    them, and each key is multiplied once, whatever the number of budgets.
    """
    attention = observation.window_attention[0, :, -held_out:]
    kv_heads, cut = scores.shape
    heads = attention.shape[0]
    entry = _find_first_budget(scores, grid, chosen, observation.sink_size)
    order = entry.sort(dim=-1, stable=True).indices
    values = observation.values[0].float()
    if len(values) != kv_heads:
        values = values.repeat_interleave(heads // len(values), dim=0)
        order = order.repeat_interleave(heads // kv_heads, dim=0)
    # The query heads of one key/value head as more rows of it.
    weights = attention.reshape(len(values), -1, attention.shape[-1])
    kept_weights = weights[..., :cut].gather(-1, order[:, None].expand(-1, weights.shape[1], -1))
    kept_values = values[:, :cut].gather(1, order[..., None].expand(-1, -1, values.shape[-1]))

    mixed, mass = weights[..., cut:] @ values[:, cut:], weights[..., cut:].sum(dim=-1, keepdim=True)
    if observation.sink_logits is not None:
        # What sinks that the model learned take away is in no key, kept or not.
        mass = mass + (1.0 - weights.sum(dim=-1, keepdim=True)).clamp(min=0.0)
    outputs, start = [], 0
    for stop in [*(min(budget, cut) for budget in grid), cut]:
        part = kept_weights[..., start:stop]
        mixed = mixed + part @ kept_values[:, start:stop]
        mass = mass + part.sum(dim=-1, keepdim=True)
        outputs.append(mixed / mass.clamp(min=torch.finfo(mass.dtype).tiny))
        start = stop
    joined = torch.stack(outputs).reshape(len(outputs), heads, held_out, -1).transpose(1, 2).flatten(2)
    return joined[:-1], joined[-1]


def _find_first_budget(scores: Tensor, grid: list[int], newest: int, sinks: int) -> Tensor:
    """Find the first budget that keeps each key, ``[kv_head, key]`` indices into ``grid``; its length for none.

    A budget keeps the newest half, its sinks, and the best scores.
    """
    cut = scores.shape[-1]
    # Stable, so that of neighbours pooled to one score the earlier is kept, on any machine.
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    entry = torch.full_like(order, len(grid))
    for number in reversed(range(len(grid))):
        budget = min(grid[number], cut)
        recent, first = min(newest, budget // 2), min(sinks, budget // 4)
        sure = (order >= cut - recent) | (order < first)
        others = (~sure).cumsum(dim=-1)
        entry.masked_fill_(sure | (others <= budget - recent - first), number)
    return torch.empty_like(entry).scatter_(-1, order, entry)


def _pool(votes: Tensor, split: int) -> Tensor:
    """Pool ``[head, key]`` along the keys before the selecting rows, and leave those rows' own keys as they are."""
    if split <= 0:
        return votes
    pooled = functional.max_pool1d(votes[:, :split], _POOL, stride=1, padding=_POOL // 2)
    return torch.cat([pooled, votes[:, split:]], dim=-1)
