"""Eviction error of a layer and of its key/value heads, measured on held-out queries."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ...limits import Limits, check_number, make_budget_grid
from ...observe.observation import Observation
from ...observe.output_projection import compute_projection_matrix, find_output_projection
from ...utils.devices import send_numbers
from ..observed_layer import (
    compute_gram_ranks,
    compute_group_concentration,
    compute_group_ranks,
    measure_group_concentration,
    read_gram_ranks,
)
from ..spectrum import round_ranks

# Width of the max-pooling of votes along the keys.
_POOL = 5
_CONCENTRATION_EXPONENT = 0.5


def compute_eviction_errors(observation: Observation, limits: Sequence[Limits] | None = None) -> Tensor:
    """Compute the error of a layer's attention output for each budget of kept tokens.

    The ``window_size`` queries before the observation window select tokens.  Of the keys before the window they keep
    the b with the most attention, as SnapKV does.  The queries of the window are held out: they attend with these keys
    and with all keys.  ``e(b) = ||W_o o_kept - W_o o_all|| / ||W_o o_all||`` (root mean square over the rows), for each
    b of :func:`rankkv.limits.make_budget_grid`.  With fewer than ``2 * window_size`` queries the older half selects.
    If the output projection W_o is not found, the heads' outputs are compared side by side.

    Parameters
    ----------
    observation : Observation
        The layer's queries, keys and values.
    limits : sequence of Limits, optional
        Give the floor of each row's budgets.  Of the budgets up to it only the largest is tried; the smaller ones get
        the largest error of all.  None tries all.

    Returns
    -------
    Tensor
        ``[batch, budget]`` float64, rounded to 6 significant digits.  Zero at the end of a shorter row, and with fewer
        than 2 queries.
    """
    return round_ranks(_measure_rows(observation, limits, _join_heads).cpu())


def compute_head_errors(
    observation: Observation, limits: Sequence[Limits] | None = None, rank_exponent: float = 2.0
) -> Tensor:
    """Compute the error that each key/value head adds to a layer's attention output, for each budget.

    As :func:`compute_eviction_errors`, but head by head: ``d_h(b) = rank_h ** rank_exponent * c_h ** 0.5 * ||W_h
    (o_h kept - o_h all)||^2 / ||W_o o_all||^2``.  W_h are the columns of the output projection for the query heads of
    this key/value head.  rank_h is the effective rank of their evictable attention, side by side.  c_h is its
    concentration (:func:`rankkv.rank.observed_layer.compute_group_concentration`).  A head that looks up another place
    for each query has both high; its losses matter most for the answer.

    Parameters
    ----------
    observation : Observation
        The layer's queries, keys and values.
    limits : sequence of Limits, optional
        Give the floor of each row's heads; see :func:`compute_eviction_errors`.
    rank_exponent : float, default 2
        Exponent of the head's effective rank, in [0, 8]; 0 ignores the rank.

    Returns
    -------
    Tensor
        ``[batch, kv_head, budget]`` float64, rounded to 6 significant digits; zeros as in
        :func:`compute_eviction_errors`.

    Raises
    ------
    ConfigError
        If ``rank_exponent`` is out of range.
    """
    check_number("rank_exponent", rank_exponent, 0.0, 8.0)
    errors = _measure_rows(observation, limits, _split_heads)
    if observation.keys.device.type == "cuda" and observation.shards is None and rank_exponent:
        concentration, errors = _read_together(observation, errors)
    else:
        concentration, errors = compute_group_concentration(observation), errors.cpu()
    factors = concentration**_CONCENTRATION_EXPONENT
    if rank_exponent:
        factors = factors * compute_group_ranks(observation) ** rank_exponent
    return round_ranks(errors * factors[..., None])


def _read_together(observation: Observation, errors: Tensor) -> tuple[Tensor, Tensor]:
    """Bring concentration, ranks and errors of a layer to the host at once: it waits for the device one time."""
    ranks = observation.remember(compute_gram_ranks)
    heads = ranks.shape[1] - 1
    parts = [ranks, measure_group_concentration(observation), errors.flatten(1)]
    joined = torch.cat([part.to(torch.float64) for part in parts], dim=1).cpu()
    observation.remember(read_gram_ranks, joined[:, : heads + 1])
    concentration = round_ranks(joined[:, heads + 1 : 2 * heads + 1])
    return concentration, joined[:, 2 * heads + 1 :].view(errors.shape)


#: Turns the differences of the heads' outputs, ``[budget + 1, row, width]`` with the whole outputs as the last entry,
#: into errors ``[budget]`` or ``[kv_head, budget]``.
_Reduction = Callable[[Observation, Tensor, int], Tensor]


def _measure_rows(observation: Observation, limits: Sequence[Limits] | None, reduction: _Reduction) -> Tensor:
    """Compute the errors of each row of the batch, and pad shorter grids with zeros."""
    whole = {*observation.lengths, *observation.available} == {observation.key_length}
    count = len(observation.lengths)
    rows = [observation] if count == 1 and whole else [observation.take_row(row) for row in range(count)]
    floors = [1] * count if limits is None else [row.floor for row in limits]
    curves = [_compute_row(row, floor, reduction) for row, floor in zip(rows, floors, strict=True)]
    widest = max(curve.shape[-1] for curve in curves)
    return torch.stack([functional.pad(curve, (0, widest - curve.shape[-1])) for curve in curves])


def _compute_row(observation: Observation, floor: int, reduction: _Reduction) -> Tensor:
    """Compute the errors of one row without padding, ``[budget]`` or ``[kv_head, budget]`` float64."""
    length, queries = observation.key_length, observation.query_length
    grid = make_budget_grid(length)
    held_out = min(observation.window_size, queries // 2)
    if held_out == 0 or not grid:
        nothing = torch.zeros(max(1, len(grid)), dtype=torch.float64, device=_find_double(observation.keys))
        return nothing if reduction is _join_heads else nothing.expand(observation.kv_heads, -1)
    # Skip the budgets below the floor, except the largest: it is the left end of the curve.
    skipped = max(0, sum(budget <= floor for budget in grid) - 1)
    grid = grid[skipped:]
    selecting = min(observation.window_size, queries - held_out)
    # Keys before the held-out queries' own.
    cut = length - held_out
    last = queries - held_out
    votes = observation.compute_attention(slice(last - selecting, last))[0, :, :, :cut].mean(dim=1)
    scores = observation.compute_group_mean(_pool(votes, cut - selecting)[None])[0]
    outputs, full = _attend_with_fewer(observation, scores, grid, held_out, selecting)

    errors = reduction(observation, torch.cat([outputs - full, full[None]]), len(scores))
    # With the largest error the skipped budgets do not change a decreasing fit to the others.
    return torch.cat([errors.amax(dim=-1, keepdim=True).expand(*errors.shape[:-1], skipped), errors], dim=-1)


def _join_heads(observation: Observation, wrong: Tensor, kv_heads: int) -> Tensor:
    """Compute the error of the layer's output relative to the whole output, root mean square, ``[budget]``."""
    matrix = _find_matrix(observation, wrong)
    if matrix is None:
        # Heads side by side: their squares add up.
        squares = observation.sum_over_shards(wrong.pow(2).sum(dim=(-2, -1)))
    else:
        squares = observation.sum_over_shards(wrong @ matrix).pow(2).sum(dim=(-2, -1))
    return _divide(squares[:-1], squares[-1]).sqrt()


