"""MeasuringCache: stores nothing and measures each layer during one forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from ..budget.plan import BudgetPlan
from ..budget.strategies import get_strategy
from ..cache.compressor import measure_rows, sort_scores
from ..cache.resolve import resolve_global, resolve_profile
from ..config import RankKVConfig
from ..errors import CacheStateError
from ..models.tensor_parallel import find_head_shards
from ..observe import hook
from ..observe.call import AttentionCall, observe
from ..observe.hook import AttentionObserver
from ..observe.observation import Observation
from ..observe.rotary import LayerRotation, find_rotations
from ..rank.observed_layer import compute_layer_ranks
from ..selection import get_selector


class MeasuringCache(AttentionObserver, DynamicCache):
    """Measure each full-attention layer during one forward, in place of a cache.

    Parameters
    ----------
    model : PreTrainedModel
        The model that will run.
    config : RankKVConfig
        Options: strategy, scope, aggregation, window and sinks.
    on_layer : callable, optional
        Called with (layers done, all layers) after each layer.
    total_budget : int, optional
        Tokens over all layers; overrides the config's ``budget`` and ``compression_ratio``.
    """

    layers: list[Any]

    def __init__(
        self,
        model: Any,
        config: RankKVConfig,
        on_layer: Callable[[int, int], None] | None,
        total_budget: int | None = None,
    ) -> None:
        text_config = model.config.get_text_config(decoder=True)
        super().__init__(config=text_config)
        self.layers = [_PassingLayer() if type(layer) is DynamicLayer else layer for layer in self.layers]
        self.layer_indices = [i for i, layer in enumerate(self.layers) if isinstance(layer, _PassingLayer)]
        self.ranks: dict[int, float] = {}
        self.measures: dict[int, Any] = {}
        self.plan: BudgetPlan | None = None
        self._total_budget = total_budget
        self._selector = get_selector(config.selector)
        # Budgets are reported for equal heads.
        config = resolve_global(config, self._selector, can_spread=False)
        self._config = resolve_profile(config, model, self.layer_indices)
        self._rotations: Mapping[int, LayerRotation | None] = {}
        by_scores = get_strategy(self._config.resolve_strategy()[0]).by_scores
        if by_scores and self._selector.needs_rotation:
            self._rotations = find_rotations(model, self.layer_indices)
        #: Sorted scores of each layer's heads, if the strategy reads them.
        self._tables: dict[int, Any] = {}
        self._on_layer = on_layer
        self._shards = find_head_shards(model)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Pass new keys and values through, and announce the next attention call of this layer to the hook."""
        if isinstance(self.layers[layer_idx], _PassingLayer):
            hook.hand_off(self, layer_idx, key_states.shape[-2])
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def attend(self, layer_idx: int, call: AttentionCall) -> Any:
        """Run the layer's attention, then measure it."""
        output = call.run()
        with torch.no_grad():
            observation = observe(
                layer_idx,
                *call.arguments,
                kv_heads=call.key.shape[1],
                window_size=self._config.window_size,
                sink_size=self._config.sink_size,
                shards=self._shards,
            )
            self._measure(layer_idx, observation)
        if self._on_layer is not None:
            self._on_layer(len(self.ranks), len(self.layer_indices))
        return output

    def finish_plan(self) -> BudgetPlan:
        """Return the budget plan computed from the measures of all layers.

        Raises
        ------
        CacheStateError
            If the forward did not reach every layer.
        """
        if self.plan is None or len(self.measures) < len(self.layer_indices):
            raise CacheStateError(
                "the forward did not reach the last layer, so the prompt was not measured: run it again."
            )
        for layer_idx in self.layer_indices:
            measured = None if self.plan.measure is None else self.measures[layer_idx]
            rank = self.ranks[layer_idx] if self.plan.needs_ranks else None
            self.plan.add_layer(measured, rank=rank, head_scores=self._tables.get(layer_idx))
        self.plan.finish()
        return self.plan

    def _measure(self, layer_idx: int, observation: Observation) -> None:
        if self.plan is None:
            self.plan = BudgetPlan(
                self._config, observation.lengths[0], self.layer_indices, self._total_budget
            )
        ranks = compute_layer_ranks(observation, self._config.scope, self._config.aggregation)
        self.ranks[layer_idx] = float(ranks[0])
        # The rank is computed anyway, so it is not measured twice.
        of_rank = self.plan.measure in ("rank", None)
        measured = ranks.tolist() if of_rank else measure_rows([self.plan], self._config, observation)
        self.measures[layer_idx] = measured[0]
        if self.plan.reads_scores:
            scores = self._selector.compute_scores(
                replace(observation, rotation=self._rotations.get(layer_idx))
            )
            self._tables[layer_idx] = sort_scores([self.plan], self._config, observation, scores)[0]


class _PassingLayer(DynamicLayer):
    """A layer that passes new keys and values through and stores none."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the new keys and values."""
        return key_states, value_states
