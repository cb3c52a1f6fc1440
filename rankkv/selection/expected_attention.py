"""Expected attention: keep what queries yet to come can be expected to attend to, judged by those that came."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError
from ..observe.observation import Observation
from ..observe.queries import compute_query_moments, split_moments
from .scoring import without_padding


@without_padding
def score_expected_attention(
    observation: Observation,
    future_positions: int = 512,
    covariance: bool = True,
    value_norms: bool = True,
    epsilon: float = 0.0,
) -> Tensor:
    """Score each key by the attention that queries yet to come are expected to pay to it, times its value's norm.

    Queries turned back to position 0 are taken as normal with mean ``m`` and covariance ``C``.  With ``R`` the mean of
    the rotary matrices of the next ``future_positions`` positions and the layer's scaling ``s``,

    ``z_j = s k_j R m + s^2 / 2 k_j R C R^T k_j^T`` (the logarithm of the expected ``exp(s q k_j^T)``),

    ``score_j = (mean over the heads of the group of softmax_j z_j + epsilon) ||v_j||``.

    All queries count but those of the sinks; the softmax is over all keys but the sinks, which score as high as the
    best.  What past queries leave is ``m`` and ``C`` alone, so that a prompt in chunks scores as in one piece, and in
    bounded decoding every query so far counts.

    Parameters
    ----------
    observation : Observation
        The layer's queries, keys and values, and how it turns them with position.
    future_positions : int, default 512
        How many positions from the newest token on ``R`` is the mean over.
    covariance : bool, default True
        Whether the term with ``C`` counts.
    value_norms : bool, default True
        Whether values weigh.
    epsilon : float, default 0.0
        The larger, the more the values weigh against attention.

    Returns
    -------
    Tensor
        ``[batch, kv_head, key]`` float32.

    Raises
    ------
    ConfigError
        If ``future_positions`` is no integer of at least 1, or ``epsilon`` is negative.

    Notes
    -----
    Unlike kvpress' form, ``s`` is the scaling the model uses, which is not ``head_dim ** -0.5`` in all; a learned
    attention sink takes its part of the softmax; and only the rotated part of a head is turned.  Left out are a tanh
    cap on the logits and position biases.  A model whose layers turn keys in no known way is scored with ``R = 1`` from
    its queries as they are, and a warning says so.

    As with every selector the newest token is always kept, whatever it scores (``recent_fraction=0.0`` protects no
    other); kvpress protects none.

    References
    ----------
    Devoto et al., "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution",
    2025, arXiv:2510.00636.
    """
    if isinstance(future_positions, bool) or not isinstance(future_positions, int) or future_positions < 1:
        raise ConfigError(
            f"future_positions={future_positions!r} of selector 'expected_attention' must be an integer of at least 1."
        )
    if not epsilon >= 0:
        raise ConfigError(f"epsilon={epsilon!r} of selector 'expected_attention' must be 0 or more.")
    spread, mean, count = split_moments(compute_query_moments(observation, "unturned"))
    spread = spread / count.clamp(min=1)
    if observation.rotation is not None:
        frequencies = observation.rotation.frequencies.to(observation.keys.device)
        cos, sin = _average_rotation(observation, frequencies, future_positions)
        mean = observation.rotation.combine(mean, cos, sin)
        half = observation.rotation.combine(spread, cos, sin)
        spread = observation.rotation.combine(half.mT, cos, sin)
    keys = observation.keys.float()
    batch, key_heads, tokens = keys.shape[:3]
    groups = mean.shape[1] // key_heads
    mean, spread = mean.unflatten(1, (key_heads, groups)), spread.unflatten(1, (key_heads, groups))
    logits = torch.empty(batch, key_heads, groups, tokens, device=keys.device)
    for group in range(groups):
        logit = (keys * mean[:, :, group]).sum(dim=-1) * observation.scaling
        if covariance:
            quadratic = ((keys @ spread[:, :, group]) * keys).sum(dim=-1)
            logit = logit + 0.5 * observation.scaling**2 * quadratic
        logits[:, :, group] = logit
    is_sink = observation.real_index < observation.sink_size
    is_sink = is_sink.repeat_interleave(key_heads // is_sink.shape[1], dim=1)
    logits = logits.masked_fill(is_sink[:, :, None], float("-inf"))
    if observation.sink_logits is not None:
        sink = observation.sink_logits.float().reshape(1, key_heads, groups, 1).expand(batch, -1, -1, -1)
        weights = torch.cat([logits, sink], dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights = logits.softmax(dim=-1)
    # With nothing but sinks there is nothing to divide attention over.
    scores = weights.masked_fill(is_sink[:, :, None], 0.0).mean(dim=2)
    if value_norms:
        scores = (scores + epsilon) * torch.linalg.vector_norm(
            observation.values, dim=-1, dtype=torch.float32
        )
    scores = observation.compute_group_mean(scores)
    is_sink = observation.real_index < observation.sink_size
    best = scores.masked_fill(is_sink, 0.0).amax(dim=-1, keepdim=True)
    return torch.where(is_sink, best, scores)


def _average_rotation(
    observation: Observation, frequencies: Tensor, future_positions: int
) -> tuple[Tensor, Tensor]:
    """Average cosine and sine over the positions to come, ``[batch, 1, 1, pair]``."""
    newest = observation.query_rotary_positions[:, 0, -1:]
    future = newest + torch.arange(1, future_positions + 1, device=newest.device)
    angles = future[:, :, None] * frequencies
    return angles.cos().mean(dim=1)[:, None, None], angles.sin().mean(dim=1)[:, None, None]
