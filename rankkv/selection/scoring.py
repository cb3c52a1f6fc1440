"""Helpers of the scoring functions: rows scored without padding, ties merged, options checked."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import ConfigError
from ..observe.observation import Observation
from ..observe.output_projection import compute_projection_matrix, find_output_projection


def without_padding(score: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Decorate a scoring function so that it sees each row alone, without padding.

    A mean, a norm or a partition over the tokens then needs no mask. Padding scores 0 and is never selected.

    Parameters
    ----------
    score : callable
        ``score(observation, **options) -> Tensor [batch, kv_head or 1, key]``.

    Returns
    -------
    callable
        The same function for any observation.
    """

    @functools.wraps(score)
    def score_each(observation: Observation, *args: Any, **options: Any) -> Tensor:
        if min(observation.available) == observation.key_length:
            return score(observation, *args, **options)
        if observation.valid.dim() == 3:
            return _score_groups(score, observation, *args, **options)
        rows = {
            row: score(observation.take_row(row), *args, **options)
            for row, count in enumerate(observation.available)
            # In a chunk of the prompt a row may hold padding only.
            if count
        }
        heads = max((scores.shape[1] for scores in rows.values()), default=1)
        shape = (len(observation.available), heads, observation.key_length)
        joined = observation.keys.new_zeros(shape).float()
        for row, scores in rows.items():
            if observation.is_padded_in_front(row):
                joined[row, :, observation.row_start[row] :] = scores[0]
            else:
                joined[row, :, observation.valid[row]] = scores[0]
        return joined

    return score_each


def _score_groups(
    score: Callable[..., Tensor], observation: Observation, *args: Any, **options: Any
) -> Tensor:
    """Score the tokens of each head alone, for heads that hold different tokens."""
    joined = torch.zeros(observation.valid.shape, dtype=torch.float32, device=observation.keys.device)
    for row, heads in enumerate(observation.valid.any(dim=-1).tolist()):
        for head, holds_tokens in enumerate(heads):
            if holds_tokens:
                group = observation.take_group(row, head)
                joined[row, head, observation.valid[row, head]] = score(group, *args, **options)[0, 0].float()
    return joined


def merge_ties(scores: Tensor, tolerance: float = 1e-6) -> Tensor:
    """Replace each run of nearly equal scores by the lowest of them.

    In a model's first layer, keys of the same token differ only by their rotation, so their norms are equal. Their
    float32 values differ by rounding, and differently from batch to batch.

    Parameters
    ----------
    scores : Tensor
        ``[..., key]``.
    tolerance : float, default 1e-6
        Largest difference between neighbours in ascending order, as a fraction of the larger.

    Returns
    -------
    Tensor
        Same shape and dtype; scores that are further apart keep their order.

    Examples
    --------
    >>> merge_ties(torch.tensor([2.0, 1.0, 1.0000001, 3.0])).tolist()
    [2.0, 1.0, 1.0, 3.0]
    """
    ordered, order = scores.sort(dim=-1)
    lower, upper = ordered[..., :-1], ordered[..., 1:]
    begins = functional.pad(upper - lower > tolerance * upper.abs().maximum(lower.abs()), (1, 0), value=True)
    index = torch.arange(scores.shape[-1], device=scores.device)
    first = torch.where(begins, index, 0).cummax(dim=-1).values
    return torch.empty_like(scores).scatter_(-1, order, ordered.gather(-1, first))


def check_integer_option(selector: str, name: str, value: object, least: int) -> None:
    """Check that an option of a selector is an integer of at least ``least``.

    Raises
    ------
    ConfigError
        If it is not; the message names the option, its value and the selector.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(
            f"{name}={value!r} of selector {selector!r} must be an integer of at least {least}."
        )


def has_output_projection(observation: Observation) -> bool:
    """Return True if the layer's output projection is found."""
    return _find_projection(observation) is not None


def compute_head_projections(observation: Observation) -> Tensor | None:
    """Compute each query head's part of the layer's output projection; None if no projection is found.

    Parameters
    ----------
    observation : Observation
        The layer's queries, values and attention module; of all its heads, or of a part of them.

    Returns
    -------
    Tensor or None
        ``[head, head_dim, hidden]``, on the device and in the dtype of the values.
    """
    found = _find_projection(observation)
    if found is None:
        return None
    values, heads = observation.values, observation.query.shape[1]
    first, total = (0, heads) if observation.part_of is None else observation.part_of
    parts = 1 if observation.shards is None else observation.shards.size
    matrix = compute_projection_matrix(found, total * values.shape[-1], values, parts)
    return matrix.view(total, values.shape[-1], -1)[first : first + heads]


def _find_projection(observation: Observation) -> nn.Module | None:
    heads = observation.query.shape[1] if observation.part_of is None else observation.part_of[1]
    parts = 1 if observation.shards is None else observation.shards.size
    return find_output_projection(observation.module, heads * observation.values.shape[-1], parts)


def compute_output_norms(observation: Observation) -> Tensor:
    """Compute how long each value is in the layer's output, for each query head.

    ``||W^g v_j||_2 = sqrt(v_j^T G^g v_j)`` with ``G^g = W^gT W^g``, where ``W^g`` holds the rows of the output
    projection that belong to query head g.  ``G`` is as small as a head, so this costs far less than the projection.

    Parameters
    ----------
    observation : Observation
        The layer's values ``[batch, kv_head, key, head_dim]``, and its attention module.

    Returns
    -------
    Tensor
        ``[batch, head, key]`` float32; ``||v_j||_2`` if no output projection is found.
    """
    values, heads = observation.values, observation.query.shape[1]
    groups = heads // values.shape[1]
    matrices = compute_head_projections(observation)
    if matrices is None:
        norms = torch.linalg.vector_norm(values, dim=-1, dtype=torch.float32)
        return norms.repeat_interleave(groups, dim=1)
    by_head = matrices.float().unflatten(0, (values.shape[1], groups))
    squares = by_head @ by_head.mT
    value = values.float()
    norms = value.new_empty(values.shape[0], groups, values.shape[1], values.shape[2])
    for group in range(groups):
        torch.sum((value @ squares[:, group]).mul_(value), dim=-1, out=norms[:, group])
    # Rounding may leave a tiny negative number.
    norms.clamp_(min=0.0).sqrt_()
    return norms.transpose(1, 2).flatten(1, 2)
