"""DropKV: keep the keys whose removal would change the attention output most."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import ConfigError
from ..observe.observation import Observation
from .scoring import without_padding

# A key that has all attention of a query would give 0/0.
_LEAST_REST = 1e-6


@without_padding
def score_dropkv(observation: Observation, kernel_size: int = 5) -> Tensor:
    """Score each key by the error of the attention output if this key alone is dropped.

    ``s_j = mean over window rows i and heads of the group of (p_ij / (1 - p_ij))^2 ||v_j - o_i||_2^2``, where ``p`` is
    the attention and ``o_i = sum_j p_ij v_j`` the output. This is exact: without key j the other weights grow by
    ``1 / (1 - p_ij)``. Keys before the window are average-pooled among themselves.

    Parameters
    ----------
    observation : Observation
        The layer's queries, keys and values.
    kernel_size : int, default 5
        Width of the pooling over neighbouring keys, odd; 1 means none.

    Returns
    -------
    Tensor
        ``[batch, kv_head, key]`` float32, not negative: squared errors of outputs, which compare over heads.

    Raises
    ------
    ConfigError
        If ``kernel_size`` is not odd and positive.

    Notes
    -----
    The paper sums over the window. The mean gives the same order, and lets new queries join while decoding.
    ``1 - p_ij`` counts as at least 1e-6.

    References
    ----------
    DropKV (decoupled residual-output perturbation), 2026, openreview.net/forum?id=MqfNzH3TVH.

    Examples
    --------
    >>> from rankkv.selection import get_selector
    >>> str(get_selector("dropkv", kernel_size=1))
    'dropkv(kernel_size=1)'
    """
    if (
        isinstance(kernel_size, bool)
        or not isinstance(kernel_size, int)
        or kernel_size < 1
        or not kernel_size % 2
    ):
        raise ConfigError(
            f"kernel_size={kernel_size!r} of selector 'dropkv' must be an odd integer of at least 1."
        )
    # Where a key has nearly all attention, both 1 - p and v - o are small differences: float32 would lose them.
    exact = torch.float32 if observation.query.device.type == "mps" else torch.float64
    weights, values = observation.window_attention.to(exact), observation.values.to(exact)
    batch, heads, rows, keys = weights.shape
    if observation.sink_logits is None:
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=_LEAST_REST)
    # The query heads of a group share their values, so they go into one product.
    grouped = weights.reshape(batch, values.shape[1], -1, keys)
    outputs = grouped @ values
    distances = outputs @ values.mT
    distances.mul_(-2).add_(values.square().sum(dim=-1)[:, :, None])
    distances.add_(outputs.square().sum(dim=-1, keepdim=True)).clamp_(min=0.0)
    shares = grouped / (1.0 - grouped).clamp_(min=_LEAST_REST)
    errors = distances.mul_(shares.square_()).view(batch, heads, rows, keys).mean(dim=-2).float()
    split = keys - rows
    if split and kernel_size > 1:
        pooled = functional.avg_pool1d(errors[..., :split], kernel_size, stride=1, padding=kernel_size // 2)
        errors = torch.cat([pooled, errors[..., split:]], dim=-1)
    return observation.compute_group_mean(errors)
