"""From observations, layer after layer, to budgets and kept tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..budget.plan import BudgetPlan
from ..config import RankKVConfig
from ..errors import UnsupportedModelError
from ..observe.observation import Observation
from ..observe.queries import compute_query_moments
from ..rank.measures import compute_measures
from ..selection import Selector
from .layer import RankKVLayer

# Slots that may stand over the budget while a prefill goes on, as a share of (total budget + one layer): earlier
# layers are not gathered anew for every layer that arrives.
_CASCADE_SLACK = 0.04


def measure_rows(plans: Sequence[BudgetPlan], config: RankKVConfig, observation: Observation) -> list[Any]:
    """Measure a layer as the plans' strategy wants it: one number (or array) a row, None where it wants nothing."""
    plan = plans[0]
    if plan.measure is None:
        return [None] * len(plans)
    options = {"scope": config.scope, "aggregation": config.aggregation, **plan.strategy_options}
    measured = compute_measures(
        observation,
        plan.measure,
        limits=[row.head_limits if plan.measure == "head_distortion" else row.limits for row in plans],
        layers=len(plan.layer_indices),
        **options,
    )
    return measured.tolist() if measured.dim() == 1 else list(measured.numpy())


def measure_ranks(
    plans: Sequence[BudgetPlan], config: RankKVConfig, observation: Observation
) -> list[float | None]:
    """Measure a layer's effective rank, one a row, where the plans' strategy reads it beside another measure."""
    if not plans[0].needs_ranks:
        return [None] * len(plans)
    return list(
        compute_measures(observation, "rank", scope=config.scope, aggregation=config.aggregation).tolist()
    )


def measure_heads(plans: Sequence[BudgetPlan], observation: Observation) -> list[Any]:
    """Measure a layer's heads, ``[kv_head, budget]`` a row, where they are split by it and the layers are not."""
    if not plans[0].measures_heads or plans[0].measure == "head_distortion":
        return [None] * len(plans)
    limits = [row.head_limits for row in plans]
    return list(compute_measures(observation, "head_distortion", limits=limits).numpy())


