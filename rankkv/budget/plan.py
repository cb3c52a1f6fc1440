"""BudgetPlan: the budgets of one row of a batch, updated as the measures of its layers arrive."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..config import (
    FLOOR_TOKENS,
    GLOBAL_FLOOR_TOKENS,
    GLOBAL_RECENT_TOKENS,
    PROFILE_USERS,
    SCORE_WEIGHT_USERS,
    RankKVConfig,
    count_spanned,
)
from ..errors import BudgetError, ProfileError
from ..limits import Limits
from ..profile.record import RankProfile
from .apportion import allocate_integers, allocate_shares, ceil_shares, spread_shares
from .calibrated import compute_curve
from .distortion import allocate_by_distortion
from .heads import (
    HeadCurves,
    HeadSplit,
    HeadWeights,
    allocate_by_head_curves,
    compute_head_weights,
    fit_head_curves,
    join_heads,
)
from .scores import HeadScores, ScorePool
from .strategies import check_options, compute_weights, get_strategy

# A ratio whose total is raised to the smallest floors.
_SMALLEST_RATIO = 1e-9


class BudgetPlan:
    """Budgets of the compressible layers for one prompt of ``length`` tokens.

    Every layer keeps between ``floor = min(length, max(16, average budget // 2))`` (or ``min_budget``) and ``length``
    tokens. A total below the sum of the floors is raised to it if it comes from a ratio. If it comes from an explicit
    budget, it is an error.

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

    Notes
    -----
    With ``decode="bounded"`` the budget limits how far a layer may grow, so the prompt's length bounds neither side.

    Raises
    ------
    BudgetError
        If an explicit ``budget`` or ``total_budget`` lies below the floor; the message names the smallest budget.

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
        self._profile = find_used_profile(config, self.strategy, self.layer_indices)
        self._head_splits = weigh_heads(config, self._profile)
        if self._profile is not None and config.head_budgets == "profile":
            self._profile = join_heads(self._profile)
        # Distortion curves give budgets directly; every other strategy gives weights.
        self._by_distortion = self.strategy == "profile" and self.strategy_options.get("exponent") is None
        #: True if each head's eviction error is measured and decides the head's budget.
        self.measures_heads = config.head_budgets == "distortion"
        # The total is then allocated to all heads of all layers; a layer's budget is the mean over its heads.
        self._by_heads = self.measures_heads and self.strategy == "distortion"
        #: Error curves of the heads of each layer, if heads are measured.
        self.head_curves: list[HeadCurves] = []
        #: True if the strategy reads the scores of all heads.
        self.reads_scores = self._strategy.by_scores
        # Smallest score that stays, if the strategy has one.
        self._threshold: float | None = None
        if self._strategy.by_threshold:
            self._threshold = check_options(self.strategy, self.strategy_options)["threshold"]
        self._splits_by_scores = self.reads_scores and config.head_budgets == "adaptive"
        self._joins_heads = self.reads_scores and config.head_budgets is None
        #: Scores of the heads of each layer, if they split its budget.
        self.head_scores: list[HeadScores] = []
        self._pool = ScorePool()
        #: Factors of the heads' scores from the profile, ``[layer][kv_head]``; None without.
        self.score_weights = find_score_weights(config) if self.strategy in SCORE_WEIGHT_USERS else None
        # Allocations by distortion curves, by the number of layers they include.
        self._allocated: dict[int, np.ndarray] = {}
        #: Name of the strategy's measure; None if it measures nothing.
        self.measure = "head_distortion" if self._by_heads else self._strategy.measure
        self.notes: list[str] = []
        #: Measure of each layer. After `finish`, a measure of several numbers is replaced by the layer's weight.
        self.layer_measures: list[Any] = []
        #: Effective ranks of the layers, if the strategy reads them beside another measure.
        self.ranks: list[float] = []
        self.budgets: list[int] = []
        #: Share of the attention of the prompt's last queries that goes to evicted tokens; None if not measured.
        self.lost_attention: float | None = None
        self._config = config
        # What was added, for plans of other totals; empty unless the total is still open.
        self._added_measures: list[tuple[Any, ...]] = []
        bounded = config.decode == "bounded"
        if total_budget is not None:
            given, total = f"total_budget={total_budget}", total_budget
        elif config.budget is not None:
            given, total = f"budget={config.budget} tokens per layer", config.budget * count
        else:
            given, total = "", round(config.compression_ratio * length * count)
        if not bounded:
            total = min(total, length * count)
        if config.min_budget is not None:
            minimum = config.min_budget
        elif self.reads_scores:
            # One top-k decides, so a layer's floor is that of its heads: sinks, newest tokens, a share of the average.
            protected = GLOBAL_RECENT_TOKENS + config.sink_size
            minimum = max(GLOBAL_FLOOR_TOKENS, protected)
            if self._threshold is None:
                minimum = max(minimum, int(config.head_floor * total / count))
        else:
            minimum = max(FLOOR_TOKENS, total // count // 2)
        #: Tokens in spans that the options protect.
        self.spanned = spanned = count_spanned(config.protect, length)
        # A layer needs room for its sinks and newest tokens besides the protected spans.
        minimum = max(minimum, spanned + FLOOR_TOKENS) if spanned else minimum
        self.floor = minimum if bounded else min(length, minimum)
        least = self.floor * count
        if total < least and given:
            raise BudgetError(
                f"{given} lies below the floor of {self.floor} tokens in each of {count} layers for a prompt of "
                f"{length} tokens{f', {spanned} of them protected' if spanned else ''}; give at least "
                f"budget={self.floor} (total_budget={least}), or a smaller min_budget."
            )
        if total < least:
            self.notes.append(
                f"  the ratio gives {total} tokens, raised to {least}: the floor is {self.floor} per layer"
            )
            total = least
        self.total_budget = total
        self.limits = Limits(total, length, config.window_size, self.floor)
        # Every head keeps at least the fixed floor, so that its sinks and newest tokens stay.
        fixed = self.floor if self.reads_scores else FLOOR_TOKENS
        head_floor = min(fixed, self.floor)
        if self._threshold is None:
            # A total that only bounds what the threshold keeps sets no floor.
            head_floor = max(head_floor, int(config.head_floor * total / count))
        #: Limits of single heads; their floor may be lower than that of their layer.
        self.head_limits = replace(self.limits, floor=head_floor)
        self._bounded = bounded
        self._least = max(self.floor, head_floor) if self._by_heads or self.reads_scores else self.floor
        self._least = self._least if bounded else min(length, self._least)
        self._lower = np.full(count, self._least, dtype=np.int64)
        self._upper = np.full(count, total if bounded else length, dtype=np.int64)
        self._all_there = True
        self._added = 0
        #: Plan whose floors the measures are made for: the smallest one while the total is open, else this one.
        self.measuring: BudgetPlan = self
        if config.max_loss is not None and total_budget is None:
            self.measuring = BudgetPlan(_set_ratio(config, _SMALLEST_RATIO), length, layer_indices)

    @staticmethod
    def check(config: RankKVConfig) -> None:
        """Check the strategy and its options before any model runs.

        Raises
        ------
        UnknownNameError, ConfigError
            As `check_options`.
        """
        name, options = config.resolve_strategy()
        check_options(name, options)

    @property
    def layers_added(self) -> int:
        """Number of layers measured so far."""
        return self._added

    @property
    def layer_ranks(self) -> list[float]:
        """Effective ranks of the layers so far; empty if the strategy does not read them."""
        return list(self.layer_measures if self.measure == "rank" else self.ranks)

    @property
    def head_floor(self) -> int:
        """Tokens that every head keeps."""
        return self.head_limits.floor

    @property
    def needs_ranks(self) -> bool:
        """True if the strategy reads the layers' effective ranks beside another measure."""
        return self._strategy.ranked

    @property
    def needs_all_layers(self) -> bool:
        """True if a layer's weight depends on later layers, so that nothing can be evicted before the last."""
        return self.measure is not None and not self._strategy.layerwise

    def add_layer(
        self,
        measured: Any,
        available: int | None = None,
        rank: float | None = None,
        head_errors: Any = None,
        head_scores: Any = None,
    ) -> None:
        """Add the measure of the next layer.

        A measure that is not finite gives the layer its uniform share, with a warning that names the layer.

        Parameters
        ----------
        measured : float, array or None
            The layer's effective rank, or another measure of the strategy. None if the strategy measures nothing.
        available : int, optional
            Tokens the layer still holds, if some were evicted earlier.
        rank : float, optional
            The layer's effective rank, if the strategy reads it beside another measure.
        head_errors : array, optional
            ``[kv_head, budget]`` eviction error of each head, if heads are measured.
        head_scores : array, optional
            ``[kv_head, token]`` descending scores of the tokens beyond each head's floor, if the strategy reads them.
        """
        if self.measuring is not self:
            self._added_measures.append((measured, available, rank, head_errors, head_scores))
        self._add(measured, available, rank, head_errors, head_scores)

    def _add(
        self, measured: Any, available: int | None, rank: Any, head_errors: Any, head_scores: Any
    ) -> None:
        if available is not None and available < self.length and not self._bounded:
            self._upper[self._added] = available
            self._lower[self._added] = min(self._least, available)
            self._all_there = False
        if head_scores is not None:
            self._add_scores(np.asarray(head_scores, dtype=np.float64))
        if measured is not None:
            if not (np.isfinite(measured).all() and np.isfinite(rank or 0.0)):
                ranked = self.measure == "rank" or not np.isfinite(rank or 0.0)
                # Equal bounds fix the budget; the zero measure then has no effect on this layer.
                self._fix_share("effective rank" if ranked else f"{self.strategy} measure")
                measured = 0.0 if np.ndim(measured) == 0 else np.zeros_like(measured)
                rank = None if rank is None else 0.0
            self.layer_measures.append(measured)
        if rank is not None:
            self.ranks.append(rank)
        if self.measures_heads:
            errors = np.nan_to_num(measured if self._by_heads else head_errors, posinf=0.0)
            self.head_curves.append(fit_head_curves(errors, self.length, self.head_limits.floor))
        self._added += 1

    def _fix_share(self, name: str) -> None:
        """Give the layer that is being added its uniform share, since what ``name`` says is not finite."""
        layer = self.layer_indices[self._added]
        share = self.total_budget // len(self._lower)
        warnings.warn(
            f"the attention of layer {layer} is not finite, so its {name} is unknown and it gets its "
            f"uniform share of {share} tokens; load the model in bfloat16 or float32, not float16.",
            stacklevel=4,
        )
        self.notes.append(
            f"  layer {layer} has no finite {name.rpartition(' ')[2]} and got its uniform share"
        )
        share = min(share, int(self._upper[self._added]))
        self._lower[self._added] = self._upper[self._added] = share

    def _add_scores(self, table: np.ndarray) -> None:
        """Add the scores of a layer's heads to the pool."""
        if (table == np.finfo(np.float32).min).any():
            # The selection ranks NaN as the lowest finite number.
            self._fix_share("order of scores")
        if self.score_weights is not None:
            weights = np.asarray(self.score_weights[self._added], dtype=np.float64)
            if len(weights) != len(table):
                raise ProfileError(
                    f"the profile weighs the scores of {len(weights)} heads, but layer "
                    f"{self.layer_indices[self._added]} has {len(table)}: calibrate again, or use profile=None."
                )
            table = table * weights[:, None]
        # Scores are sorted beyond the smallest floor.
        scores = HeadScores(table[:, self.head_floor - self.measuring.head_floor :], self.head_floor)
        if self._splits_by_scores:
            self.head_scores.append(self._cut(scores))
        scores = self._cut(scores.average() if self._joins_heads else scores)
        lower, upper = int(self._lower[self._added]), int(self._upper[self._added])
        self._pool.add(self._added, scores, lower, upper)

    def _cut(self, scores: HeadScores) -> HeadScores:
        """Return the scores that reach the threshold, all without one."""
        if self._threshold is None:
            return scores
        return HeadScores(np.where(scores.table >= self._threshold, scores.table, -np.inf), scores.floor)

    def compute_ceilings(self) -> list[int]:
        """Compute upper bounds of the budgets of the layers so far; the final budgets never exceed them."""
        if self.reads_scores:
            shares = self._compute_shares(self._added)
        elif self.measure is None and self._all_there:
            shares = self._compute_shares(len(self._lower))[: self._added]
        elif self._strategy.layerwise or self.measure is None:
            shares = self._compute_shares(self._added)
        else:
            # The layers' weights still depend on later layers, so nothing can be evicted yet.
            return self._upper[: self._added].tolist()
        return ceil_shares(shares).tolist()

    def finish(self) -> list[int]:
        """Allocate the budgets, one integer per layer, summing exactly to the total."""
        count = len(self._lower)
        self.total_budget = min(self.total_budget, int(self._upper.sum()))
        shares = self._compute_shares(count)
        if self._threshold is not None:
            shares = self._round_up(shares)
        weights = shares if self._by_heads or self.reads_scores else self._compute_weights(count)
        budgets = allocate_integers(shares, self.total_budget, self._lower, self._upper, weights)
        self.budgets = budgets.tolist()
        if not self._strategy.scalar:
            self.layer_measures = weights.tolist()
        return list(self.budgets)

    def _round_up(self, shares: np.ndarray) -> np.ndarray:
        """Return whole shares that hold every score above the threshold, unless the total forbids it."""
        whole = np.minimum(np.ceil(shares - 1e-9), self._upper)
        if whole.sum() > self.total_budget:
            left = float(self.total_budget - shares.sum())
            return spread_shares(shares, left, self._upper.astype(np.float64))
        self.total_budget = int(whole.sum())
        return whole

    @property
    def least_total(self) -> int:
        """Smallest total that the layers can keep."""
        return self.measuring.total_budget

    def repeat(self, total: int) -> BudgetPlan:
        """Return the finished plan of another total, from the measures that were added to this one.

        Parameters
        ----------
        total : int
            Tokens over all layers, raised to the smallest floors.
        """
        layers = len(self._lower)
        share = min(1.0, max(total, 1) / max(1, self.length * layers))
        plan = BudgetPlan(_set_ratio(self._config, share), self.length, self.layer_indices)
        plan.measuring = self.measuring
        for added in self._added_measures:
            plan._add(*added)
        plan.finish()
        return plan

    def settle(self) -> None:
        """Forget the scores of all tokens, and remember the number of tokens that each head got."""
        self._pool = ScorePool()
        self._added_measures, self.measuring = [], self
        if self.head_scores:
            self.head_curves = [
                scores.settle(max(0, budget - self.spanned))
                for scores, budget in zip(self.head_scores, self.budgets, strict=True)
            ]
            self.head_scores = []

    def find_head_split(self, place: int) -> HeadSplit | None:
        """Return the split of a layer's budget over its heads.

        None if all heads keep the same number of tokens, or if their tokens compete for one shared budget.

        Parameters
        ----------
        place : int
            Index of the layer among the compressible layers.
        """
        splits: Sequence[HeadSplit] = self._head_splits
        if self._splits_by_scores and self.head_scores:
            splits = self.head_scores
        elif self.measures_heads or self._splits_by_scores:
            splits = self.head_curves
        return splits[place] if place < len(splits) else None

    def _compute_weights(self, count: int) -> np.ndarray:
        options: dict[str, Any] = {
            "limits": self.limits,
            "profile": self._profile,
            "ranks": np.array(self.ranks[:count]) if self.ranks else None,
            **self.strategy_options,
        }
        if self.measure is not None:
            return compute_weights(_stack(self.layer_measures[:count]), self.strategy, **options)
        return compute_weights([1.0] * len(self._lower), self.strategy, **options)[:count]

    def _compute_shares(self, count: int) -> np.ndarray:
        if self._by_distortion and self._profile is not None:
            return self._allocate_by_distortion(self._profile, count)
        if self.reads_scores:
            return self._allocate_by_scores(count)
        if self._by_heads:
            bounds = self._lower[:count], self._upper[:count]
            return allocate_by_head_curves(self.head_curves[:count], self.total_budget, *bounds)
        return allocate_shares(
            self._compute_weights(count),
            self.total_budget,
            self._lower[:count],
            self._upper[:count],
            partial=True,
        )

    def _allocate_by_scores(self, count: int) -> np.ndarray:
        """Allocate by one top-k over the scores of all layers so far."""
        # Layers to come keep their floor, unless tokens evicted earlier have lowered it.
        reserved = self._lower if self._all_there else self._lower[:count]
        low, high = self._lower[:count].astype(np.float64), self._upper[:count].astype(np.float64)
        left = max(0.0, float(self.total_budget - reserved.sum()))
        self._pool.share(left)
        result = low + self._pool.count(count)
        if self._threshold is not None:
            return result
        # Beyond all scores, the rest is spread evenly.
        return spread_shares(result, left - float((result - low).sum()), high)

    def _allocate_by_distortion(self, profile: RankProfile, count: int) -> np.ndarray:
        known = self._allocated.get(count)
        if known is None or not self._all_there:
            bounds = list(zip(self._lower[:count].tolist(), self._upper[:count].tolist(), strict=True))
            curves = [
                compute_curve(profile, layer, self.length, *bound) for layer, bound in enumerate(bounds)
            ]
            known = allocate_by_distortion(
                curves, self.total_budget, self._lower[:count], self._upper[:count]
            ).astype(np.float64)
            self._allocated[count] = known
        return known


def _set_ratio(config: RankKVConfig, ratio: float) -> RankKVConfig:
    """Return the options with a ratio as the only thing that sets the size."""
    return replace(config, compression_ratio=ratio, budget=None, max_loss=None, on_doubt="say")


def find_used_profile(config: RankKVConfig, strategy: str, layer_indices: list[int]) -> RankProfile | None:
    """Return the profile that a strategy uses, or None if it uses none.

    Raises
    ------
    ProfileError
        If the strategy needs a profile and none is known, or the profile has other layers.
    """
    if strategy not in PROFILE_USERS:
        return None
    profile = config.profile
    if not isinstance(profile, RankProfile):
        raise ProfileError(
            f"strategy {strategy!r} needs a profile of the model, but none is known: measure one with rankkv "
            "calibrate, or give profile=RankProfile.load(path)."
        )
    if list(profile.layer_indices) != layer_indices:
        raise ProfileError(
            f"the profile has layers {list(profile.layer_indices)} but the model compresses {layer_indices}: it "
            "belongs to another model, so calibrate this one."
        )
    return profile


def find_score_weights(config: RankKVConfig) -> Sequence[Sequence[float]] | None:
    """Return the profile's factor of each head's scores, ``[layer][kv_head]``; None if it has none of this selector."""
    found = config.profile.score_weights if isinstance(config.profile, RankProfile) else {}
    return found["weights"] if found.get("selector") == str(config.selector) else None


def weigh_heads(config: RankKVConfig, profile: RankProfile | None) -> Sequence[HeadSplit]:
    """Return the split of each layer's budget by its heads' measured weights.

    Empty unless ``head_budgets="profile"``.

    Parameters
    ----------
    config : RankKVConfig
        All options.
    profile : RankProfile, optional
        Profile that the strategy uses; by default the profile of the options.

    Raises
    ------
    ProfileError
        As `compute_head_weights`.
    """
    used = profile if profile is not None else config.profile
    if config.head_budgets != "profile" or not isinstance(used, RankProfile):
        return []
    return [HeadWeights(row.tolist(), config.head_floor) for row in compute_head_weights(used)]


def _stack(measures: list[Any]) -> Any:
    """Stack the layers' measures, padded with zeros if layers differ in heads or numbers."""
    shapes = {np.shape(measured) for measured in measures}
    if len(shapes) == 1:
        return np.array(measures)
    table = np.zeros((len(measures), *map(max, zip(*shapes, strict=True))))
    for row, measured in zip(table, measures, strict=True):
        row[tuple(slice(size) for size in np.shape(measured))] = measured
    return table
