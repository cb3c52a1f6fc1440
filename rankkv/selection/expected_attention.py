"""Expected attention: keep the keys that future queries are expected to attend to, estimated from past queries."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError
from ..observe.observation import Observation
from ..observe.queries import compute_query_moments, split_moments
from .scoring import check_integer_option, without_padding


@without_padding
def score_expected_attention(
    observation: Observation,
    future_positions: int = 512,
    covariance: bool = True,
    value_norms: bool = True,
    epsilon: float = 0.0,
) -> Tensor:
    """Score each key by the expected attention of future queries times its value's norm.

    Queries without rotary embedding are modelled as normal with mean ``m`` and covariance ``C``. Let ``R`` be the mean
    of the rotary matrices of the next ``future_positions`` positions and ``s`` the layer's scaling. Then

    ``z_j = s k_j R m + s^2 / 2 k_j R C R^T k_j^T`` (the logarithm of the expected ``exp(s q k_j^T)``),

    ``score_j = (mean over the heads of the group of softmax_j z_j + epsilon) ||v_j||``.

    All queries count except those of the sinks. The softmax is over all keys except the sinks, which score as high as
    the best key. Only ``m`` and ``C`` are kept of past queries. A prompt in chunks therefore scores like a whole
    prompt, and in bounded decoding every query so far counts.

    Parameters
    ----------
    observation : Observation
        The layer's queries, keys, values and rotary embedding.
    future_positions : int, default 512
        Number of positions after the newest token that ``R`` averages over.
    covariance : bool, default True
        Use the term with ``C``.
    value_norms : bool, default True
        Multiply by ``||v_j||``.
    epsilon : float, default 0.0
        Larger values give the value norms more influence against attention.

    Returns
    -------
    Tensor
        ``[batch, kv_head, key]`` float32.

    Raises
    ------
    ConfigError
        If ``future_positions`` is not an integer of at least 1, or ``epsilon`` is negative.

    Notes
    -----
    Three points differ from kvpress. ``s`` is the model's own scaling, which is not always ``head_dim ** -0.5``. A
    learned attention sink takes its share of the softmax. Only the rotary part of a head is rotated. A tanh cap on the
    logits and position biases are ignored. If the rotary embedding of a model is unknown, its queries are used as they
    are with ``R = 1``, and a warning says so.

    As with every selector, the newest token is always kept, whatever it scores; ``recent_fraction=0.0`` protects no
    other token. kvpress protects none.

    References
    ----------
    Devoto et al., "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution",
    2025, arXiv:2510.00636.
    """
    check_integer_option("expected_attention", "future_positions", future_positions, 1)
    if not epsilon >= 0:
        raise ConfigError(f"epsilon={epsilon!r} of selector 'expected_attention' must be 0 or more.")
    weights = compute_expected_attention(observation, future_positions, covariance)
    scores = weights.unflatten(1, (observation.keys.shape[1], -1)).mean(dim=2)
    if value_norms:
        scores = (scores + epsilon) * torch.linalg.vector_norm(
            observation.values, dim=-1, dtype=torch.float32
        )
    scores = observation.compute_group_mean(scores)
    is_sink = observation.real_index < observation.sink_size
    best = scores.masked_fill(is_sink, 0.0).amax(dim=-1, keepdim=True)
    return torch.where(is_sink, best, scores)


def compute_expected_attention(
    observation: Observation, future_positions: int = 512, covariance: bool = True, stride: int = 1
) -> Tensor:
    """Compute the attention that future queries are expected to pay each key, for each query head.

    ``softmax_j z_j`` of :func:`score_expected_attention`, over all keys except the sinks.

    Parameters
    ----------
    observation : Observation
        The layer's queries, keys and rotary embedding, of rows without padding.
    future_positions : int, default 512
        Number of positions after the newest token that are averaged over.
    covariance : bool, default True
        Use the covariance of the queries beside their mean.
    stride : int, default 1
        Use every so many queries only, which costs less.

    Returns
    -------
    Tensor
        ``[batch, head, key]`` float32; 0 for the sinks.
    """
    spread, mean, count = split_moments(compute_query_moments(observation, "unturned", stride))
    spread = spread / count.clamp(min=1)
    if observation.rotation is not None:
        frequencies = observation.rotation.frequencies.to(observation.keys.device)
        cos, sin = average_rotation(observation, frequencies, future_positions)
        mean = observation.rotation.combine(mean, cos, sin)
        half = observation.rotation.combine(spread, cos, sin)
        spread = observation.rotation.combine(half.mT, cos, sin)
    keys = observation.keys.float()
    batch, key_heads = keys.shape[:2]
    groups = mean.shape[1] // key_heads
    mean, spread = mean.unflatten(1, (key_heads, groups)), spread.unflatten(1, (key_heads, groups))
    logits = (mean.flatten(2, 3) @ keys.mT).mul_(observation.scaling)
    if covariance:
        # One group at a time: the quadratic form needs a copy of the keys per query head.
        for group in range(groups):
            quadratic = (keys @ spread[:, :, group]).mul_(keys).sum(dim=-1)
            logits[:, :, group].add_(quadratic, alpha=0.5 * observation.scaling**2)
    is_sink = observation.real_index < observation.sink_size
    is_sink = is_sink.repeat_interleave(key_heads // is_sink.shape[1], dim=1)
    logits = logits.masked_fill(is_sink[:, :, None], float("-inf"))
    if observation.sink_logits is not None:
        sink = observation.sink_logits.float().reshape(1, key_heads, groups, 1).expand(batch, -1, -1, -1)
        weights = torch.cat([logits, sink], dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights = logits.softmax(dim=-1)
    # If all keys are sinks, the softmax is over nothing and NaN; the mask replaces it by 0.
    return weights.masked_fill(is_sink[:, :, None], 0.0).flatten(1, 2)


def average_rotation(
    observation: Observation, frequencies: Tensor, future_positions: int
) -> tuple[Tensor, Tensor]:
    """Average cosine and sine over the future positions, ``[batch, 1, 1, pair]``."""
    newest = observation.query_rotary_positions[:, 0, -1:]
    future = newest + torch.arange(1, future_positions + 1, device=newest.device)
    angles = future[:, :, None] * frequencies
    return angles.cos().mean(dim=1)[:, None, None], angles.sin().mean(dim=1)[:, None, None]
