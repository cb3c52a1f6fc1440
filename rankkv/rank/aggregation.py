"""Effective rank of a layer's heads together: seven ways to join them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import ConfigError, InputError, UnknownNameError
from .spectrum import as_real_tensor, compute_gram, compute_rank_from_gram

if TYPE_CHECKING:
    from ..models.tensor_parallel import HeadShards

# Gram matrices up to this side are handled in one batch; larger ones head by head, to bound memory.
_BATCHED_SIDE = 256


def _joint_concat(attention: Tensor, shards: HeadShards | None = None) -> Tensor:
    """Return the Gram matrix of the heads side by side along the keys: the sum of theirs."""
    if attention.shape[-2] <= _BATCHED_SIDE:
        gram = compute_gram(attention).sum(1)
    else:
        gram = compute_gram(attention[:, 0])
        for head in range(1, attention.shape[1]):
            gram += compute_gram(attention[:, head])
    return gram if shards is None else shards.sum(gram)


def _joint_mean(attention: Tensor, shards: HeadShards | None = None) -> Tensor:
    """Return the Gram matrix of the heads' mean."""
    mean = attention.mean(1, dtype=torch.float64)
    return compute_gram(mean if shards is None else shards.mean(mean))


def _joint_mass_normalized(attention: Tensor, shards: HeadShards | None = None) -> Tensor:
    """Return the Gram matrix of the heads' sum, each scaled to mass 1; heads without mass count as zero."""
    mass = attention.sum((-2, -1), dtype=torch.float64)
    factors = torch.where(mass > 0, 1.0 / torch.where(mass > 0, mass, 1.0), torch.where(mass == 0, 0.0, mass))
    total = attention[:, 0].to(torch.float64) * factors[:, 0, None, None]
    for head in range(1, attention.shape[1]):
        total.add_(attention[:, head].to(torch.float64) * factors[:, head, None, None])
    return compute_gram(total if shards is None else shards.sum(total))


@dataclass(frozen=True)
class Aggregation:
    """A registered way to compute one rank from a layer's heads: join the matrices, or reduce the heads' ranks.

    Attributes
    ----------
    description : str
        One line.
    join : callable, optional
        ``attention [batch, head, query, key], shards -> Gram [batch, query, query]`` float64.
    reduce : callable, optional
        ``per_head ranks [batch, head] -> ranks [batch]``.
    """

    description: str
    join: Callable[[Tensor, HeadShards | None], Tensor] | None = None
    reduce: Callable[[Tensor], Tensor] | None = None


AGGREGATIONS: dict[str, Aggregation] = {
    "mean": Aggregation("average the heads, then rank", join=_joint_mean),
    "per_head": Aggregation("rank each head, then average", reduce=lambda ranks: ranks.mean(1)),
    "median": Aggregation("median of the heads' ranks", reduce=lambda ranks: ranks.quantile(0.5, dim=1)),
    "max": Aggregation("largest of the heads' ranks", reduce=lambda ranks: ranks.amax(1)),
    "min": Aggregation("smallest of the heads' ranks", reduce=lambda ranks: ranks.amin(1)),
    "concat": Aggregation("rank of the heads side by side along the keys", join=_joint_concat),
    "mass_normalized": Aggregation(
        "each head's mass 1, then average, then rank", join=_joint_mass_normalized
    ),
}


def get_aggregation(name: str) -> Aggregation:
    """Look up an aggregation by name.

    Raises
    ------
    UnknownNameError
        If there is no such aggregation; the message lists the known ones.
    """
    if not isinstance(name, str) or name not in AGGREGATIONS:
        raise UnknownNameError.of("aggregation", name, AGGREGATIONS)
    return AGGREGATIONS[name]


def check_attention(attention: object) -> Tensor:
    """Return attention as a detached real tensor ``[batch, head, query, key]``.

    Float64 entries are scaled to at most 1.

    Raises
    ------
    InputError
        If it is not such a tensor, or its batch, head or query axis is empty.
    """
    if not isinstance(attention, Tensor):
        raise InputError(
            f"attention must be a tensor [batch, head, query, key], got {type(attention).__name__}."
        )
    tensor = as_real_tensor(attention)
    if tensor.ndim != 4 or 0 in tensor.shape[:3]:
        raise InputError(
            f"attention must have shape [batch, head, query, key] with no empty batch, head or query axis, "
            f"got {tuple(tensor.shape)}."
        )
    # Products of float64 entries may overflow; those of narrower dtypes cannot.
    if tensor.dtype == torch.float64 and tensor.shape[-1]:
        largest = tensor.abs().amax((1, 2, 3), keepdim=True)
        usable = largest.isfinite() & (largest > 0)
        tensor = tensor / torch.where(usable, largest, 1.0)
    return tensor