def _split_heads(observation: Observation, wrong: Tensor, kv_heads: int) -> Tensor:
    """Compute the part of each key/value head in the square of that error, ``[kv_head, budget]``."""
    matrix = _find_matrix(observation, wrong)
    heads = wrong.unflatten(-1, (kv_heads, -1)).movedim(-2, 0)
    # The output of all heads, those of other processes included.
    if matrix is None:
        whole = observation.sum_over_shards(wrong[-1].pow(2).sum())
        squares = heads.pow(2).sum(dim=(-2, -1))
    else:
        whole = observation.sum_over_shards(wrong[-1] @ matrix).pow(2).sum()
        # ||x W||^2 = x (W W^T) x^T is cheaper: W W^T is as wide as a head, W as the hidden state.
        product = _multiply_by_itself(observation, matrix, kv_heads)
        squares = ((heads.flatten(1, 2) @ product).view_as(heads) * heads).sum(dim=(-2, -1))
    return _divide(squares[:, :-1].clamp(min=0.0), whole)


#: W W^T of each attention module, by what it was computed from.  A GPU computes it in less time than a check takes.
_PRODUCTS: weakref.WeakKeyDictionary[Any, tuple[tuple[Any, ...], Tensor]] = weakref.WeakKeyDictionary()


def _multiply_by_itself(observation: Observation, matrix: Tensor, kv_heads: int) -> Tensor:
    """Compute ``W W^T`` for the rows of each key/value head, ``[kv_head, width, width]``; on a CPU once a module."""
    module = observation.module
    part = matrix.unflatten(0, (kv_heads, -1))
    if module is None or matrix.device.type != "cpu":
        return part @ part.mT
    # Weights may change in ways that leave no other trace, so their sums are compared too; the last one by place.
    weights = matrix.double().flatten()
    places = torch.linspace(1.0, 2.0, weights.numel(), dtype=torch.float64)
    sums = float(weights.sum()), float(weights.square().sum()), float(weights @ places)
    found = (matrix.shape, kv_heads, *sums)
    known = _PRODUCTS.get(module)
    if known is None or known[0] != found:
        known = _PRODUCTS[module] = found, part @ part.mT
    return known[1]


def _find_matrix(observation: Observation, wrong: Tensor) -> Tensor | None:
    """Return the output projection's matrix ``[width, hidden]`` float32; None if it is not found."""
    width = wrong.shape[-1]
    parts = 1 if observation.shards is None else observation.shards.size
    projection = find_output_projection(observation.module, width, parts)
    if projection is None:
        return None
    # Use the model's own dtype: some modules accept no other.
    return compute_projection_matrix(projection, width, observation.values, parts).float()


