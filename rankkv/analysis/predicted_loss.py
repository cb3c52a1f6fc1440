"""Predicted loss of one prompt against the share of the cache kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from ..cache.cache import RankKVCache
from ..cache.prefill import run_prefill
from ..cache.quality import find_knee
from ..errors import InputError

#: Shares of the cache kept at which the loss is predicted.
SHARES = (0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)


@dataclass(frozen=True)
class PredictedLoss:
    """Predicted loss of a prompt at one share kept.

    Attributes
    ----------
    share : float
        Share of the prompt's tokens kept, the mean over layers.
    lost : float
        Share of the attention that goes to evicted tokens.
    loss, bound : float
        Loss that half of the prompts stay below, and nine of ten, nats per token.
    is_knee : bool
        True at the knee: beyond it, more tokens gain little.
    """

    share: float
    lost: float
    loss: float
    bound: float
    is_knee: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON-ready values."""
        return asdict(self)


def predict_losses(
    model: Any, input_ids: Tensor, shares: Sequence[float] = SHARES, *, selector: Any = "snapkv"
) -> list[PredictedLoss]:
    """Predict the loss of one prompt at several shares kept, from one prefill.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model.
    input_ids : Tensor
        ``[1, token]``.
    shares : sequence of float
        Fractions of the cache kept, in (0, 1].  Those below the floor of the budgets give the same point once.
    selector : str or Selector, default "snapkv"
        Token selection method.

    Returns
    -------
    list of PredictedLoss
        Ascending in the share; one of them is the knee.

    Raises
    ------
    ConfigError
        If the loss of the selector was not measured.
    InputError
        If there is not one prompt, or no share.

    Examples
    --------
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
    ...     num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8)).eval()
    >>> points = predict_losses(model, torch.arange(60)[None], [0.4, 0.6, 0.8])
    >>> [point.share for point in points], sum(point.is_knee for point in points)
    ([0.4, 0.6, 0.8], 1)
    """
    if input_ids.dim() != 2 or input_ids.shape[0] != 1:
        raise InputError(f"input_ids {tuple(input_ids.shape)} must be one prompt, [1, token].")
    if not shares:
        raise InputError("shares is empty: give at least one fraction of the cache, such as 0.3.")
    # Chunked: the prompt waits for `finish`, so that one prefill serves all shares.  With `max_loss` a selector whose
    # loss was not measured is refused before the prefill.
    waiting = RankKVCache(model, selector=selector, profile=None, prefill="chunked", max_loss=1.0)
    run_prefill(model, waiting.measure_lost_attention(), input_ids)
    found: dict[int, PredictedLoss] = {}
    for ratio in sorted(shares):
        cache = waiting.copy_with(compression_ratio=ratio, max_loss=None).finish()
        total = sum(cache.budgets)
        share = total / (input_ids.shape[1] * len(cache.budgets))
        found[total] = PredictedLoss(
            share, cache.lost_attention[0] or 0.0, cache.predicted_loss or 0.0, cache.loss_bounds[0] or 0.0
        )
    points = list(found.values())
    knee = find_knee([point.share for point in points], [point.loss for point in points])
    return [PredictedLoss(p.share, p.lost, p.loss, p.bound, place == knee) for place, p in enumerate(points)]
