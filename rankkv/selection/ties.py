"""Scores that are equal but for rounding made equal, so that ties go to the earlier token."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def merge_ties(scores: Tensor, tolerance: float = 1e-6) -> Tensor:
    """Give scores that follow each other within a relative ``tolerance`` the lowest value among them.

    In a model's first layer, keys of the same token differ by their rotation alone, which leaves their norms equal;
    what float32 makes of that differs from one batch to the next.

    Parameters
    ----------
    scores : Tensor
        ``[..., key]``.
    tolerance : float, default 1e-6
        Greatest difference of two neighbours in order, as a fraction of the larger.

    Returns
    -------
    Tensor
        Of the same shape and dtype; the order of scores that are further apart is kept.

    Examples
    --------
    >>> merge_ties(torch.tensor([2.0, 1.0, 1.0000001, 3.0])).tolist()
    [2.0, 1.0, 1.0, 3.0]
    """
    ordered, order = scores.sort(dim=-1)
    lower, upper = ordered[..., :-1], ordered[..., 1:]
    begins = functional.pad(upper - lower > tolerance * upper.abs().maximum(lower.abs()), (1, 0), value=True)
    index = torch.arange(scores.shape[-1], device=scores.device)
    first = torch.where(begins, index, 0).cummax(dim=-1).values
    return torch.empty_like(scores).scatter_(-1, order, ordered.gather(-1, first))
