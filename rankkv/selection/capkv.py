"""CapKV: keep the values that span most of what likely queries can read, by their leverage."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError
from ..observe.observation import Observation
from ..observe.queries import compute_query_moments, split_moments
from .expected_attention import average_rotation
from .scoring import check_integer_option, without_padding

_EPSILON = 1e-6


@without_padding
def score_capkv(observation: Observation, tau: float = 5.0, future_positions: int = 512) -> Tensor:
    """Score each key by the leverage of its value among all values, weighed by the key's likely attention.

    ``w_j = exp(tau (cos(k_j, q) - max over i of cos(k_i, q)))``, ``A = I + sum_j (w_j + 1e-6) v_j v_j^T``, and
    ``score_j = mean over the heads of the group of w_j v_j^T A^-1 v_j``. Here ``q`` is the mean query of the head,
    turned by the mean rotation of the next ``future_positions`` positions. The score is the derivative of
    ``log det A``, the volume that the kept values span. Sinks and their queries are left out; sinks score as high as
    the best key.

    Parameters
    ----------
    observation : Observation
        The layer's queries, keys, values and rotary embedding.
    tau : float, default 5
        Sharpness of the weights, at least 0.
    future_positions : int, default 512
        Number of positions after the newest token that the rotation averages over.

    Returns
    -------
    Tensor
        ``[batch, kv_head, key]`` float32, in [0, 1].

    Raises
    ------
    ConfigError
        If ``tau`` is negative, or ``future_positions`` is not an integer of at least 1.

    Notes
    -----
    The formula is that of kvpress, which divides keys and queries by their norms; the paper does not. As with
    ``expected_attention``, only the mean of past queries is kept, and only the rotary part of a head is rotated. The
    newest token is always kept; kvpress protects no newest token.

    References
    ----------
    "Rethinking KV Cache Eviction via a Unified Information-Theoretic Objective", 2026, arXiv:2604.25975: CapKV.

    Examples
    --------
    >>> from rankkv.selection import get_selector
    >>> str(get_selector("capkv", tau=2.0))
    'capkv(tau=2.0)'
    """
    check_integer_option("capkv", "future_positions", future_positions, 1)
    if isinstance(tau, bool) or not isinstance(tau, int | float) or not 0 <= tau <= 80:
        raise ConfigError(f"tau={tau!r} of selector 'capkv' must be a number in [0, 80].")
    _, mean, _ = split_moments(compute_query_moments(observation, "unturned"))
    if observation.rotation is not None:
        frequencies = observation.rotation.frequencies.to(observation.keys.device)
        mean = observation.rotation.combine(
            mean, *average_rotation(observation, frequencies, future_positions)
        )
    keys, values = observation.keys.float(), observation.values.float()
    key_heads = keys.shape[1]
    anchors = torch.nn.functional.normalize(mean, dim=-1).unflatten(1, (key_heads, -1))
    cosines = torch.nn.functional.normalize(keys, dim=-1)[:, :, None] @ anchors.mT
    cosines = cosines.squeeze(-1).clamp_(-1.0, 1.0)
    is_sink = observation.real_index < observation.sink_size
    sink = is_sink.repeat_interleave(key_heads // is_sink.shape[1], dim=1)
    cosines = cosines.masked_fill(sink[:, :, None], float("-inf"))
    # If all keys are sinks, minus infinity stays below the largest finite number.
    top = cosines.amax(dim=-1, keepdim=True).clamp(min=-1.0)
    weights = (cosines - top).mul_(tau).nan_to_num_(nan=0.0).exp_().masked_fill_(sink[:, :, None], 0.0)
    scores = torch.zeros_like(keys[..., 0])
    identity = torch.eye(values.shape[-1], device=values.device)
    # One head of each group at a time: the solution is as large as the values.
    for group in range(weights.shape[2]):
        weight = weights[:, :, group]
        used = (weight + _EPSILON).masked_fill(sink, 0.0)
        matrix = identity + (values * used[..., None]).mT @ values
        # Values that are not numbers must not raise here; they rank last.
        factor, _ = torch.linalg.cholesky_ex(matrix)
        solved = torch.linalg.solve_triangular(factor, values.mT, upper=False)
        scores += weight * solved.square().sum(dim=-2) / weights.shape[2]
    scores = observation.compute_group_mean(scores)
    best = scores.amax(dim=-1, keepdim=True)
    return torch.where(is_sink, best, scores)
