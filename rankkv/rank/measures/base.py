"""Attention of the observation window to the tokens before it, shared by the measures."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ...observe.observation import Observation


def compute_past_attention(observation: Observation) -> tuple[Tensor, Tensor]:
    """Compute the attention of the observation window to the tokens before it.

    Parameters
    ----------
    observation : Observation
        The layer's queries and keys.

    Returns
    -------
    attention : Tensor
        ``[batch, head, row, key]`` float32; zero in the columns of the window itself and of padding.
    columns : Tensor
        Bool ``[batch, head or 1, key]``: True for real tokens before the window.
    """
    window, index = observation.window_attention, observation.real_index
    newest = torch.tensor(observation.lengths, device=index.device).view(-1, 1, 1) - observation.window_size
    columns = (index >= 0) & (index < newest)
    if columns.shape[1] > 1:
        columns = columns.repeat_interleave(window.shape[1] // columns.shape[1], dim=1)
    return window * columns[:, :, None, :], columns


def count_window_rows(observation: Observation, rows: int) -> Tensor:
    """Count the real queries among the last ``rows``, ``[batch]`` int64 and at least 1."""
    return observation.query_valid[:, -rows:].sum(dim=-1).clamp(min=1)


def pool_scores(scores: Tensor, columns: Tensor, kernel_size: int, average: bool = False) -> Tensor:
    """Pool ``[batch, head, key]`` along the keys, by maximum or average; zero outside ``columns``."""
    pool = functional.avg_pool1d if average else functional.max_pool1d
    return pool(scores, kernel_size, stride=1, padding=kernel_size // 2) * columns
