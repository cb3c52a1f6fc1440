"""Perplexity: the loss of a continuation after a compressed context, beside the full one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..cache.prefill import check_input_ids
from ..errors import InputError
from ..models.compat import cache_argument
from ..models.placement import find_input_device
from .prefill_record import PrefillRecord


@dataclass(frozen=True)
class ContinuationScore:
    """Score of one continuation with one cache.

    Attributes
    ----------
    loss : float
        Mean negative log-likelihood of the continuation's tokens, nats per token.
    divergence : float
        Mean Kullback-Leibler divergence of the predictions from the full cache's, nats per token.  If the text
        follows the model's own distribution, its expectation is the excess of ``loss`` over the full cache's.  Its
        noise is far lower.
    kept_tokens : int
        Tokens of the context that are kept, summed over layers.
    cache_bytes : int
        Bytes of the compressed context.
    """

    loss: float
    divergence: float
    kept_tokens: int
    cache_bytes: int


def compute_continuation_loss(model: Any, cache: Any, continuation_ids: Tensor) -> Tensor:
    """Compute the negative log-likelihood of each token of a continuation but the first, teacher-forced.

    ``loss_t = -log p(x_t | cache, x_0 ... x_(t-1))``.  The first token is left out, because the prefill predicts it
    without reading the cache.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model.
    cache : Cache
        Cache of the context.  The continuation is appended to it; pass a ``copy()`` to keep it as it is.
    continuation_ids : Tensor
        ``[1, token]`` int64, at least 2 tokens.

    Returns
    -------
    Tensor
        ``[token - 1]`` float32, nats.

    Raises
    ------
    InputError
        If the continuation is shorter than 2 tokens or has several rows.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> import rankkv
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
    ...     num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8)).eval()
    >>> cache = rankkv.compress(model, torch.arange(60)[None], compression_ratio=0.5)
    >>> compute_continuation_loss(model, cache, torch.arange(10)[None]).shape
    torch.Size([9])
    """
    continuation_ids = _check_continuation(continuation_ids)
    return _compute_losses(predict_tokens(model, cache, continuation_ids), continuation_ids)


def evaluate_continuation(
    record: PrefillRecord, continuation_ids: Tensor, settings: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[str, ContinuationScore]]:
    """Score one continuation with the full cache, then with one compressed cache per setting, from one prefill.

    Parameters
    ----------
    record : PrefillRecord
        Prefill of the context, a single row.
    continuation_ids : Tensor
        ``[1, token]`` int64, at least 2 tokens.
    settings : mapping
        Maps each setting's name to its options of :class:`~rankkv.RankKVCache`.

    Yields
    ------
    (str, ContinuationScore)
        ``"full"`` first, then the settings in their order.

    Raises
    ------
    InputError
        As :func:`compute_continuation_loss`.
    """
    continuation_ids = _check_continuation(continuation_ids)
    model = record.model
    full = record.build_full_cache()
    held = [layer.keys for layer in full.layers if getattr(layer, "keys", None) is not None]
    slots = sum(keys.shape[-2] for keys in held)
    full_bytes = sum(
        layer.keys.nbytes + layer.values.nbytes for layer in full.layers if hasattr(layer, "values")
    )
    reference = predict_tokens(model, full, continuation_ids)
    loss = float(_compute_losses(reference, continuation_ids).mean())
    yield "full", ContinuationScore(loss, 0.0, slots, full_bytes)
    probabilities = reference.exp()
    for name, options in settings.items():
        cache = record.build_cache(**options)
        kept, kept_bytes = sum(cache.kept_lengths), cache.kept_bytes()
        predicted = predict_tokens(model, cache, continuation_ids)
        loss = float(_compute_losses(predicted, continuation_ids).mean())
        # The prediction after the last token has no token to score: leave it out, as in the loss.
        divergence = float((probabilities * (reference - predicted)).sum(-1)[:-1].mean())
        yield name, ContinuationScore(loss, divergence, kept, kept_bytes)


def _check_continuation(continuation_ids: Tensor) -> Tensor:
    continuation_ids = check_input_ids(continuation_ids)
    if continuation_ids.shape[0] != 1 or continuation_ids.shape[1] < 2:
        raise InputError(
            f"continuation_ids {tuple(continuation_ids.shape)} must be one row of at least 2 tokens, because the first "
            "is not scored."
        )
    return continuation_ids


def predict_tokens(model: Any, cache: Any, input_ids: Tensor) -> Tensor:
    """Compute log-probabilities after each new token that follows a cache, without gradients.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model.
    cache : Cache
        Cache of the preceding tokens; the new tokens are appended to it.
    input_ids : Tensor
        New tokens, ``[1, token]`` int64.

    Returns
    -------
    Tensor
        ``[token, vocabulary]`` float32.
    """
    with torch.no_grad():
        output = model(
            input_ids=input_ids.to(find_input_device(model)), use_cache=True, **cache_argument(cache)
        )
    return output.logits[0].float().log_softmax(dim=-1)


def _compute_losses(predicted: Tensor, continuation_ids: Tensor) -> Tensor:
    """Compute the loss of each continuation token but the first from the predictions before it."""
    following = continuation_ids[0, 1:, None].to(predicted.device)
    return -predicted[:-1].gather(-1, following)[:, 0]
