"""H2O: keep the heavy hitters, the keys with the largest accumulated attention."""

from __future__ import annotations

from torch import Tensor

from ..observe.observation import Observation


def score_h2o(observation: Observation) -> Tensor:
    """Score each key by the column sum of the whole causal attention matrix.

    ``score_j = mean over the heads of the group of sum over all query rows i of A[i, j]``, accumulated in blocks of
    rows, so that memory stays ``O(block x keys)``. The selector's ``recent_fraction=0.5`` is the paper's own split of
    a budget into heavy hitters and recent tokens.

    kvpress' ``ObservedAttentionPress`` divides each sum by the number of queries that see the key, which favours late
    tokens. Here it is the sum, as in the paper.

    Parameters
    ----------
    observation : Observation
        The layer's queries and keys.

    Returns
    -------
    Tensor
        ``[batch, kv_head, key]`` float32.

    Notes
    -----
    There is no separate method for sums over the observation window alone: ``snapkv`` with ``kernel_size=1`` averages
    over the same rows, which gives the same order.

    References
    ----------
    Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models", 2023,
    arXiv:2306.14048, algorithm 1.
    """
    return observation.compute_column_sums()
