"""Calibration of loss curves: the real loss of compressed caches beside the attention that they lose."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from ..cache.cache import RankKVCache
from ..cache.prefill import run_prefill
from ..cache.quality import SHORTEST_PROMPT
from ..cache.resolve import find_obstacle
from ..config import PREDICTED_SELECTORS
from ..errors import InputError
from ..models.compat import cache_argument
from ..models.placement import find_input_device
from ..profile.loss_curve import LossCurve, fit_loss_curve
from .settings import CalibrationSettings
from .single_runs import Reference

#: Fractions of the cache kept at which the loss is measured.
LOSS_RATIOS = (0.03, 0.06, 0.12, 0.25, 0.5, 0.75)
#: Tokens after the context over which the loss is the mean; the first one is predicted without the cache.
SCORED_TOKENS = 129


def measure_loss_curves(
    model: Any,
    texts: Iterable[Tensor],
    *,
    ratios: Sequence[float] = LOSS_RATIOS,
    name: str | None = None,
    on_progress: Callable[[], None] | None = None,
) -> dict[str, LossCurve]:
    """Measure the loss curve of each selector whose loss can be predicted.

    Each text is cut into a context and its last 129 tokens.  For each selector and ratio, the context is compressed
    and the mean KL divergence from the full cache over the 128 tokens is measured.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model.
    texts : iterable of Tensor
        Token ids ``[token]`` or ``[1, token]``; 258 tokens or more.  At least 4 texts, better 24 of several kinds and
        lengths (:func:`cut_contexts`).
    ratios : sequence of float
        Fractions of the cache kept.
    name : str, optional
        Name of the model in the curves.
    on_progress : callable, optional
        Called after each text.

    Returns
    -------
    dict of str to LossCurve
        By selector name; a selector that the model does not allow is left out.

    Raises
    ------
    InputError
        If a text is too short, or there are too few texts.
    """
    selectors = [one for one in PREDICTED_SELECTORS if one != "echo" or not find_obstacle(model)]
    found: dict[str, list[tuple[float, float, int]]] = {selector: [] for selector in selectors}
    strategies = dict[str, str]()
    for number, ids in enumerate(texts):
        ids = ids.view(1, -1).to(find_input_device(model))
        if ids.shape[1] < 2 * SCORED_TOKENS:
            raise InputError(
                f"text {number} has {ids.shape[1]} tokens: a loss curve needs texts of {2 * SCORED_TOKENS} and more."
            )
        context, after = ids[:, :-SCORED_TOKENS], ids[:, -SCORED_TOKENS:]
        full = DynamicCache(config=model.config.get_text_config(decoder=True))
        run_prefill(model, full, context)
        reference = Reference.of(_predict(model, full, after), after[0, 1:])
        for selector in selectors:
            # Chunked: the prompt waits for `finish`, so that one prefill serves all ratios.
            waiting = RankKVCache(model, selector=selector, profile=None, prefill="chunked")
            waiting.measure_lost_attention()
            run_prefill(model, waiting, context)
            for ratio in ratios:
                cache = waiting.copy_with(compression_ratio=ratio).finish()
                _, divergence = reference.compare(_predict(model, cache, after))
                found[selector].append((cache.lost_attention[0] or 0.0, divergence, number))
                strategies[selector] = cache.config.resolve_strategy()[0]
        if on_progress is not None:
            on_progress()
    described = [name or model.config._name_or_path or type(model).__name__]
    curves = {}
    for selector, rows in found.items():
        if not rows:
            raise InputError("there is no text to measure: give at least 4.")
        lost, losses, prompts = zip(*rows, strict=True)
        measured = {"models": described, "strategy": strategies[selector]}
        curves[selector] = fit_loss_curve(lost, losses, prompts, measured)
    return curves


def cut_contexts(tokenizer: Any, texts: Any, context_tokens: int, max_texts: int) -> list[Tensor]:
    """Cut contexts with the tokens that follow them, of two lengths: the share lost depends on the length.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase, optional
        Needed for texts that are strings.
    texts : sequence of str or Tensor
        Strings, or token ids.
    context_tokens : int
        Tokens of a long context; a short one has half of them, at least 256.
    max_texts : int
        Most contexts of each length.

    Raises
    ------
    InputError
        If no text is long enough, or strings come without a tokenizer.
    ConfigError
        If a number is out of range.
    """
    lengths = dict.fromkeys((max(SHORTEST_PROMPT, context_tokens), max(SHORTEST_PROMPT, context_tokens // 2)))
    cut = [CalibrationSettings(length, SCORED_TOKENS, max_texts).cut(tokenizer, texts) for length in lengths]
    return [torch.tensor(ids) for contexts in cut for ids in contexts]


def _predict(model: Any, cache: Any, ids: Tensor) -> Tensor:
    """Return the logits after each token but the last, ``[token - 1, vocabulary]``."""
    with torch.no_grad():
        return model(input_ids=ids, use_cache=True, **cache_argument(cache)).logits[0, :-1]
