"""Strategies: how the ranks of the layers become the weights that budgets are proportional to."""

from __future__ import annotations

import difflib
import inspect
import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from rankkv.budget_shares import FloatArray, check_integer
from rankkv.errors import ConfigError, DegenerateAttentionError, InputError, UnknownNameError

#: What a strategy may read of each layer, as :attr:`Strategy.needs` says it.
NEEDS = ("ranks", "window attention", "whole attention", "hidden states", "nothing")

_RANK_COST = "O(window^2 x keys)"


@dataclass(frozen=True)
class Strategy:
    """A registered way to weigh layers.

    Attributes
    ----------
    function : callable
        ``(ranks [layer] float64, **options) -> weights [layer]``, non-negative; only ratios count.
    layerwise : bool
        A layer's weight, up to a factor common to all layers, depends on its own rank alone; so shares
        computed from the first layers only shrink as further layers arrive (what a cascade needs).
    description : str
        One line.
    source : str
        Paper, or where else it comes from.
    measure : str, optional
        What is measured of each layer and given to ``function``: ``"rank"``, the effective rank.  None where the
        weights follow from the number of layers, before any attention is seen.
    needs : str
        What the measure reads, one of :data:`NEEDS`.
    cost : str
        Operations for each head of a layer, up to a factor of head_dim: ``"O(window x keys)"`` and the like.
    """

    function: Callable[..., FloatArray]
    layerwise: bool
    description: str
    source: str
    measure: str | None = "rank"
    needs: str = "ranks"
    cost: str = _RANK_COST

    @property
    def uses_ranks(self) -> bool:
        """Whether the layers are weighed by their effective ranks."""
        return self.measure == "rank"

    @property
    def defaults(self) -> dict[str, Any]:
        """The options of the strategy with their default values."""
        parameters = list(inspect.signature(self.function).parameters.values())[1:]
        return {parameter.name: parameter.default for parameter in parameters}


def _number(name: str, value: object, low: float, high: float, open_low: bool = False) -> float:
    """Return a strategy option as a float inside its range, or raise a ConfigError that names it."""
    number = float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan
    if not low <= number <= high or (open_low and number == low):
        bracket = "(" if open_low else "["
        raise ConfigError(f"{name} must be a number in {bracket}{low:g}, {high:g}], got {value!r}.")
    return number


def _proportional(ranks: FloatArray) -> FloatArray:
    return ranks


def _power(ranks: FloatArray, exponent: float = 1.0) -> FloatArray:
    # Dividing by the maximum keeps the power finite; the ratios, which are all that counts, do not see it.
    return (ranks / ranks.max()) ** _number("exponent", exponent, 0.0, 64.0)


def _softmax(ranks: FloatArray, temperature: float = 1.0) -> FloatArray:
    logits = ranks / ranks.max()
    logits = logits / (logits.mean() * _number("temperature", temperature, 1e-6, 1e6))
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()


def _adaptive(
    ranks: FloatArray,
    low_percentile: float = 25.0,
    high_percentile: float = 75.0,
    low_factor: float = 0.5,
    high_factor: float = 1.5,
) -> FloatArray:
    low_percentile = _number("low_percentile", low_percentile, 0.0, 100.0)
    high_percentile = _number("high_percentile", high_percentile, low_percentile, 100.0)
    # Factors on the far side of 1 would give a higher rank fewer tokens.
    low_factor = _number("low_factor", low_factor, 0.0, 1.0, open_low=True)
    high_factor = _number("high_factor", high_factor, 1.0, 1e6)
    low, high = np.percentile(ranks, [low_percentile, high_percentile])
    factors = np.ones_like(ranks)
    factors[(ranks <= low) & (ranks < high)] = low_factor
    factors[(ranks >= high) & (ranks > low)] = high_factor
    return ranks * factors


def _uniform(ranks: FloatArray) -> FloatArray:
    return np.ones_like(ranks)


def _pyramid(ranks: FloatArray, steepness: float = 0.8) -> FloatArray:
    steepness = _number("steepness", steepness, 0.0, 1.0)
    if len(ranks) == 1:
        return np.ones(1)
    return np.linspace(1.0 + steepness, 1.0 - steepness, len(ranks))


def _inverse(ranks: FloatArray) -> FloatArray:
    smallest = ranks[ranks > 0].min()
    return smallest / np.maximum(ranks, smallest)


def _random(ranks: FloatArray, seed: int = 0) -> FloatArray:
    return np.random.default_rng(check_integer("seed", seed, 0)).uniform(0.2, 1.8, len(ranks))


_ROY = "effective rank: O. Roy, M. Vetterli, EUSIPCO 2007; budgets by rank: this project"

STRATEGIES: dict[str, Strategy] = {
    "proportional": Strategy(_proportional, True, "weight = rank", _ROY),
    "power": Strategy(_power, True, "weight = rank ** exponent", _ROY),
    "softmax": Strategy(_softmax, False, "weight = softmax(rank / mean rank / temperature)", _ROY),
    "adaptive": Strategy(
        _adaptive, False, "weight = rank, less below one percentile, more above another", _ROY
    ),
    "uniform": Strategy(_uniform, True, "every layer the same", "baseline", None, "nothing", "O(1)"),
    "pyramid": Strategy(
        _pyramid,
        False,
        "linear in depth, from 1 + steepness to 1 - steepness times the average",
        "after Z. Cai et al., PyramidKV, arXiv:2406.02069 (baseline)",
        None,
        "nothing",
        "O(1)",
    ),
    "inverse": Strategy(
        _inverse, False, "weight = 1 / rank; rank 0 counts as the smallest positive", "baseline"
    ),
    "random": Strategy(
        _random,
        False,
        "weight drawn uniformly from 0.2 to 1.8 with a seed",
        "baseline",
        None,
        "nothing",
        "O(1)",
    ),
}


def get_strategy(name: str) -> Strategy:
    """Look a strategy up by name.

    Raises
    ------
    UnknownNameError
        No such strategy; the message lists the known ones and the closest.
    """
    if not isinstance(name, str) or name not in STRATEGIES:
        raise UnknownNameError.of("strategy", name, STRATEGIES)
    return STRATEGIES[name]


def check_options(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return all options of a strategy, defaults filled in, after checking their names and ranges.

    Raises
    ------
    UnknownNameError
        No such strategy.
    ConfigError
        An option that the strategy does not have, or a value outside its range.

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
    strategy.function(np.ones(2), **merged)
    return merged


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


def compute_weights(layer_ranks: Any, strategy: str = "proportional", **options: Any) -> FloatArray:
    """Compute the weight of each layer under a strategy; all-zero ranks weigh every layer the same.

    Parameters
    ----------
    layer_ranks : sequence, array or tensor
        ``[layer]`` effective ranks, finite and non-negative.
    strategy : str, default "proportional"
        A key of `STRATEGIES`.
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

    Examples
    --------
    >>> compute_weights([2.0, 4.0], "power", exponent=2).tolist()
    [0.25, 1.0]
    >>> compute_weights([0.0, 0.0], "pyramid").tolist()
    [1.0, 1.0]
    """
    ranks = check_ranks(layer_ranks)
    merged = check_options(strategy, options)
    if not ranks.any():
        return np.ones_like(ranks)
    return STRATEGIES[strategy].function(ranks, **merged)
