"""CAKE's layer preference: attention entropy, and variance from query to query."""

from __future__ import annotations

import torch
from torch import Tensor

from ...observe.observation import Observation
from .base import compute_past_attention, count_window_rows


def compute_layer_preference(observation: Observation, tau1: float = 1.0, tau2: float = 1.0) -> Tensor:
    """Compute CAKE's cache preference of a layer.

    ``P = H ** (1 / tau1) * V ** (1 / tau2)``, from the observation window's attention A to the tokens before it:
    ``H = -sum A log A`` over heads, rows and keys, and ``V`` the variance of A over the rows (unbiased), summed over
    heads and keys.  The authors tune the two temperatures for each model and budget, between 0.2 and 3.

    Parameters
    ----------
    observation : Observation
        The layer's queries and keys.
    tau1, tau2 : float, default 1.0
        Temperatures of the entropy and of the variance.

    Returns
    -------
    Tensor
        ``[batch]`` float64; 0 if there is no token before the window.

    Notes
    -----
    CAKE keeps the window in every layer and distributes the rest of the budget.  Here the whole budget is distributed,
    and every layer has the floor of all strategies.

    References
    ----------
    Qin et al., "CAKE: Cascading and Adaptive KV Cache Eviction with Layer Preferences", 2025, arXiv:2503.12491.
    """
    attention, _ = compute_past_attention(observation)
    rows = attention.shape[-2]
    entropy = torch.special.entr(attention).sum(dim=(1, 2, 3), dtype=torch.float64)
    entropy = observation.sum_over_shards(entropy)
    # Rows of padding are zero and do not count as queries.
    count = count_window_rows(observation, rows).to(torch.float64)
    mean = attention.sum(dim=-2, dtype=torch.float64) / count[:, None, None]
    real = observation.query_valid[:, -rows:, None]
    variance = attention.new_zeros(len(count), dtype=torch.float64)
    # Head by head: the deviations are float64 and as large as the attention.
    for head in range(attention.shape[1]):
        deviation = (attention[:, head].to(torch.float64) - mean[:, head, None]) * real
        variance += deviation.square().sum(dim=(1, 2))
    variance = observation.sum_over_shards(variance)
    variance /= (count - 1).clamp(min=1)
    return entropy ** (1 / tau1) * variance ** (1 / tau2)