def check_sizes(window_size: int, sink_size: int) -> None:
    """Check the sizes of the observation window and of the sinks.

    Raises
    ------
    ConfigError
        If a size is not an integer in its range; the message names it.
    """
    for name, value, smallest in (("window_size", window_size, 1), ("sink_size", sink_size, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
            raise ConfigError(f"{name} must be an integer >= {smallest}, got {value!r}.")


@torch.no_grad()
def compute_joint_gram(attention: Tensor, aggregation: str = "concat") -> Tensor:
    """Compute the Gram matrix whose spectrum gives a layer's rank, for "mean", "concat" or "mass_normalized".

    For "concat" it is ``sum_h R_h R_h^T``: additive over heads, over blocks of keys and over shards.

    Parameters
    ----------
    attention : Tensor
        ``[batch, head, query, key]``, any float dtype.
    aggregation : str, default "concat"
        An aggregation that joins the heads' matrices.

    Returns
    -------
    Tensor
        ``[batch, query, query]`` float64.

    Raises
    ------
    UnknownNameError
        If the aggregation does not join matrices.
    InputError
        If ``attention`` is not a tensor or array of real numbers.

    Examples
    --------
    >>> compute_joint_gram(torch.ones(1, 2, 2, 3)).tolist()
    [[[6.0, 6.0], [6.0, 6.0]]]
    """
    join = get_aggregation(aggregation).join
    if join is None:
        joining = [name for name, known in AGGREGATIONS.items() if known.join is not None]
        raise UnknownNameError.of("joining aggregation", aggregation, joining)
    return join(as_real_tensor(attention), None)


@torch.no_grad()
def compute_aggregated_rank(
    attention: Tensor,
    aggregation: str = "concat",
    normalize: bool = False,
    *,
    rows: int | Tensor | None = None,
    columns: int | Tensor | None = None,
    shards: HeadShards | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute one effective rank per batch row from the attention of all heads of a layer.

    Spectra come from float64 Gram matrices, accumulated over blocks of keys (error bound: see
    `compute_rank_from_gram`). To exclude rows or columns, set them to zero first.

    Parameters
    ----------
    attention : Tensor
        ``[batch, head, query, key]``, any float dtype. A batch row with NaN or infinity gets rank NaN; the other
        rows are not affected.
    aggregation : str, default "concat"
        A key of `AGGREGATIONS`: "mean", "per_head", "median", "max", "min", "concat" or "mass_normalized".
        Heads without mass have rank 0, and "mass_normalized" leaves them out.
    normalize : bool, default False
        Divide by ``min(rows, columns)`` of the ranked matrix; for "concat" the columns of all heads count.
    rows, columns : int or Tensor ``[batch]``, optional
        Numbers of queries and keys without the zeroed ones; used by ``normalize`` alone.
    shards : HeadShards, optional
        The tensor-parallel processes that hold the other heads of the layer.

    Returns
    -------
    ranks : Tensor
        ``[batch]`` float64 on the attention's device (on the CPU for MPS, which has no float64).
    per_head : Tensor or None
        ``[batch, head]`` for the aggregations over the heads' ranks, else None.

    Raises
    ------
    UnknownNameError
        If there is no such aggregation.
    InputError
        If ``attention`` is not a four-dimensional tensor.

    Examples
    --------
    >>> heads = torch.stack([torch.eye(4, 8), torch.eye(4, 8).roll(4, 1)])[None]
    >>> ranks, per_head = compute_aggregated_rank(heads, "per_head")
    >>> ranks.round(decimals=6).tolist(), per_head.round(decimals=6).tolist()
    ([4.0], [[4.0, 4.0]])
    """
    known = get_aggregation(aggregation)
    tensor = check_attention(attention)
    per_head = None
    if known.join is not None:
        ranks = compute_rank_from_gram(known.join(tensor, shards))
    else:
        per_head = _head_ranks(tensor)
        per_head = per_head if shards is None else shards.gather_heads(per_head)
        ranks = known.reduce(per_head)  # type: ignore[misc]
    if normalize:
        height = torch.as_tensor(tensor.shape[2] if rows is None else rows, device=ranks.device)
        width = torch.as_tensor(tensor.shape[3] if columns is None else columns, device=ranks.device)
        heads = tensor.shape[1] * (1 if shards is None else shards.size)
        joint_width = width * heads if aggregation == "concat" else width
        ranks = ranks / torch.minimum(height, joint_width).clamp_min(1)
        if per_head is not None:
            per_head = per_head / torch.minimum(height, width).clamp_min(1).reshape(-1, 1)
    return ranks, per_head


def _head_ranks(attention: Tensor) -> Tensor:
    """Compute the rank of each head from the Gram matrix of its shorter side, ``[batch, head]``."""
    short = attention if attention.shape[-2] <= attention.shape[-1] else attention.mT
    if short.shape[-2] == 0:
        return torch.zeros(attention.shape[:2], dtype=torch.float64, device=attention.device)
    if short.shape[-2] <= _BATCHED_SIDE:
        return compute_rank_from_gram(compute_gram(short))
    return torch.stack(
        [compute_rank_from_gram(compute_gram(short[:, h])) for h in range(short.shape[1])], dim=1
    )
