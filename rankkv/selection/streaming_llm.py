"""StreamingLLM: keep the attention sinks and the most recent tokens."""

from __future__ import annotations

from torch import Tensor

from ..observe.observation import Observation


def score_streaming_llm(observation: Observation) -> Tensor:
    """Score each key by how recent it is; the sinks are protected by every selector.

    ``score_j = j``, the index of the key among the row's real tokens.

    Parameters
    ----------
    observation : Observation
        The layer's keys.

    Returns
    -------
    Tensor
        ``[batch, 1, key]`` float32: all heads keep the same tokens.

    References
    ----------
    Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2023, arXiv:2309.17453, section 3.2. The
    paper renumbers the positions of kept keys; here they keep their original positions.
    """
    return observation.real_index.float()
