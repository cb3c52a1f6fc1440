"""What is measured of the layers, checked and made float64."""

from __future__ import annotations

import math
import numbers
from typing import Any

import numpy as np

from rankkv.budget.apportion import FloatArray
from rankkv.errors import DegenerateAttentionError, InputError


def check_ranks(layer_ranks: Any) -> FloatArray:
    """Turn ranks (list, array or tensor) into ``[layer]`` float64, finite and non-negative.

    Raises
    ------
    InputError
        Not a flat sequence of numbers.
    DegenerateAttentionError
        Empty, or a rank is NaN, infinite or negative; the message names the layer.

    Examples
    --------
    >>> check_ranks([3, 1.5]).tolist()
    [3.0, 1.5]
    """
    values = layer_ranks.tolist() if hasattr(layer_ranks, "tolist") else layer_ranks
    if isinstance(values, (str, bytes, dict, set)) or not hasattr(values, "__iter__"):
        raise InputError(
            f"layer_ranks must be a list of numbers, one a layer; got {type(layer_ranks).__name__}."
        )
    ranks = []
    for i, value in enumerate(values):
        # Zero-dimensional tensors and array scalars inside a list.
        number = value.tolist() if hasattr(value, "tolist") else value
        if isinstance(number, bool) or not isinstance(number, numbers.Real):
            raise InputError(f"layer {i}: a rank must be a number, got {value!r} ({type(value).__name__}).")
        if not math.isfinite(number) or number < 0:
            raise DegenerateAttentionError(
                f"layer {i}: rank {number!r} is not a finite number >= 0; look at that layer's attention for "
                "NaN, or use strategy='uniform' with ranks of 1."
            )
        ranks.append(float(number))
    if not ranks:
        raise DegenerateAttentionError("layer_ranks is empty: there is no layer to give a budget to.")
    return np.array(ranks, dtype=np.float64)


def check_measures(measures: Any, strategy: str, scalar: bool) -> FloatArray:
    """Turn what a strategy measures of the layers into ``[layer]``, or unless ``scalar`` ``[layer, ...]``, float64.

    Raises
    ------
    InputError, DegenerateAttentionError
        As `check_ranks`, which sees to one number a layer.
    """
    if scalar:
        return check_ranks(measures)
    try:
        values = np.asarray(measures, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"the measures of {strategy!r} must be numbers, as many for every layer: {error}."
        ) from error
    if values.ndim == 0 or values.size == 0:
        raise DegenerateAttentionError("layer_ranks is empty: there is no layer to give a budget to.")
    wrong = np.flatnonzero(~((values >= 0) & (values < np.inf)).reshape(len(values), -1).all(axis=1))
    if len(wrong):
        raise DegenerateAttentionError(
            f"layer {wrong[0]}: a measure of {strategy!r} is not a finite number >= 0; look at that layer's attention."
        )
    return values
