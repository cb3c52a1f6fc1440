"""Budget strategies: the registry, and the way from measures of the layers to their weights."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ConfigError, ProfileError, UnknownNameError
from ..limits import Limits
from ..profile.record import RankProfile
from ..utils.registry import add_entry, remove_entry
from . import weights
from .apportion import FloatArray
from .calibrated import weigh_blend, weigh_profile
from .distortion import weigh_distortion

#: Values of :attr:`Strategy.needs`: inputs that a strategy may read of each layer.
NEEDS = ("ranks", "window attention", "whole attention", "scores", "nothing")

_RANK_COST = "O(window^2 x keys)"
_WINDOW_COST = "O(window x keys)"


@dataclass(frozen=True)
class Strategy:
    """Registered way to weigh layers.

    Attributes
    ----------
    function : callable
        ``(measures [layer] or [layer, ...] float64, **options) -> weights [layer]``, non-negative; only ratios count.
        A parameter ``limits`` receives the total, the prompt's length and the window. A parameter ``profile`` receives
        the model's profile.
    layerwise : bool
        True if a layer's weight, up to a factor common to all layers, depends on its own measure alone. Shares computed
        from the first layers then only shrink as further layers arrive, which the cascade needs.
    description : str
        One line.
    source : str
        Paper or other origin.
    measure : str, optional
        Measure of each layer that ``function`` reads, a key of :data:`rankkv.rank.measures.MEASURES`: ``"rank"`` is the
        effective rank. None if the weights follow from the number of layers alone, before any attention is seen.
    needs : str
        Input of the measure, one of :data:`NEEDS`.
    cost : str
        Operations per head of a layer, up to a factor of head_dim, such as ``"O(window x keys)"``.
    scalar : bool
        True if the measure is one number per layer.
    windows : int
        The measure reads the newest ``windows * window_size`` queries.
    ranked : bool
        True if the weights also depend on the layers' effective ranks.
    by_scores : bool
        True if the selector's scores of all heads and layers compete for the total; ``function`` is not called then.
    equal_heads : bool
        True if all heads of a layer keep the same number of tokens, whatever their scores.
    by_threshold : bool
        True if the option ``threshold`` decides which scores stay, and the total follows from the prompt.
    """

    function: Callable[..., FloatArray]
    layerwise: bool
    description: str
    source: str
    measure: str | None = "rank"
    needs: str = "ranks"
    cost: str = _RANK_COST
    scalar: bool = True
    windows: int = 1
    ranked: bool = False
    by_scores: bool = False
    equal_heads: bool = False
    by_threshold: bool = False

    @property
    def uses_ranks(self) -> bool:
        """True if the weights depend on the layers' effective ranks, alone or among other measures."""
        return self.measure == "rank" or self.ranked

    @property
    def defaults(self) -> dict[str, Any]:
        """Options of the strategy with their default values."""
        parameters = list(inspect.signature(self.function).parameters.values())[1:]
        return {
            parameter.name: parameter.default
            for parameter in parameters
            if parameter.name not in ("limits", "profile", "ranks")
        }

    def weigh(
        self,
        measures: FloatArray,
        limits: Limits | None,
        options: dict[str, Any],
        profile: RankProfile | None = None,
        ranks: FloatArray | None = None,
    ) -> FloatArray:
        """Return the weights of the layers, ``[layer]``."""
        # A function names the inputs that it wants as parameters.
        offered = {"limits": limits, "profile": profile, "ranks": ranks}
        parameters = list(inspect.signature(self.function).parameters)[1:]
        known = {name: offered[name] for name in parameters if name in offered}
        return self.function(measures, **known, **options)


_ROY = "effective rank: O. Roy, M. Vetterli, EUSIPCO 2007; budgets by rank: this project"

