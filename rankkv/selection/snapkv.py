"""SnapKV: keep the keys that the observation window attends to, clustered by pooling."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import ConfigError
from ..observe.observation import Observation

_POOLS: dict[str, Callable[..., Tensor]] = {"max": functional.max_pool1d, "avg": functional.avg_pool1d}


def score_snapkv(observation: Observation, pooling: str = "max", kernel_size: int = 5) -> Tensor:
    """Score each key by the observation window's attention to it, pooled along the keys.

    ``score_j = mean over the heads of the group of pool_j(mean over window rows i of A[i, j])``. Keys before the
    window are pooled among themselves, so that the window's attention to itself does not leak into them.

    kvpress' ``SnapKVPress`` is ``pooling="avg"`` with ``sink_size=0``. It keeps the whole window whatever the budget.
    Here at most half of a layer's budget protects the window, and the rest of the window competes by its score.

    Parameters
    ----------
    observation : Observation
        The layer's queries and keys.
    pooling : {"max", "avg"}, default "max"
        Pooling over neighbouring keys.
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
    """Compute the observation window's mean attention to each key, pooled along the keys.

    Parameters
    ----------
    observation : Observation
        The layer's queries and keys.
    selector : str
        Name of the selector, for error messages.
    pooling, kernel_size
        See :func:`score_snapkv`.

    Returns
    -------
    Tensor
        ``[batch, query_head, key]`` float32.

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
    # In a row shorter than the window, padding must not count as queries in the mean.
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
