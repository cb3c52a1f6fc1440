"""Quality of a compressed cache: the attention it loses, the loss to expect, and the smallest cache below a bound."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..budget.attention import AttentionTable, compute_lost
from ..budget.plan import BudgetPlan
from ..config import PREDICTED_SELECTORS, RankKVConfig
from ..observe.observation import Observation
from ..profile.known import find_profile
from ..profile.loss_curve import LossCurve, load_default_curves
from ..profile.record import RankProfile
from ..selection import Selector
from ..utils.devices import spread_numbers
from .layer import RankKVLayer

#: Windows of newest queries that test what is lost, and the step between two of these queries.
TEST_WINDOWS, TEST_STEP = 2, 8
#: Prompts shorter than this were not measured.
SHORTEST_PROMPT = 256
#: Tokens of a span that no head keeps, from which on it is a doubt.
LONGEST_GAP = 32
Spans = Sequence[tuple[int, int]]

# The search for the smallest cache ends when the share lost is met to this factor, or after so many tries.
_TOLERANCE, _MOST_TRIES = 1.04, 6
# Part of the share that may be lost which a try aims at.
_SAFE_SIDE = 0.98


@dataclass(frozen=True)
class LayerAttention:
    """Attention of one layer's test queries to its tokens, cumulative in the order in which they are kept.

    Attributes
    ----------
    newest, first, others : Tensor
        ``[batch, kv_head, token + 1]`` float32, see :class:`rankkv.budget.attention.AttentionTable`.
    """

    newest: Tensor
    first: Tensor
    others: Tensor


def measure_attention(
    observation: Observation, scores: Tensor, protector: Selector, queries: int, protect: Spans = ()
) -> LayerAttention:
    """Measure the attention to each token and add it up in the order in which tokens are kept.

    Every eighth of the last ``queries`` queries tests.  Their attention is averaged over the query heads of a group.

    Parameters
    ----------
    observation : Observation
        Queries, keys and mask of the layer.
    scores : Tensor
        ``[batch, kv_head or 1, key]`` scores that select.
    protector : Selector
        Counts the protected tokens of a budget.
    queries : int
        Newest queries to choose from.
    protect : sequence of (int, int), default ()
        Spans of real tokens that every head keeps.
    """
    last = observation.query_length - 1
    start = max(0, last - TEST_STEP * ((min(queries, last + 1) - 1) // TEST_STEP))
    shares = observation.compute_group_mean(
        observation.compute_attention(slice(start, None, TEST_STEP)).sum(dim=2)
    )
    shares = torch.nan_to_num(observation.gather_over_shards(shares))
    scores = observation.gather_over_shards(scores.float().expand(-1, observation.kv_heads, -1))
    index = observation.real_index
    if index.shape[1] > 1:
        index = observation.gather_over_shards(index)
    counts = [
        protector.count_protected(max(1, n), observation.window_size, observation.sink_size)
        for n in observation.lengths
    ]
    recent, sinks = (max(column) for column in zip(*counts, strict=True))
    recents, firsts = (spread_numbers(list(column), index.device) for column in zip(*counts, strict=True))
    age = spread_numbers(observation.lengths, index.device) - 1 - index
    index, age = index.expand(shares.shape), age.expand(shares.shape)
    is_real = index >= 0
    is_first = is_real & (index < firsts)
    is_newest = is_real & (age < recents) & ~is_first
    is_other = is_real & ~is_newest & ~is_first
    order = scores.nan_to_num(nan=torch.finfo(torch.float32).min)
    for first, stop in protect:
        order = order.masked_fill((index >= first) & (index < stop), float("inf"))
    order = order.masked_fill(~is_other, float("-inf"))
    order = order.sort(dim=-1, descending=True, stable=True).indices
    return LayerAttention(
        _add_up(shares, is_newest, age, recent),
        _add_up(shares, is_first, index, sinks),
        _start_at_zero((shares * is_other).gather(-1, order)),
    )


def _add_up(shares: Tensor, chosen: Tensor, place: Tensor, count: int) -> Tensor:
    """Add up the shares of the chosen tokens in the order of their places below ``count``."""
    table = shares.new_zeros(*shares.shape[:2], count + 1)
    table.scatter_add_(-1, torch.where(chosen, place, count), shares * chosen)
    return _start_at_zero(table[..., :count])


def _start_at_zero(values: Tensor) -> Tensor:
    return torch.nn.functional.pad(values.cumsum(dim=-1), (1, 0))


def split_rows(layers: Sequence[LayerAttention]) -> list[list[AttentionTable]]:
    """Return the tables of all layers on the host, ``[row][layer]``."""
    parts = []
    for one in layers:
        # One transfer for each layer: the host waits for the device.
        sizes = [part.shape[-1] for part in (one.newest, one.first, one.others)]
        joined = torch.cat([one.newest, one.first, one.others], dim=-1).cpu().double()
        parts.append([part.numpy() for part in joined.split(sizes, dim=-1)])
    rows = len(parts[0][0]) if parts else 0
    return [[AttentionTable(*(part[row] for part in layer)) for layer in parts] for row in range(rows)]


def note_lost_attention(
    plan: BudgetPlan,
    tables: Sequence[AttentionTable],
    config: RankKVConfig,
    protector: Selector,
    earlier: float = 0.0,
) -> None:
    """Note in a finished plan the share of the test queries' attention that goes to evicted tokens.

    Parameters
    ----------
    plan : BudgetPlan
        The plan; its ``lost_attention`` is set.
    tables : sequence of AttentionTable
        One per layer.
    config : RankKVConfig
        The options.
    protector : Selector
        Counts the protected tokens of a budget.
    earlier : float, default 0
        Share that was lost in earlier compressions.
    """

    def count_protected(count: int) -> tuple[int, int]:
        return protector.count_protected(max(0, count - plan.spanned), config.window_size, config.sink_size)

    kept = []
    for place, (budget, table) in enumerate(zip(plan.budgets, tables, strict=True)):
        heads = len(table.others)
        split = plan.find_head_split(place)
        counts = [budget] * heads
        if split is not None:
            # Every head keeps the protected spans; the rest of the budget is split.
            spanned = min(plan.spanned, budget)
            counts = (split.split(budget - spanned, [plan.length - spanned] * heads) + spanned).tolist()
        kept.append(table.sum_kept(counts, count_protected))
    plan.lost_attention = 1.0 - (1.0 - earlier) * (1.0 - compute_lost(tables, kept))


@dataclass(frozen=True)
class LossBound:
    """Finds the smallest cache of a row whose loss is predicted to stay below a bound.

    Parameters
    ----------
    config : RankKVConfig
        The options, with ``max_loss``.
    curve : LossCurve
        Curve of the model.
    protector : Selector
        Counts the protected tokens of a budget.
    """

    config: RankKVConfig
    curve: LossCurve
    protector: Selector

    def choose(self, plan: BudgetPlan, tables: Sequence[AttentionTable], earlier: float = 0.0) -> BudgetPlan:
        """Return the finished plan of the smallest cache below the bound, or of the largest one that is allowed.

        Parameters
        ----------
        plan : BudgetPlan
            Plan of the largest cache, to which all layers were added.
        tables : sequence of AttentionTable
            One per layer.
        earlier : float, default 0
            Share of the attention that was lost in earlier compressions.
        """
        aim = self.config.max_loss or 0.0
        if self.config.on_doubt == "keep" and list_doubts(plan):
            aim /= 2.0
        most_lost = self.curve.find_lost(aim)
        if self.config.on_doubt == "keep":
            # Beyond the measurements the curve is a guess.
            most_lost = min(most_lost, self.curve.lost[-1])

        def attempt(total: int) -> BudgetPlan:
            with warnings.catch_warnings():
                # The largest plan has warned of layers that are not finite.
                warnings.simplefilter("ignore")
                tried = plan.repeat(total)
            note_lost_attention(tried, tables, self.config, self.protector, earlier)
            return tried

        best = None
        low, high = Trial(plan.least_total - 1, 1.0), Trial(plan.total_budget, 0.0)
        everything = plan.total_budget >= plan.length * len(plan.layer_indices)
        if not everything:
            best = attempt(high.total)
            high = Trial(high.total, best.lost_attention or 0.0)
            if high.lost > most_lost:
                best.notes.append(
                    f"  max_loss={self.config.max_loss:g} is not reached within the largest cache allowed: raise "
                    "compression_ratio or budget, or leave them out"
                )
                return best
        for number in range(_MOST_TRIES):
            if high.total <= low.total + 1 or high.lost >= most_lost / _TOLERANCE:
                break
            total = interpolate(low, high, most_lost, first=number == 0)
            tried = attempt(total)
            trial = Trial(total, tried.lost_attention or 0.0)
            if trial.lost <= most_lost:
                best, high = tried, trial
            else:
                low = trial
        return best or attempt(high.total)


@dataclass(frozen=True)
class Trial:
    """A total of tokens over all layers, and the share of attention that it loses."""

    total: int
    lost: float


def interpolate(low: Trial, high: Trial, most_lost: float, first: bool = False) -> int:
    """Return a total strictly between two, near the one that loses slightly less than ``most_lost``.

    The share lost falls nearly linearly with the logarithm of the total.

    Parameters
    ----------
    low, high : Trial
        A total that loses too much, and one that does not.
    most_lost : float
        Share that may be lost.
    first : bool, default False
        True if ``low`` was not tried: a quarter of ``high`` is a good first guess.

    Examples
    --------
    >>> interpolate(Trial(100, 0.4), Trial(1600, 0.0), 0.2)
    411
    """
    ends = math.log(max(1, low.total)), math.log(max(1, high.total))
    if first:
        middle = ends[1] - math.log(4.0)
    else:
        part = (most_lost * _SAFE_SIDE - high.lost) / max(low.lost - high.lost, 1e-9)
        # Kept away from both ends, so that each try shrinks the range.
        middle = ends[1] + min(max(part, 0.05), 0.95) * (ends[0] - ends[1])
    return min(max(round(math.exp(middle)), low.total + 1), high.total - 1)


def list_doubts(plan: BudgetPlan, curve: LossCurve | None = None) -> list[str]:
    """List the reasons for which a prediction is weak, as phrases.

    Parameters
    ----------
    plan : BudgetPlan
        The plan of a row.
    curve : LossCurve, optional
        Curve of the model; without it only what is known before the budgets.
    """
    doubts = []
    if plan.length < SHORTEST_PROMPT:
        doubts.append(f"a prompt of {plan.length} tokens is shorter than any measured ({SHORTEST_PROMPT})")
    if curve is not None and plan.lost_attention is not None and plan.lost_attention > curve.lost[-1]:
        doubts.append(
            f"{plan.lost_attention:.1%} of the attention is lost, more than in any measurement ({curve.lost[-1]:.1%})"
        )
    return doubts


def find_longest_gap(layers: Sequence[RankKVLayer], start: int, length: int, row: int = 0) -> tuple[int, int]:
    """Find the longest span of prompt tokens that no head of any layer keeps, as (first, stop).

    Parameters
    ----------
    layers : sequence of RankKVLayer
        The compressed layers.
    start : int
        Padding before the row's first token.
    length : int
        Tokens of the prompt.
    row : int, default 0
        Row of the batch.

    Returns
    -------
    (int, int)
        Counted from the row's first token; (0, 0) if every token is kept somewhere.
    """
    is_kept = torch.zeros(length + 1, dtype=torch.bool)
    for layer in layers:
        positions, valid = layer.compute_positions()[row], layer.compute_slot_valid()
        if valid is not None:
            positions, held = torch.broadcast_tensors(positions, valid[row])
            positions = positions[held]
        places = (positions - start).flatten().clamp(0, length).unique().cpu()
        is_kept[places] = True
    # The place behind the prompt ends the last span.
    is_kept[length] = True
    ends = torch.cat([torch.tensor([-1]), is_kept.nonzero()[:, 0]])
    widths = ends[1:] - ends[:-1] - 1
    best = int(widths.argmax())
    return int(ends[best]) + 1 if int(widths[best]) else 0, int(ends[best + 1]) if int(widths[best]) else 0


def find_curve(
    config: RankKVConfig, model: Any, layer_indices: list[int], selector: Selector
) -> tuple[LossCurve | None, bool]:
    """Find the loss curve of a model and a selector, and if it was measured on this model.

    Parameters
    ----------
    config : RankKVConfig
        The options; a profile among them comes first.
    model : PreTrainedModel
        The model.
    layer_indices : list of int
        Its compressible layers.
    selector : Selector
        Token selection method.
    """
    if selector.name not in PREDICTED_SELECTORS:
        return None, False
    profile = config.profile if isinstance(config.profile, RankProfile) else None
    if profile is None or selector.name not in profile.loss_curves:
        profile = find_profile(model, layer_indices, predicts=selector.name)
    if profile is not None and selector.name in profile.loss_curves:
        return LossCurve.from_dict(profile.loss_curves[selector.name]), True
    return load_default_curves().get(selector.name), False


def settle_strategy(config: RankKVConfig) -> RankKVConfig:
    """Return the options with the strategy that ``max_loss`` takes if none is given: the one that was measured."""
    left_open = config.strategy is None and config.strategy_options is None and config.profile == "auto"
    if config.max_loss is None or not left_open or config.head_budgets not in ("auto", "distortion"):
        return config
    return replace(config, profile=None)


def finish_plans(
    plans: Sequence[BudgetPlan],
    attention: Sequence[LayerAttention],
    config: RankKVConfig,
    protector: Selector,
    curve: LossCurve | None,
    earlier: Sequence[BudgetPlan] = (),
) -> list[BudgetPlan]:
    """Finish the plans of all rows; with ``max_loss`` return smaller ones in their place.

    Parameters
    ----------
    plans : sequence of BudgetPlan
        One per row, to which all layers were added.
    attention : sequence of LayerAttention
        One per layer; empty if the loss cannot be predicted.
    config : RankKVConfig
        The options.
    protector : Selector
        Counts the protected tokens of a budget.
    curve : LossCurve, optional
        Curve of the model, with ``max_loss``.
    earlier : sequence of BudgetPlan
        Plans of the last compression of the same rows.
    """
    rows = split_rows(attention) or [[] for _ in plans]
    lost = [plan.lost_attention or 0.0 for plan in earlier] or [0.0] * len(plans)
    bound = None if config.max_loss is None or curve is None else LossBound(config, curve, protector)
    finished = []
    for plan, tables, before in zip(plans, rows, lost, strict=True):
        if bound is not None and tables:
            finished.append(bound.choose(plan, tables, before))
            continue
        plan.finish()
        if tables:
            note_lost_attention(plan, tables, config, protector, before)
        finished.append(plan)
    return finished


def find_knee(shares: Sequence[float], losses: Sequence[float]) -> int:
    """Return the place of the knee: the point farthest below the line between the ends of share and log loss.

    Examples
    --------
    >>> find_knee([0.05, 0.1, 0.2, 0.4, 0.8], [1.0, 0.1, 0.08, 0.06, 0.04])
    1
    """
    x, y = np.asarray(shares, dtype=np.float64), np.log(np.maximum(losses, 1e-9))
    line = y[0] + (y[-1] - y[0]) * (x - x[0]) / max(x[-1] - x[0], 1e-9)
    return int(np.argmax(line - y))
