"""What strategies measure of a layer: one measure a file, one line of the registry below each."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..layer_rank import compute_layer_ranks
from ..observation import Observation
from ..rank_kernels import round_ranks
from .cake import compute_layer_preference
from .dynamickv import compute_best_scores
from .lava import compute_layer_entropy
from .squeezeattention import compute_layer_change
from .zigzagkv import compute_layer_uncertainty

#: ``function(observation, **options) -> Tensor [batch] or [batch, ...]``, non-negative, NaN where the attention is not
#: finite. A function takes those of the options offered to it that it has a parameter for.
MEASURES: dict[str, Callable[..., Tensor]] = {
    "rank": compute_layer_ranks,
    "cake": compute_layer_preference,
    "lava": compute_layer_entropy,
    "zigzagkv": compute_layer_uncertainty,
    "dynamickv": compute_best_scores,
    "squeezeattention": compute_layer_change,
}


def compute_measures(observation: Observation, measure: str, **options: Any) -> Tensor:
    """Measure one layer.

    Parameters
    ----------
    observation : Observation
        The layer's queries, keys and values.
    measure : str
        A key of :data:`MEASURES`.
    **options
        Offered to the measure, which takes those it knows.

    Returns
    -------
    Tensor
        ``[batch]`` or ``[batch, ...]`` float64 on the CPU; one number a layer is rounded to 6 significant digits, so
        that float noise does not move a token.
    """
    function = MEASURES[measure]
    known = inspect.signature(function).parameters
    measured = function(observation, **{name: value for name, value in options.items() if name in known})
    measured = measured.to("cpu", torch.float64)
    return round_ranks(measured) if measured.dim() == 1 else measured


__all__ = ["MEASURES", "compute_measures"]
