"""The budgets of one row of a batch, from its length and the ranks of its layers as they arrive."""

from __future__ import annotations

import math
import warnings

import numpy as np

from .budget_allocation import (
    allocate_integers,
    allocate_shares,
    ceil_shares,
    check_options,
    compute_weights,
    get_strategy,
)
from .config import FLOOR_TOKENS, RankKVConfig
from .errors import BudgetError


class BudgetPlan:
    """Budgets of the compressible layers for one prompt of ``length`` tokens.

    Every layer keeps between ``floor = min(length, max(16, average budget // 2))`` (or ``min_budget``) and ``length``
    tokens.  A total that comes from a ratio is raised to the sum of the floors where it lies below; an explicit budget
    is not.

    Parameters
    ----------
    config : RankKVConfig
        The options.
    length : int
        Real tokens of the prompt.
    layer_indices : list of int
        Model indices of the compressible layers.
    total_budget : int, optional
        Tokens over all layers; overrides the config's ``budget`` and ``compression_ratio``.

    Raises
    ------
    BudgetError
        If an explicit ``budget`` or ``total_budget`` lies below the floor; the message names the smallest one.

    Examples
    --------
    >>> plan = BudgetPlan(RankKVConfig(0.5, strategy="proportional"), length=100, layer_indices=[0, 1])
    >>> plan.add_layer(2.0); plan.add_layer(3.0); plan.finish()
    [40, 60]
    """

    def __init__(
        self, config: RankKVConfig, length: int, layer_indices: list[int], total_budget: int | None = None
    ) -> None:
        count = len(layer_indices)
        self.length = length
        self.layer_indices = list(layer_indices)
        self.strategy, self.strategy_options = config.resolve_strategy()
        self._strategy = get_strategy(self.strategy)
        self.needs_ranks = self._strategy.uses_ranks
        self.notes: list[str] = []
        self.layer_ranks: list[float] = []
        self.budgets: list[int] = []
        if total_budget is not None:
            asked, total = f"total_budget={total_budget}", min(total_budget, length * count)
        elif config.budget is not None:
            asked, total = f"budget={config.budget} tokens a layer", min(config.budget, length) * count
        else:
            asked, total = "", round(config.compression_ratio * length * count)
        minimum = max(FLOOR_TOKENS, total // count // 2) if config.min_budget is None else config.min_budget
        self.floor = min(length, minimum)
        least = self.floor * count
        if total < least and asked:
            raise BudgetError(
                f"{asked} lies below the floor of {self.floor} tokens in each of {count} layers for a prompt of {length} "
                f"tokens; give at least budget={self.floor} (total_budget={least}), or a smaller min_budget."
            )
        if total < least:
            self.notes.append(
                f"  the ratio asks for {total} tokens, raised to the floor of {self.floor} a layer: {least}"
            )
            total = least
        self.total_budget = total
        self._lower = np.full(count, self.floor, dtype=np.int64)
        self._upper = np.full(count, length, dtype=np.int64)
        self._added = 0

    @staticmethod
    def check(config: RankKVConfig) -> None:
        """Raise, before any model runs, if the strategy or an option of it is unknown or out of range."""
        name, options = config.resolve_strategy()
        check_options(name, options)

    def add_layer(self, rank: float | None) -> None:
        """Take the rank of the next layer (None where the strategy needs none).

        A rank that is not finite gives the layer its uniform share, with a warning that names it.
        """
        if rank is not None:
            if not math.isfinite(rank):
                layer = self.layer_indices[self._added]
                share = self.total_budget // len(self._lower)
                warnings.warn(
                    f"the attention of layer {layer} is not finite, so its effective rank is unknown; the layer gets its "
                    f"uniform share of {share} tokens. Check the model's dtype (bfloat16 or float32 instead of float16).",
                    stacklevel=2,
                )
                self.notes.append(f"  layer {layer} has no finite rank and got its uniform share")
                self._lower[self._added] = self._upper[self._added] = share
                rank = 0.0
            self.layer_ranks.append(rank)
        self._added += 1

    def compute_ceilings(self) -> list[int]:
        """Compute what the layers so far may keep while others are still to come, never less than in the end."""
        if not self.needs_ranks:
            shares = self._compute_shares(len(self._lower))[: self._added]
        elif self._strategy.layerwise:
            shares = self._compute_shares(self._added)
        else:
            # The weight of a layer still depends on those to come, so nothing can be released yet.
            return self._upper[: self._added].tolist()
        return ceil_shares(shares).tolist()

    def finish(self) -> list[int]:
        """Allocate the budgets, one integer a layer, summing exactly to the total."""
        count = len(self._lower)
        shares = self._compute_shares(count)
        weights = self._compute_weights(count)
        budgets = allocate_integers(shares, self.total_budget, self._lower, self._upper, weights)
        self.budgets = budgets.tolist()
        return list(self.budgets)

    def _compute_weights(self, count: int) -> np.ndarray:
        ranks = self.layer_ranks[:count] if self.needs_ranks else [1.0] * count
        return compute_weights(ranks, self.strategy, **self.strategy_options)

    def _compute_shares(self, count: int) -> np.ndarray:
        return allocate_shares(
            self._compute_weights(count), self.total_budget, self._lower[:count], self._upper[:count], partial=True
        )
