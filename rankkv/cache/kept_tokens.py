"""Kept tokens of a prompt: the layers and heads that still hold each token of a compressed cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CacheStateError, InputError, UnsupportedModelError
from .layer import RankKVLayer

#: Fates of a token: kept by all heads of all layers, by some, by none.
FATES = ("all", "some", "none")


# Decoded form of an unfinished multi-byte character.
_UNFINISHED = "\ufffd"
# A character has at most four bytes, so after four tokens it cannot become complete.
_MOST_PARTS = 4


def analyze_kept_tokens(cache: Any, row: int = 0) -> KeptTokens:
    """Count the heads of each layer that still hold each token of a prompt.

    With ``decode="grow"`` these are the tokens left by the compression.  With ``"bounded"`` and ``"periodic"``, where
    decoding evicts more, they are the tokens left now.  Layers without a full-attention cache are not compressed and
    not counted.

    Parameters
    ----------
    cache : RankKVCache
        A cache after its prefill.
    row : int, default 0
        Row of the batch; padding does not count as tokens.

    Returns
    -------
    KeptTokens
        One count per compressible layer and token of the prompt.

    Raises
    ------
    UnsupportedModelError
        If no layer of the model is compressed.
    CacheStateError
        If the cache has not been compressed yet.
    InputError
        If the batch has no such row.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> import rankkv
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
    ...     num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8)).eval()
    >>> cache = rankkv.compress(model, torch.arange(60)[None], compression_ratio=0.5)
    >>> kept = analyze_kept_tokens(cache)
    >>> kept.counts.shape, int(kept.counts.sum()) == 2 * sum(cache.budgets)
    (torch.Size([2, 60]), True)
    """
    if not cache.layer_indices:
        raise UnsupportedModelError(
            "no layer of this model has a full-attention cache, so nothing is compressed and there is nothing to "
            "explain: use a model with full-attention layers."
        )
    if not cache.plans:
        raise CacheStateError(
            "the cache is not compressed yet: run the prefill, or call finish() after the last chunk."
        )
    if not 0 <= row < len(cache.plans):
        raise InputError(
            f"row {row} is not in a batch of {len(cache.plans)}: give 0 to {len(cache.plans) - 1}."
        )
    length = cache.plans[row].length
    layers = [cache.layers[index] for index in cache.layer_indices]
    return KeptTokens(
        layer_indices=list(cache.layer_indices),
        kv_heads=[len(layer.kept_per_head[row]) for layer in layers],
        counts=torch.stack([_count_heads(layer, row, cache.row_start[row], length) for layer in layers]),
    )


@dataclass(frozen=True)
class KeptTokens:
    """Hold the number of heads in each layer that keep each token of one prompt.

    Attributes
    ----------
    layer_indices : list of int
        Model indices of the compressible layers.
    kv_heads : list of int
        Number of key/value heads of each of these layers.
    counts : Tensor
        ``[layer, token]`` int64: number of heads of the layer that keep the token.
    """

    layer_indices: list[int]
    kv_heads: list[int]
    counts: Tensor

    @property
    def tokens(self) -> int:
        """Number of tokens of the prompt."""
        return self.counts.shape[1]

    def compute_shares(self) -> Tensor:
        """Compute the fraction of all heads that keep each token, ``[token]`` float32 in [0, 1]."""
        return self.counts.sum(0) / sum(self.kv_heads)

    def count_layers(self) -> Tensor:
        """Count the layers in which at least one head keeps each token, ``[token]`` int64."""
        return (self.counts > 0).sum(0)

    def list_fates(self) -> list[str]:
        """Return the fate of each token: ``"all"``, ``"some"`` or ``"none"`` (see :data:`FATES`)."""
        total, kept = sum(self.kv_heads), self.counts.sum(0).tolist()
        return ["all" if count == total else "some" if count else "none" for count in kept]

    def count_fates(self) -> dict[str, int]:
        """Count the tokens of each fate; the three counts sum to the tokens of the prompt."""
        fates = self.list_fates()
        return {fate: fates.count(fate) for fate in FATES}

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values: fates, and for each token the layers and the share of heads that keep it."""
        return {
            "layer_indices": list(self.layer_indices),
            "kv_heads": list(self.kv_heads),
            "fates": self.count_fates(),
            "layers": self.count_layers().tolist(),
            "shares": [round(share, 4) for share in self.compute_shares().tolist()],
        }


def decode_each_token(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """Return the text that every token adds, special tokens included.

    A character made of several tokens belongs to the last of them; the others get an empty string.  A space that the
    tokenizer writes only between tokens belongs to the token after it.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        Tokenizer that decodes.
    token_ids : sequence of int
        Token ids of one prompt.

    Returns
    -------
    list of str
        One text per token; joined they are the prompt.

    Examples
    --------
    >>> decode_each_token(tokenizer, tokenizer("Two words")["input_ids"])  # doctest: +SKIP
    ['Two', ' words']
    """

    def decode(ids: list[int]) -> str:
        text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    texts: list[str] = []
    # Tokens of the last complete text, and tokens that make up no complete character yet.
    before: list[int] = []
    open_ids: list[int] = []
    for token_id in token_ids:
        open_ids.append(int(token_id))
        # Decoded together with the tokens before, since some tokenizers drop the space at the start of a text.
        lead = decode(before)
        text = decode(before + open_ids)[len(lead) :]
        if text.endswith(_UNFINISHED) and len(open_ids) < _MOST_PARTS:
            texts.append("")
            continue
        texts.append(text)
        before, open_ids = open_ids, []
    if open_ids:
        texts[-1] = decode(before + open_ids)[len(decode(before)) :]
    return texts


def _count_heads(layer: RankKVLayer, row: int, start: int, length: int) -> Tensor:
    """Count the heads that keep each of ``length`` tokens, from position ``start``, ``[token]`` int64."""
    heads = len(layer.kept_per_head[row])
    positions = layer.compute_positions()[row].expand(heads, -1).cpu() - start
    held = (positions >= 0) & (positions < length)
    valid = layer.compute_slot_valid()
    if valid is not None:
        held &= valid[row].cpu()
    return torch.bincount(positions[held], minlength=length)
