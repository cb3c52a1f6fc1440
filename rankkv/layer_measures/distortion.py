"""What evicting costs a layer, measured on queries that had no say in it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ..budget_distortion import make_budget_grid
from ..budget_weights import Limits
from ..observation import Observation
from ..output_projection import compute_projection_matrix, find_output_projection
from ..rank_kernels import round_ranks

_POOL = 5


def compute_eviction_errors(observation: Observation, limits: Sequence[Limits] | None = None) -> Tensor:
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
    limits : sequence of Limits, optional
        Says the floor of each row's budgets: of those up to it only the largest is tried, and the smaller ones are
        given the largest error of all.  None tries all.

    Returns
    -------
    Tensor
        ``[batch, budget]`` float64, rounded to 6 significant digits; zeros at the end of a shorter row, and for fewer
        than 2 queries.
    """
    whole = {*observation.lengths, *observation.available} == {observation.key_length}
    count = len(observation.lengths)
    rows = [observation] if count == 1 and whole else [observation.take_row(row) for row in range(count)]
    floors = [1] * count if limits is None else [row.floor for row in limits]
    curves = [_compute_row(row, floor) for row, floor in zip(rows, floors, strict=True)]
    widest = max(len(curve) for curve in curves)
    table = torch.stack([functional.pad(curve, (0, widest - len(curve))) for curve in curves])
    return round_ranks(table)


def _compute_row(observation: Observation, floor: int) -> Tensor:
    """Return the errors of one row without padding, ``[budget]`` float64 on the CPU."""
    length, queries = observation.key_length, observation.query_length
    grid = make_budget_grid(length)
    held_out = min(observation.window_size, queries // 2)
    if held_out == 0 or not grid:
        return torch.zeros(max(1, len(grid)), dtype=torch.float64)
    # What lies between the floor and the first budget above it is told by the last one that is not above it.
    untried = max(0, sum(budget <= floor for budget in grid) - 1)
    grid = grid[untried:]
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
    errors = errors.sqrt().to("cpu", torch.float64)
    # No fit of a falling curve mixes these with the others.
    return torch.cat([errors.max().expand(untried), errors])


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
    order = _order_by_budget(scores, grid, chosen, observation.sink_size)
    values = observation.values[0]
    if len(values) != kv_heads:
        values = values.repeat_interleave(heads // len(values), dim=0)
        order = order.repeat_interleave(heads // kv_heads, dim=0)
    # The query heads of one key/value head as more rows of it.
    weights = attention.reshape(len(values), -1, attention.shape[-1])
    mixed = weights[..., cut:] @ values[:, cut:].float()
    mass = weights[..., cut:].sum(dim=-1, keepdim=True)
    if observation.sink_logits is not None:
        # What sinks that the model learned take away is in no key, kept or not.
        mass = mass + (1.0 - weights.sum(dim=-1, keepdim=True)).clamp(min=0.0)
    # Whole rows of head_dim numbers are copied: several times as fast as gathering number by number.
    rows = values.reshape(-1, values.shape[-1])
    first = torch.arange(len(values), device=values.device)[:, None] * values.shape[1]
    outputs, start = [], 0
    for stop in [*(min(budget, cut) for budget in grid), cut]:
        keys = order[:, start:stop]
        part = weights.gather(-1, keys[:, None].expand(-1, weights.shape[1], -1))
        added = rows.index_select(0, (keys + first).flatten()).view(*keys.shape, rows.shape[-1])
        mixed = torch.baddbmm(mixed, part, added.float())
        mass = mass + part.sum(dim=-1, keepdim=True)
        outputs.append(mixed / mass.clamp(min=torch.finfo(mass.dtype).tiny))
        start = stop
    joined = torch.stack(outputs).reshape(len(outputs), heads, held_out, -1).transpose(1, 2).flatten(2)
    return joined[:-1], joined[-1]


def _order_by_budget(scores: Tensor, grid: list[int], newest: int, sinks: int) -> Tensor:
    """Order the keys of each head by the first budget that keeps them, ``[kv_head, key]``; the last ones none keeps.

    A budget keeps the newest half, its sinks, and the best scores.
    """
    cut = scores.shape[-1]
    # Stable, so that of neighbours pooled to one score the earlier is kept, on any machine.
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    entry = torch.full_like(order, len(grid))
    known = None
    for number in reversed(range(len(grid))):
        budget = min(grid[number], cut)
        recent, first = protected = min(newest, budget // 2), min(sinks, budget // 4)
        if protected != known:
            # Few budgets are so small that they protect fewer keys than the next.
            sure, known = (order >= cut - recent) | (order < first), protected
            place = (~sure).cumsum(dim=-1).masked_fill_(sure, 0)
        entry.masked_fill_(place <= budget - recent - first, number)
    return torch.empty_like(entry).scatter_(-1, order, entry).sort(dim=-1, stable=True).indices


def _pool(votes: Tensor, split: int) -> Tensor:
    """Pool ``[head, key]`` along the keys before the selecting rows, and leave those rows' own keys as they are."""
    if split <= 0:
        return votes
    pooled = functional.max_pool1d(votes[:, :split], _POOL, stride=1, padding=_POOL // 2)
    return torch.cat([pooled, votes[:, split:]], dim=-1)
