"""BudgetAllocator: per-layer budgets from per-layer measures, whole tokens that sum exactly to the total."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from .budget.apportion import allocate_integers, allocate_shares, ceil_shares, check_integer
from .budget.strategies import (
    STRATEGIES,
    Strategy,
    check_options,
    compute_weights,
    get_strategy,
    register_strategy,
    unregister_strategy,
)
from .budget.weights import check_measures, check_ranks
from .errors import BudgetError, ConfigError
from .limits import Limits

__all__ = [
    "STRATEGIES",
    "BudgetAllocation",
    "BudgetAllocator",
    "Limits",
    "Strategy",
    "allocate_integers",
    "allocate_shares",
    "ceil_shares",
    "check_options",
    "check_ranks",
    "compute_weights",
    "get_strategy",
    "register_strategy",
    "unregister_strategy",
]

_BAR_WIDTH = 40


@dataclass(frozen=True)
class BudgetAllocation:
    """Budgets of all layers, with the inputs they were computed from.

    Attributes
    ----------
    budgets : list of int
        Tokens each layer keeps; sums to ``total_budget``.
    total_budget : int
        Tokens over all layers.
    layer_ranks, weights : list of float
        The given ranks and the weights that the strategy computed. Without ranks if the strategy reads another measure,
        which is then in ``layer_measures``.
    strategy, strategy_options
        The strategy and all its options, defaults included.
    min_budget : int
        Lower bound of a layer, tokens.
    max_budget : int or None
        Upper bound of a layer, tokens; with None only ``seq_len`` bounds it.
    seq_len : int or None
        Tokens a layer holds uncompressed; None if unknown.
    layer_measures : list
        The given measures, if the strategy reads another measure than ranks.
    """

    budgets: list[int]
    total_budget: int
    layer_ranks: list[float]
    weights: list[float]
    strategy: str
    strategy_options: dict[str, Any]
    min_budget: int
    max_budget: int | None
    seq_len: int | None
    layer_measures: list[Any] = field(default_factory=list)

    @property
    def average_budget(self) -> float:
        """Average number of tokens per layer."""
        return self.total_budget / len(self.budgets)

    @property
    def compression_ratio(self) -> float | None:
        """Fraction of the KV cache kept; None if ``seq_len`` is unknown."""
        return None if self.seq_len is None else self.total_budget / (self.seq_len * len(self.budgets))

    def to_dict(self) -> dict[str, Any]:
        """Return all values as plain JSON types."""
        return {
            "budgets": list(self.budgets),
            "total_budget": self.total_budget,
            "average_budget": self.average_budget,
            "compression_ratio": self.compression_ratio,
            "layer_ranks": list(self.layer_ranks),
            "layer_measures": list(self.layer_measures),
            "weights": list(self.weights),
            "strategy": self.strategy,
            "strategy_options": dict(self.strategy_options),
            "min_budget": self.min_budget,
            "max_budget": self.max_budget,
            "seq_len": self.seq_len,
        }

    def summary(self) -> str:
        """Return a plain text table with one bar per layer, as long as its budget."""
        options = ", ".join(f"{name}={value}" for name, value in self.strategy_options.items())
        kept = "" if self.compression_ratio is None else f", {self.compression_ratio:.1%} of the cache kept"
        longest = max(1, *self.budgets)
        lines = [
            f"strategy {self.strategy}({options}): {self.total_budget} tokens over "
            f"{len(self.budgets)} layers, {self.average_budget:.1f} on average{kept}",
            f"layer {'rank' if self.layer_ranks else 'weight':>9}   budget",
        ]
        # Without ranks the weight is shown, since another measure may be several numbers per layer.
        column = self.layer_ranks or self.weights
        for i, (number, budget) in enumerate(zip(column, self.budgets, strict=True)):
            bar = "#" * round(_BAR_WIDTH * budget / longest)
            shown = f"{number:>9.3f}" if self.layer_ranks else f"{number:>9.4g}"
            lines.append(f"{i:>5} {shown} {budget:>8}  {bar}".rstrip())
        return "\n".join(lines)


class BudgetAllocator:
    """Allocate whole tokens to layers: weights by strategy, water-filling within bounds, largest remainder.

    Parameters
    ----------
    strategy : str, default "proportional"
        A key of `STRATEGIES`.
    min_budget : int, default 4
        Fewest tokens a layer keeps (at most ``seq_len``).
    max_budget : int, optional
        Most tokens a layer keeps; tokens that a capped layer cannot take go to the others.
    **strategy_options
        Options of the strategy, such as ``exponent`` or ``temperature``.

    Raises
    ------
    UnknownNameError
        If no strategy has that name.
    ConfigError
        If the strategy does not have an option, or a value is outside its range.

    Examples
    --------
    >>> BudgetAllocator(min_budget=4).allocate([1.0, 2.0, 7.0], 100).budgets
    [10, 20, 70]
    """

    def __init__(
        self,
        strategy: str = "proportional",
        min_budget: int = 4,
        max_budget: int | None = None,
        **strategy_options: Any,
    ) -> None:
        self.strategy_options = check_options(strategy, strategy_options)
        self.strategy = strategy
        self.min_budget = check_integer("min_budget", min_budget, 0)
        self.max_budget = None if max_budget is None else check_integer("max_budget", max_budget, 1)
        if self.max_budget is not None and self.max_budget < self.min_budget:
            raise ConfigError(
                f"max_budget={self.max_budget} is below min_budget={self.min_budget}; "
                "raise max_budget or lower min_budget."
            )

    def allocate(
        self,
        layer_ranks: Any,
        total_budget: int | None = None,
        *,
        seq_len: int | None = None,
        compression_ratio: float | None = None,
    ) -> BudgetAllocation:
        """Allocate a budget to each layer.

        Parameters
        ----------
        layer_ranks : sequence, array or tensor
            ``[layer]`` effective ranks, finite and non-negative, or the strategy's own measure
            (`Strategy.measure`). All zero gives uniform budgets.
        total_budget : int, optional
            Tokens over all layers together.
        seq_len : int, optional
            Tokens each layer holds uncompressed; caps every layer, the minimum included.
        compression_ratio : float, optional
            Fraction of the KV cache kept, in (0, 1], instead of ``total_budget``. With ``seq_len`` it gives
            ``round(compression_ratio * seq_len * layers)`` tokens.

        Returns
        -------
        BudgetAllocation
            ``sum(budgets) == total_budget`` and ``min <= budget <= max`` for each layer.

        Raises
        ------
        ConfigError
            If the total is given in both ways or in neither, or a value is outside its range.
        BudgetError
            If no budgets satisfy total and bounds; the message names the nearest feasible total.
        InputError
            If ``layer_ranks`` is not a flat sequence of numbers.
        DegenerateAttentionError
            If there is no layer, or a rank is NaN, infinite or negative.

        Examples
        --------
        >>> BudgetAllocator("uniform").allocate([3.0, 9.0], seq_len=100, compression_ratio=0.3).budgets
        [30, 30]
        """
        strategy = get_strategy(self.strategy)
        measures = check_measures(layer_ranks, self.strategy, strategy.scalar)
        layers = len(measures)
        if seq_len is not None:
            seq_len = check_integer("seq_len", seq_len, 1)
        total = _total(total_budget, seq_len, compression_ratio, layers)
        lower = self.min_budget if seq_len is None else min(self.min_budget, seq_len)
        bounds = [limit for limit in (self.max_budget, seq_len) if limit is not None]
        upper = min(bounds) if bounds else None
        if total < lower * layers:
            raise BudgetError(
                f"a total of {total} tokens over {layers} layers is below the minimum of {lower * layers} "
                f"({lower} per layer); raise the total to at least {lower * layers} or lower min_budget."
            )
        if upper is not None and total > upper * layers:
            raise BudgetError(
                f"a total of {total} tokens over {layers} layers is above the maximum of {upper * layers} "
                f"({upper} per layer); lower the total to at most {upper * layers} or raise max_budget "
                "(seq_len caps it)."
            )
        limits = Limits(total, seq_len)
        weights = compute_weights(measures, self.strategy, limits=limits, **self.strategy_options)
        bound = math.inf if upper is None else upper
        shares = allocate_shares(weights, total, lower, bound)
        of_ranks = strategy.measure in ("rank", None)
        return BudgetAllocation(
            budgets=allocate_integers(shares, total, lower, bound, weights).tolist(),
            total_budget=total,
            layer_ranks=measures.tolist() if of_ranks else [],
            layer_measures=[] if of_ranks else measures.tolist(),
            weights=weights.tolist(),
            strategy=self.strategy,
            strategy_options=dict(self.strategy_options),
            min_budget=lower,
            max_budget=self.max_budget,
            seq_len=seq_len,
        )

    @staticmethod
    def compare(
        layer_ranks: Any,
        total_budget: int | None = None,
        *,
        seq_len: int | None = None,
        compression_ratio: float | None = None,
        strategies: Iterable[str] | None = None,
        min_budget: int = 4,
        max_budget: int | None = None,
    ) -> dict[str, BudgetAllocation]:
        """Allocate the same total under several strategies with their default options.

        Parameters
        ----------
        layer_ranks, total_budget, seq_len, compression_ratio
            As in `allocate`.
        strategies : iterable of str, optional
            Keys of `STRATEGIES`; by default all that read ranks or no measure at all.
        min_budget, max_budget
            As in the class.

        Returns
        -------
        dict
            One `BudgetAllocation` per strategy, in the order given.

        Raises
        ------
        UnknownNameError, ConfigError, BudgetError, InputError, DegenerateAttentionError
            As `allocate`.

        Examples
        --------
        >>> both = BudgetAllocator.compare([1.0, 3.0], 40, strategies=["uniform", "inverse"])
        >>> {name: allocation.budgets for name, allocation in both.items()}
        {'uniform': [20, 20], 'inverse': [30, 10]}
        """
        if isinstance(strategies, str):
            strategies = [strategies]
        ranks = check_ranks(layer_ranks)
        comparable = [name for name, known in STRATEGIES.items() if known.measure in ("rank", None)]
        return {
            name: BudgetAllocator(name, min_budget, max_budget).allocate(
                ranks, total_budget, seq_len=seq_len, compression_ratio=compression_ratio
            )
            for name in (comparable if strategies is None else strategies)
        }


def _total(
    total_budget: int | None, seq_len: int | None, compression_ratio: float | None, layers: int
) -> int:
    """Compute the tokens over all layers from the total, or from the ratio and the length."""
    if total_budget is not None and compression_ratio is not None:
        raise ConfigError(
            f"total_budget={total_budget!r} and compression_ratio={compression_ratio!r} both set the total; "
            "give one of them."
        )
    if total_budget is not None:
        return check_integer("total_budget", total_budget, 0)
    if compression_ratio is None or seq_len is None:
        raise ConfigError(
            "the total is unknown: give total_budget (tokens over all layers), or both seq_len and "
            "compression_ratio (the fraction of the cache kept)."
        )
    real = isinstance(compression_ratio, numbers.Real) and not isinstance(compression_ratio, bool)
    if not real or not 0 < compression_ratio <= 1:
        raise ConfigError(
            f"compression_ratio must be in (0, 1], got {compression_ratio!r}: give the fraction of the KV "
            "cache kept (0.3 keeps 30%), not the fraction removed."
        )
    return round(float(compression_ratio) * seq_len * layers)
