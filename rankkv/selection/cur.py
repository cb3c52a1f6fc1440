"""CUR: keep the tokens whose keys and values weigh most among their neighbours, by approximate leverage scores."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from ..errors import ConfigError, UnknownNameError
from ..observe.observation import Observation
from .scoring import merge_ties, without_padding

_LEVERAGES = ("kv_product", "kv_avg", "key", "value")


@without_padding
def score_cur(observation: Observation, leverage: str = "kv_product", local_window: int = 16) -> Tensor:
    """Score each token by the leverage of its key and value, approximated by their squared norms.

    With ``K_j = ||k_j||^2 / sum of ||k_i||^2 over the local window of j`` and ``V_j`` likewise, the token's leverage is
    ``K_j V_j``, ``(K_j + V_j) / 2``, ``K_j`` or ``V_j``, and ``score_j = leverage_j / sum of all leverages``.  Sinks
    score 1, above the rest.

    Parameters
    ----------
    observation : Observation
        The layer's keys and values.
    leverage : {"kv_product", "kv_avg", "key", "value"}, default "kv_product"
        How the two are joined.
    local_window : int, default 16
        Tokens of a local window, counted from the row's first token; 0 compares all tokens of the row.

    Returns
    -------
    Tensor
        ``[batch, kv_head, key]`` float32; where attention sees more key heads than the cache has, their mean.

    Raises
    ------
    ConfigError, UnknownNameError
        If ``leverage`` is none of these, or ``local_window`` no integer of at least 0.

    Notes
    -----
    The paper estimates the norms from a random projection to 20 dimensions; here they are exact, as by default in
    kvpress' form of the method, whose formula this is.  The paper's adaptive split of a budget over heads is a matter
    of budgets.  kvpress' ``kv_avg`` without a local window averages the squared norms as they are; here each is divided
    by its sum over the row first.

    As with every selector the newest token is always kept, whatever it scores (``recent_fraction=0.0`` protects no
    other); kvpress protects none.  Scores that are equal but for rounding tie, and the earlier token is
    kept.

    References
    ----------
    Sengupta et al., "Value-Guided KV Compression for LLMs via Approximated CUR Decomposition" (CurDKV), 2025,
    arXiv:2509.15038, algorithm 1.
    """
    if leverage not in _LEVERAGES:
        raise UnknownNameError.of("leverage", leverage, _LEVERAGES)
    if isinstance(local_window, bool) or not isinstance(local_window, int) or local_window < 0:
        raise ConfigError(
            f"local_window={local_window!r} of selector 'cur' must be an integer of at least 0."
        )
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
    squares = states.float().square().sum(dim=-1)
    tokens = squares.shape[-1]
    window = local_window or tokens
    local = functional.pad(squares, (0, -tokens % window)).unflatten(-1, (-1, window))
    return (local / local.sum(dim=-1, keepdim=True).clamp(min=1e-30)).flatten(-2)[..., :tokens]
