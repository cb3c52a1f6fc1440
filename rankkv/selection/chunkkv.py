"""ChunkKV: keep whole chunks of neighbouring tokens, ranked by mean score."""

from __future__ import annotations

import torch
from torch import Tensor

from ..observe.observation import Observation
from .scoring import check_integer_option


def refine_chunkkv(scores: Tensor, observation: Observation, chunk_length: int = 20) -> Tensor:
    """Give every token the mean score of its chunk, over all heads of the layer.

    Chunk ``c`` holds the real tokens of a row from ``c * chunk_length`` to before ``(c + 1) * chunk_length``. Its score
    is the mean of the base's scores over its remaining tokens and over the heads, so all heads keep the same chunks.
    Ties go to the earlier token, so chunks are kept whole, the best first. **The last chunk kept is cut at its end** so
    that budgets stay exact.

    Parameters
    ----------
    scores : Tensor
        The base's scores, ``[batch, kv_head or 1, key]``.
    observation : Observation
        The layer's keys.
    chunk_length : int, default 20
        Tokens of a chunk; the last chunk of a row may be shorter.

    Returns
    -------
    Tensor
        ``[batch, 1, key]`` float32.

    Raises
    ------
    ConfigError
        If ``chunk_length`` is not an integer of at least 1.

    Notes
    -----
    The option ``base`` (default ``"snapkv"``) names the method whose scores are averaged. kvpress rounds the budget
    down to whole chunks. Its SnapKV gives the observation window the highest score, so it also keeps the chunk in which
    the window begins. Here the newest tokens are protected as with every selector, and their chunks compete by the
    base's own scores. If the window begins with a chunk and the budget is a whole number of chunks, both keep the same
    tokens.

    References
    ----------
    Liu et al., "ChunkKV: Semantic-Preserving KV Cache Compression for Efficient Long-Context LLM Inference", 2025,
    arXiv:2502.00299, algorithm 1.
    """
    check_integer_option("chunkkv", "chunk_length", chunk_length, 1)
    index = observation.real_index
    heads = max(scores.shape[1], index.shape[1])
    is_real = (index >= 0).expand(-1, heads, -1)
    chunk = index.clamp(min=0) // chunk_length
    place = chunk.expand(-1, heads, -1).flatten(1)
    # Sums are in float64, so that the order of the additions cannot decide between two chunks.
    scores = scores.double().expand(-1, heads, -1).masked_fill(~is_real, 0.0).flatten(1)
    sums = scores.new_zeros(scores.shape[0], max(observation.lengths) // chunk_length + 1)
    counts = torch.zeros_like(sums).scatter_add_(-1, place, is_real.double().flatten(1))
    sums = observation.sum_over_shards(sums.scatter_add_(-1, place, scores))
    counts = observation.sum_over_shards(counts)
    means = sums / counts.clamp(min=1)
    return means.float()[:, None].expand(-1, chunk.shape[1], -1).gather(-1, chunk)
