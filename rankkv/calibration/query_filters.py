"""Calibration of Q-Filters: the principal direction of each head's queries over texts, saved as one JSON file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..observe.observation import Observation
from ..observe.queries import compute_query_moments, merge_moments
from ..selection.qfilter import FORMAT, compute_filter, load_query_filters
from ..utils.files import dump_json, write_text_atomically
from .observed_texts import observe_texts


def compute_query_filters(
    model: Any, texts: Iterable[str | Tensor], tokenizer: Any = None, *, max_tokens: int = 2048
) -> dict[int, Tensor]:
    """Compute the filters of selector ``"qfilter"``: the principal direction of each head's queries.

    Each text takes one forward pass. Only the mean and covariance of the queries are kept, so memory does not grow
    with the number of texts.

    Parameters
    ----------
    model : PreTrainedModel
        Model that will use the filters.
    texts : iterable of str or Tensor
        Texts, or their token ids ``[token]`` or ``[1, token]``. The paper uses about twenty texts of 2,048 tokens.
    tokenizer : PreTrainedTokenizerBase, optional
        Needed for texts that are strings.
    max_tokens : int, default 2048
        Longer texts are cut to this.

    Returns
    -------
    dict of int to Tensor
        Filters ``[key_head, key_dim]`` float32 by layer; write them with :func:`save_query_filters`.

    Raises
    ------
    ConfigError
        If a text is a string and no tokenizer is given, or ``max_tokens`` is not an integer of at least 1.
    InputError
        If there is no text, or a text is empty.

    References
    ----------
    Godey et al., "Q-Filters: Leveraging Query-Key Geometry for Efficient Key-Value Cache Compression", 2025,
    arXiv:2503.02812.

    Examples
    --------
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
    ...     num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8)).eval()
    >>> filters = compute_query_filters(model, [torch.arange(60)])
    >>> sorted(filters), tuple(filters[0].shape)
    ([0, 1], (2, 8))
    """
    moments: dict[int, Tensor] = {}
    key_heads: dict[int, int] = {}

    def collect(observation: Observation) -> None:
        new = compute_query_moments(observation, "turned")
        past = moments.get(observation.layer_idx)
        moments[observation.layer_idx] = new if past is None else merge_moments(past, new)
        key_heads[observation.layer_idx] = observation.keys.shape[1]

    observe_texts(model, texts, tokenizer, max_tokens, collect)
    return {
        layer: compute_filter(found, key_heads[layer])[0].cpu() for layer, found in sorted(moments.items())
    }


def save_query_filters(filters: Mapping[int, Tensor], path: str | Path) -> Path:
    """Write filters to one JSON file and return its path.

    ``get_selector("qfilter", filters=path)`` reads the file.

    Parameters
    ----------
    filters : mapping of int to Tensor
        Filters from :func:`compute_query_filters`.
    path : str or Path
        File to write; an existing one is replaced in one step.

    Raises
    ------
    InputError
        If the written file does not hold filters.
    """
    layers = {str(layer): found.tolist() for layer, found in filters.items()}
    path = write_text_atomically(path, dump_json({"format": FORMAT, "layers": layers}))
    # Read the file back, so that wrong filters fail here and not at their first use.
    load_query_filters(path)
    return path
