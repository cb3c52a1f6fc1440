"""DefensiveKV: keep the keys that any query of the observation window attends to, none scored below the mean."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import ConfigError
from ..observe.observation import Observation
from .criticalkv import compute_value_norms
from .scoring import without_padding


@without_padding
def score_defensivekv(observation: Observation, kernel_size: int = 5, projection: bool = True) -> Tensor:
    """Score each key by its largest attention in the window, at least the head's mean, times its value's norm.

    ``m_j = max over window rows i and heads g of the group of a_{g,i,j}``, ``score_j = max(m_j, mean of m) w_j``. Here
    ``a`` is the attention, average-pooled over the keys before the window; each row keeps its sum. ``w_j`` is the norm
    of :func:`rankkv.selection.criticalkv.refine_criticalkv`. The lower bound guards against queries to come that
    attend to keys which this window ignores.

    Parameters
    ----------
    observation : Observation
        The layer's queries, keys and values, and its attention module.
    kernel_size : int, default 5
        Width of the pooling over neighbouring keys, odd; 1 means none.
    projection : bool, default True
        Use ``||v_j W||_1``; False uses ``||v_j||_1``. So does True if no output projection is found.

    Returns
    -------
    Tensor
        ``[batch, kv_head, key]`` float32, not negative.

    Raises
    ------
    ConfigError
        If ``kernel_size`` is not odd and positive, or ``projection`` is not a truth value.

    Notes
    -----
    Two points differ from the authors' code. It first keeps the tokens that hold 90 % of the attention by attention
    alone, and it divides each norm by the sum of the heads' norms at that token.

    References
    ----------
    Feng et al., "Taming the Fragility of KV Cache Eviction in LLM Inference", 2025, arXiv:2510.13334: DefensiveKV.

    Examples
    --------
    >>> from rankkv.selection import get_selector
    >>> str(get_selector("defensivekv", projection=False))
    'defensivekv(projection=False)'
    """
    if (
        isinstance(kernel_size, bool)
        or not isinstance(kernel_size, int)
        or kernel_size < 1
        or not kernel_size % 2
    ):
        raise ConfigError(
            f"kernel_size={kernel_size!r} of selector 'defensivekv' must be an odd integer of at least 1."
        )
    if not isinstance(projection, bool):
        raise ConfigError(f"projection={projection!r} of selector 'defensivekv' must be True or False.")
    weights = observation.window_attention
    batch, rows, keys = weights.shape[0], *weights.shape[-2:]
    split = keys - rows
    past = weights[..., :split]
    if split and kernel_size > 1:
        pooled = functional.avg_pool1d(past.flatten(0, 1), kernel_size, stride=1, padding=kernel_size // 2)
        pooled = pooled.view(past.shape)
        sums = pooled.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        past = pooled.mul_(past.sum(dim=-1, keepdim=True) / sums)
    most = torch.cat([past.amax(dim=-2), weights[..., split:].amax(dim=-2)], dim=-1)
    most = most.view(batch, observation.kv_heads, -1, keys).amax(dim=2)
    # The window attends to itself, so its own keys would raise the mean.
    mean = most[..., : split or keys].mean(dim=-1, keepdim=True)
    return torch.maximum(most, mean) * compute_value_norms(observation, projection)
