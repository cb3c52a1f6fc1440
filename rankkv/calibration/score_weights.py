"""Calibration of score weights: how much each head's scores count when all heads compete for the cache."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import Tensor

from ..cache.prefill import compress
from ..errors import ConfigError, InputError
from ..models.placement import find_input_device
from .observed_texts import check_max_tokens, read_ids

# Bounds of a weight, so that no head is lost for what a few texts did not show.
_SMALLEST, _LARGEST = 0.05, 20.0
# Significant digits in a file.
_DIGITS = 4


def compute_score_weights(
    model: Any,
    texts: Iterable[str | Tensor],
    tokenizer: Any,
    *,
    selector: str = "echo",
    reference: str = "kvzip_plus",
    compression_ratio: float = 0.125,
    max_tokens: int = 1024,
) -> dict[str, Any]:
    """Compute the weight of each head's scores, so that a selector shares the cache as a slower reference does.

    ``weight_lh = (mean tokens that the reference keeps in head h of layer l) / (mean tokens that the selector keeps)``

    Both compress each text with strategy ``"global"``.  Which tokens matter depends on the text; how many a head needs
    hardly does.  So a reference that replays every text is needed once a model, not once a prompt.

    Parameters
    ----------
    model : PreTrainedModel
        Model that will use the weights.
    texts : iterable of str or Tensor
        Texts, or their token ids ``[token]`` or ``[1, token]``; eight texts of different kinds are enough.
    tokenizer : PreTrainedTokenizerBase or ReplayPrompt
        What the reference replays with; see :func:`rankkv.compress`.
    selector : str, default "echo"
        Selector whose scores are weighed.
    reference : str, default "kvzip_plus"
        Selector whose shares are the aim.
    compression_ratio : float, default 0.125
        Fraction of each text that both keep.
    max_tokens : int, default 1024
        Longer texts are cut to this.

    Returns
    -------
    dict
        For :attr:`rankkv.RankProfile.score_weights`: the two selectors, the ratio, the number of texts, and the weights
        ``[layer][kv_head]``.

    Raises
    ------
    ConfigError
        If the scores of a selector do not compare over heads, or an option is outside its range.
    InputError
        If there is no text, or a text is empty.

    References
    ----------
    This project.  Kim et al., "KVzip", 2025, arXiv:2505.23416, section 3, gives whole heads a score in a similar way:
    the largest score of their tokens over a few contexts.

    Examples
    --------
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
    ...     num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8)).eval()
    >>> text = torch.randint(64, (200,), generator=torch.manual_seed(0))
    >>> found = compute_score_weights(model, [text], None, reference="snapkv", compression_ratio=0.5)
    >>> found["selector"], [len(row) for row in found["weights"]]
    ('echo', [2, 2])
    """
    check_max_tokens(max_tokens)
    if reference == selector:
        raise ConfigError(
            f"reference={reference!r} is the selector itself: name another one, such as 'kvzip_plus'."
        )
    counts: dict[str, list[np.ndarray]] = {reference: [], selector: []}
    for text in texts:
        ids = read_ids(text, tokenizer)[:, :max_tokens].to(find_input_device(model))
        for name, found in counts.items():
            cache = compress(
                model,
                ids,
                tokenizer=tokenizer,
                selector=name,
                strategy="global",
                profile=None,
                compression_ratio=compression_ratio,
            )
            found.append(np.array([rows[0] for rows in cache.kept_per_head], dtype=np.float64))
    if not counts[selector]:
        raise InputError("there is no text to compress: give at least one.")
    wanted, own = (np.mean(counts[name], axis=0) for name in (reference, selector))
    weights = np.clip(wanted / own, _SMALLEST, _LARGEST)
    return {
        "selector": selector,
        "reference": reference,
        "compression_ratio": compression_ratio,
        "texts": len(counts[selector]),
        "weights": [[float(f"{value:.{_DIGITS}g}") for value in row] for row in weights],
    }
