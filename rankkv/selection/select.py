"""Choice of the kept tokens from scores: protected tokens first, then the best, per head or across heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import count_spanned
from ..utils.devices import send_numbers, spread_numbers, spread_tables
from .base import Selector

# Half and a quarter of the budget are protected, rounded. As the budget grows, rounding may take two unprotected places
# from a head, and the protected tokens may grow by one more than the budget: three in all.
#: Tokens per head that a layer keeps beyond its budget while the budget may still shrink.
CASCADE_SLACK = 3


def select_tokens(
    scores: Tensor,
    real_index: Tensor,
    lengths: Sequence[int],
    budgets: Sequence[int],
    selector: Selector,
    window_size: int,
    sink_size: int,
    *,
    protect: Sequence[tuple[int, int]] = (),
    protect_before: Sequence[int] | None = None,
    keep: Sequence[int] | None = None,
) -> Tensor:
    """Select the indices of the tokens to keep: protected tokens, then the highest scores.

    Parameters
    ----------
    scores : Tensor
        ``[batch, kv_head or 1, key]``; ties go to the earlier token, NaN ranks last.
    real_index : Tensor
        ``[batch, kv_head or 1, key]`` int64, index of each key in its row's real tokens, -1 for padding.
    lengths, budgets : sequence of int
        Real tokens seen and tokens to keep, one entry per row.
    selector : Selector
        Sets how much of a budget is protected.
    window_size, sink_size : int
        See :meth:`Selector.count_protected`.
    protect : sequence of (start, stop)
        Spans of real tokens that are kept before any other.
    protect_before : sequence of int, optional
        Length of each row when its budget was made. Spans protect no tokens from there on, since the budget does not
        include them.
    keep : sequence of int, optional
        Tokens to select in each row, by default ``min(budget, length)``. Give fewer if fewer are left. Give one more
        while budgets may still shrink, because the protected part shrinks with them.

    Returns
    -------
    Tensor
        Int64 ``[batch, kv_head or 1, width]``, ascending, with ``width = max(keep)``; a row that keeps fewer
        tokens starts with -1.

    Examples
    --------
    >>> from rankkv.selection import get_selector
    >>> scores = torch.tensor([[[0.1, 0.9, 0.2, 0.8, 0.3, 0.0]]])
    >>> index = torch.arange(6).view(1, 1, 6)
    >>> select_tokens(scores, index, [6], [3], get_selector("snapkv"), window_size=1, sink_size=0).tolist()
    [[[1, 3, 5]]]
    """
    if keep is None:
        keep = [min(budget, length) for budget, length in zip(budgets, lengths, strict=True)]
    width = max(keep)
    spanned_in = lengths if protect_before is None else protect_before
    tables = list_protected(
        lengths, budgets, selector, window_size, sink_size, protect=protect, protect_before=protect_before
    )
    *numbers, kept = spread_tables([*tables, keep], scores.device)
    scores = _raise(scores, real_index, *numbers, protect=protect, spanned_in=spanned_in)
    # On a GPU, nonzero() below would make the host wait for the device; sorting does not.
    if min(keep) < width or scores.device.type != "cpu":
        order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :width]
        if min(keep) < width:
            rank = torch.arange(width, device=order.device)
            order = order.masked_fill(rank >= kept, -1)
        return order.sort(dim=-1).values
    # On a CPU this beats sorting: keep the scores above the lowest kept one, and the first of those equal to it.
    least = scores.topk(width, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    above, level = scores > least, scores == least
    is_kept = above | (level & (level.cumsum(dim=-1) <= width - above.sum(dim=-1, keepdim=True)))
    return is_kept.nonzero()[:, -1].view(*scores.shape[:-1], width)


def list_protected(
    lengths: Sequence[int],
    budgets: Sequence[int],
    selector: Selector,
    window_size: int,
    sink_size: int,
    *,
    protect: Sequence[tuple[int, int]] = (),
    protect_before: Sequence[int] | None = None,
) -> tuple[list[int], list[int]]:
    """Return the first of the newest protected tokens, and the number of protected first ones, each per row.

    Parameters
    ----------
    lengths, budgets, selector, window_size, sink_size, protect, protect_before
        See :func:`select_tokens`.
    """
    spanned_in = lengths if protect_before is None else protect_before
    counts = [
        selector.count_protected(max(0, budget - count_spanned(protect, length)), window_size, sink_size)
        for budget, length in zip(budgets, spanned_in, strict=True)
    ]
    newest_from = [length - recent for length, (recent, _) in zip(lengths, counts, strict=True)]
    return newest_from, [first for _, first in counts]


def rank_tokens(
    scores: Tensor,
    real_index: Tensor,
    lengths: Sequence[int],
    protected: tuple[list[int], list[int]],
    *,
    protect: Sequence[tuple[int, int]] = (),
    protect_before: Sequence[int] | None = None,
    in_order: bool = False,
) -> Tensor:
    """Rank the tokens of each row: protected tokens first, then the highest scores.

    The first tokens are those that :func:`select_tokens` selects for any budget that protects equally many.

    Parameters
    ----------
    scores, real_index, lengths, protect, protect_before
        See :func:`select_tokens`.
    protected : (list of int, list of int)
        What :func:`list_protected` returned.
    in_order : bool, default False
        True if the keys of all rows are their real tokens, none missing.

    Returns
    -------
    Tensor
        Indices of the keys, int64 ``[batch, kv_head or 1, key]``.

    Examples
    --------
    >>> scores, index = torch.tensor([[[0.1, 0.9, 0.2, 0.8, 0.0]]]), torch.arange(5).view(1, 1, 5)
    >>> rank_tokens(scores, index, [5], ([4], [0])).tolist()
    [[[4, 1, 3, 2, 0]]]
    """
    newest_from, sinks = protected
    if in_order and not protect and len(set(newest_from)) == len(set(sinks)) == 1:
        shape = torch.broadcast_shapes(scores.shape, real_index.shape)
        raised = torch.nan_to_num(scores, nan=torch.finfo(scores.dtype).min).expand(shape)
        raised = raised.contiguous() if raised.shape != scores.shape else raised
        raised[..., newest_from[0] :] = float("inf")
        raised[..., : sinks[0]] = float("inf")
    else:
        numbers = spread_tables(protected, scores.device)
        spanned_in = lengths if protect_before is None else protect_before
        raised = _raise(scores, real_index, *numbers, protect=protect, spanned_in=spanned_in)
    # Stable: of equal scores every machine must keep the earlier one.
    return raised.sort(dim=-1, descending=True, stable=True).indices


def raise_protected(
    scores: Tensor,
    real_index: Tensor,
    lengths: Sequence[int],
    budgets: Sequence[int],
    selector: Selector,
    window_size: int,
    sink_size: int,
    *,
    protect: Sequence[tuple[int, int]] = (),
    protect_before: Sequence[int] | None = None,
) -> Tensor:
    """Set the scores of protected tokens to infinity and those of padding to minus infinity.

    Parameters
    ----------
    scores, real_index, lengths, budgets, selector, window_size, sink_size, protect, protect_before
        See :func:`select_tokens`.

    Returns
    -------
    Tensor
        ``[batch, kv_head or 1, key]``; all other scores are finite.
    """
    spanned_in = lengths if protect_before is None else protect_before
    tables = list_protected(
        lengths, budgets, selector, window_size, sink_size, protect=protect, protect_before=protect_before
    )
    numbers = spread_tables(tables, scores.device)
    return _raise(scores, real_index, *numbers, protect=protect, spanned_in=spanned_in)


def _raise(
    scores: Tensor,
    real_index: Tensor,
    newest_from: Any,
    sinks: Any,
    *,
    protect: Sequence[tuple[int, int]],
    spanned_in: Sequence[int],
) -> Tensor:
    """Raise the scores of protected tokens; see :func:`raise_protected`."""
    shape = torch.broadcast_shapes(scores.shape, real_index.shape)
    real_index = real_index.expand(shape)
    # NaN becomes the lowest finite number, so that it still ranks above padding.
    scores = torch.nan_to_num(scores, nan=torch.finfo(scores.dtype).min).expand(shape)
    is_protected = (real_index >= newest_from) | (real_index < sinks)
    for start, stop in protect:
        stops = spread_numbers([min(length, stop) for length in spanned_in], scores.device)
        is_protected |= (real_index >= start) & (real_index < stops)
    return scores.masked_fill(is_protected, float("inf")).masked_fill(real_index < 0, float("-inf"))


def select_tokens_across_heads(
    scores: Tensor,
    real_index: Tensor,
    lengths: Sequence[int],
    budgets: Sequence[int],
    selector: Selector,
    window_size: int,
    sink_size: int,
    *,
    head_floor: float,
    keep: Sequence[int],
    protect: Sequence[tuple[int, int]] = (),
    protect_before: Sequence[int] | None = None,
) -> tuple[Tensor, list[list[int]]]:
    """Select the tokens of a layer whose heads share one budget of ``kv_heads * keep`` tokens.

    Every head first gets its protected tokens and then its best, up to ``int(head_floor * budget)`` in all. The rest
    goes to the highest scores over all heads. Ties go to the earlier token, then to the lower head.

    Parameters
    ----------
    scores : Tensor
        ``[batch, kv_head, key]``; comparable between heads, as attention weights are.
    real_index : Tensor
        ``[batch, kv_head or 1, key]`` int64, index of each key in its row's real tokens, -1 for padding.
    lengths, budgets, selector, window_size, sink_size, protect, protect_before
        See :func:`rankkv.selection.select_tokens`; a budget is an average over the heads.
    head_floor : float
        Fraction of the budget that every head keeps, in [0, 1].
    keep : sequence of int
        Tokens to select in each row, an average over the heads. Give :data:`CASCADE_SLACK` more than the budget (or
        all) while the budget may still shrink. A smaller budget then selects the same tokens from these as from all.

    Returns
    -------
    index : Tensor
        Int64 ``[batch, kv_head, width]``, ascending, as wide as the head that keeps most; other heads start with -1.
    counts : list of list of int
        Tokens of each head, ``[row][kv_head]``.  The width depends on them, so the host reads them anyway.

    References
    ----------
    Feng et al., "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference", 2024,
    arXiv:2407.11550, algorithm 1 (``head_floor`` is its safeguard alpha).

    Examples
    --------
    >>> from rankkv.selection import get_selector
    >>> scores = torch.tensor([[[0.9, 0.8, 0.7, 0.0], [0.6, 0.1, 0.2, 0.0]]])
    >>> index = torch.arange(4).view(1, 1, 4)
    >>> snapkv = get_selector("snapkv")
    >>> kept, counts = select_tokens_across_heads(scores, index, [4], [2], snapkv, 1, 0, head_floor=0.2, keep=[2])
    >>> kept.tolist(), counts
    ([[[0, 1, 3], [-1, -1, 3]]], [[3, 1]])
    """
    scores = raise_protected(
        scores,
        real_index,
        lengths,
        budgets,
        selector,
        window_size,
        sink_size,
        protect=protect,
        protect_before=protect_before,
    )
    batch, heads, keys = scores.shape
    device = scores.device
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    place = torch.empty_like(order).scatter_(-1, order, torch.arange(keys, device=device).expand_as(order))
    floors = send_numbers([int(head_floor * budget) for budget in budgets], device)
    protected = (scores == float("inf")).sum(dim=-1, keepdim=True)
    spare = spread_numbers([max(0, count - b - 1) for b, count in zip(budgets, keep, strict=True)], device)
    safe = torch.maximum(protected, floors.view(-1, 1, 1)) + spare
    # Before the heads compete, each keeps its protected tokens or its floor, and the spare tokens of a cascade.
    is_safe = (place < safe) & (real_index >= 0)
    scores = scores.masked_fill(is_safe, float("inf"))
    # Heads hold different tokens at the same place after evictions, so ties are ordered by token index, not by place.
    token = (real_index * heads + torch.arange(heads, device=device).view(-1, 1)).flatten(1).argsort(dim=-1)
    best = scores.flatten(1).gather(1, token).sort(dim=-1, descending=True, stable=True).indices
    best = token.gather(1, best)[:, : heads * max(keep)]
    is_within = torch.arange(best.shape[1], device=device) < heads * send_numbers(keep, device)[:, None]
    is_kept = torch.zeros(batch, heads * keys, dtype=torch.bool, device=device).scatter_(1, best, is_within)
    is_kept = is_kept.view(batch, heads, keys)
    index = torch.where(is_kept, torch.arange(keys, device=device), -1).sort(dim=-1).values
    counts: list[list[int]] = is_kept.sum(dim=-1).tolist()
    return index[..., keys - max(map(max, counts)) :], counts
