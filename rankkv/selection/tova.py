"""TOVA: keep what the newest query attends to, the same tokens in all heads of a layer."""

from __future__ import annotations

from torch import Tensor

from ..observe.observation import Observation


def score_tova(observation: Observation) -> Tensor:
    """Score each key by the attention that the newest query pays to it, averaged over all heads of the layer.

    ``score_j = mean over all heads of A[newest query, j]``.  In bounded decoding each new query scores all kept keys
    anew, so that the token it attends to least is the one to go: the paper's own loop.

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
    The paper protects nothing; here the sinks and part of the budget for the newest tokens are protected as with every
    selector.  ``recent_fraction=0.0`` with ``sink_size=0`` protects the newest token alone, as kvpress does.

    References
    ----------
    Oren et al., "Transformers are Multi-State RNNs", 2024, arXiv:2401.06104, section 3.2.
    """
    newest = observation.query_length - 1
    shared = observation.compute_attention(slice(newest, newest + 1)).mean(dim=1)
    return shared if observation.shards is None else observation.shards.mean(shared)
