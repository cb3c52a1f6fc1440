"""Eviction error of a layer and of its key/value heads, measured on held-out queries."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ...limits import Limits, check_number, make_budget_grid
from ...observe.observation import Observation
from ...observe.output_projection import compute_projection_matrix, find_output_projection
from ...utils.devices import (
    Reader,
    multiply_halves,
    send_numbers,
    split_into_halves,
    spread_numbers,
    takes_halves,
)
from ..observed_layer import (
    average_concentration,
    compute_group_ranks,
    measure_concentration,
    send_ranks,
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
    return begin_eviction_errors(observation, Reader(observation.keys.device), limits)()


def begin_eviction_errors(
    observation: Observation, reader: Reader, limits: Sequence[Limits] | None = None
) -> Callable[[], Tensor]:
    """Begin :func:`compute_eviction_errors`; the host waits only when it calls what this returns."""
    curves = _measure_rows(observation, limits, _join_heads)
    sent = [reader.send(squares) for squares in _list_squares(curves)]
    forms = [curve.form for curve in curves]
    return lambda: round_ranks(_finish(forms, [part.read() for part in sent]).sqrt())


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
    return begin_head_errors(observation, Reader(observation.keys.device), limits, rank_exponent)()


def begin_head_errors(
    observation: Observation,
    reader: Reader,
    limits: Sequence[Limits] | None = None,
    rank_exponent: float = 2.0,
) -> Callable[[], Tensor]:
    """Begin :func:`compute_head_errors`; the host waits only when it calls what this returns."""
    check_number("rank_exponent", rank_exponent, 0.0, 8.0)
    curves = _measure_rows(observation, limits, _split_heads)
    sent = [reader.send(squares) for squares in _list_squares(curves)]
    forms, kv_heads = [curve.form for curve in curves], observation.kv_heads
    concentrations, masses = (reader.send(part) for part in measure_concentration(observation))
    if not rank_exponent:
        find_ranks = None
    elif observation.shards is None:
        find_ranks = send_ranks(observation, reader)
    else:
        ranks = compute_group_ranks(observation)
        find_ranks = lambda: ranks  # noqa: E731

    def finish() -> Tensor:
        squares = [part.read() for part in sent]
        concentration = average_concentration(concentrations.read(), masses.read(), kv_heads)
        factors = concentration**_CONCENTRATION_EXPONENT
        if find_ranks is not None:
            factors = factors * round_ranks(find_ranks()[:, :kv_heads]) ** rank_exponent
        return round_ranks(_finish(forms, squares) * factors[..., None])

    return finish


@dataclass(frozen=True)
class _Curves:
    """Squared errors of one or more rows.

    Attributes
    ----------
    squares : Tensor
        ``[batch, budget]`` or ``[batch, kv_head, budget]``, of what each budget misses.
    whole : Tensor
        ``[batch]``, of the whole output.
    form : _Form
        How their budgets lie in the grid.
    """

    squares: Tensor
    whole: Tensor
    form: _Form


@dataclass(frozen=True)
class _Form:
    """Place of the budgets of one or more rows in the grid.

    Attributes
    ----------
    first : int
        Place of the first budget in the grid of all budgets.
    skipped, tried : list of int
        Budgets of each row's grid that were not tried, and those that were.
    """

    first: int
    skipped: list[int]
    tried: list[int]


def _list_squares(curves: Sequence[_Curves]) -> Iterator[Tensor]:
    for curve in curves:
        yield curve.squares
        yield curve.whole


def _finish(forms: Sequence[_Form], read: Sequence[Tensor]) -> Tensor:
    """Compute relative squared errors from what was read, padded with zeros beyond the end of a row's grid.

    Returns
    -------
    Tensor
        ``[row, budget]`` or ``[row, kv_head, budget]`` float64 on the CPU.
    """
    rows = []
    for place, form in enumerate(forms):
        squares, whole = read[2 * place], read[2 * place + 1]
        whole = whole.clamp(min=torch.finfo(whole.dtype).tiny).view(-1, *[1] * (squares.dim() - 1))
        errors = (squares.clamp(min=0.0) / whole).to(torch.float64)
        for row, skipped, tried in zip(errors, form.skipped, form.tried, strict=True):
            own = row[..., skipped - form.first :][..., :tried]
            # With the largest error the skipped budgets do not change a decreasing fit to the others.
            lead = own.amax(dim=-1, keepdim=True).expand(*own.shape[:-1], skipped)
            rows.append(torch.cat([lead, own], dim=-1))
    widest = max(row.shape[-1] for row in rows)
    return torch.stack([functional.pad(row, (0, widest - row.shape[-1])) for row in rows])


#: Turns outputs of the heads, ``[budget + 1, batch, head, row, head_dim]``, of each budget and, last, of all keys, into
#: squares: of the differences, ``[batch, budget]`` or ``[batch, kv_head, budget]``, and of the whole, ``[batch]``.
_Reduction = Callable[[Observation, Tensor], tuple[Tensor, Tensor]]


def _measure_rows(
    observation: Observation, limits: Sequence[Limits] | None, reduction: _Reduction
) -> list[_Curves]:
    """Measure the rows of the batch: at once if they allow it, else row by row without padding."""
    lengths, keys = observation.lengths, observation.key_length
    floors = [1] * len(lengths) if limits is None else [row.floor for row in limits]
    if {*lengths, *observation.available} == {keys}:
        return [_measure(observation, [keys] * len(lengths), floors, reduction)]
    whole = observation.valid.dim() == 2 and lengths == observation.available
    whole = whole and observation.query_start + observation.query_length == keys
    if whole and min(*lengths, observation.query_length) >= 2 * observation.window_size:
        # All rows end at the last key, so that only padding in front tells them apart.
        return [_measure(observation, lengths, floors, reduction)]
    rows = (observation.take_row(row) for row in range(len(lengths)))
    return [
        _measure(row, [row.key_length], [floor], reduction) for row, floor in zip(rows, floors, strict=True)
    ]


def _measure(
    observation: Observation, lengths: list[int], floors: list[int], reduction: _Reduction
) -> _Curves:
    """Measure rows that have ``lengths`` tokens behind their padding."""
    queries, cut = observation.query_length, observation.key_length
    grids = [make_budget_grid(length) for length in lengths]
    grid = max(grids, key=len)
    held_out = min(observation.window_size, queries // 2)
    if held_out == 0 or not grid:
        nothing = observation.keys.new_zeros((len(lengths), max(1, len(grid))), dtype=torch.float32)
        squares = (
            nothing if reduction is _join_heads else nothing[:, None].expand(-1, observation.kv_heads, -1)
        )
        form = _Form(0, [0] * len(lengths), [max(1, len(grid))] * len(lengths))
        return _Curves(squares, nothing[:, 0], form)
    # Skip the budgets below the floor, except the largest: it is the left end of the curve.
    skipped = [
        max(0, sum(budget <= floor for budget in own) - 1) for own, floor in zip(grids, floors, strict=True)
    ]
    first = min(skipped)
    selecting = min(observation.window_size, queries - held_out)
    # Keys before the held-out queries' own.
    cut -= held_out
    last = queries - held_out
    votes = observation.compute_attention(slice(last - selecting, last))[..., :cut].mean(dim=2)
    scores = observation.compute_group_mean(_pool(votes, cut - selecting))
    padding = [observation.key_length - length for length in lengths]
    order = _order_by_budget(scores, grid[first:], selecting, observation.sink_size, padding)
    outputs = _attend_with_fewer(observation, order, grid[first:], held_out, padding)
    squares, whole = reduction(observation, outputs)
    tried = [len(own) - none for own, none in zip(grids, skipped, strict=True)]
    return _Curves(squares, whole, _Form(first, skipped, tried))


def _join_heads(observation: Observation, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the squares of the layer's output, ``[batch, budget]`` and ``[batch]``."""
    outputs[:-1] -= outputs[-1:]
    # Heads side by side, [batch, budget + 1, row, width].
    wrong = outputs.permute(1, 0, 3, 2, 4).flatten(3)
    matrix = _find_matrix(observation, wrong.shape[-1])
    if matrix is None:
        # Their squares add up.
        squares = observation.sum_over_shards(wrong.pow(2).sum(dim=(-2, -1)))
    else:
        squares = observation.sum_over_shards(_project(wrong, matrix)).pow(2).sum(dim=(-2, -1))
    return squares[:, :-1], squares[:, -1]


