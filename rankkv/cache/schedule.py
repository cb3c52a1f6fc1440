"""When a cache is compressed: at once, after the last chunk, once a draft is judged, at each turn, while decoding."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..budget.strategies import get_strategy
from ..config import RankKVConfig
from ..errors import CacheStateError, ConfigError, UnsupportedModelError
from ..models.tensor_parallel import HeadShards
from ..observe.call import AttentionCall, check_rows, observe
from ..observe.observation import Observation
from ..observe.queries import QueryBuffer
from ..observe.rotary import LayerRotation
from ..selection import Selector
from .compressor import Compressor
from .layer import RankKVLayer

# Queries held beyond the observation window while a draft may still be taken back.
_DRAFT_QUERIES = 256


class CompressionSchedule:
    """Decides for every attention call of one cache what is observed and whether a compression follows.

    Parameters
    ----------
    config : RankKVConfig
        The options.
    selector : Selector
        Token selection method.
    layer_indices : list of int
        Model indices of the compressible layers.
    rotations : mapping
        How layers turn keys with position, where the selector or packed positions ask for it.
    shards : HeadShards, optional
        The tensor-parallel processes of the model, where there are several.
    """

    def __init__(
        self,
        config: RankKVConfig,
        selector: Selector,
        layer_indices: list[int],
        rotations: Mapping[int, LayerRotation | None] = MappingProxyType({}),
        shards: HeadShards | None = None,
    ) -> None:
        self.rotations = rotations
        self.shards = shards
        self.selector = selector
        self.layer_indices = layer_indices
        self.compressor = Compressor(config, selector, layer_indices)
        #: Newest queries that ranks, other measures and scores are computed from.
        windows = get_strategy(config.resolve_strategy()[0]).windows
        if config.head_budgets == "distortion":
            windows = max(windows, get_strategy("distortion").windows)
        self.window_queries = config.window_size * windows
        self.reset()

    @property
    def config(self) -> RankKVConfig:
        """All options: those of the compressor, which holds the one copy."""
        return self.compressor.config

    def reset(self) -> None:
        """Forget everything: the next forward is a prefill."""
        self.compressor.plans = []
        #: Padding before each row's first real token; None before the first forward.
        self.row_start: list[int] | None = None
        self.compressed = False
        self.compressed_at = 0
        # Compression waits: for the last chunk of the prompt, or until a draft has been judged.
        self.deferred = self.config.prefill == "chunked"
        self.recording = False
        self.streaming = self.config.prefill == "streaming"

    def copy(self) -> CompressionSchedule:
        """Return an independent copy (the layers are copied by the cache)."""
        copied = copy.copy(self)
        copied.compressor = copy.copy(self.compressor)
        copied.row_start = None if self.row_start is None else list(self.row_start)
        return copied

    def pick_rows(self, repeats: int = 1, indices: Tensor | None = None) -> None:
        """Follow a change of rows: each repeated, or those of ``indices`` only."""
        if self.row_start is None:
            return
        rows = [row for row in range(len(self.row_start)) for _ in range(repeats)]
        if indices is not None:
            rows = torch.arange(len(rows))[indices.cpu()].tolist()
        self.row_start = [self.row_start[row] for row in rows]
        if self.compressor.plans:
            self.compressor.plans = [self.compressor.plans[row] for row in rows]

    @property
    def can_take_back(self) -> bool:
        """Whether the newest tokens can be removed again: no option evicts others to make room for them."""
        return self.config.decode == "grow" and not self.streaming and not self.config.recompress_turns

    def start_recording(self) -> None:
        """Let drafts be taken back from now on (assisted decoding).

        Raises
        ------
        ConfigError
            If an option evicts tokens that a rejected draft would need back.
        """
        if not self.can_take_back:
            raise ConfigError(
                f"decode={self.config.decode!r} with prefill={self.config.prefill!r} and "
                f"recompress_turns={self.config.recompress_turns} evicts tokens that a rejected draft would need back; "
                "use decode='grow', prefill='single' or 'chunked', and recompress_turns=False with assisted decoding."
            )
        self.recording = True
        self.deferred = self.deferred or not self.compressed

    def before_update(self, layers: list[Any], layer: RankKVLayer, steps: int) -> None:
        """Compress a prompt that came in chunks when its first one-token step arrives."""
        if self.deferred and not self.recording and steps == 1 and layer.seen:
            self.compress_deferred(layers)

    def after_crop(self, layers: list[Any]) -> None:
        """Compress the prompt once its first draft has been judged."""
        if self.deferred and self.recording and self.row_start is not None:
            self.compress_deferred(layers)

    def finish(self, layers: list[Any]) -> None:
        """Compress a prompt that came in chunks, and check that the prefill is complete."""
        if self.row_start is None or not self.layer_indices:
            return
        if self.deferred:
            self.compress_deferred(layers)
        if not self.compressed:
            raise CacheStateError(
                "the prefill did not reach the last layer; build a new cache and run it again."
            )
        self.streaming = False

    def wants_observation(self, steps: int) -> bool:
        """Tell whether a call with ``steps`` queries has to be looked at."""
        if not self.compressed or self.config.decode != "grow":
            return True
        return steps > 1 and (self.config.recompress_turns or self.streaming)

    def observe(self, layers: list[Any], layer_idx: int, call: AttentionCall) -> None:
        """Look at one attention call, and compress the layer if its time has come."""
        layer, config, steps = layers[layer_idx], self.config, call.steps
        observation = observe(
            layer_idx,
            *call.arguments,
            kv_heads=layer.keys.shape[1],
            window_size=config.window_size,
            sink_size=config.sink_size,
            positions=None if layer.kept_positions is None else layer.compute_positions(),
            slot_valid=layer.compute_head_valid(),
            seen=layer.seen,
            row_start=self.row_start,
            more_to_come=self.deferred or self.streaming,
            shards=self.shards,
        )
        observation = self.add_past(layer, observation)
        last = layer_idx == self.layer_indices[-1]
        if self.deferred:
            spare = _DRAFT_QUERIES if self.recording else 0
            self._buffer(layer, observation, self.window_queries + spare, spare)
        elif not self.compressed or (steps > 1 and (config.recompress_turns or self.streaming)):
            self.end_round(layers, self.compressor.add_layer(layers, observation, in_attention=True))
        elif config.decode == "bounded":
            self.compressor.step(layer, observation)
        else:
            self._buffer(layer, observation, self.window_queries)
            if layer.seen - self.compressed_at >= config.decode_interval:
                self.compressor.add_layer(layers, self._observe_buffer(layer, call.key, call.value))
                self.end_round(layers, last)
        if last:
            self.row_start = observation.row_start
            self.streaming = self.streaming and steps > 1

    def note_changes(self, layers: list[Any], layer_idx: int, changes: Tensor) -> None:
        """Take how far a layer's attention turned the hidden states, and go on with the layer if that was awaited."""
        awaited = self.compressor.waits_for(layer_idx)
        if not awaited and not self.deferred:
            return
        layer = layers[layer_idx]
        past = layer.token_changes
        layer.token_changes = changes if past is None else torch.cat([past, changes], dim=1)
        if awaited:
            self.end_round(layers, self.compressor.resume(layers))

    def compress_deferred(self, layers: list[Any]) -> None:
        """Compress all layers from the queries held back."""
        if self.row_start is not None:
            seen = layers[self.layer_indices[0]].seen
            check_rows([seen - start for start in self.row_start])
        self.deferred = False
        with torch.no_grad():
            for index in self.layer_indices:
                layer = layers[index]
                self.compressor.add_layer(layers, self._observe_buffer(layer, layer.keys, layer.values))
        self.end_round(layers)

    def compress_observed(
        self, layers: list[Any], observations: Mapping[int, Observation], selector: Selector | None = None
    ) -> None:
        """Compress all layers from observations of the whole prompt, with the scores of another selector if given."""
        compressor = self.compressor
        own, compressor.selector = compressor.selector, selector or compressor.selector
        try:
            for index in self.layer_indices:
                compressor.add_layer(layers, self.add_past(layers[index], observations[index]))
        finally:
            compressor.selector = own
        if self.layer_indices:
            self.row_start = observations[self.layer_indices[0]].row_start
            self.end_round(layers)

    def check_positions(self, layer: RankKVLayer, steps: int, position_ids: Tensor | None) -> None:
        """Check that new tokens go on where the tokens seen end.

        Raises
        ------
        CacheStateError
            If their positions lie among those already seen.
        """
        past = layer.seen - steps
        if position_ids is None or position_ids.dim() != 2 or self.row_start is None:
            return
        # Once is enough for single steps: each position follows from the last, and reading it may stall a device.
        if steps == 1 and past != self.compressed_at:
            return
        rows = [past - start for start in self.row_start]
        given = position_ids[:, 0].tolist() * (len(rows) // position_ids.shape[0])
        if all(position < row for position, row in zip(given, rows, strict=True)):
            raise CacheStateError(
                f"the new tokens start at position {given[0]}, but the cache has seen {rows[0]} tokens: input_ids hold "
                "nothing new, or attention_mask does not cover all tokens seen and the new ones. Give generate() all "
                "ids, or only the new ids with a mask over all; give a bare forward position_ids if the model counts "
                "them from 0 each time."
            )

    def end_round(self, layers: list[Any], last: bool = True) -> None:
        """Note that all layers are compressed, once the last one is."""
        if last:
            self.compressed, self.compressed_at = True, layers[self.layer_indices[-1]].seen
            for index in self.layer_indices:
                layers[index].buffer = None
                layers[index].rest()

    def add_past(self, layer: RankKVLayer, observation: Observation) -> Observation:
        """Add what the selector asks for of earlier queries and of positions."""
        if not self.selector.past_queries:
            return observation
        return replace(
            observation,
            rotation=self.rotations.get(observation.layer_idx),
            packed=self.config.positions == "packed",
            past_moments=layer.query_moments,
        )

    def _buffer(
        self, layer: RankKVLayer, observation: Observation, capacity: int, spare: int | None = None
    ) -> None:
        if self.deferred and observation.keys.shape != layer.keys.shape:
            raise UnsupportedModelError(
                f"layer {observation.layer_idx} attends to other keys than it caches, so its attention cannot be "
                "computed after the forward; use prefill='single', and no assisted decoding, with this model."
            )
        if self.deferred and observation.hides_real_tokens:
            raise UnsupportedModelError(
                f"the attention of layer {observation.layer_idx} hides more than padding and what comes later, so it "
                "cannot be computed after the forward; use prefill='single' with this model."
            )
        if layer.buffer is None:
            layer.buffer = QueryBuffer(capacity, spare)
        gone = layer.buffer.push(observation)
        if gone is None:
            return
        if self.selector.step == "sum":
            self.compressor.carry(layer, gone)
        self.compressor.carry_queries(layer, self.add_past(layer, gone), more=True)

    def _observe_buffer(self, layer: RankKVLayer, keys: Tensor, values: Tensor) -> Observation:
        if layer.buffer is None:
            raise CacheStateError(
                "no query of this prompt was observed; build a new cache and run the prefill again."
            )
        observation = layer.buffer.observe(
            keys, values, layer.compute_positions(), layer.compute_slot_valid()
        )
        return self.add_past(layer, observation)
