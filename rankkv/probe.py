"""A stand-in for a cache that keeps nothing and takes each layer's rank as its attention passes by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from . import attention
from .attention_call import AttentionCall
from .config import RankKVConfig
from .layer_rank import compute_layer_ranks
from .observing import observe


class _PassingLayer(DynamicLayer):
    """A layer that hands new keys and values through and keeps nothing of them."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the new keys and values."""
        return key_states, value_states


class ProbeCache(DynamicCache):
    """Stands in for a cache during one forward and takes the rank of each full-attention layer.

    Parameters
    ----------
    model : PreTrainedModel
        The model that will run.
    config : RankKVConfig
        Scope, aggregation, window and sinks.
    on_layer : callable, optional
        Called with (layers done, layers in all) after each layer.
    """

    layers: list[Any]

    def __init__(self, model: Any, config: RankKVConfig, on_layer: Callable[[int, int], None] | None) -> None:
        text_config = model.config.get_text_config(decoder=True)
        super().__init__(config=text_config)
        self.layers = [_PassingLayer() if type(layer) is DynamicLayer else layer for layer in self.layers]
        self.layer_indices = [i for i, layer in enumerate(self.layers) if isinstance(layer, _PassingLayer)]
        self.ranks: dict[int, float] = {}
        self.length = 0
        self._config = config
        self._on_layer = on_layer

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Pass new keys and values through, and let this layer's attention be observed."""
        if isinstance(self.layers[layer_idx], _PassingLayer):
            attention.hand_off(self, layer_idx, key_states.shape[-2])
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def attend(self, layer_idx: int, call: AttentionCall) -> Any:
        """Run the layer's attention, then take its rank."""
        output = call.run()
        with torch.no_grad():
            observation = observe(
                layer_idx,
                *call.arguments,
                kv_heads=call.key.shape[1],
                window_size=self._config.window_size,
                sink_size=self._config.sink_size,
            )
            ranks = compute_layer_ranks(observation, self._config.scope, self._config.aggregation)
        self.length = observation.lengths[0]
        self.ranks[layer_idx] = float(ranks[0])
        if self._on_layer is not None:
            self._on_layer(len(self.ranks), len(self.layer_indices))
        return output

    def find_attended(self, key: Tensor) -> None:
        """Return None: nothing is evicted, so layers that borrow keys need no care."""
