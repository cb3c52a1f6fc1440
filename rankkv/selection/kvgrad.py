"""KVgrad: the effect of each key on the last hidden states while the model repeats the context."""

from __future__ import annotations

from torch import Tensor

from ..errors import InputError
from ..observe.observation import Observation
from .kvzip import compute_largest_weights, take_group_maximum
from .scoring import compute_output_norms

#: Tokens that one replay repeats.
CHUNK_TOKENS = 512


def score_kvgrad(observation: Observation, chunk_size: int = CHUNK_TOKENS) -> Tensor:
    """Score each key by its largest effect on the last hidden states while the model repeats the context.

    ``s_i = max over j and g of a_{g,j,i} ||v_i W_g||_2 ||dPhi/do_j||_2``, with ``a`` as in
    :func:`~rankkv.selection.kvzip.score_kvzip`. ``W_g`` holds the rows of the layer's output projection that belong to
    query head g. ``o_j`` is the attention output at replay token j, which the layer adds to the residual stream.
    ``Phi = sum_j ||h_j||_2^2``, where ``h_j`` is the output of the last decoder layer, before the final norm.

    Parameters
    ----------
    observation : Observation
        One layer of one replay, with the norms of its gradient; see :func:`~rankkv.selection.kvzip.score_kvzip`.
    chunk_size : int, default 512
        Tokens repeated in one replay, and in one backward pass. The replay reads it, not this function.

    Returns
    -------
    Tensor
        ``[batch, kv_head, key]`` float32, not negative.

    Raises
    ------
    InputError
        If the gradient is not known, because the observation is not of a replay.

    Notes
    -----
    One backward pass a chunk takes the memory of a training step on ``chunk_size`` tokens behind the whole prompt:
    activations of the chunk in every layer, and the prompt's keys and values a second time. Weights get no gradient. A
    smaller ``chunk_size`` takes less of the first, and gives other scores, since ``Phi`` is a sum over the chunk. Time:
    a prefill, a second forward pass and its backward pass. Quantized weights, weights created in inference mode, tensor
    parallelism and flex attention are refused.

    If the layer's output projection cannot be told from its other parts, ``||v_i||_2`` is used. What
    :func:`~rankkv.selection.kvzip.score_kvzip` says of sinks, newest tokens and chat templates holds here too.

    References
    ----------
    KVgrad, 2026, OpenReview:cg1wTCJjjk.
    """
    if observation.gradient is None:
        raise InputError(
            f"selector 'kvgrad' needs the gradient at layer {observation.layer_idx}, which only a replay of the prompt "
            "computes: use rankkv.compress(model, ids, tokenizer=tokenizer)."
        )
    weights = compute_largest_weights(observation, observation.gradient.to(observation.keys.device))
    # The norms do not depend on the query, so they may be multiplied after its maximum.
    return take_group_maximum(observation, weights * compute_output_norms(observation))
