"""What evicting costs a layer, measured on queries that had no say in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ...limits import Limits, check_number, make_budget_grid
from ...observe.observation import Observation
from ...observe.output_projection import compute_projection_matrix, find_output_projection
from ..observed_layer import compute_group_concentration, compute_group_ranks
from ..spectrum import round_ranks

_POOL = 5
_CONCENTRATION_EXPONENT = 0.5


def compute_eviction_errors(observation: Observation, limits: Sequence[Limits] | None = None) -> Tensor:
    """Compute how wrong a layer's attention output gets when only so many tokens are kept.

    The ``window_size`` queries before the observation window select: of the keys before the window they keep the b
    that they attend to most, as SnapKV does.  The window itself, which had no say, is attended with these keys and with
    all: ``e(b) = ||W_o o_kept - W_o o_all|| / ||W_o o_all||`` (root mean square over the rows), at each b of
    :func:`rankkv.limits.make_budget_grid`.  Of fewer than ``2 * window_size`` queries the older half
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
    return round_ranks(_measure_rows(observation, limits, _join_heads))


def compute_head_errors(
    observation: Observation, limits: Sequence[Limits] | None = None, rank_exponent: float = 2.0
) -> Tensor:
    """Compute how wrong each key/value head makes a layer's attention output when it keeps only so many tokens.

    As :func:`compute_eviction_errors`, but head by head: ``d_h(b) = rank_h ** rank_exponent * c_h ** 0.5 * ||W_h
    (o_h kept - o_h all)||^2 / ||W_o o_all||^2``, where W_h are the columns of the output projection that read the query
    heads of this key/value head, rank_h is the effective rank of their evictable attention, side by side, and c_h how
    few tokens they attend to at a time (:func:`rankkv.rank.observed_layer.compute_group_concentration`).  A head that looks
    something up, at another place for each query, has both; of what one head loses that matters most for the answer.

    Parameters
    ----------
    observation : Observation
        The layer's queries, keys and values.
    limits : sequence of Limits, optional
        Says the floor of each row's heads; see :func:`compute_eviction_errors`.
    rank_exponent : float, default 2
        Of the head's effective rank; 0 leaves it out.

    Returns
    -------
    Tensor
        ``[batch, kv_head, budget]`` float64, rounded to 6 significant digits; zeros as in
        :func:`compute_eviction_errors`.
    """
    check_number("rank_exponent", rank_exponent, 0.0, 8.0)
    factors = compute_group_concentration(observation) ** _CONCENTRATION_EXPONENT
    if rank_exponent:
        factors = factors * compute_group_ranks(observation) ** rank_exponent
    return round_ranks(_measure_rows(observation, limits, _split_heads) * factors[..., None])


#: From what fewer tokens change in the heads' outputs, ``[budget + 1, row, width]`` with the whole outputs as the last,
#: to errors ``[budget]`` or ``[kv_head, budget]``.
_Reduction = Callable[[Observation, Tensor, int], Tensor]


def _measure_rows(observation: Observation, limits: Sequence[Limits] | None, reduction: _Reduction) -> Tensor:
    whole = {*observation.lengths, *observation.available} == {observation.key_length}
    count = len(observation.lengths)
    rows = [observation] if count == 1 and whole else [observation.take_row(row) for row in range(count)]
    floors = [1] * count if limits is None else [row.floor for row in limits]
    curves = [_compute_row(row, floor, reduction) for row, floor in zip(rows, floors, strict=True)]
    widest = max(curve.shape[-1] for curve in curves)
    return torch.stack([functional.pad(curve, (0, widest - curve.shape[-1])) for curve in curves])


def _compute_row(observation: Observation, floor: int, reduction: _Reduction) -> Tensor:
    """Return the errors of one row without padding, ``[budget]`` or ``[kv_head, budget]`` float64 on the CPU."""
    length, queries = observation.key_length, observation.query_length
    grid = make_budget_grid(length)
    held_out = min(observation.window_size, queries // 2)
    if held_out == 0 or not grid:
        nothing = torch.zeros(max(1, len(grid)), dtype=torch.float64)
        return nothing if reduction is _join_heads else nothing.expand(observation.kv_heads, -1)
    # What lies between the floor and the first budget above it is told by the last one that is not above it.
    untried = max(0, sum(budget <= floor for budget in grid) - 1)
    grid = grid[untried:]
    chosen = min(observation.window_size, queries - held_out)
    cut = length - held_out
    last = queries - held_out
    votes = observation.compute_attention(slice(last - chosen, last))[0, :, :, :cut].mean(dim=1)
    scores = observation.compute_group_mean(_pool(votes, cut - chosen)[None])[0]
    outputs, full = _attend_with_fewer(observation, scores, grid, held_out, chosen)

    errors = reduction(observation, torch.cat([outputs - full, full[None]]), len(scores))
    # No fit of a falling curve mixes these with the others.
    return torch.cat([errors.amax(dim=-1, keepdim=True).expand(*errors.shape[:-1], untried), errors], dim=-1)


def _join_heads(observation: Observation, wrong: Tensor, kv_heads: int) -> Tensor:
    """Return the error of the layer's output, root mean square relative to the whole output, ``[budget]``."""
    matrix = _find_matrix(observation, wrong)
    if matrix is None:
        # Heads side by side: their squares add up.
        squares = observation.sum_over_shards(wrong.pow(2).sum(dim=(-2, -1)))
    else:
        squares = observation.sum_over_shards(wrong @ matrix).pow(2).sum(dim=(-2, -1))
    return _divide(squares[:-1], squares[-1]).sqrt()


def _split_heads(observation: Observation, wrong: Tensor, kv_heads: int) -> Tensor:
    """Return what each key/value head adds to the square of that error, ``[kv_head, budget]``."""
    matrix = _find_matrix(observation, wrong)
    heads = wrong.unflatten(-1, (kv_heads, -1)).movedim(-2, 0)
    whole = wrong[-1] if matrix is None else wrong[-1] @ matrix
    if matrix is None:
        squares = heads.pow(2).sum(dim=(-2, -1))
    else:
        # ||x W||^2 = x (W W^T) x^T: a head is narrower than what it is projected to.
        part = matrix.unflatten(0, (kv_heads, -1))
        squares = ((heads.flatten(1, 2) @ (part @ part.mT)).view_as(heads) * heads).sum(dim=(-2, -1))
    return _divide(squares[:, :-1].clamp(min=0.0), whole.pow(2).sum())


def _find_matrix(observation: Observation, wrong: Tensor) -> Tensor | None:
    width = wrong.shape[-1]
    parts = 1 if observation.shards is None else observation.shards.size
    projection = find_output_projection(observation.module, width, parts)
    if projection is None:
        return None
    # Read in the dtype the model computes in: some modules take no other.
    return compute_projection_matrix(projection, width, observation.values, parts).float()


def _divide(squares: Tensor, whole: Tensor) -> Tensor:
    return (squares / whole.clamp(min=torch.finfo(squares.dtype).tiny)).to("cpu", torch.float64)


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
