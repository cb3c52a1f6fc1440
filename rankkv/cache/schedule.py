"""Compression schedule of one cache: after the prefill, the last chunk or a draft, at each turn, while decoding."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..budget.strategies import get_strategy
from ..config import RankKVConfig
from ..errors import CacheStateError, ConfigError, InputError, UnsupportedModelError
from ..models.tensor_parallel import HeadShards
from ..observe.call import AttentionCall, MaskReads, check_rows, observe
from ..observe.observation import Observation
from ..observe.queries import QueryBuffer
from ..observe.rotary import LayerRotation
from ..selection import Selector
from .compressor import Compressor
from .layer import RankKVLayer
from .quality import TEST_WINDOWS
from .replay import Replay

# Queries held beyond the observation window while a draft may still be rejected.
_DRAFT_QUERIES = 256
# Capacity of a buffer that never drops a query.
_ALL_QUERIES = 2**31


class CompressionSchedule:
    """Decide for every attention call what to observe and if a compression follows.

    Parameters
    ----------
    config : RankKVConfig
        The options.
    selector : Selector
        Token selection method.
    layer_indices : list of int
        Model indices of the compressible layers.
    rotations : mapping
        Rotary embedding of each layer, if the selector or packed positions need it.
    shards : HeadShards, optional
        The tensor-parallel processes of the model, if there are several.
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
        #: Scores the prompt by a replay; set by the cache if the selector needs it.
        self.replay: Replay | None = None
        # Held-out measures need several windows: one selects, another one tests.
        windows = get_strategy(config.resolve_strategy()[0]).windows
        if self.compressor.predicts:
            windows = max(windows, TEST_WINDOWS)
        if config.head_budgets == "distortion":
            windows = max(windows, get_strategy("distortion").windows)
        #: Number of newest queries that measures and scores are computed from.
        self.window_queries = config.window_size * windows
        self.compressor.test_queries = config.window_size * TEST_WINDOWS
        self.reset()

    def reset(self) -> None:
        """Forget everything: the next forward is a prefill."""
        self.compressor.reset()
        #: Number of padding tokens before each row's first real token; None before the first forward.
        self.row_start: list[int] | None = None
        #: True after the first finished round.
        self.compressed = False
        #: Tokens seen at the last finished round.
        self.compressed_at = 0
        #: True if compression waits for the last chunk of the prompt, the first draft, or a replay of the prompt.
        self.deferred = self.config.prefill == "chunked" or self.selector.replays
        # Observations of the prompt's last queries, by layer, while compression waits for a replay.
        self._unscored: dict[int, Observation] = {}
        #: True if drafts may be removed again (assisted decoding).
        self.recording = False
        #: True while chunks of the prompt are compressed as they come.
        self.streaming = self.config.prefill == "streaming"
        #: Hidden tokens inside each row of the prompt: a mask with holes.
        self.holes: list[int] = []
        #: Difference between position and token number, ``[batch, 1]``, where the model keeps one for its images.
        self.position_offset: Tensor | None = None
        # Tokens of the first forward, until a one-token step or finish() shows that it was the whole prompt.
        self._first_steps: int | None = None
        self._mask_reads = MaskReads()

    @property
    def config(self) -> RankKVConfig:
        """All options; the compressor holds the only copy."""
        return self.compressor.config

    def before_update(self, layers: list[Any], layer: RankKVLayer, steps: int) -> None:
        """Compress a prompt that waits, for more chunks, a replay or its first draft, before a forward that ends that.

        A one-token step ends the prompt.  Where drafts may be removed, any forward does: the first draft was accepted.
        """
        if self.awaits_replay and steps > 1:
            raise CacheStateError(
                f"selector {self.selector.name!r} scores a prompt that comes in one forward, and {steps} tokens came "
                f"after {layer.seen}: leave prefill_chunk_size out, or call finish() after the prompt."
            )
        # transformers 5.14 does not crop the cache if it accepts the whole draft.
        accepted = self.recording and self.config.prefill != "chunked"
        if self.deferred and layer.seen and (steps == 1 or accepted):
            self._compress_deferred(layers)

    def needs_observation(self, steps: int) -> bool:
        """Return True if a call with ``steps`` queries must be observed."""
        if not self.compressed or self.config.decode != "grow":
            return True
        return steps > 1 and (self.config.recompress_turns or self.streaming)

    def after_attention(
        self, layers: list[Any], layer_idx: int, call: AttentionCall, sees_all: bool = False
    ) -> None:
        """Observe one attention call, and compress the layer if it is due.

        Parameters
        ----------
        layers : list
            All layers of the cache.
        layer_idx : int
            Index of the layer that attends.
        call : AttentionCall
            The call, with the mask of the layer's slots.
        sees_all : bool, default False
            True if the one new query sees every token of the layer.
        """
        layer, config, steps = layers[layer_idx], self.config, call.steps
        layer.sees_all = sees_all
        if layer_idx == self.layer_indices[0]:
            self._mask_reads.forget()
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
            more_to_come=(self.deferred and not self.selector.replays) or self.streaming,
            shards=self.shards,
            reads=self._mask_reads,
            available=layer.count_tokens(self.row_start) if sees_all else None,
        )
        if sees_all:
            layer.note_tokens(observation.available)
        observation = self._add_past(layer, observation)
        last = layer_idx == self.layer_indices[-1]
        if self.deferred and self.selector.replays:
            kept = min(self.window_queries, steps)
            self._unscored[layer_idx] = observation.take_queries(slice(steps - kept, steps))
        elif self.deferred:
            spare = _DRAFT_QUERIES if self.recording else 0
            capacity = _ALL_QUERIES if self.selector.whole_prompt else self.window_queries + spare
            self._push_queries(layer, observation, capacity, spare)
        elif not self.compressed or (steps > 1 and (config.recompress_turns or self.streaming)):
            self._end_round(layers, self.compressor.add_layer(layers, observation))
        elif config.decode == "bounded":
            self.compressor.step(layer, observation)
        else:
            capacity = _ALL_QUERIES if self.selector.whole_prompt else self.window_queries
            self._push_queries(layer, observation, capacity)
            if layer.seen - self.compressed_at >= config.decode_interval:
                self.compressor.add_layer(layers, self._observe_queries(layer, call.key, call.value))
                self._end_round(layers, last)
        if last:
            if self.row_start is None:
                self._first_steps = steps
                self.holes = self._count_holes(observation)
            self.row_start = observation.row_start
            # The first one-token step ends the prompt.
            self.streaming = self.streaming and steps > 1

    def _count_holes(self, observation: Observation) -> list[int]:
        """Count the hidden tokens inside each row of the prompt, and raise where they would change the text."""
        holes = [n - real for n, real in zip(observation.lengths, observation.available, strict=True)]
        config = self.config
        plain = config.decode == "grow" and config.prefill == "single" and not config.recompress_turns
        if any(holes) and self.selector.replays:
            raise InputError(
                f"attention_mask hides {max(holes)} tokens inside a row, and selector {self.selector.name!r} repeats "
                "whole rows: leave these tokens out and pad on the left."
            )
        if any(holes) and not (plain and config.positions == "original"):
            row = next(i for i, count in enumerate(holes) if count)
            raise InputError(
                f"attention_mask hides {holes[row]} tokens inside row {row}, which decode={config.decode!r}, "
                f"prefill={config.prefill!r}, positions={config.positions!r} and "
                f"recompress_turns={config.recompress_turns} cannot follow: leave these tokens out and pad on the "
                "left, or use the defaults of these options."
            )
        return holes

    def check_positions(self, layer: RankKVLayer, steps: int, position_ids: Tensor | None) -> None:
        """Check that the positions of new tokens continue after the tokens seen, and that the prompt came whole.

        Raises
        ------
        CacheStateError
            If they repeat positions already seen.
        """
        if not self.compressed:
            return
        past = layer.seen - steps
        if position_ids is None or position_ids.dim() != 2 or self.row_start is None:
            self._warn_of_chunks(steps)
            return
        # Check single steps only right after a compression: reading positions may stall the device.
        if steps == 1 and past != self.compressed_at:
            self._first_steps = None
            return
        holes = self.holes or [0] * len(self.row_start)
        rows = [past - start - hidden for start, hidden in zip(self.row_start, holes, strict=True)]
        given = position_ids[:, 0].tolist() * (len(rows) // position_ids.shape[0])
        if all(position < row for position, row in zip(given, rows, strict=True)):
            again = (
                " (all ids came again: an interrupted generate(), use_cache=False, or assisted decoding on a prefilled "
                "cache)"
            )
            raise CacheStateError(
                f"the new tokens start at position {given[0]}, but the cache has seen {rows[0]} tokens"
                f"{again if given[0] == 0 else ''}: give generate() all ids, or the new ids with an attention_mask "
                "over all tokens; give position_ids to a direct forward call if the model counts from 0."
            )
        self._warn_of_chunks(steps)

    def _warn_of_chunks(self, steps: int) -> None:
        """Warn if a prompt seems to come in chunks, of which only the first one is compressed."""
        first, self._first_steps = self._first_steps, None
        alone = self.config.prefill == "single" and not self.config.recompress_turns
        if alone and first is not None and 1 < steps == first:
            warnings.warn(
                f"the prompt comes in forwards of {steps} tokens, and only the first one was compressed: use "
                f"prefill='chunked' (or 'streaming') with prefill_chunk_size={steps}, or leave the chunk size out.",
                stacklevel=2,
            )

    def check_removable(self) -> None:
        """Raise if the newest tokens left traces in scores or query statistics that cannot be taken back."""
        config = self.config
        carried = self.selector.past_queries or self.selector.step in ("sum", "max")
        carried = carried or (config.decode == "bounded" and self.selector.step in ("decay", "mean"))
        if config.decode != "grow" and carried and self.compressed:
            raise CacheStateError(
                f"cannot rewind: with decode={config.decode!r} the scores of selector {self.selector.name!r} follow "
                "every token, and cannot go back; copy() the cache before each answer, or use decode='grow'."
            )

    def after_crop(self, layers: list[Any]) -> None:
        """Compress the prompt after its first draft is verified."""
        if self.deferred and self.recording and self.row_start is not None:
            self._compress_deferred(layers)

    def start_recording(self) -> None:
        """Allow drafts to be removed again from now on (assisted decoding).

        Raises
        ------
        ConfigError
            If an option evicts tokens that a rejected draft would need back.
        """
        if not self.compressed and self.selector.replays:
            raise ConfigError(
                f"selector {self.selector.name!r} scores the prompt alone, and assisted decoding drafts behind it: "
                "compress() the prompt first, and give its cache to generate()."
            )
        if not self.can_take_back:
            raise ConfigError(
                f"decode={self.config.decode!r} with prefill={self.config.prefill!r} and "
                f"recompress_turns={self.config.recompress_turns} evicts tokens that a rejected draft would need back: "
                "use decode='grow', prefill='single' or 'chunked', and recompress_turns=False with assisted decoding."
            )
        self.recording = True
        self.deferred = self.deferred or not self.compressed

    @property
    def awaits_replay(self) -> bool:
        """True between the prefill of a prompt and its replay."""
        return self.deferred and self.selector.replays and self.row_start is not None

    def settle(self, layers: list[Any]) -> None:
        """Replay and compress a waiting prompt now, before its rows change."""
        if self.awaits_replay:
            self._compress_deferred(layers)

    @property
    def can_take_back(self) -> bool:
        """True if the newest tokens can be removed again, because no option evicts others for them."""
        return self.config.decode == "grow" and not self.streaming and not self.config.recompress_turns

    def finish(self, layers: list[Any]) -> None:
        """Compress a prompt that came in chunks, and check that the prefill is complete.

        Raises
        ------
        CacheStateError
            If the prefill did not reach the last layer.
        """
        if self.row_start is None or not self.layer_indices:
            return
        if self.deferred:
            self._compress_deferred(layers)
        if not self.compressed:
            raise CacheStateError(
                "the prefill did not reach the last layer: build a new cache and run the prefill again."
            )
        self.streaming, self._first_steps = False, None

    def compress_observed(
        self, layers: list[Any], observations: Mapping[int, Observation], selector: Selector | None = None
    ) -> None:
        """Compress all layers from observations of the whole prompt; ``selector`` replaces the own one once."""
        compressor = self.compressor
        own, compressor.selector = compressor.selector, selector or compressor.selector
        try:
            for index in self.layer_indices:
                compressor.add_layer(layers, self._add_past(layers[index], observations[index]))
        finally:
            compressor.selector = own
        if self.layer_indices:
            self.row_start = observations[self.layer_indices[0]].row_start
            self.deferred = False
            self._end_round(layers)

    def copy(self) -> CompressionSchedule:
        """Return an independent copy; the cache copies the layers."""
        copied = copy.copy(self)
        copied.compressor = copy.copy(self.compressor)
        copied.row_start = None if self.row_start is None else list(self.row_start)
        copied._unscored = dict(self._unscored)
        copied._mask_reads = MaskReads()
        return copied

    def pick_rows(self, repeats: int = 1, indices: Tensor | None = None) -> None:
        """Apply a change of rows to the state: each row repeated, or only the rows ``indices``."""
        if self.row_start is None:
            return
        rows = [row for row in range(len(self.row_start)) for _ in range(repeats)]
        if indices is not None:
            rows = torch.arange(len(rows))[indices.cpu()].tolist()
        self.row_start = [self.row_start[row] for row in rows]
        if self.holes:
            self.holes = [self.holes[row] for row in rows]
        if self.position_offset is not None and len(self.position_offset) > 1:
            self.position_offset = self.position_offset[rows]
        if self.compressor.plans:
            self.compressor.plans = [self.compressor.plans[row] for row in rows]

    def _compress_deferred(self, layers: list[Any]) -> None:
        """Compress all layers from the stored queries."""
        if self.row_start is not None:
            seen = layers[self.layer_indices[0]].seen
            check_rows([seen - start for start in self.row_start])
        # Before anything changes: a replay that fails can be run again.
        replayed = self._replay(layers) if self.selector.replays else {}
        self.deferred = False
        with torch.no_grad():
            for index in self.layer_indices:
                layer = layers[index]
                if index in replayed:
                    # Taken out one by one, so that a layer's evicted tokens are freed as it shrinks.
                    observation = self._unscored.pop(index)
                    observation.replayed = replayed.pop(index)
                else:
                    observation = self._observe_queries(layer, layer.keys, layer.values)
                self.compressor.add_layer(layers, observation)
        self._end_round(layers)

    def _replay(self, layers: list[Any]) -> dict[int, Tensor]:
        """Score the waiting prompt by a replay, ``[batch, kv_head, key]`` for each layer."""
        if self.replay is None or self.row_start is None:
            raise CacheStateError(
                f"selector {self.selector.name!r} has no prompt to repeat: build a new cache with rankkv.compress()."
            )
        return self.replay.run(layers, self.row_start, self.config.sink_size)

    def _end_round(self, layers: list[Any], last: bool = True) -> None:
        """Mark the cache as compressed if the layer just compressed is the last one of the round."""
        if last:
            self.compressed, self.compressed_at = True, layers[self.layer_indices[-1]].seen
            for index in self.layer_indices:
                layers[index].buffer = None
                layers[index].rest()

    def _push_queries(
        self, layer: RankKVLayer, observation: Observation, capacity: int, spare: int | None = None
    ) -> None:
        if self.deferred and observation.keys.shape != layer.keys.shape:
            raise UnsupportedModelError(
                f"layer {observation.layer_idx} attends to other keys than it caches, so its attention cannot be "
                "computed after the forward: use prefill='single' without assisted decoding for this model."
            )
        if self.deferred and observation.hides_real_tokens:
            raise UnsupportedModelError(
                f"the mask of layer {observation.layer_idx} hides more than padding and later tokens, so its attention "
                "cannot be computed after the forward: use prefill='single' for this model."
            )
        if layer.buffer is None:
            layer.buffer = QueryBuffer(capacity, spare)
        # Queries that no longer fit leave only their sums and moments behind.
        gone = layer.buffer.push(observation)
        if gone is None:
            return
        if self.selector.step == "sum":
            self.compressor.carry(layer, gone)
        self.compressor.carry_queries(layer, self._add_past(layer, gone), more=True)

    def _observe_queries(self, layer: RankKVLayer, keys: Tensor, values: Tensor) -> Observation:
        if layer.buffer is None:
            raise CacheStateError(
                "no query of this prompt was observed: build a new cache and run the prefill again."
            )
        known = None if layer.kept_positions is None else layer.count_tokens(self.row_start)
        slots = None if known is None else layer.count_slots(known)
        observation = layer.buffer.build_observation(
            keys, values, layer.compute_positions(), layer.compute_slot_valid(), known, slots
        )
        return self._add_past(layer, observation)

    def _add_past(self, layer: RankKVLayer, observation: Observation) -> Observation:
        """Add earlier queries and the rotary embedding to an observation, if the selector needs them."""
        if not (self.selector.past_queries or self.selector.turns):
            return observation
        return replace(
            observation,
            rotation=self.rotations.get(observation.layer_idx),
            packed=self.config.positions == "packed",
            past_moments=layer.query_moments,
        )
