"""Kept-token maps: the tokens that every setting keeps of one prompt, by layer, head and token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ...cache.kept_tokens import KeptTokens, analyze_kept_tokens, decode_each_token
from ...rank.observed_layer import compute_head_ranks
from ..prefill_record import PrefillRecord

#: Equal stretches of the prompt, at most, whose share of kept tokens is recorded for each layer.
STRETCHES = 48


def describe_kept_tokens(
    record: PrefillRecord, tokenizer: Any, settings: Mapping[str, Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Describe the tokens that every setting keeps of one recorded prompt.

    A model without a compressible layer gives no row.

    Parameters
    ----------
    record : PrefillRecord
        Prefill of a single prompt.
    tokenizer
        Tokenizer of the model; it decodes each token's text.
    settings : mapping
        Maps each setting's name to its options of :class:`~rankkv.RankKVCache`.

    Yields
    ------
    dict
        One row per setting:

        - ``setting``: its name; ``measure``: name of the strategy's measure of a layer;
        - one entry per token: ``pieces`` (text), ``token_layers`` (layers in which a head keeps the token) and
          ``token_shares`` (share of all heads that keep it);
        - one entry per layer: ``layer_indices``, ``layer_measures``, ``budgets`` (tokens), ``head_ranks`` (effective
          rank of each query head's evictable attention), ``head_kept`` (tokens that each kv head keeps) and
          ``stretch_shares`` (share kept of each of up to 48 equal stretches of the prompt).
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
    """Compute the share of each stretch of the prompt that each layer keeps, ``[layer, stretch]``."""
    stretches = min(STRETCHES, kept.tokens)
    stretch_of = torch.arange(kept.tokens) * stretches // kept.tokens
    sums = torch.zeros(len(kept.kv_heads), stretches).index_add_(1, stretch_of, kept.counts.float())
    return sums / (torch.bincount(stretch_of) * torch.tensor(kept.kv_heads)[:, None])
