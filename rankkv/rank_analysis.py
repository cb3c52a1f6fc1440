"""Effective rank of one matrix, and of every layer's attention."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import DegenerateAttentionError, InputError, UnknownNameError
from .rank.aggregation import (
    AGGREGATIONS,
    Aggregation,
    check_attention,
    check_sizes,
    compute_aggregated_rank,
    compute_joint_gram,
    get_aggregation,
)
from .rank.spectrum import (
    as_real_tensor,
    compute_effective_ranks,
    compute_gram,
    compute_rank_from_gram,
    round_ranks,
)

__all__ = [
    "AGGREGATIONS",
    "SCOPES",
    "Aggregation",
    "RankAnalysis",
    "analyze_attention_ranks",
    "compute_aggregated_rank",
    "compute_effective_rank",
    "compute_effective_ranks",
    "compute_gram",
    "compute_joint_gram",
    "compute_rank_from_gram",
    "round_ranks",
]


def compute_effective_rank(matrix: Tensor, normalize: bool = False) -> float:
    """Compute the effective rank of a matrix, ``exp(-sum_i p_i log p_i)`` with ``p = sigma / sum(sigma)``.

    Parameters
    ----------
    matrix : Tensor or ndarray
        ``[m, n]``, any real dtype; its scale does not matter. The singular values are computed in float64.
        A bf16 or fp16 matrix has exactly the rank of its float32 copy.
    normalize : bool, default False
        Divide by ``min(m, n)``.

    Returns
    -------
    float
        In [1, min(m, n)]; 0 for a zero matrix.

    Raises
    ------
    InputError
        Not two-dimensional, empty, or not real numbers.
    DegenerateAttentionError
        An entry is NaN or infinite, or the singular values do not converge even with a tiny jitter.

    References
    ----------
    O. Roy, M. Vetterli, "The effective rank: A measure of effective dimensionality", EUSIPCO 2007, def. 1.

    Examples
    --------
    >>> round(compute_effective_rank(torch.eye(8)), 6)
    8.0
    >>> round(compute_effective_rank(torch.ones(8, 8), normalize=True), 6)
    0.125
    """
    tensor = as_real_tensor(matrix)
    if tensor.ndim != 2 or tensor.numel() == 0:
        raise InputError(
            f"a matrix must have shape [m, n] with m, n >= 1, got {tuple(tensor.shape)}; "
            "use compute_effective_ranks for a batch of matrices."
        )
    rank = float(compute_effective_ranks(tensor, normalize))
    if rank != rank:  # only NaN differs from itself
        bad = int((~torch.isfinite(tensor)).sum())
        raise DegenerateAttentionError(
            f"{bad} of {tensor.numel()} entries are NaN or infinite, so the matrix has no rank; "
            "mask them first."
        )
    return rank


SCOPES: dict[str, str] = {
    "full": "the whole attention matrix",
    "window": "the last window_size queries, all keys",
    "evictable": "the last window_size queries, keys outside the sinks and the recent window",
}


@dataclass(frozen=True)
class RankAnalysis:
    """Hold the effective ranks of all layers.

    Attributes
    ----------
    layer_ranks : list of float
        One rank per layer (mean over the batch rows).
    per_head_ranks : list of list of float
        ``[layer][head]``, whatever the aggregation (mean over the batch rows).
    statistics : dict
        Of ``layer_ranks``: mean, std (population), min, max, and the layer indices min_layer and max_layer.
    scope, aggregation : str
        The ranked part of the attention, and how the heads were joined.
    normalize : bool
        True if ranks were divided by the smaller side of the ranked matrix.
    """

    layer_ranks: list[float]
    per_head_ranks: list[list[float]]
    statistics: dict[str, float | int]
    scope: str
    aggregation: str
    normalize: bool

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain JSON types."""
        return {
            "layer_ranks": list(self.layer_ranks),
            "per_head_ranks": [list(ranks) for ranks in self.per_head_ranks],
            "statistics": dict(self.statistics),
            "scope": self.scope,
            "aggregation": self.aggregation,
            "normalize": self.normalize,
        }


