"""KVzip and KVzip+: the attention that each key gets while the model repeats the context."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError
from ..observe.observation import Observation
from .scoring import compute_output_norms

#: Tokens that one replay repeats.
CHUNK_TOKENS = 2048


def score_kvzip(observation: Observation, chunk_size: int = CHUNK_TOKENS) -> Tensor:
    """Score each key by the largest attention it gets while the model repeats the context.

    ``s_i = max over the replay's queries j and the query heads g of the group of a_{g,j,i}``. The replay feeds a chunk
    of the prompt again, behind the whole prompt and an instruction to repeat it. ``a`` is a softmax over the sinks, the
    chunk's cached keys and the replay's own keys, in float32.

    Parameters
    ----------
    observation : Observation
        One layer of one replay: the replay's queries, and these keys (:func:`rankkv.cache.replay.replay_prompt`).
    chunk_size : int, default 2048
        Tokens repeated in one replay. The replay reads it, not this function.

    Returns
    -------
    Tensor
        ``[batch, kv_head, key]`` float32, in [0, 1].

    Notes
    -----
    The model runs over the prompt twice, so the prompt must be known before: use ``rankkv.compress(model, ids,
    tokenizer=tokenizer)``, the pipeline or ``custom_generate``. Sinks get the highest score, as in kvpress. There are
    two differences to kvpress. It protects no newest tokens; here every head keeps some (16 with strategy ``"global"``,
    else ``recent_fraction`` of the budget, at least one). It repeats the context without the text that a chat template
    writes before it, so that text scores 0; here the whole prompt is repeated.

    References
    ----------
    Kim et al., "KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction", 2025, arXiv:2505.23416.
    """
    top = compute_largest_weights(observation)
    return take_group_maximum(observation, top)


def score_kvzip_plus(observation: Observation, chunk_size: int = CHUNK_TOKENS) -> Tensor:
    """Score each key by the largest share of a hidden state that it writes while the model repeats the context.

    ``s_i = max over j and g of a_{g,j,i} ||v_i W_g||_2 / ||h_j||_2``, with ``a`` as in :func:`score_kvzip`. ``W_g``
    holds the rows of the layer's output projection that belong to query head g. ``h_j`` is the hidden state that enters
    the attention at replay token j.

    Parameters
    ----------
    observation : Observation
        One layer of one replay, with its hidden states; see :func:`score_kvzip`.
    chunk_size : int, default 2048
        Tokens repeated in one replay. The replay reads it, not this function.

    Returns
    -------
    Tensor
        ``[batch, kv_head, key]`` float32, not negative.

    Raises
    ------
    InputError
        If the hidden states are not known, because the observation is not of a replay.

    Notes
    -----
    If the layer's output projection cannot be told from its other parts, ``||v_i||_2`` is used. What
    :func:`score_kvzip` says of sinks, newest tokens and chat templates holds here too.

    References
    ----------
    Jegou et al., "KVzap: Fast, Adaptive, and Faithful KV Cache Pruning", 2026, arXiv:2601.07891: KVzip+.
    """
    if observation.hidden is None:
        raise InputError(
            f"selector 'kvzip_plus' needs the hidden states of layer {observation.layer_idx}, which only a replay of "
            "the prompt observes: use rankkv.compress(model, ids, tokenizer=tokenizer)."
        )
    sizes = observation.hidden.float().norm(dim=-1).to(observation.keys.device)
    # Padding has no attention; a hidden state of zeros must not turn it into NaN.
    top = compute_largest_weights(observation, 1.0 / sizes.clamp(min=torch.finfo(torch.float32).tiny))
    # The norms do not depend on the query, so they may be multiplied after its maximum.
    return take_group_maximum(observation, top * compute_output_norms(observation))


def compute_largest_weights(observation: Observation, factors: Tensor | None = None) -> Tensor:
    """Compute the largest attention weight of each key over the queries, for each query head.

    Parameters
    ----------
    observation : Observation
        Queries and keys of one layer.
    factors : Tensor, optional
        ``[batch, query]`` float32, multiplied to each query's weights before the maximum.

    Returns
    -------
    Tensor
        ``[batch, head, key]`` float32.
    """
    batch, heads = observation.query.shape[:2]
    top = observation.keys.new_zeros((batch, heads, observation.key_length), dtype=torch.float32)
    start = 0
    for weights in observation.attention_blocks():
        stop = start + weights.shape[-2]
        own = weights if factors is None else weights * factors[:, None, start:stop, None]
        start = stop
        seen = top[..., : own.shape[-1]]
        torch.maximum(seen, own.amax(dim=-2), out=seen)
    return top


def take_group_maximum(observation: Observation, per_head: Tensor) -> Tensor:
    """Return the maximum over the query heads that share a key/value head of the cache."""
    return per_head.unflatten(1, (observation.kv_heads, -1)).amax(dim=2)
