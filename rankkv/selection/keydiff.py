"""KeyDiff: keep the keys that differ most from the others."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from ..observe.observation import Observation
from .scoring import without_padding


@without_padding
def score_keydiff(observation: Observation) -> Tensor:
    """Score each key by its cosine similarity to the mean direction of all keys, the lower the better.

    ``score_j = - cos(k_j, a)`` with the anchor ``a = mean over the cached keys i of k_i / ||k_i||``, in float32. The
    paper compresses block by block during the prefill, as ``prefill="streaming"`` does.

    Parameters
    ----------
    observation : Observation
        The layer's keys.

    Returns
    -------
    Tensor
        ``[batch, kv_head, key]`` float32; the mean if attention sees more key heads than the cache has.

    Notes
    -----
    As with every selector, the newest token is always kept, whatever it scores; ``recent_fraction=0.0`` protects no
    other token. kvpress protects none.

    References
    ----------
    Park et al., "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in Resource-Constrained
    Environments", 2025, arXiv:2504.15364, section 3.
    """
    directions = functional.normalize(observation.keys.float(), dim=-1)
    anchor = functional.normalize(directions.mean(dim=-2, keepdim=True), dim=-1)
    return -observation.compute_group_mean((directions * anchor).sum(dim=-1))
