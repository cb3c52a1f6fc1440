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
        Mean negative log-likelihood of the continuation's tokens, nats a token.
    divergence : float
        Mean Kullback-Leibler divergence of the predictions from those with the full cache, nats a token.  In
        expectation the excess of ``loss`` over the full cache's, if the model's predictions are right, with far
        less noise.
    kept_tokens : int
        Tokens of the context kept over all layers.
    cache_bytes : int
        Bytes of the compressed context.
    """

    loss: float
    divergence: float
    kept_tokens: int
    cache_bytes: int


def compute_continuation_loss(model: Any, cache: Any, continuation_ids: Tensor) -> Tensor:
    """Compute the negative log-likelihood of each token of a continuation after the first, teacher-forced.

    ``loss_t = -log p(x_t | cache, x_0 ... x_(t-1))``.  The first token is left out: the context's own last logits
    predict it, and no cache is read for them.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model.
    cache : Cache
        Holds the context; it takes the continuation in (give a ``copy()`` to keep it).
    continuation_ids : Tensor
        ``[1, token]`` int64, at least 2 tokens.

    Returns
    -------
    Tensor
        ``[token - 1]`` float32, nats.

    Raises
    ------
    InputError
        If the continuation is shorter than 2 tokens, or a batch.

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
    return _pick(predict_tokens(model, cache, continuation_ids), continuation_ids)


def evaluate_continuation(
    record: PrefillRecord, continuation_ids: Tensor, settings: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[str, ContinuationScore]]:
    """Score one continuation with the full cache, then with one compressed cache per setting, from one prefill.

    Parameters
    ----------
    record : PrefillRecord
        The context, a single row.
    continuation_ids : Tensor
        ``[1, token]`` int64.
    settings : mapping
        Name of each setting, and its options of :class:`~rankkv.RankKVCache`.

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
    loss = float(_pick(reference, continuation_ids).mean())
    yield "full", ContinuationScore(loss, 0.0, slots, full_bytes)
    probabilities = reference.exp()
    for name, options in settings.items():
        cache = record.build_cache(**options)
        kept, kept_bytes = sum(cache.kept_lengths), cache.cache_bytes()
        predicted = predict_tokens(model, cache, continuation_ids)
        loss = float(_pick(predicted, continuation_ids).mean())
        divergence = float((probabilities * (reference - predicted)).sum(-1)[:-1].mean())
        yield name, ContinuationScore(loss, divergence, kept, kept_bytes)


def _check_continuation(continuation_ids: Tensor) -> Tensor:
    continuation_ids = check_input_ids(continuation_ids)
    if continuation_ids.shape[0] != 1 or continuation_ids.shape[1] < 2:
        raise InputError(
            f"continuation_ids {tuple(continuation_ids.shape)} must be one row of at least 2 tokens: the first is "
            "predicted by the context alone."
        )
    return continuation_ids


def predict_tokens(model: Any, cache: Any, input_ids: Tensor) -> Tensor:
    """Return log-probabilities after each of some tokens that follow what a cache holds, without gradients.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model.
    cache : Cache
        It takes the tokens in.
    input_ids : Tensor
        ``[1, token]`` int64.

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


def _pick(predicted: Tensor, continuation_ids: Tensor) -> Tensor:
    following = continuation_ids[0, 1:, None].to(predicted.device)
    return -predicted[:-1].gather(-1, following)[:, 0]