def _split_heads(observation: Observation, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the part of each key/value head in these squares, ``[batch, kv_head, budget]``, and ``[batch]``."""
    kv_heads = observation.kv_heads
    outputs[:-1] -= outputs[-1:]
    # [batch, row, width]
    full = outputs[-1].transpose(1, 2).flatten(2)
    # The query heads of a key/value head side by side, [batch, kv_head, budget, row, width].
    heads = outputs[:-1].unflatten(2, (kv_heads, -1)).permute(1, 2, 0, 4, 3, 5).flatten(4)
    matrix = _find_matrix(observation, full.shape[-1])
    # The output of all heads, those of other processes included.
    if matrix is None:
        whole = observation.sum_over_shards(full.pow(2).sum(dim=(-2, -1)))
        return heads.pow(2).sum(dim=(-2, -1)), whole
    whole = observation.sum_over_shards(_project(full, matrix)).pow(2).sum(dim=(-2, -1))
    # ||x W||^2 = x (W W^T) x^T is cheaper: W W^T is as wide as a head, W as the hidden state.
    product = _multiply_by_itself(observation, matrix, kv_heads)
    squares = (heads.flatten(2, 3) @ product).view_as(heads) * heads
    return squares.sum(dim=(-2, -1)), whole


#: W W^T of each attention module, by what it was computed from.  A GPU computes it in less time than a check takes.
_PRODUCTS: weakref.WeakKeyDictionary[Any, tuple[tuple[Any, ...], Tensor]] = weakref.WeakKeyDictionary()


def _multiply_by_itself(observation: Observation, matrix: Tensor, kv_heads: int) -> Tensor:
    """Compute ``W W^T`` for the rows of each key/value head, ``[kv_head, width, width]``; on a CPU once a module."""
    module = observation.module
    part = matrix.unflatten(0, (kv_heads, -1))
    if takes_halves(matrix):
        return multiply_halves(part, part.mT)
    part = part.float()
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


def _project(states: Tensor, matrix: Tensor) -> Tensor:
    """Multiply ``[..., row, width]`` float32 by the output projection's matrix, in float32."""
    if not takes_halves(matrix):
        return states @ matrix.float()
    # A copy, because splitting uses it up.
    halves = split_into_halves(states.reshape(1, -1, states.shape[-1]).clone())
    found = multiply_halves(halves.flatten(0, 2)[None], matrix[None])
    return found.view(2, *states.shape[:-1], -1).sum(dim=0)


def _find_matrix(observation: Observation, width: int) -> Tensor | None:
    """Return the output projection's matrix ``[width, hidden]`` in the values' dtype; None if it is not found."""
    parts = 1 if observation.shards is None else observation.shards.size
    projection = find_output_projection(observation.module, width, parts)
    if projection is None:
        return None
    # Use the model's own dtype: some modules accept no other.
    return compute_projection_matrix(projection, width, observation.values, parts)


def _attend_with_fewer(
    observation: Observation, order: Tensor, grid: list[int], held_out: int, padding: list[int]
) -> Tensor:
    """Compute the held-out rows' outputs with each budget's keys and, last, with all keys.

    A larger budget keeps all keys of a smaller one.  So the keys are sorted by the first budget that keeps them, and
    each key is multiplied only once, whatever the number of budgets.

    Parameters
    ----------
    observation : Observation
        The layer's queries, keys and values.
    order : Tensor
        See :func:`_order_by_budget`.
    grid : list of int
        The budgets.
    held_out : int
        Number of newest queries that test.
    padding : list of int
        Keys before each row's first token.

    Returns
    -------
    Tensor
        ``[budget + 1, batch, head, row, head_dim]`` float32.
    """
    attention = observation.window_attention[:, :, -held_out:]
    batch, heads, keys = attention.shape[0], attention.shape[1], attention.shape[-1]
    values, cut = observation.values, order.shape[-1]
    if values.shape[1] != order.shape[1]:
        values = values.repeat_interleave(heads // values.shape[1], dim=1)
        order = order.repeat_interleave(heads // order.shape[1], dim=1)
    if any(padding):
        # Its weight is zero, but padding may hold NaN.
        values = values.masked_fill(~observation.valid[:, None, :, None], 0.0)
    # Stack the query heads of a key/value head as rows.
    values, order = values.flatten(0, 1), order.flatten(0, 1)
    weights = attention.reshape(len(values), -1, keys)
    mixed = weights[..., cut:] @ values[:, cut:].float()
    masses = [weights[..., cut:].sum(dim=-1, keepdim=True)]
    if observation.sink_logits is not None:
        # The mass of learned sinks belongs to no key; it stays, whatever is evicted.
        masses[0] = masses[0] + (1.0 - weights.sum(dim=-1, keepdim=True)).clamp(min=0.0)
    # Copy whole rows of head_dim numbers: several times faster than a gather of single numbers.
    rows = values.reshape(-1, values.shape[-1])
    first = torch.arange(0, len(rows), keys, device=values.device)[:, None]
    sorted_weights = weights.gather(-1, order[:, None].expand(-1, weights.shape[1], -1))
    sorted_values = rows.index_select(0, (order + first).flatten()).view(*order.shape, rows.shape[-1])
    bounds = list(itertools.pairwise([0, *(min(budget, cut) for budget in grid), cut]))
    masses += [sorted_weights[..., start:stop].sum(dim=-1, keepdim=True) for start, stop in bounds]
    if takes_halves(sorted_values):
        halves = split_into_halves(sorted_weights).flatten(1, 2)
        parts = [
            multiply_halves(halves[..., start:stop], sorted_values[:, start:stop])
            if start < stop
            else mixed.new_zeros((*halves.shape[:2], mixed.shape[-1]))
            for start, stop in bounds
        ]
        outputs = torch.stack(parts).unflatten(2, (2, -1)).sum(dim=2).cumsum(dim=0).add_(mixed)
    else:
        outputs = mixed.new_empty((len(bounds), *mixed.shape))
        for output, (start, stop) in zip(outputs, bounds, strict=True):
            part = sorted_weights[..., start:stop]
            mixed = torch.baddbmm(mixed, part, sorted_values[:, start:stop].float(), out=output)
    mass = torch.stack(masses).cumsum(dim=0)[1:]
    outputs /= mass.clamp(min=torch.finfo(mass.dtype).tiny)
    return outputs.view(len(outputs), batch, heads, held_out, -1)


def _order_by_budget(scores: Tensor, grid: list[int], newest: int, sinks: int, padding: list[int]) -> Tensor:
    """Order the keys of each head by the first budget that keeps them, ``[batch, kv_head, key]``.

    A budget keeps up to half of it as newest keys, up to a quarter as sinks, and the best scores.  Never kept keys come
    last, and padding last of all.
    """
    cut, device = scores.shape[-1], scores.device
    protected = [(min(newest, budget // 2), min(sinks, budget // 4)) for budget in grid]
    left = [budget - sum(both) for budget, both in zip(grid, protected, strict=True)]
    # Only small budgets protect fewer keys than the next larger one; the others share the last places.
    small = protected.index(protected[-1])
    recents, firsts = zip(*protected[: small + 1], strict=True)
    numbers = send_numbers([*(cut - recent for recent in recents), *firsts, *left], device)
    newest_from, sinks_to = numbers[: 2 * (small + 1)].view(2, -1, 1, 1, 1)
    room = numbers[2 * (small + 1) :]
    if any(padding):
        start = spread_numbers(padding, device)
        scores = scores.masked_fill(torch.arange(cut, device=device) < start, float("-inf"))
    # Stable: pooling gives neighbours equal scores, and every machine must keep the earlier one.
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    token = order
    if any(padding):
        token = order - start
        token = token.masked_fill(token < 0, cut)
    is_free = (order < newest_from) & (token >= sinks_to)
    place = is_free.cumsum(dim=-1) * is_free
    # The number of budgets without a place for the key is the number of the first one with a place.
    entry = torch.bucketize(place[-1], room[small:])
    if small:
        entry += (place[:-1] > room[:small].view(-1, 1, 1, 1)).sum(dim=0)
    # A narrow type is sorted in fewer passes.
    entry = entry.to(torch.uint8)
    return torch.empty_like(entry).scatter_(-1, order, entry).sort(dim=-1, stable=True).indices


def _pool(votes: Tensor, split: int) -> Tensor:
    """Max-pool ``[batch, head, key]`` along the keys before ``split``; leave the selecting rows' own keys unpooled."""
    if split <= 0:
        return votes
    pooled = functional.max_pool1d(votes[..., :split], _POOL, stride=1, padding=_POOL // 2)
    return torch.cat([pooled, votes[..., split:]], dim=-1)
