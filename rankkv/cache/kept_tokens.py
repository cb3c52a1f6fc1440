"""Which tokens of a prompt are still in a cache: by how many layers and heads each one is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CacheStateError, InputError, UnsupportedModelError
from .layer import RankKVLayer

# What a tokenizer decodes an unfinished character of several bytes to.
_UNFINISHED = "\ufffd"
# A character has at most four bytes; a token that still is none then never will be.
_MOST_PARTS = 4


def split_pieces(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """Return the piece of text that every token adds, special tokens included.

    A character that several tokens make up stands at the last of them; the others get an empty string.  A space that a
    tokenizer writes only between tokens belongs to the token after it.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        Decodes.
    token_ids : sequence of int
        Of one prompt.

    Returns
    -------
    list of str
        One piece a token; joined they are the prompt.

    Examples
    --------
    >>> split_pieces(tokenizer, tokenizer("Two words")["input_ids"])  # doctest: +SKIP
    ['Two', ' words']
    """

    def decode(ids: list[int]) -> str:
        text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    pieces: list[str] = []
    before: list[int] = []
    part: list[int] = []
    for token_id in token_ids:
        part.append(int(token_id))
        # After what stands before it, since some tokenizers drop the space at the start of a text.
        lead = decode(before)
        text = decode(before + part)[len(lead) :]
        if text.endswith(_UNFINISHED) and len(part) < _MOST_PARTS:
            pieces.append("")
            continue
        pieces.append(text)
        before, part = part, []
    if part:
        pieces[-1] = decode(before + part)[len(decode(before)) :]
    return pieces


#: What can have become of a token: kept by every head of every layer, by some, by none.
FATES = ("all", "some", "none")


@dataclass(frozen=True)
class KeptTokens:
    """How many heads of each layer keep each token of one prompt.

    Attributes
    ----------
    layer_indices : list of int
        Model indices of the compressible layers.
    kv_heads : list of int
        Key/value heads of each of them.
    counts : Tensor
        ``[layer, token]`` int64: heads of the layer that keep the token.
    """

    layer_indices: list[int]
    kv_heads: list[int]
    counts: Tensor

    @property
    def tokens(self) -> int:
        """Tokens of the prompt."""
        return self.counts.shape[1]

    def compute_shares(self) -> Tensor:
        """Compute the fraction of all heads of all layers that keep each token, ``[token]`` float32 in [0, 1]."""
        return self.counts.sum(0) / sum(self.kv_heads)

    def count_layers(self) -> Tensor:
        """Count the layers in which at least one head keeps each token, ``[token]`` int64."""
        return (self.counts > 0).sum(0)

    def list_fates(self) -> list[str]:
        """Return what became of each token: ``"all"``, ``"some"`` or ``"none"`` (see :data:`FATES`)."""
        total, kept = sum(self.kv_heads), self.counts.sum(0).tolist()
        return ["all" if count == total else "some" if count else "none" for count in kept]

    def count_fates(self) -> dict[str, int]:
        """Count the tokens of each fate; the three numbers sum to the tokens of the prompt."""
        fates = self.list_fates()
        return {fate: fates.count(fate) for fate in FATES}

    def to_dict(self) -> dict[str, Any]:
        """Return what became of each token, as JSON-ready values: layers and share of the heads that keep it."""
        return {
            "layer_indices": list(self.layer_indices),
            "kv_heads": list(self.kv_heads),
            "fates": self.count_fates(),
            "layers": self.count_layers().tolist(),
            "shares": [round(share, 4) for share in self.compute_shares().tolist()],
        }


def analyze_kept_tokens(cache: Any, row: int = 0) -> KeptTokens:
    """Find out which tokens of a prompt a compressed cache still holds.

    With ``decode="grow"`` that is what the compression left; with ``"bounded"`` and ``"periodic"``, where decoding
    evicts more, what is left now.  Layers without a full-attention cache are not compressed and not counted.

    Parameters
    ----------
    cache : RankKVCache
        After its prefill.
    row : int, default 0
        Row of the batch; padding does not count as tokens.

    Returns
    -------
    KeptTokens
        One entry a compressible layer and token of the prompt.

    Raises
    ------
    UnsupportedModelError
        If the model has no layer that is compressed.
    CacheStateError
        If the cache has not been compressed yet.
    InputError
        If there is no such row.

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
            "no layer of this model has a full-attention cache, so nothing is compressed and no token can be told from "
            "another: there is nothing to explain."
        )
    if not cache.plans:
        raise CacheStateError(
            "the cache has not been compressed yet: prefill it, or call finish() after the last chunk."
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


def _count_heads(layer: RankKVLayer, row: int, start: int, length: int) -> Tensor:
    """Count the heads that keep each of the ``length`` tokens from position ``start`` on, ``[token]`` int64."""
    heads = len(layer.kept_per_head[row])
    positions = layer.compute_positions()[row].expand(heads, -1).cpu() - start
    held = (positions >= 0) & (positions < length)
    valid = layer.compute_slot_valid()
    if valid is not None:
        held &= valid[row].cpu()
    return torch.bincount(positions[held], minlength=length)
