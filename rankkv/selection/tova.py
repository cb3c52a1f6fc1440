"""TOVA: keep the keys that the newest query attends to, the same tokens in all heads of a layer."""

from __future__ import annotations

from torch import Tensor

from ..observe.observation import Observation


def score_tova(observation: Observation) -> Tensor:
    """Score each key by the newest query's attention to it, averaged over all heads.

    ``score_j = mean over all heads of A[newest query, j]``. In bounded decoding each new query scores all kept keys
    again and the token it attends to least is evicted, as in the paper.

    Parameters
    ----------
    observation : Observation
        The layer's queries and keys.

    Returns
    -------
    Tensor
        ``[batch, 1, key]`` float32: all heads keep the same tokens.

    Notes
    -----
    The paper protects no token. Here the sinks and part of the budget for the newest tokens are protected as with every
    selector. ``recent_fraction=0.0`` with ``sink_size=0`` protects only the newest token, as kvpress does.

    References
    ----------
    Oren et al., "Transformers are Multi-State RNNs", 2024, arXiv:2401.06104, section 3.2.
    """
    newest = observation.query_length - 1
    shared = observation.compute_attention(slice(newest, newest + 1)).mean(dim=1)
    return shared if observation.shards is None else observation.shards.mean(shared)
