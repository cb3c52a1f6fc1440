"""Compactor: keep outlying keys, by leverage scores, and keys that their neighbourhood attends to."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import ConfigError
from ..observe.observation import Observation
from .scoring import check_integer_option, without_padding

# Tokens at both ends that are left out of all statistics.
_FIRST, _LAST = 8, 4
_RIDGE = 0.01
# Least standard deviation, as a fraction of the mean.
_LEAST_SPREAD = 0.01
_SEED = 0


def score_compactor(
    observation: Observation, chunk_size: int = 256, sketch_size: int = 48, blending: float = 0.5
) -> Tensor:
    """Score each key by its sketched leverage, plus the attention of its chunk without a causal mask.

    ``score = blending z(l) + z(c)``, where ``z`` subtracts the mean over all heads and tokens of the layer and divides
    by the standard deviation (at least 1 % of the mean).

    ``l_j = x_j (X^T X + 0.01 I)^-1 x_j^T``, with ``X = (K - mean K) P``. ``K`` are the keys without rotary embedding,
    ``P [key_dim, sketch_size]`` is a fixed Gaussian matrix over ``sqrt(sketch_size)``.

    ``c_j`` is ``||v_j||_2`` times the mean over the heads of the group of ``sum over i of softmax over j of q_i k_j``,
    for all queries i and keys j of a chunk of ``chunk_size`` tokens, average-pooled over three keys. The 8 first and
    the 4 last tokens held are left out, and score as high as the best key.

    Parameters
    ----------
    observation : Observation
        The layer's queries, keys, values and rotary embedding.
    chunk_size : int, default 256
        Tokens of a chunk.
    sketch_size : int, default 48
        Width of the sketch.
    blending : float, default 0.5
        Weight of the leverage.

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
    The logits of the chunks are not scaled, as in the authors' code and kvpress. Three points differ from kvpress.
    Its ``blending`` is the removed share of the cache unless given; the authors' own code uses 0.5. It draws ``P``
    anew for each head and call. In a last chunk that is not full, its padding takes part: every empty query gives
    each key an equal share, and empty keys take attention.

    Queries that come later score all other keys by their plain attention, scaled to a mean of 1. A tanh cap on the
    logits and learned attention sinks are ignored.

    References
    ----------
    Chari and Van Durme, "Compactor: Calibrated Query-Agnostic KV Cache Compression with Approximate Leverage Scores",
    2025, arXiv:2507.08143.

    Examples
    --------
    >>> from rankkv.selection import get_selector
    >>> str(get_selector("compactor", blending=0.75))
    'compactor(blending=0.75)'
    """
    check_integer_option("compactor", "chunk_size", chunk_size, 1)
    check_integer_option("compactor", "sketch_size", sketch_size, 1)
    if isinstance(blending, bool) or not isinstance(blending, int | float) or not 0 <= blending <= 1e6:
        raise ConfigError(f"blending={blending!r} of selector 'compactor' must be a number in [0, 1e6].")
    # Heads may hold different tokens: the parts are computed for each head alone, their spread over all of them.
    is_middle = _mark_middle(observation) > 0
    leverage, attended = _score_leverage(observation, sketch_size), _score_attention(observation, chunk_size)
    scores = blending * _standardize(observation, leverage, is_middle)
    scores += _standardize(observation, attended, is_middle)
    best = scores.masked_fill(~is_middle, float("-inf")).amax(dim=-1, keepdim=True)
    return torch.where(is_middle, scores, torch.where(best.isneginf(), 0.0, best))


def _find_middle(observation: Observation) -> slice:
    """Return the tokens held but for those at both ends."""
    first = min(_FIRST, observation.key_length)
    return slice(first, max(first, observation.key_length - _LAST))


@without_padding
def _mark_middle(observation: Observation) -> Tensor:
    """Return 1 for tokens that are not at an end, ``[batch, kv_head, key]``."""
    marks = torch.zeros(
        (observation.keys.shape[0], observation.kv_heads, observation.key_length),
        device=observation.keys.device,
    )
    marks[..., _find_middle(observation)] = 1.0
    return marks


@without_padding
def _score_leverage(observation: Observation, sketch_size: int) -> Tensor:
    """Compute the leverage of the keys in the middle, ``[batch, kv_head, key]``; 0 at the ends."""
    middle = _find_middle(observation)
    scores = _mark_middle(observation)
    if middle.start < middle.stop:
        keys = turn_to_zero(observation)[:, :, middle]
        leverage = compute_leverage(keys, build_sketch(keys.shape[-1], sketch_size))
        scores[..., middle] = observation.compute_group_mean(leverage)
    return scores


@without_padding
def _score_attention(observation: Observation, chunk_size: int) -> Tensor:
    """Compute the pooled attention of chunks times the values' norms, ``[batch, kv_head, key]``; 0 at the ends."""
    middle = _find_middle(observation)
    scores = _mark_middle(observation)
    if middle.start < middle.stop:
        attended = _attend(observation, middle.start, middle.stop, chunk_size)
        norms = torch.linalg.vector_norm(observation.values[:, :, middle], dim=-1, dtype=torch.float32)
        attended = observation.compute_group_mean(attended * norms)
        scores[..., middle] = functional.avg_pool1d(attended, 3, stride=1, padding=1)
    return scores


