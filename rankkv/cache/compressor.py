"""The compressor: turns the observations of all layers, one after the other, into budgets and kept tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..budget.plan import BudgetPlan
from ..budget.strategies import get_strategy
from ..config import PREDICTED_SELECTORS, RankKVConfig
from ..errors import UnsupportedModelError
from ..observe.observation import Observation
from ..observe.queries import compute_query_moments
from ..profile.loss_curve import LossCurve
from ..rank.measures import begin_measures
from ..selection import GLOBAL_PROTECTION, Selector, raise_protected
from ..selection.scoring import has_output_projection
from ..utils.devices import Reader
from .layer import RankKVLayer
from .quality import LayerAttention, finish_plans, measure_attention

# Slots held above the budget during a prefill, as a fraction of (total budget + one layer).
# Without this slack every new layer would copy all earlier layers once more.
_RELEASE_SLACK = 0.05
# Up to so many bytes of all layers' tokens, a GPU holds them until the last layer: launches cost more than memory then.
_SMALL_BYTES = 64 << 20


class Compressor:
    """Compress the layers of one cache in rounds; a round is all compressible layers in order.

    During a round, budgets are computed from the layers so far, and these layers shrink at once (a cascade).  The
    outcome equals one decision at the end, for two reasons: a layer's share only falls as layers arrive, and the best
    tokens among the best tokens are the best of all.  The cascade never holds more than the total budget and one layer.
    On a GPU it is one layer more: a layer shrinks once the next one has been measured, so that the host does not wait
    for the measures.  There a prompt of few tokens shrinks only at the end.

    Parameters
    ----------
    config : RankKVConfig
        The options.
    selector : Selector
        Token selection method.
    layer_indices : list of int
        Model indices of the compressible layers.
    """

    def __init__(self, config: RankKVConfig, selector: Selector, layer_indices: list[int]) -> None:
        self.config = config
        self.selector = selector
        self.layer_indices = layer_indices
        #: One plan per row, of the last finished round.
        self.plans: list[BudgetPlan] = []
        # One plan per row, of the round under way.
        self._open: list[BudgetPlan] = []
        # Attention to the tokens of each layer of the round under way, if the loss of the selector can be predicted.
        self._attention: list[LayerAttention] = []
        # True if the layers of the round under way may be held whole until the last one.
        self._holds_all = False
        # The last layer of the round under way, if its measures are still on their way to the host.
        self._waiting: _Waiting | None = None
        #: Newest queries that test what is lost.
        self.test_queries = config.window_size
        #: True to measure the attention lost on every device; on a GPU its launches are not free.
        self.measures_lost = config.max_loss is not None
        #: Curve from the attention lost to the loss, if ``max_loss`` is given.
        self.curve: LossCurve | None = None

    @property
    def protector(self) -> Selector:
        """Selector that counts the protected tokens of a budget."""
        by_scores = get_strategy(self.config.resolve_strategy()[0]).by_scores
        return GLOBAL_PROTECTION if by_scores else self.selector

    @property
    def predicts(self) -> bool:
        """True if the loss can be predicted from the attention that eviction loses."""
        in_parts = self.config.prefill == "streaming" or self.config.recompress_turns
        return self.selector.name in PREDICTED_SELECTORS and not in_parts

    @property
    def carries_scores(self) -> bool:
        """True if scores are kept after a round, because later queries will continue them."""
        continued = (
            self.config.decode == "bounded" or self.config.prefill != "single" or self.config.recompress_turns
        )
        adds_up = self.selector.step in ("sum", "max") and (continued or self.config.decode == "periodic")
        return adds_up or (self.config.decode == "bounded" and self.selector.step in ("decay", "mean"))

    def reset(self) -> None:
        """Forget the budgets, and a round that was interrupted."""
        self.plans, self._open, self._attention, self._waiting = [], [], [], None

    def add_layer(self, layers: Sequence[RankKVLayer], observation: Observation) -> bool:
        """Add the next layer of a round and shrink the layers so far; return True when the round is finished.

        Raises
        ------
        UnsupportedModelError
            If an earlier layer of the round was skipped.
        """
        config, layer_idx = self.config, observation.layer_idx
        layer = layers[layer_idx]
        if layer_idx == self.layer_indices[0] or not self._open:
            self._open = [BudgetPlan(config, length, self.layer_indices) for length in observation.lengths]
            self._attention, self._waiting = [], None
        # Lasting scores may be continued by later queries; the refined ones only select now.
        self._check_order(layer_idx)
        lasting = self._compute_lasting_scores(layer, observation)
        scores = self.selector.refine(lasting, observation)
        layer.begin_compression(scores, observation, lasting)
        self.carry_queries(layer, observation)
        self._note_projection(observation)
        return self._measure_and_shrink(layers, observation, scores)

    def _note_projection(self, observation: Observation) -> None:
        """Note it in the plans if the selector wants an output projection that is not found."""
        if not self.selector.projects or has_output_projection(observation):
            return
        note = (
            f"  the output projection of layer {observation.layer_idx} is not found: selector {self.selector.name!r} "
            "weighs its values by their own norms"
        )
        for plan in self._open:
            plan.notes.append(note)

    def _check_order(self, layer_idx: int) -> None:
        """Raise if a layer of this round was skipped: its attention never reached the cache."""
        expected = self.layer_indices[self._open[0].layers_added + (self._waiting is not None)]
        if layer_idx != expected:
            self._open, self._waiting = [], None
            raise UnsupportedModelError(
                f"layer {layer_idx} follows, but layer {expected} did not run its attention with this cache: use a "
                "model of which every attention layer updates the cache, or a new cache after an interrupted forward."
            )

    def step(self, layer: RankKVLayer, observation: Observation) -> None:
        """Keep a layer at its budget while decoding: update its scores by the newest queries, then evict."""
        if self.selector.step == "rescore":
            lasting = self.selector.compute_lasting_scores(observation)
        else:
            by_attention = self.selector.step in ("decay", "sum")
            new = (
                observation.compute_column_sums()
                if by_attention
                else self.selector.compute_lasting_scores(observation)
            )
            lasting = self._continue_scores(layer, new)
            layer.running_scores = lasting
        self.carry_queries(layer, observation)
        place = self.layer_indices.index(observation.layer_idx)
        budgets = [plan.budgets[place] for plan in self.plans]
        if all(count <= budget for count, budget in zip(observation.available, budgets, strict=True)):
            return
        layer.begin_compression(self.selector.refine(lasting, observation), observation, lasting)
        layer.head_splits = [plan.find_head_split(place) for plan in self.plans]
        self._shrink_layer(layer, budgets, slack=0, protect_before=[plan.length for plan in self.plans])
        layer.end_compression(keep_scores=self.selector.step != "rescore")

    def carry(self, layer: RankKVLayer, observation: Observation) -> None:
        """Add the scores of queries that will be gone when the layer is compressed."""
        layer.running_scores = self._continue_scores(layer, observation.compute_column_sums())

    def carry_queries(self, layer: RankKVLayer, observation: Observation, more: bool = False) -> None:
        """Keep the moments of queries that will be gone, if later scores need them.

        With ``more`` the layer is not compressed yet, so the moments are needed in every decode mode.
        """
        config = self.config
        continued = (
            more or config.decode != "grow" or config.prefill == "streaming" or config.recompress_turns
        )
        if self.selector.past_queries and continued:
            layer.query_moments = compute_query_moments(observation, self.selector.past_queries)
        else:
            layer.query_moments = None

    def _measure_and_shrink(
        self, layers: Sequence[RankKVLayer], observation: Observation, scores: Tensor
    ) -> bool:
        is_last = observation.layer_idx == self.layer_indices[-1]
        reader = Reader(observation.keys.device)
        begun = begin_measuring(self._open, self.config, observation, reader)
        tables = begin_sorting(self._open, self.config, observation, scores, reader)
        reader.start()
        if self.predicts and (self.measures_lost or observation.keys.device.type == "cpu"):
            found = measure_attention(
                observation, scores, self.protector, self.test_queries, self.config.protect or ()
            )
            self._attention.append(found)
        self._finish_waiting(layers)
        held = (observation.keys.nbytes + observation.values.nbytes) * len(self.layer_indices)
        self._holds_all = observation.keys.device.type == "cuda" and held <= _SMALL_BYTES
        self._waiting = _Waiting(begun, list(observation.available), tables)
        # While a GPU measures this layer, the model goes on to the next one, so that neither waits for the other.
        if is_last or not reader.is_late:
            self._finish_waiting(layers)
        return is_last

    def _finish_waiting(self, layers: Sequence[RankKVLayer]) -> None:
        """Add the measures of the layer that waits for them to the plans, and shrink the layers so far."""
        waiting, self._waiting = self._waiting, None
        if waiting is None:
            return
        for plan, measured, available, rank, errors, table in zip(self._open, *waiting.read(), strict=True):
            plan.add_layer(measured, available, rank, errors, table)
        self._shrink_all(layers, self.layer_indices[: self._open[0].layers_added])

    def _shrink_all(self, layers: Sequence[RankKVLayer], done: list[int]) -> None:
        """Shrink the layers ``done`` to their budgets so far, and finish the round with the last layer."""
        config = self.config
        if len(done) < len(self.layer_indices):
            if self._holds_all:
                return
            ceilings = [plan.compute_ceilings() for plan in self._open]
            self._shrink(layers, done, ceilings, len(done) - 1)
            self._release_excess(layers, done, ceilings)
            return
        # With layers on a CPU and on GPUs, only some were measured.
        whole = self._attention if len(self._attention) == len(self.layer_indices) else []
        self._open = finish_plans(self._open, whole, config, self.protector, self.curve, self.plans)
        budgets, self._attention = [plan.budgets for plan in self._open], []
        for place, index in enumerate(done):
            self._shrink(layers, done, budgets, place, final=True)
            layers[index].end_compression(keep_scores=self.carries_scores)
        for plan in self._open:
            plan.settle()
        self.plans, self._open = self._open, []

    def _release_excess(
        self, layers: Sequence[RankKVLayer], done: list[int], ceilings: list[list[int]]
    ) -> None:
        """Shrink the layers with most to release until the slots held fit the total; spare the others."""
        excess = {}
        for place, index in enumerate(done):
            budgets = [row[place] for row in ceilings]
            excess[place] = (
                layers[index].kept_length - max(budgets) - self._count_slack(layers[index], budgets)
            )
        total = max(plan.total_budget for plan in self._open)
        limit = total + _RELEASE_SLACK * (total + layers[done[-1]].seen)
        over = sum(layers[index].kept_length for index in done) - limit
        for place in sorted(excess, key=lambda place: -excess[place]):
            if over <= 0:
                return
            self._shrink(layers, done, ceilings, place)
            over -= excess[place]

    def _shrink(
        self,
        layers: Sequence[RankKVLayer],
        done: list[int],
        budgets: list[list[int]],
        place: int,
        final: bool = False,
    ) -> None:
        layer, own = layers[done[place]], [row[place] for row in budgets]
        layer.head_splits = [plan.find_head_split(place) for plan in self._open]
        self._shrink_layer(layer, own, slack=0 if final else self._count_slack(layer, own), final=final)

    def _count_slack(self, layer: RankKVLayer, budgets: list[int]) -> int:
        """Count the tokens kept beyond ``budgets`` (one per row) while these may still shrink."""
        window, sinks = self.config.window_size, self.config.sink_size
        settled = True
        for plan, budget in zip(self._open, budgets, strict=True):
            # The number of protected tokens grows with the budget: if the smallest budget and this one protect
            # equally many, so does every budget between them.
            least, most = (
                self.protector.count_protected(max(0, count - plan.spanned), window, sinks)
                for count in (min(plan.floor, budget), budget)
            )
            settled = settled and least == most
        return layer.count_slack(settled)

    def _shrink_layer(
        self,
        layer: RankKVLayer,
        budgets: list[int],
        slack: int,
        protect_before: list[int] | None = None,
        final: bool = True,
    ) -> None:
        window, sinks, protect = self.config.window_size, self.config.sink_size, self.config.protect
        with torch.no_grad():
            layer.shrink(
                budgets,
                self.protector,
                window,
                sinks,
                protect,
                slack,
                protect_before,
                final,
            )

    def _compute_lasting_scores(self, layer: RankKVLayer, observation: Observation) -> Tensor:
        scores = self.selector.compute_lasting_scores(observation)
        if self.selector.step in ("sum", "max") and layer.running_scores is not None:
            scores = self._continue_scores(layer, scores)
        return scores

    def _continue_scores(self, layer: RankKVLayer, scores: Tensor) -> Tensor:
        past = layer.running_scores
        if past is None:
            return scores
        # Sums accumulate; decaying scores forget the past over about one window.
        keep = 1.0 if self.selector.step in ("sum", "max") else 1.0 - 1.0 / self.config.window_size
        scores = scores.clone() if keep == 1.0 else scores * (1.0 - keep)
        known = scores[..., : past.shape[-1]]
        if self.selector.step == "max":
            torch.maximum(known, past, out=known)
        else:
            known.add_(past, alpha=keep)
        return scores


@dataclass(frozen=True)
class _Waiting:
    """A layer whose measures are on their way to the host.

    Attributes
    ----------
    measures : callable
        Returns what :func:`begin_measuring` began.
    available : list of int
        Real tokens among the layer's keys, one entry per row.
    tables : callable
        Returns what :func:`begin_sorting` began.
    """

    measures: Callable[[], tuple[list[Any], list[Any], list[Any]]]
    available: list[int]
    tables: Callable[[], list[Any]]

    def read(self) -> tuple[list[Any], ...]:
        """Return measures, tokens, ranks, measures of the heads, and tables, each one entry per row."""
        rows, ranks, heads = self.measures()
        return rows, self.available, ranks, heads, self.tables()


def sort_scores(
    plans: Sequence[BudgetPlan], config: RankKVConfig, observation: Observation, scores: Tensor
) -> list[Any]:
    """Sort each head's scores above its floor, ``[kv_head, token]`` per row; None unless the strategy reads them.

    The tokens that a head keeps anyway are left out: the protected ones, and the best others up to the floor.
    """
    return begin_sorting(plans, config, observation, scores, Reader(observation.keys.device))()


def begin_sorting(
    plans: Sequence[BudgetPlan],
    config: RankKVConfig,
    observation: Observation,
    scores: Tensor,
    reader: Reader,
) -> Callable[[], list[Any]]:
    """Begin :func:`sort_scores`; the host waits only when it calls what this returns."""
    floors = [plan.measuring.head_floor for plan in plans]
    if not plans[0].reads_scores:
        return lambda: [None] * len(floors)
    ranked = raise_protected(
        scores.float().expand(-1, observation.kv_heads, -1),
        observation.real_index,
        observation.lengths,
        floors,
        GLOBAL_PROTECTION,
        config.window_size,
        config.sink_size,
        protect=config.protect or (),
    )
    sent = reader.send(observation.gather_over_shards(ranked.sort(dim=-1, descending=True).values))
    return lambda: [table[:, floor:] for table, floor in zip(sent.read().numpy(), floors, strict=True)]


def begin_measuring(
    plans: Sequence[BudgetPlan], config: RankKVConfig, observation: Observation, reader: Reader
) -> Callable[[], tuple[list[Any], list[Any], list[Any]]]:
    """Begin all measures of a layer; return a function that returns those of the layer, its ranks, and its heads'."""
    plan, count = plans[0], len(plans)
    begun: list[Callable[[], Tensor] | None] = [_begin_rows(plans, config, observation, reader), None, None]
    if plan.needs_ranks:
        begun[1] = begin_measures(
            observation, "rank", reader, scope=config.scope, aggregation=config.aggregation
        )
    # Otherwise they are unused, or the measure of the layer.
    if plan.measures_heads and plan.measure != "head_distortion":
        limits = [row.measuring.head_limits for row in plans]
        begun[2] = begin_measures(observation, "head_distortion", reader, limits=limits)

    return lambda: (_read(begun[0], count), _read(begun[1], count), _read(begun[2], count))


def measure_rows(plans: Sequence[BudgetPlan], config: RankKVConfig, observation: Observation) -> list[Any]:
    """Measure a layer for the plans' strategy: one number or array per row, None if it measures nothing."""
    return _read(_begin_rows(plans, config, observation, Reader(observation.keys.device)), len(plans))


def _begin_rows(
    plans: Sequence[BudgetPlan], config: RankKVConfig, observation: Observation, reader: Reader
) -> Callable[[], Tensor] | None:
    plan = plans[0]
    if plan.measure is None:
        return None
    options = {"scope": config.scope, "aggregation": config.aggregation, **plan.strategy_options}
    limits = [
        row.measuring.head_limits if plan.measure == "head_distortion" else row.measuring.limits
        for row in plans
    ]
    return begin_measures(
        observation, plan.measure, reader, limits=limits, layers=len(plan.layer_indices), **options
    )


def _read(finish: Callable[[], Tensor] | None, count: int) -> list[Any]:
    if finish is None:
        return [None] * count
    measured = finish()
    return measured.tolist() if measured.dim() == 1 else list(measured.numpy())
