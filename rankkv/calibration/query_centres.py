"""Calibration of TriAttention: the centre and the mean size of each head's queries, before rotary embedding."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..observe.observation import Observation
from ..selection.triattention import FORMAT, load_query_centres, split_pairs
from ..utils.files import dump_json, write_text_atomically
from .observed_texts import observe_texts

# Digits kept of each number: half precision would not keep the small ones.
_DIGITS = 6


def compute_query_centres(
    model: Any, texts: Iterable[str | Tensor], tokenizer: Any = None, *, max_tokens: int = 2048
) -> dict[int, Tensor]:
    """Compute the centres of selector ``"triattention"``: the mean query of each head, pair by pair.

    Queries are turned back to position 0. Those of the sinks differ from all others and are left out. Each text takes
    one forward pass.

    Parameters
    ----------
    model : PreTrainedModel
        Model that will use the centres.
    texts : iterable of str or Tensor
        Texts, or their token ids ``[token]`` or ``[1, token]``; 50,000 tokens of any text are enough, says the paper.
    tokenizer : PreTrainedTokenizerBase, optional
        Needed for texts that are strings.
    max_tokens : int, default 2048
        Longer texts are cut to this.

    Returns
    -------
    dict of int to Tensor
        ``[head, 3, pair]`` float32 by layer: real part, imaginary part, and mean absolute value.

    Raises
    ------
    ConfigError
        If a text is a string and no tokenizer is given, or ``max_tokens`` is not an integer of at least 1.
    InputError
        If there is no text, or a text is empty.

    References
    ----------
    "TriAttention", ICML 2026, arXiv:2604.04921.

    Examples
    --------
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
    ...     num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8)).eval()
    >>> centres = compute_query_centres(model, [torch.arange(60)])
    >>> sorted(centres), tuple(centres[0].shape)
    ([0, 1], (4, 3, 4))
    """
    sums: dict[int, Tensor] = {}
    counts: dict[int, int] = {}

    def collect(observation: Observation) -> None:
        used = observation.query_valid[0] & (observation.query_index[0] >= observation.sink_size)
        queries = observation.query[:1].float()
        if observation.rotation is not None:
            frequencies = observation.rotation.frequencies.to(queries.device)
            angles = observation.query_rotary_positions[:1, ..., None] * frequencies
            queries = observation.rotation.turn(queries, -angles)
        first, second = split_pairs(observation.rotation, queries[0][:, used])
        parts = (first, second, (first.square() + second.square()).sqrt())
        new = torch.stack([part.double().sum(dim=1) for part in parts], dim=1).cpu()
        layer = observation.layer_idx
        sums[layer] = new + sums.get(layer, 0.0)
        counts[layer] = int(used.sum()) + counts.get(layer, 0)

    observe_texts(model, texts, tokenizer, max_tokens, collect, turns=True)
    return {layer: (found / max(1, counts[layer])).float() for layer, found in sorted(sums.items())}


def describe_query_centres(centres: Mapping[int, Tensor]) -> dict[str, Any]:
    """Return centres as plain JSON types, for a file or :attr:`rankkv.RankProfile.query_centres`."""
    layers = {
        str(layer): [
            [[float(f"{value:.{_DIGITS}g}") for value in row] for row in head] for head in found.tolist()
        ]
        for layer, found in centres.items()
    }
    return {"format": FORMAT, "layers": layers}


def save_query_centres(centres: Mapping[int, Tensor], path: str | Path) -> Path:
    """Write centres to one JSON file and return its path.

    ``get_selector("triattention", centres=path)`` reads the file.

    Parameters
    ----------
    centres : mapping of int to Tensor
        Centres from :func:`compute_query_centres`.
    path : str or Path
        File to write; an existing one is replaced in one step.

    Raises
    ------
    InputError
        If the written file does not hold centres.
    """
    path = write_text_atomically(path, dump_json(describe_query_centres(centres)))
    # Read the file back, so that wrong centres fail here and not at their first use.
    load_query_centres(path)
    return path
