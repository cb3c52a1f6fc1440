"""CUR: keep the tokens whose keys and values have the highest approximate leverage scores."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from ..errors import UnknownNameError
from ..observe.observation import Observation
from .scoring import check_integer_option, merge_ties, without_padding

_LEVERAGES = ("kv_product", "kv_avg", "key", "value")


@without_padding
def score_cur(observation: Observation, leverage: str = "kv_product", local_window: int = 16) -> Tensor:
    """Score each token by the leverage of its key and value, approximated by their squared norms.

    Let ``K_j = ||k_j||^2 / sum of ||k_i||^2 over the local window of j``, and ``V_j`` likewise. The token's leverage is
    ``K_j V_j``, ``(K_j + V_j) / 2``, ``K_j`` or ``V_j``. Its score is ``leverage_j / sum of all leverages``. Sinks
    score 1, above the rest.

    Parameters
    ----------
    observation : Observation
        The layer's keys and values.
    leverage : {"kv_product", "kv_avg", "key", "value"}, default "kv_product"
        Combination of the two.
    local_window : int, default 16
        Tokens of a local window, counted from the row's first token; 0 compares all tokens of the row.

    Returns
    -------
    Tensor
        ``[batch, kv_head, key]`` float32; the mean if attention sees more key heads than the cache has.

    Raises
    ------
    ConfigError
        If ``local_window`` is not an integer of at least 0.
    UnknownNameError
        If ``leverage`` is not one of these.

    Notes
    -----
    The formula is that of kvpress. The paper estimates the norms from a random projection to 20 dimensions. Here they
    are exact, which is also kvpress' default. The paper's adaptive split of a budget over heads is not part of the
    score. kvpress' ``kv_avg`` without a local window averages the plain squared norms. Here each is first divided by
    its sum over the row.

    As with every selector, the newest token is always kept, whatever it scores; ``recent_fraction=0.0`` protects no
    other token. kvpress protects none. Scores that differ only by rounding tie, and the earlier token is kept.

    References
    ----------
    Sengupta et al., "Value-Guided KV Compression for LLMs via Approximated CUR Decomposition" (CurDKV), 2025,
    arXiv:2509.15038, algorithm 1.
    """
    if leverage not in _LEVERAGES:
        raise UnknownNameError.of("leverage", leverage, _LEVERAGES)
    check_integer_option("cur", "local_window", local_window, 0)
    keys, values = (
        observation.compute_group_mean(_compute_leverage(states, local_window))
        for states in (observation.keys, observation.values)
    )
    scores = {"kv_product": keys * values, "kv_avg": (keys + values) / 2, "key": keys, "value": values}[
        leverage
    ]
    scores = merge_ties(scores / scores.sum(dim=-1, keepdim=True).clamp(min=1e-30))
    is_sink = (observation.real_index >= 0) & (observation.real_index < observation.sink_size)
    return scores.masked_fill(is_sink, 1.0)


def _compute_leverage(states: Tensor, local_window: int) -> Tensor:
    """Divide each squared norm by the sum over its local window, ``[batch, head, key]``."""
    squares = states.float().square().sum(dim=-1)
    tokens = squares.shape[-1]
    window = local_window or tokens
    local = functional.pad(squares, (0, -tokens % window)).unflatten(-1, (-1, window))
    return (local / local.sum(dim=-1, keepdim=True).clamp(min=1e-30)).flatten(-2)[..., :tokens]