STRATEGIES: dict[str, Strategy] = {
    "proportional": Strategy(weights.weigh_proportional, True, "weight = rank", _ROY),
    "power": Strategy(weights.weigh_power, True, "weight = rank ** exponent", _ROY),
    "softmax": Strategy(
        weights.weigh_softmax, False, "weight = softmax(rank / mean rank / temperature)", _ROY
    ),
    "adaptive": Strategy(
        weights.weigh_adaptive, False, "weight = rank, less below one percentile, more above another", _ROY
    ),
    "uniform": Strategy(
        weights.weigh_uniform, True, "every layer the same", "baseline", None, "nothing", "O(1)"
    ),
    "pyramid": Strategy(
        weights.weigh_pyramid,
        False,
        "linear in depth, from 1 + steepness to 1 - steepness times the average; with `beta` PyramidKV's lengths",
        "Z. Cai et al., PyramidKV, arXiv:2406.02069",
        None,
        "nothing",
        "O(1)",
    ),
    "inverse": Strategy(
        weights.weigh_inverse, False, "weight = 1 / rank; rank 0 counts as the smallest positive", "baseline"
    ),
    "random": Strategy(
        weights.weigh_random,
        False,
        "weight drawn uniformly from 0.2 to 1.8 with a seed",
        "baseline",
        None,
        "nothing",
        "O(1)",
    ),
    "cake": Strategy(
        weights.weigh_cake,
        True,
        "weight = H ** (1 / tau1) * V ** (1 / tau2): entropy and variance of the window's attention",
        "Z. Qin et al., CAKE, arXiv:2503.12491",
        "cake",
        "window attention",
        _WINDOW_COST,
    ),
    "lava": Strategy(
        weights.weigh_lava,
        True,
        "weight = entropy of the layer's scores, attention x largest value norm, as one distribution",
        "Y. Shen et al., LAVa, arXiv:2509.09754",
        "lava",
        "window attention",
        _WINDOW_COST,
    ),
    "zigzagkv": Strategy(
        weights.weigh_zigzagkv,
        True,
        "weight = share of tokens that holds `mass` of the window's attention",
        "M. Zhong et al., ZigZagKV, arXiv:2412.09036",
        "zigzagkv",
        "window attention",
        "O(window x keys + keys log keys)",
    ),
    "dynamickv": Strategy(
        weights.weigh_dynamickv,
        False,
        "weight = window, and how many of the best scores of all layers are the layer's own",
        "X. Zhou et al., DynamicKV, arXiv:2412.14838",
        "dynamickv",
        "window attention",
        "O(window x keys + keys log keys)",
        scalar=False,
    ),
    "distortion": Strategy(
        weigh_distortion,
        True,
        "least sum of rank ** rank_exponent x error of the layer's output, measured on held-out queries",
        "this project; Y. Shoham, A. Gersho, IEEE TASSP 36 (9), 1988",
        "distortion",
        "window attention",
        "O(window x keys + keys log keys)",
        scalar=False,
        windows=2,
        ranked=True,
    ),
    "global": Strategy(
        weights.weigh_uniform,
        True,
        "one top-k of the selector's scores over all heads and layers",
        "J.-H. Kim et al., KVzip, arXiv:2505.23416",
        None,
        "scores",
        "O(keys log keys)",
        by_scores=True,
    ),
    "kvcompose": Strategy(
        weights.weigh_uniform,
        True,
        "one top-k over all layers of the heads' mean sorted scores; heads keep equally many",
        "D. Akulov et al., KVCompose, arXiv:2509.05165",
        None,
        "scores",
        "O(keys log keys)",
        by_scores=True,
        equal_heads=True,
    ),
    "threshold": Strategy(
        weights.weigh_threshold,
        True,
        "every token whose score reaches `threshold`; the size follows from the prompt",
        "S. Jegou, M. Jeblick, KVzap, arXiv:2601.07891; A. Lancucki et al., DMS, arXiv:2506.05345",
        None,
        "scores",
        "O(keys log keys)",
        by_scores=True,
        by_threshold=True,
    ),
}

_BUILT_IN = frozenset(STRATEGIES)

#: Strategies that need a profile of the model, with or without a measure of the prompt.
PROFILE_STRATEGIES: dict[str, Strategy] = {
    "profile": Strategy(
        weigh_profile,
        True,
        "least sum of measured distortions; with `exponent`, weight = measured sensitivity ** exponent",
        "this project; bit allocation: Y. Shoham, A. Gersho, IEEE Transactions on ASSP 36 (9), 1988",
        None,
        "nothing",
        "O(1)",
    ),
    "blend": Strategy(
        weigh_blend,
        True,
        "weight = measured sensitivity ** profile_exponent * rank ** rank_exponent",
        "this project",
    ),
}


