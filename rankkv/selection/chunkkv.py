"""ChunkKV: keep whole chunks of neighbouring tokens, by the mean score of each."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError
from ..observe.observation import Observation


def refine_chunkkv(scores: Tensor, observation: Observation, chunk_length: int = 20) -> Tensor:
    """Give every token the mean score of its chunk, over all heads of the layer.

    Chunk ``c`` holds the real tokens of a row from ``c * chunk_length`` to before ``(c + 1) * chunk_length``; its score
    is the mean of the base's scores over its tokens (those still there, where some were evicted) and over the heads, so
    all heads keep the same chunks.  Ties go to the earlier token: chunks are kept whole, the best first, and **the last
    one kept is cut at its end** so that budgets stay exact.

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
    The option ``base`` (default ``"snapkv"``) names the method whose scores are averaged.  kvpress rounds the budget
    down to whole chunks, and its SnapKV gives the observation window the highest score, so that a chunk the window
    begins in is kept too; here the newest tokens are protected as with every selector, and their chunks compete by the
    base's own scores.  Where the window begins with a chunk and the budget is a number of chunks, both keep the same.

    References
    ----------
    Liu et al., "ChunkKV: Semantic-Preserving KV Cache Compression for Efficient Long-Context LLM Inference", 2025,
    arXiv:2502.00299, algorithm 1.
    """
    if not isinstance(chunk_length, int) or isinstance(chunk_length, bool) or chunk_length < 1:
        raise ConfigError(
            f"chunk_length={chunk_length!r} of selector 'chunkkv' must be an integer of at least 1."
        )
    index = observation.real_index
    heads = max(scores.shape[1], index.shape[1])
    is_real = (index >= 0).expand(-1, heads, -1)
    chunk = index.clamp(min=0) // chunk_length
    place = chunk.expand(-1, heads, -1).flatten(1)
    # In float64, so that the order of the additions cannot decide between two chunks.
    scores = scores.double().expand(-1, heads, -1).masked_fill(~is_real, 0.0).flatten(1)
    sums = scores.new_zeros(scores.shape[0], max(observation.lengths) // chunk_length + 1)
    counts = torch.zeros_like(sums).scatter_add_(-1, place, is_real.double().flatten(1))
    sums = observation.sum_over_shards(sums.scatter_add_(-1, place, scores))
    counts = observation.sum_over_shards(counts)
    means = sums / counts.clamp(min=1)
    return means.float()[:, None].expand(-1, chunk.shape[1], -1).gather(-1, chunk)
