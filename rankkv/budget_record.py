"""What one allocation came to, and what it was computed from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

_BAR_WIDTH = 40


@dataclass(frozen=True)
class BudgetAllocation:
    """Budgets of all layers and what they were computed from.

    Attributes
    ----------
    budgets : list of int
        Tokens each layer keeps; sums to ``total_budget``.
    total_budget : int
        Tokens over all layers.
    layer_ranks, weights : list of float
        The ranks given and the weights the strategy made of them.  No ranks where the strategy measures something
        else: that is in ``layer_measures``.
    strategy, strategy_options
        The strategy and all its options, defaults included.
    min_budget : int
        Lower bound of a layer, tokens.
    max_budget : int or None
        Upper bound of a layer, tokens; None is no bound but ``seq_len``.
    seq_len : int or None
        Tokens a layer holds uncompressed, where known.
    layer_measures : list
        What was given in place of ranks, for a strategy that measures something else of each layer.
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
        """Tokens a layer keeps on average."""
        return self.total_budget / len(self.budgets)

    @property
    def compression_ratio(self) -> float | None:
        """Fraction of the KV cache kept; None while ``seq_len`` is unknown."""
        return None if self.seq_len is None else self.total_budget / (self.seq_len * len(self.budgets))

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON types."""
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
        """Return a plain text table with one bar a layer, as long as its budget."""
        options = ", ".join(f"{name}={value}" for name, value in self.strategy_options.items())
        kept = "" if self.compression_ratio is None else f", {self.compression_ratio:.1%} of the cache kept"
        longest = max(1, *self.budgets)
        lines = [
            f"strategy {self.strategy}({options}): {self.total_budget} tokens over "
            f"{len(self.budgets)} layers, {self.average_budget:.1f} on average{kept}",
            f"layer {'rank' if self.layer_ranks else 'weight':>9}   budget",
        ]
        # The weight stands for a measure that is no rank: it may be several numbers.
        numbers = self.layer_ranks or self.weights
        for i, (number, budget) in enumerate(zip(numbers, self.budgets, strict=True)):
            bar = "#" * round(_BAR_WIDTH * budget / longest)
            shown = f"{number:>9.3f}" if self.layer_ranks else f"{number:>9.4g}"
            lines.append(f"{i:>5} {shown} {budget:>8}  {bar}".rstrip())
        return "\n".join(lines)