def get_strategy(name: str) -> Strategy:
    """Look a strategy up by name.

    Raises
    ------
    UnknownNameError
        If no strategy has that name; the message names the closest and all known ones.
    """
    known = {**STRATEGIES, **PROFILE_STRATEGIES}
    if not isinstance(name, str) or name not in known:
        raise UnknownNameError.of("strategy", name, known)
    return known[name]


def register_strategy(name: str, strategy: Strategy) -> Strategy:
    """Add a strategy to the registry, so that every option ``strategy`` accepts its name.

    Raises
    ------
    ConfigError
        If it is not a `Strategy`, or its name is taken or not a Python name.

    Examples
    --------
    >>> squares = Strategy(lambda ranks: ranks**2, True, "weight = rank ** 2", "this example")
    >>> register_strategy("squares", squares) is get_strategy("squares")
    True
    >>> unregister_strategy("squares")
    """
    if not isinstance(strategy, Strategy):
        raise ConfigError(f"{strategy!r} is not a Strategy: build one around your function of the ranks.")
    add_entry(STRATEGIES, "strategy", name, strategy)
    return strategy


def unregister_strategy(name: str) -> None:
    """Remove a strategy that `register_strategy` added.

    Raises
    ------
    UnknownNameError
        If `register_strategy` added no strategy of that name.
    """
    remove_entry(STRATEGIES, "strategy", name, _BUILT_IN)


def check_options(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Check a strategy's options and return all of them, defaults included.

    Raises
    ------
    UnknownNameError
        If no strategy has that name.
    ConfigError
        If the strategy does not have an option, or a value is outside its range.

    Examples
    --------
    >>> check_options("power", {"exponent": 4})
    {'exponent': 4}
    """
    strategy = get_strategy(name)
    known = strategy.defaults
    for option in options:
        if option not in known:
            close = difflib.get_close_matches(option, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise ConfigError(
                f"strategy {name!r} has no option {option!r}{hint} Its options: {', '.join(known) or 'none'}."
            )
    merged = {**known, **options}
    # The function checks the ranges of its own options, so run it on placeholder measures.
    strategy.function(np.ones(2), **merged)
    return merged


def compute_weights(
    layer_ranks: Any,
    strategy: str = "proportional",
    *,
    limits: Limits | None = None,
    profile: RankProfile | None = None,
    ranks: FloatArray | None = None,
    **options: Any,
) -> FloatArray:
    """Compute the weight of each layer under a strategy.

    All-zero measures weigh every layer the same.

    Parameters
    ----------
    layer_ranks : sequence, array or tensor
        ``[layer]`` effective ranks, finite and non-negative, or the strategy's own measure (`Strategy.measure`).
    strategy : str, default "proportional"
        A key of `STRATEGIES` or `PROFILE_STRATEGIES`.
    limits : Limits, optional
        Total, length and window, for formulas in tokens.
    profile : RankProfile, optional
        Profile of the model, for the strategies of `PROFILE_STRATEGIES`.
    ranks : ndarray, optional
        ``[layer]`` effective ranks, for a strategy that reads them beside another measure (`Strategy.ranked`).
    **options
        The strategy's options.

    Returns
    -------
    ndarray
        ``[layer]`` float64, non-negative; only ratios count.

    Raises
    ------
    UnknownNameError, ConfigError, InputError, DegenerateAttentionError
        As `check_options` and `check_ranks`.
    ProfileError
        If the strategy needs a profile and none is given.

    Examples
    --------
    >>> compute_weights([2.0, 4.0], "power", exponent=2).tolist()
    [0.25, 1.0]
    >>> compute_weights([0.0, 0.0], "pyramid").tolist()
    [1.0, 1.0]
    """
    merged = check_options(strategy, options)
    known = get_strategy(strategy)
    if strategy in PROFILE_STRATEGIES and profile is None:
        raise ProfileError(
            f"strategy {strategy!r} needs a profile of the model: give profile=RankProfile.load(...), or measure one "
            "with rankkv calibrate."
        )
    measures = weights.check_measures(layer_ranks, strategy, known.scalar)
    if not measures.any():
        return np.ones(len(measures))
    return known.weigh(measures, limits, merged, profile, ranks)