def _divide(squares: Tensor, whole: Tensor) -> Tensor:
    """Divide squared errors by the squared output, as float64."""
    divided = squares / whole.clamp(min=torch.finfo(squares.dtype).tiny)
    return divided.to(_find_double(divided), torch.float64)


def _find_double(tensor: Tensor) -> torch.device:
    """Return where float64 numbers of a tensor stay until the host reads them: some devices have no float64."""
    return tensor.device if tensor.device.type == "cuda" else torch.device("cpu")


def _attend_with_fewer(
    observation: Observation, scores: Tensor, grid: list[int], held_out: int, selecting: int
) -> tuple[Tensor, Tensor]:
    """Compute the held-out rows' outputs with each budget's keys and with all keys.

    A larger budget keeps all keys of a smaller one.  So the keys are sorted by the first budget that keeps them, and
    each key is multiplied only once, whatever the number of budgets.

    Returns
    -------
    outputs, full : Tensor
        ``[budget, row, width]`` and ``[row, width]``.
    """
    attention = observation.window_attention[0, :, -held_out:]
    kv_heads, cut = scores.shape
    heads = attention.shape[0]
    order = _order_by_budget(scores, grid, selecting, observation.sink_size)
    values = observation.values[0]
    if len(values) != kv_heads:
        values = values.repeat_interleave(heads // len(values), dim=0)
        order = order.repeat_interleave(heads // kv_heads, dim=0)
    # Stack the query heads of a key/value head as rows.
    weights = attention.reshape(len(values), -1, attention.shape[-1])
    mixed = weights[..., cut:] @ values[:, cut:].float()
    mass = weights[..., cut:].sum(dim=-1, keepdim=True)
    if observation.sink_logits is not None:
        # The mass of learned sinks belongs to no key; it stays, whatever is evicted.
        mass = mass + (1.0 - weights.sum(dim=-1, keepdim=True)).clamp(min=0.0)
    # Copy whole rows of head_dim numbers: several times faster than a gather of single numbers.
    rows = values.reshape(-1, values.shape[-1])
    first = torch.arange(len(values), device=values.device)[:, None] * values.shape[1]
    sorted_weights = weights.gather(-1, order[:, None].expand(-1, weights.shape[1], -1))
    sorted_values = rows.index_select(0, (order + first).flatten()).view(*order.shape, rows.shape[-1])
    outputs, start = [], 0
    for stop in [*(min(budget, cut) for budget in grid), cut]:
        part = sorted_weights[..., start:stop]
        mixed = torch.baddbmm(mixed, part, sorted_values[:, start:stop].float())
        mass = mass + part.sum(dim=-1, keepdim=True)
        outputs.append(mixed / mass.clamp(min=torch.finfo(mass.dtype).tiny))
        start = stop
    joined = torch.stack(outputs).reshape(len(outputs), heads, held_out, -1).transpose(1, 2).flatten(2)
    return joined[:-1], joined[-1]


def _order_by_budget(scores: Tensor, grid: list[int], newest: int, sinks: int) -> Tensor:
    """Order the keys of each head by the first budget that keeps them, ``[kv_head, key]``; never kept keys come last.

    A budget keeps up to half of it as newest keys, up to a quarter as sinks, and the best scores.
    """
    cut = scores.shape[-1]
    # Stable: pooling gives neighbours equal scores, and every machine must keep the earlier one.
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    entry = torch.full_like(order, len(grid))
    # Only small budgets protect fewer keys than the next larger one; the others share the ranks.
    groups: dict[tuple[int, int], list[int]] = {}
    for number, budget in enumerate(grid):
        budget = min(budget, cut)
        groups.setdefault((min(newest, budget // 2), min(sinks, budget // 4)), []).append(number)
    # From large to small: a smaller budget overwrites the entry of the keys that it keeps too.
    for (recent, first), numbers in reversed(groups.items()):
        is_protected = (order >= cut - recent) | (order < first)
        place = (~is_protected).cumsum(dim=-1).masked_fill_(is_protected, 0)
        left = [min(grid[number], cut) - recent - first for number in numbers]
        if len(numbers) == 1:
            entry.masked_fill_(place <= left[0], numbers[0])
            continue
        # The first of these budgets that has a place for the key; none, if all are too small.
        found = torch.bucketize(place, send_numbers(left, place.device))
        entry = torch.where(found < len(numbers), found + numbers[0], entry)
    return torch.empty_like(entry).scatter_(-1, order, entry).sort(dim=-1, stable=True).indices


def _pool(votes: Tensor, split: int) -> Tensor:
    """Max-pool ``[head, key]`` along the keys before ``split``; leave the selecting rows' own keys unpooled."""
    if split <= 0:
        return votes
    pooled = functional.max_pool1d(votes[:, :split], _POOL, stride=1, padding=_POOL // 2)
    return torch.cat([pooled, votes[:, split:]], dim=-1)
