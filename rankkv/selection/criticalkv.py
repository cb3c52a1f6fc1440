"""CriticalKV and VATP: attention scores weighed by the norm of the value's part of the layer's output."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError
from ..observe.observation import BLOCK_ELEMENTS, Observation
from .scoring import compute_head_projections


def refine_criticalkv(
    scores: Tensor,
    observation: Observation,
    epsilon: float = 1e-4,
    first_stage_ratio: float = 0.5,
    projection: bool = True,
) -> Tensor:
    """Weigh attention scores by the norm of each key's projected value, in two stages.

    ``w_j = mean over the heads h of the group of ||v_j W_h||_1``, where ``W_h`` holds the rows of the layer's output
    projection that belong to head h. Of a budget of b tokens, the base's scores s fill the first
    ``int(first_stage_ratio * b)`` places. ``(s_j + epsilon) * w_j`` fills the others. Both stages together give one
    order of the tokens for all budgets. The result is minus the place in that order.

    ``first_stage_ratio=0`` returns ``(s_j + epsilon) * w_j`` itself. VATP is
    ``base="h2o", projection=False, first_stage_ratio=0.0, epsilon=0.0``.

    Parameters
    ----------
    scores : Tensor
        The base's scores, ``[batch, kv_head or 1, key]``; attention, so not negative.
    observation : Observation
        The layer's values, and its attention module.
    epsilon : float, default 1e-4
        Added to every score, so that a key without attention is still weighed by its value.
    first_stage_ratio : float, default 0.5
        Share of a budget that is filled by the base's scores alone, in [0, 1].
    projection : bool, default True
        False uses ``||v_j||_1``. So does True if no output projection is found: if the module's children do not
        identify it, and under tensor parallelism.

    Returns
    -------
    Tensor
        ``[batch, kv_head, key]`` float32.

    Raises
    ------
    ConfigError
        If an option is outside its range.

    Notes
    -----
    The option ``base`` (default ``"snapkv"``) names the method whose scores are weighed; it must read attention. As in
    kvpress, the newest ``window_size`` tokens fill the first places of the first stage, the newest of them first.
    Sinks, which kvpress does not protect, take places of the second stage.

    References
    ----------
    Feng et al., "CriticalKV: Optimizing KV Cache Eviction from an Output Perturbation Perspective", 2025,
    arXiv:2502.03805, algorithm 1.

    Guo et al., "Attention Score is not All You Need for Token Importance Indicator in KV Cache Reduction: Value Also
    Matters", 2024, arXiv:2406.12335: VATP.
    """
    _check(epsilon, first_stage_ratio, projection)
    weighed = (scores.float() + epsilon) * compute_value_norms(observation, projection)
    if first_stage_ratio == 0:
        return weighed
    index = observation.real_index.expand(weighed.shape)
    newest_from = torch.tensor(observation.lengths, device=index.device) - observation.window_size
    # The newest tokens rank above any score, the newest first.
    first = torch.where(index >= newest_from.view(-1, 1, 1), (index + 1) * 1e30, scores.double())
    ranks = [
        [_join_orders(*orders, ratio=first_stage_ratio) for orders in zip(*row, strict=True)]
        for row in zip(_list_orders(first, index), _list_orders(weighed, index), strict=True)
    ]
    return -torch.tensor(ranks, dtype=torch.float32, device=weighed.device)


def compute_value_norms(observation: Observation, projection: bool) -> Tensor:
    """Compute the L1 norm of each value, projected if ``projection`` and a projection is found.

    Parameters
    ----------
    observation : Observation
        The layer's values ``[batch, kv_head, key, head_dim]``, and its attention module.
    projection : bool
        See :func:`refine_criticalkv`.

    Returns
    -------
    Tensor
        ``[batch, kv_head, key]`` float32: the mean over the query heads of a group.
    """
    values, heads = observation.values, observation.query.shape[1]
    matrices = compute_head_projections(observation) if projection else None
    if matrices is None:
        norms = values.float().abs().sum(dim=-1)
        return observation.compute_group_mean(norms)
    # Blocks of tokens bound the memory: each projected value is hidden_size wide.
    rows = max(1, BLOCK_ELEMENTS // (values.shape[0] * matrices.shape[-1]))
    norms = torch.empty(values.shape[0], heads, values.shape[-2], dtype=torch.float32, device=values.device)
    for head in range(heads):
        value = values[:, head * values.shape[1] // heads]
        for start in range(0, values.shape[-2], rows):
            outputs = value[:, start : start + rows] @ matrices[head]
            norms[:, head, start : start + rows] = outputs.float().abs().sum(dim=-1)
    return observation.compute_group_mean(norms)


def _check(epsilon: object, first_stage_ratio: object, projection: object) -> None:
    for name, value, high in (("epsilon", epsilon, 1e6), ("first_stage_ratio", first_stage_ratio, 1.0)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= high:
            raise ConfigError(f"{name}={value!r} of selector 'criticalkv' must be a number in [0, {high:g}].")
    if not isinstance(projection, bool):
        raise ConfigError(f"projection={projection!r} of selector 'criticalkv' must be True or False.")


def _list_orders(scores: Tensor, index: Tensor) -> list[list[list[int]]]:
    """List the keys from the highest score to the lowest, ``[row][head]``, padding last."""
    scores = torch.nan_to_num(scores, nan=torch.finfo(scores.dtype).min)
    scores = scores.masked_fill(index < 0, float("-inf"))
    return scores.sort(dim=-1, descending=True, stable=True).indices.tolist()


def _join_orders(first: list[int], second: list[int], ratio: float) -> list[int]:
    """Rank the keys by two orders, for every budget b at once.

    The keys of rank below b are the best ``int(ratio * b)`` of the first order, then the best others of the second.
    """
    ranks = [-1] * len(first)
    by_first, by_second = iter(first), iter(second)
    placed = 0
    for rank in range(len(ranks)):
        key = -1
        if int(ratio * (rank + 1)) > placed:
            placed += 1
            key = next(by_first)
        # Take the next key of the second order. Keys that already have a rank are skipped.
        while key < 0 or ranks[key] >= 0:
            key = next(by_second)
        ranks[key] = rank
    return ranks