def build_sketch(width: int, sketch_size: int) -> Tensor:
    """Build the Gaussian matrix of the sketch, ``[width, sketch_size]`` float32: the same for every head and call."""
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randn(width, sketch_size, generator=generator) / sketch_size**0.5


def compute_leverage(keys: Tensor, sketch: Tensor) -> Tensor:
    """Compute the ridge leverage scores of centred, sketched keys, ``[batch, head, key]`` float32.

    ``diag(X (X^T X + r I)^-1 X^T)`` are the squared row norms of ``Q`` in ``[X; sqrt(r) I] = Q R``, without the rows of
    the identity. No matrix is inverted.
    """
    rows = (keys - keys.mean(dim=-2, keepdim=True)) @ sketch.to(keys.device)
    ridge = _RIDGE**0.5 * torch.eye(rows.shape[-1], device=rows.device)
    stacked = torch.cat([rows, ridge.expand(*rows.shape[:2], -1, -1)], dim=-2)
    return torch.linalg.qr(stacked).Q[..., : rows.shape[-2], :].square().sum(dim=-1)


def turn_to_zero(observation: Observation) -> Tensor:
    """Turn all keys back to position 0, ``[batch, key_head, key, key_dim]`` float32."""
    keys = observation.keys.float()
    if observation.rotation is None:
        return keys
    positions = observation.real_index
    if observation.packed:
        positions = torch.arange(keys.shape[-2], device=keys.device).expand(keys.shape[0], 1, -1)
    if positions.shape[1] > 1:
        positions = positions.repeat_interleave(keys.shape[1] // positions.shape[1], dim=1)
    frequencies = observation.rotation.frequencies.to(keys.device)
    return observation.rotation.turn(keys, -positions[..., None] * frequencies)


def _attend(observation: Observation, first: int, stop: int, chunk_size: int) -> Tensor:
    """Compute the attention that each key gets inside its chunk, ``[batch, key_head, key]``, a mean over the group."""
    key_heads = observation.keys.shape[1]
    offset = observation.key_length - observation.query_length
    # Keys before the first known query belong to no chunk.
    begin = min(max(first, offset), stop)
    parts = []
    if begin > first:
        plain = torch.zeros(
            (*observation.query.shape[:2], observation.key_length),
            dtype=torch.float32,
            device=observation.keys.device,
        )
        for weights in observation.attention_blocks():
            plain[..., : weights.shape[-1]] += weights.sum(dim=-2)
        plain = plain[..., first:begin] * (observation.key_length / observation.query_length)
        parts.append(plain.unflatten(1, (key_heads, -1)).mean(dim=2))
    for start in range(begin, stop, chunk_size):
        chunk = slice(start, min(start + chunk_size, stop))
        rows = slice(chunk.start - offset, chunk.stop - offset)
        keys = observation.keys[:, :, chunk].float()
        queries = observation.query[:, :, rows].float().unflatten(1, (key_heads, -1))
        sums = keys.new_zeros(keys.shape[:3])
        step = observation.count_block_rows(keys.shape[-2])
        for row in range(0, keys.shape[-2], step):
            part = queries[..., row : row + step, :]
            logits = part.flatten(2, 3) @ keys.mT
            sums += torch.softmax(logits, dim=-1, out=logits).sum(dim=-2)
        parts.append(sums / queries.shape[2])
    return torch.cat(parts, dim=-1)


def _standardize(observation: Observation, scores: Tensor, is_used: Tensor) -> Tensor:
    """Subtract the mean over the used tokens of all heads, and divide by their standard deviation."""
    rows = scores.shape[0]
    sums = torch.stack([is_used.flatten(1).sum(dim=-1).float(), (scores * is_used).flatten(1).sum(dim=-1)])
    count, total = observation.sum_over_shards(sums)
    mean = total / count.clamp(min=1)
    centred = (scores - mean.view(rows, 1, 1)) * is_used
    squares = observation.sum_over_shards(centred.square().flatten(1).sum(dim=-1))
    deviation = (squares / (count - 1).clamp(min=1)).sqrt()
    # Scores that are as good as equal, such as leverages of fewer keys than dimensions, differ by rounding.
    least = (_LEAST_SPREAD * mean.abs()).clamp(min=1e-6)
    return centred / torch.maximum(deviation, least).view(rows, 1, 1)
