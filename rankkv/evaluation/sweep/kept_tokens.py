"""Kept-token maps: the tokens that every setting keeps of one prompt, by layer, head and token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ...cache.kept_tokens import KeptTokens, analyze_kept_tokens, decode_each_token
from ...rank.observed_layer import compute_head_ranks
from ..prefill_record import PrefillRecord

#: Stretches of the prompt, from its beginning to its end, by which it is told where a layer keeps tokens.
STRETCHES = 48


def describe_kept_tokens(
    record: PrefillRecord, tokenizer: Any, settings: Mapping[str, Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Describe what every setting keeps of one recorded prompt; nothing of a model that has no layer to compress.

    Parameters
    ----------
    record : PrefillRecord
        A single row.
    tokenizer
        Of the model; tells the tokens' text.
    settings : mapping
        Name of each setting, and its options of :class:`~rankkv.RankKVCache`.

    Yields
    ------
    dict
        ``setting``; ``pieces`` (text), ``token_layers`` and ``token_shares`` (layers with a head that keeps the token;
        share of all heads that do), one entry a token; ``layer_indices``, ``measure`` (what the strategy measures),
        ``layer_measures``, ``budgets`` (tokens), ``head_ranks`` (effective rank of each query head's evictable
        attention), ``head_kept`` (tokens each kv head keeps) and ``stretch_shares`` (share kept of each of up to 48
        stretches of the prompt), one entry a layer.
    """
    texts = decode_each_token(tokenizer, record.input_ids[0].tolist())
    for name, options in settings.items():
        cache = record.build_cache(**options)
        if not cache.layer_indices:
            return
        kept = analyze_kept_tokens(cache)
        observed = record.observe(cache.config.window_size, cache.config.sink_size)
        plan = cache.plans[0]
        yield {
            "setting": name,
            "pieces": texts,
            "token_layers": kept.count_layers().tolist(),
            "token_shares": kept.compute_shares().tolist(),
            "layer_indices": cache.layer_indices,
            "measure": plan.measure,
            "layer_measures": [float(value) for value in cache.layer_measures],
            "budgets": cache.budgets,
            "head_ranks": [compute_head_ranks(observed[index])[0].tolist() for index in cache.layer_indices],
            "head_kept": [cache.layers[index].kept_per_head[0] for index in cache.layer_indices],
            "stretch_shares": _compute_stretch_shares(kept).tolist(),
        }


def _compute_stretch_shares(kept: KeptTokens) -> Tensor:
    """Compute the share of each stretch of the prompt that a layer keeps, ``[layer, stretch]``."""
    stretches = min(STRETCHES, kept.tokens)
    stretch_of = torch.arange(kept.tokens) * stretches // kept.tokens
    sums = torch.zeros(len(kept.kv_heads), stretches).index_add_(1, stretch_of, kept.counts.float())
    return sums / (torch.bincount(stretch_of) * torch.tensor(kept.kv_heads)[:, None])