@torch.no_grad()
def analyze_attention_ranks(
    attentions: Iterable[Tensor],
    aggregation: str = "mean",
    normalize: bool = False,
    show_progress: bool = False,
    *,
    scope: str = "full",
    window_size: int = 32,
    sink_size: int = 4,
) -> RankAnalysis:
    """Compute the effective rank of each layer's attention weights.

    Parameters
    ----------
    attentions : iterable of Tensor
        One ``[batch, head, query, key]`` per layer, as ``output_attentions=True`` returns; any float dtype. The
        shapes may differ between layers. An iterator is consumed layer by layer.
    aggregation : str, default "mean"
        How heads are joined, a key of `AGGREGATIONS`.
    normalize : bool, default False
        Divide by the smaller side of the ranked matrix.
    show_progress : bool, default False
        Show a progress bar on stderr.
    scope : {"full", "window", "evictable"}
        "full" ranks the whole matrix. "window" ranks the last ``window_size`` queries. "evictable" ranks, of the
        window, the keys that may be evicted: ``sink_size <= key < keys - window_size``. They are not
        renormalised; the rank is 0 if there are none.
    window_size, sink_size : int
        Observation window and attention sinks, in tokens. Padding is not detected: remove it first.

    Returns
    -------
    RankAnalysis
        Ranks averaged over the batch rows.

    Raises
    ------
    InputError
        No layer, or an entry that is None or not a four-dimensional tensor; names the layer.
    DegenerateAttentionError
        Weights that are NaN, infinite or negative; names the layer.
    UnknownNameError
        Unknown scope or aggregation.
    ConfigError
        A size outside its range.

    Examples
    --------
    >>> layers = (torch.eye(6)[None, None], torch.full((1, 1, 6, 6), 1 / 6))
    >>> [round(rank, 6) for rank in analyze_attention_ranks(layers).layer_ranks]
    [6.0, 1.0]
    """
    known = get_aggregation(aggregation)
    if scope not in SCOPES:
        raise UnknownNameError.of("scope", scope, SCOPES)
    check_sizes(window_size, sink_size)
    if attentions is None or not isinstance(attentions, Iterable):
        raise InputError(f"attentions must hold one tensor per layer, got {type(attentions).__name__}.")
    layers: Iterable[Tensor] = attentions
    if show_progress:
        from tqdm.auto import tqdm

        layers = tqdm(attentions, desc="effective rank", unit="layer")
    layer_ranks: list[float] = []
    per_head_ranks: list[list[float]] = []
    for layer, attention in enumerate(layers):
        part = _cut(_check_layer(layer, attention), scope, window_size, sink_size)
        _, per_head = compute_aggregated_rank(part, "per_head", normalize)
        if known.join is None:
            ranks = known.reduce(per_head)  # type: ignore[misc,arg-type]
        else:
            ranks, _ = compute_aggregated_rank(part, aggregation, normalize)
        layer_ranks.append(float(ranks.mean()))
        per_head_ranks.append(per_head.mean(0).tolist())  # type: ignore[union-attr]
    if not layer_ranks:
        raise InputError("attentions is empty; pass the attention of at least one layer.")
    return RankAnalysis(layer_ranks, per_head_ranks, _statistics(layer_ranks), scope, aggregation, normalize)


def _check_layer(layer: int, attention: object) -> Tensor:
    """Return a layer's attention as a tensor of finite weights, or raise an error that names the layer."""
    if attention is None:
        raise InputError(
            f"layer {layer}: attention is None; load the model with attn_implementation='eager' and pass "
            "output_attentions=True."
        )
    try:
        tensor = check_attention(attention)
    except InputError as error:
        raise InputError(f"layer {layer}: {error}") from None
    if tensor.shape[-1] == 0:
        raise InputError(f"layer {layer}: attention must have keys, got shape {tuple(tensor.shape)}.")
    smallest, largest = (float(value) for value in tensor.aminmax())
    # Not `smallest < 0`: NaN compares false and must be refused too.
    if not smallest >= 0 or largest == float("inf"):
        what = "NaN" if smallest != smallest else f"values from {smallest:g} to {largest:g}"
        raise DegenerateAttentionError(
            f"layer {layer}: attention weights must be finite and >= 0, found {what}; pass the weights after "
            "the softmax, padded query rows zeroed."
        )
    return tensor


def _cut(attention: Tensor, scope: str, window_size: int, sink_size: int) -> Tensor:
    """Return the part of the attention that a scope ranks."""
    if scope == "full":
        return attention
    window = attention[:, :, -window_size:]
    if scope == "window":
        return window
    keys = attention.shape[-1]
    return window[..., sink_size : max(sink_size, keys - window_size)]


def _statistics(layer_ranks: list[float]) -> dict[str, float | int]:
    low, high = min(layer_ranks), max(layer_ranks)
    return {
        "mean": statistics.fmean(layer_ranks),
        "std": statistics.pstdev(layer_ranks),
        "min": low,
        "max": high,
        "min_layer": layer_ranks.index(low),
        "max_layer": layer_ranks.index(high),
    }
