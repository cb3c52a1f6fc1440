"""SnapKV: keep what the observation window attends to, clustered by pooling."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import ConfigError
from ..observe.observation import Observation

_POOLS: dict[str, Callable[..., Tensor]] = {"max": functional.max_pool1d, "avg": functional.avg_pool1d}


def score_snapkv(observation: Observation, pooling: str = "max", kernel_size: int = 5) -> Tensor:
    """Score each key by the attention that the observation window pays to it, pooled along the keys.

    ``score_j = mean over the heads of the group of pool_j(mean over window rows i of A[i, j])``.  Keys before the
    window are pooled among themselves, so that the window's attention to itself does not leak into them.

    kvpress' ``SnapKVPress`` is ``pooling="avg"`` with ``sink_size=0``; it keeps the whole window whatever the budget,
    while here the window's protected part is at most half of a layer's budget and the rest of it competes by its score.

    Parameters
    ----------
    observation : Observation
        The layer's queries and keys.
    pooling : {"max", "avg"}, default "max"
        How neighbouring keys are joined.
    kernel_size : int, default 5
        Width of the pooling, odd; 1 means none.

    Returns
    -------
    Tensor
        ``[batch, kv_head, key]`` float32.

    Raises
    ------
    ConfigError
        If ``pooling`` is unknown or ``kernel_size`` is not odd and positive.

    References
    ----------
    Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation", 2024, arXiv:2404.14469, section 4.
    """
    return observation.compute_group_mean(pool_votes(observation, "snapkv", pooling, kernel_size))


def pool_votes(observation: Observation, selector: str, pooling: str, kernel_size: int) -> Tensor:
    """Compute the mean attention of the observation window to each key, pooled along the keys.

    Parameters
    ----------
    observation : Observation
        The layer's queries and keys.
    selector : str
        Named where an option is wrong.
    pooling, kernel_size
        See :func:`score_snapkv`.

    Returns
    -------
    Tensor
        ``[batch, head, key]`` float32, one head a query head.

    Raises
    ------
    ConfigError
        If ``pooling`` is unknown or ``kernel_size`` is not odd and positive.
    """
    if pooling not in _POOLS:
        raise ConfigError(
            f"pooling={pooling!r} of selector {selector!r} must be one of: {', '.join(sorted(_POOLS))}."
        )
    if not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
        raise ConfigError(
            f"kernel_size={kernel_size!r} of selector {selector!r} must be an odd integer of at least 1."
        )
    rows = min(observation.window_size, observation.query_length)
    # A row shorter than the window has padding in it, which is no query and must not dilute the mean.
    queries = observation.query_valid[:, -rows:].sum(dim=-1).clamp(min=1)
    votes = observation.window_attention.sum(dim=-2) / queries[:, None, None]
    split = observation.key_length - rows
    parts = [votes[..., :split], votes[..., split:]]
    pool = _POOLS[pooling]
    pooled = [
        pool(part, kernel_size, stride=1, padding=kernel_size // 2) if part.shape[-1] else part
        for part in parts
    ]
    return torch.cat(pooled, dim=-1)