class Compressor:
    """Compresses the layers of one cache, in rounds: all compressible layers, in order, make a round.

    While a round is under way, budgets are computed from the layers so far and these shrink at once (a cascade): a
    share only falls as layers arrive, and the best tokens of the best tokens are the best tokens, so the outcome is
    that of one decision at the end, while no more than the total budget and one layer is ever held.

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
        #: One plan a row, of the last round that was finished.
        self.plans: list[BudgetPlan] = []
        self._open: list[BudgetPlan] = []
        # A layer whose measure arrives only after its attention.
        self._waiting: Observation | None = None

    @property
    def carries_scores(self) -> bool:
        """Whether scores outlive a round, to be continued by the queries that follow."""
        continued = (
            self.config.decode == "bounded" or self.config.prefill != "single" or self.config.recompress_turns
        )
        adds_up = self.selector.step == "sum" and (continued or self.config.decode == "periodic")
        return adds_up or (self.config.decode == "bounded" and self.selector.step == "decay")

    def waits_for(self, layer_idx: int) -> bool:
        """Whether :meth:`resume` is due once the layer's attention module returns."""
        return self._waiting is not None and self._waiting.layer_idx == layer_idx

    def add_layer(
        self, layers: Sequence[RankKVLayer], observation: Observation, in_attention: bool = False
    ) -> bool:
        """Take the next layer of a round and shrink what can be shrunk; True when the round is finished.

        Called from inside the layer's attention, what is measured of hidden states is not there yet: then nothing is
        shrunk before :meth:`resume`.

        Raises
        ------
        UnsupportedModelError
            If the measure of an earlier layer never arrived.
        """
        if self._waiting is not None:
            missing, self._waiting = self._waiting.layer_idx, None
            raise UnsupportedModelError(
                f"the attention of layer {missing} ran outside the modules where its hidden states can be seen (or an "
                "earlier forward was interrupted): use another strategy with this model, or a new cache."
            )
        config, layer_idx = self.config, observation.layer_idx
        layer = layers[layer_idx]
        if layer_idx == self.layer_indices[0] or not self._open:
            self._open = [BudgetPlan(config, length, self.layer_indices) for length in observation.lengths]
        lasting = self._compute_lasting_scores(layer, observation)
        layer.begin_compression(self.selector.refine(lasting, observation), observation, lasting)
        self.carry_queries(layer, observation)
        if in_attention and self._open[0].needs_hidden_states:
            self._waiting = observation
            return False
        return self._measure_and_shrink(layers, observation)

    def resume(self, layers: Sequence[RankKVLayer]) -> bool:
        """Go on with the layer whose measure has arrived; True when the round is finished."""
        observation, self._waiting = self._waiting, None
        return observation is not None and self._measure_and_shrink(layers, observation)

    def _measure_and_shrink(self, layers: Sequence[RankKVLayer], observation: Observation) -> bool:
        config, layer_idx = self.config, observation.layer_idx
        if self._open[0].needs_hidden_states:
            observation = replace(observation, changes=layers[layer_idx].token_changes)
        rows = measure_rows(self._open, config, observation)
        ranks = measure_ranks(self._open, config, observation)
        heads = measure_heads(self._open, observation)
        for plan, measured, available, rank, errors in zip(
            self._open, rows, observation.available, ranks, heads, strict=True
        ):
            plan.add_layer(measured, available, rank, errors)
        done = self.layer_indices[: self.layer_indices.index(layer_idx) + 1]
        if len(done) < len(self.layer_indices):
            if config.merging is not None:
                # What a later budget evicts has to be folded into what the last one keeps.
                return False
            ceilings = [plan.compute_ceilings() for plan in self._open]
            self._shrink(layers, done, ceilings, len(done) - 1)
            self._release_excess(layers, done, ceilings)
            return False
        budgets = [plan.finish() for plan in self._open]
        for place, index in enumerate(done):
            self._shrink(layers, done, budgets, place, final=True)
            layers[index].end_compression(keep_scores=self.carries_scores)
        self.plans, self._open = self._open, []
        return True

    def step(self, layer: RankKVLayer, observation: Observation) -> None:
        """Keep a layer at its budget while decoding: continue its scores by the newest queries, then evict."""
        if self.selector.step == "rescore":
            lasting = self.selector.compute_lasting_scores(observation)
        else:
            lasting = self._continue_scores(layer, observation.compute_column_sums())
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
        """Continue a layer's scores by queries that will not be there when it is compressed."""
        layer.running_scores = self._continue_scores(layer, observation.compute_column_sums())

    def carry_queries(self, layer: RankKVLayer, observation: Observation, more: bool = False) -> None:
        """Keep the moments of queries that will not be there again, where later scores need them.

        ``more``: the layer is yet to be compressed, so they are needed whatever comes after.
        """
        config = self.config
        continued = (
            more or config.decode != "grow" or config.prefill == "streaming" or config.recompress_turns
        )
        if self.selector.past_queries and continued:
            layer.query_moments = compute_query_moments(observation, self.selector.past_queries)
        else:
            layer.query_moments = None

    def _compute_lasting_scores(self, layer: RankKVLayer, observation: Observation) -> Tensor:
        scores = self.selector.compute_lasting_scores(observation)
        if self.selector.step == "sum" and layer.running_scores is not None:
            scores = self._continue_scores(layer, scores)
        return scores

    def _continue_scores(self, layer: RankKVLayer, scores: Tensor) -> Tensor:
        past = layer.running_scores
        if past is None:
            return scores
        keep = 1.0 if self.selector.step == "sum" else 1.0 - 1.0 / self.config.window_size
        scores = scores.clone()
        if keep < 1.0:
            scores *= 1.0 - keep
        scores[..., : past.shape[-1]] += past * keep
        return scores

    def _release_excess(
        self, layers: Sequence[RankKVLayer], done: list[int], ceilings: list[list[int]]
    ) -> None:
        """Shrink the layers with most to release until what is held fits the total, and no further."""
        excess = {}
        for place, index in enumerate(done):
            budgets = [row[place] for row in ceilings]
            excess[place] = (
                layers[index].kept_length - max(budgets) - self._count_slack(layers[index], budgets)
            )
        total = max(plan.total_budget for plan in self._open)
        limit = total + _CASCADE_SLACK * (total + layers[done[-1]].seen)
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
        self._shrink_layer(layer, own, slack=0 if final else self._count_slack(layer, own))

    def _count_slack(self, layer: RankKVLayer, budgets: list[int]) -> int:
        """Count the tokens that a layer keeps beyond ``budgets``, one a row, while these may still shrink."""
        window, sinks = self.config.window_size, self.config.sink_size
        settled = True
        for plan, budget in zip(self._open, budgets, strict=True):
            # What is protected grows with a budget, so that what the smallest and this one protect tells for all.
            least, most = (
                self.selector.count_protected(max(0, count - plan.spanned), window, sinks)
                for count in (min(plan.floor, budget), budget)
            )
            settled = settled and least == most
        return layer.count_slack(settled)

    def _shrink_layer(
        self, layer: RankKVLayer, budgets: list[int], slack: int, protect_before: list[int] | None = None
    ) -> None:
        window, sinks, protect = self.config.window_size, self.config.sink_size, self.config.protect
        with torch.no_grad():
            layer.shrink(
                budgets,
                self.selector,
                window,
                sinks,
                protect,
                slack,
                protect_before,
                self.config.merging,
            )
