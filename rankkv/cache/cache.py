"""RankKVCache: goes into ``model.generate()`` and keeps of each layer what its rank and its budget allow."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer

from ..budget.plan import BudgetPlan
from ..budget.strategies import get_strategy
from ..config import RankKVConfig
from ..errors import CacheStateError, ConfigError, InputError, UnsupportedModelError
from ..models.compat import check_transformers
from ..models.placement import find_layer_devices
from ..models.tensor_parallel import find_head_shards
from ..observe import hook
from ..observe.call import AttentionCall
from ..observe.hidden_states import watch_hidden_states
from ..observe.hook import AttentionObserver
from ..observe.observation import Observation
from ..observe.rotary import LayerRotation, build_packers, find_rotations
from ..selection import Selector, get_selector
from . import saving
from .head_budget_layer import HeadBudgetLayer
from .layer import RankKVLayer, SlotMap, StoredLayer, release_hidden
from .masks import StepMask, project_mask
from .report import compute_cache_bytes, compute_full_cache_bytes, count_slots, summarize
from .resolve import check_methods, resolve_options
from .schedule import CompressionSchedule


class RankKVCache(AttentionObserver, DynamicCache):
    """A KV cache that is compressed once, at the end of the prefill, layer by layer.

    Pass it to the ordinary ``model.generate(..., cache=RankKVCache(model))`` (``past_key_values=`` before transformers
    5.24).  The first forward on the empty cache is the prefill: after each layer's own attention its effective rank is
    computed, budgets follow from the ranks of the layers so far, and the tokens the selector scores lowest are
    released; later tokens are kept whole.  Positions continue from the tokens *seen*, so the first generated token
    always equals the one of the uncompressed model.  The parameters that are not listed here are those of
    :class:`~rankkv.RankKVConfig`.

    Parameters
    ----------
    model : PreTrainedModel
        The model the cache is for; only its config and attention backend are read, nothing is stored on it.
    compression_ratio : float, default 0.3
        Fraction of the KV cache kept, in (0, 1].  kvpress gives this name to the fraction *removed*.
    budget : int, optional
        Average number of tokens a layer keeps; overrides ``compression_ratio``.
    selector : str or Selector, default "snapkv"
        Token selection method (:data:`rankkv.selection.SELECTORS`).
    strategy : str, optional
        Budget strategy; None is the measured default (``"distortion"``; with a known profile ``"blend"``).
    scope : {"evictable", "window", "full"}, default "evictable"
        Part of the attention whose effective rank is taken.
    aggregation : str, default "concat"
        How the heads of a layer are joined for its rank.
    strategy_options : mapping, optional
        Options of the strategy.
    window_size : int, default 32
        Number of last queries observed.
    sink_size : int, default 4
        Number of first tokens protected as attention sinks.
    profile : {"auto"}, RankProfile, path or None, default "auto"
        Measured sensitivity of the model's layers: the known one of this model unless ``strategy`` is given, one of
        yours, or None for no calibration.
    min_budget : int, optional
        Fewest tokens a layer keeps; None means ``max(16, average budget // 2)``.
    config : RankKVConfig, optional
        All options in one frozen object, instead of the single ones.

    Raises
    ------
    ConfigError, UnknownNameError
        If an option lies outside its range or is not registered.
    UnsupportedModelError
        If the model's attention cannot be observed, or it has no KV cache.
    ProfileError
        If ``profile`` belongs to another model, or the strategy needs one and none is known.

    Examples
    --------
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
    ...     num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8)).eval()
    >>> cache = RankKVCache(model, compression_ratio=0.5)
    >>> with torch.no_grad():
    ...     output = model(torch.arange(60)[None], past_key_values=cache)
    >>> sum(cache.kept_lengths), cache.seen_tokens
    (60, 60)
    """

    layers: list[Any]

    def __init__(
        self,
        model: Any,
        compression_ratio: float = 0.3,
        *,
        budget: int | None = None,
        selector: Any = "snapkv",
        strategy: str | None = None,
        scope: str = "evictable",
        aggregation: str = "concat",
        strategy_options: Mapping[str, Any] | None = None,
        window_size: int = 32,
        sink_size: int = 4,
        decode: str = "grow",
        decode_interval: int = 128,
        positions: str = "original",
        prefill: str = "single",
        recompress_turns: bool = False,
        storage: str = "full",
        merging: str | None = None,
        profile: Any = "auto",
        min_budget: int | None = None,
        head_budgets: str | None = "auto",
        head_floor: float = 0.2,
        protect: Any = None,
        config: RankKVConfig | None = None,
    ) -> None:
        given = RankKVConfig(
            compression_ratio=compression_ratio,
            budget=budget,
            selector=selector,
            strategy=strategy,
            scope=scope,
            aggregation=aggregation,
            strategy_options=strategy_options,
            window_size=window_size,
            sink_size=sink_size,
            decode=decode,
            decode_interval=decode_interval,
            positions=positions,
            prefill=prefill,
            recompress_turns=recompress_turns,
            storage=storage,
            merging=merging,
            profile=profile,
            min_budget=min_budget,
            head_budgets=head_budgets,
            head_floor=head_floor,
            protect=protect,
        )
        if config is not None and given != RankKVConfig():
            raise ConfigError(
                "give either config=RankKVConfig(...) or single options, not both: one would be ignored."
            )
        config = config or given
        check_transformers()
        hook.check_observable(model)
        self.selector = get_selector(config.selector)
        check_methods(config)
        text_config = model.config.get_text_config(decoder=True)
        super().__init__(config=text_config)
        self.layer_indices = [i for i, layer in enumerate(self.layers) if type(layer) is DynamicLayer]
        if not self.layer_indices:
            _report_nothing_to_compress(model, self.layers)
        shards = find_head_shards(model)
        config = resolve_options(config, model, self.layer_indices, shards)
        for index in self.layer_indices:
            self.layers[index] = _build_layer(config)
        self._backend_of = text_config
        rotations = self._find_rotations(model, config)
        self._step_masks: dict[int, StepMask] = {}
        self._packers = build_packers(rotations) if config.positions == "packed" else {}
        # Weak: a cache must not keep a model alive, and copies of it must not copy the model.
        self._model = weakref.ref(model)
        self._schedule = CompressionSchedule(config, self.selector, self.layer_indices, rotations, shards)
        # The keys each layer's attention was last given, for layers that attend to those of another.
        self._attended: dict[int, tuple[weakref.ref[Tensor], SlotMap | None]] = {}
        self._watch(model)

    @property
    def config(self) -> RankKVConfig:
        """All options, those left to "auto" resolved for the model."""
        return self._schedule.config

    # -- what a reader asks -----------------------------------------------------------------------------------------

    @property
    def seen_tokens(self) -> int:
        """Tokens seen so far, evicted ones included (a padded batch: its padded width)."""
        return self.get_seq_length()

    @property
    def kept_lengths(self) -> list[int]:
        """Slots each model layer holds, one entry a layer (a layer without keys: 0; head budgets: a head's average)."""
        return [count_slots(layer) for layer in self.layers]

    @property
    def kept_per_head(self) -> list[list[list[int]]]:
        """Tokens that every kv head keeps, ``[compressible layer][row][kv_head]``."""
        return [self.layers[index].kept_per_head for index in self.layer_indices]

    @property
    def plans(self) -> list[BudgetPlan]:
        """How the last compression came to its budgets, one plan a row; empty before the prefill."""
        return self._schedule.compressor.plans

    @property
    def row_start(self) -> list[int]:
        """Padding before the first real token of each row; empty before the prefill."""
        return list(self._schedule.row_start or [])

    @property
    def budgets_per_row(self) -> list[list[int]]:
        """Tokens kept of the prompt, ``[row][compressible layer]``; empty before the prefill."""
        return [list(plan.budgets) for plan in self.plans]

    @property
    def layer_ranks_per_row(self) -> list[list[float]]:
        """Effective ranks, ``[row][compressible layer]``; empty lists where the strategy needs none."""
        return [plan.layer_ranks for plan in self.plans]

    @property
    def layer_measures_per_row(self) -> list[list[float]]:
        """What the strategy measured, ``[row][compressible layer]``; empty lists where it measures nothing.

        For most strategies that is the effective rank; for ``"cake"`` the layer's preference, and so on
        (:attr:`rankkv.budget_allocation.Strategy.measure`).  Where a layer is measured by several numbers it is the
        weight they gave it.
        """
        return [list(plan.layer_measures) for plan in self.plans]

    @property
    def budgets(self) -> list[int]:
        """Tokens kept of the prompt by each compressible layer (row 0)."""
        rows = self.budgets_per_row
        return rows[0] if rows else []

    @property
    def layer_ranks(self) -> list[float]:
        """Effective rank of each compressible layer (row 0); empty where the strategy measures no rank."""
        rows = self.layer_ranks_per_row
        return rows[0] if rows else []

    @property
    def layer_measures(self) -> list[float]:
        """What the strategy measured of each compressible layer (row 0); see :attr:`layer_measures_per_row`."""
        rows = self.layer_measures_per_row
        return rows[0] if rows else []

    def cache_bytes(self) -> int:
        """Return the bytes of all keys and values held, each distinct storage counted once."""
        return compute_cache_bytes(self)

    def full_cache_bytes(self) -> int:
        """Return the bytes the model's plain cache would hold after the same tokens."""
        return compute_full_cache_bytes(self)

    def _fingerprint(self) -> str:
        model = self._model()
        if model is None:
            raise CacheStateError(
                "the model of this cache is gone: keep a reference to it while the cache is in use."
            )
        return saving.compute_model_fingerprint(model)

    def copy(self) -> RankKVCache:
        """Return an independent copy: what is generated on one does not reach the other."""
        hook.check_not_pending(self)
        copied = copy.copy(self)
        copied.layers = copy.deepcopy(self.layers)
        copied._schedule = self._schedule.copy()
        copied._attended, copied._step_masks = {}, {}
        copied._packers = {index: packer.copy() for index, packer in self._packers.items()}
        copied._watch(self._model())
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> RankKVCache:
        return self.copy()

    def copy_with(self, **options: Any) -> RankKVCache:
        """Return a copy whose prompt, prefilled but not compressed yet, will be compressed by other options.

        Parameters
        ----------
        **options
            Of :class:`~rankkv.RankKVConfig`, those that are read at the compression: budgets, strategy, scope,
            aggregation, profile.

        Raises
        ------
        CacheStateError
            If the prompt is compressed already; build the cache with ``prefill="chunked"`` and do not finish it.
        """
        if self._schedule.compressed:
            raise CacheStateError(
                "the prompt of this cache is compressed already, so other options come too late: build it with "
                "prefill='chunked' and copy it before finish()."
            )
        copied = self.copy()
        copied._schedule.compressor.config = replace(self.config, **options)
        return copied

    def take_prefill(
        self,
        observations: Mapping[int, Observation],
        other_layers: Sequence[Any],
        changes: Mapping[int, Tensor] | None = None,
        selector: Selector | None = None,
    ) -> RankKVCache:
        """Fill an empty cache from a recorded prefill, compress it, and return the cache.

        Parameters
        ----------
        observations : mapping
            The observation of the whole prompt for each compressible layer.
        other_layers : sequence
            The layers of a plain cache after the prompt; those that are not compressible are copied.
        changes : mapping, optional
            How far the attention of each layer turned the hidden states, where it was recorded.
        selector : Selector, optional
            Gives this cache's scores in its selector's place, from what was computed before.
        """
        for index, layer in enumerate(self.layers):
            if isinstance(layer, RankKVLayer):
                layer.update(observations[index].keys, observations[index].values)
                layer.token_changes = (changes or {}).get(index)
            else:
                self.layers[index] = copy.deepcopy(other_layers[index])
        with torch.no_grad():
            self._schedule.compress_observed(self.layers, observations, selector)
        return self

    def rewind(self, seen_tokens: int) -> RankKVCache:
        """Drop the newest tokens until ``seen_tokens`` have been seen, and return the cache.

        Raises
        ------
        CacheStateError
            If that would need tokens that were evicted, or more tokens than were seen.
        """
        if not 0 < seen_tokens <= self.seen_tokens:
            raise CacheStateError(
                f"cannot rewind to {seen_tokens} tokens: the cache has seen {self.seen_tokens}; give 1 to that many."
            )
        if seen_tokens < self.seen_tokens:
            self.crop(seen_tokens - self.seen_tokens)
        return self

    def finish(self) -> RankKVCache:
        """Compress a prompt that came in chunks, check that the prefill is complete, and return the cache."""
        hook.check_not_pending(self)
        self._check_complete()
        self._schedule.finish(self.layers)
        return self

    def save(self, path: str | Path) -> Path:
        """Write the compressed cache to one safetensors file and return its path.

        Raises
        ------
        CacheStateError
            If the prefill is not complete, or a layer's state is no keys and values.
        """
        return saving.save_cache(self, path, self._fingerprint())

    @classmethod
    def load(cls, path: str | Path, model: Any) -> RankKVCache:
        """Read a cache that :meth:`save` wrote, for the same model.

        Raises
        ------
        InputError
            If the file is missing, no saved cache, or one of another model.
        """
        header = saving.read_cache_header(path)
        if saving.compute_model_fingerprint(model) != header.get("fingerprint"):
            raise InputError(
                f"{path} was saved from another model (or the same in another dtype): keys and values of one model "
                "mean nothing to another. Load it with the model it came from."
            )
        try:
            cache = cls(model, config=saving.restore_config(header))
            saving.restore_state(cache, path, header, find_layer_devices(model))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{path} describes a cache that this version of RankKV cannot build ({error}): write it again with "
                "save()."
            ) from error
        return cache

    def summary(self) -> str:
        """Return a short account: tokens and bytes kept, and rank and budget of each layer (row 0)."""
        return summarize(self)

    def _watch(self, model: Any) -> None:
        """Be shown the attention of the model's layers, and what else the strategy measures."""
        hook.watch_for(self, model)
        if model is not None and get_strategy(self.config.resolve_strategy()[0]).needs == "hidden states":
            watch_hidden_states(self, model, self.layer_indices)

    def _find_rotations(self, model: Any, config: RankKVConfig) -> dict[int, LayerRotation | None]:
        if config.positions == "packed":
            return find_rotations(model, self.layer_indices)
        if self.selector.past_queries != "unturned":
            return {}
        try:
            return find_rotations(model, self.layer_indices)
        except UnsupportedModelError:
            warnings.warn(
                f"how {type(model).__name__} turns queries with their position is not known, so selector "
                f"{self.selector.name!r} takes past queries as they stand.",
                stacklevel=4,
            )
            return {}

    # -- what transformers asks ---------------------------------------------------------------------------------

    @torch.compiler.disable
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append new keys and values, and let this layer's next attention call be observed."""
        layer = self.layers[layer_idx]
        if isinstance(layer, RankKVLayer):
            if layer_idx == self.layer_indices[0]:
                self._check_complete()
            self._schedule.before_update(self.layers, layer, key_states.shape[-2])
        states = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if isinstance(layer, RankKVLayer):
            hook.hand_off(self, layer_idx, states[0].shape[-2])
        elif key_states.shape[-2] > 1:
            release_hidden(layer)
        return states

    def _check_complete(self) -> None:
        seen = {self.layers[index].seen for index in self.layer_indices}
        if len(seen) > 1:
            raise CacheStateError(
                f"an earlier forward with this cache was interrupted: its layers have seen {min(seen)} to {max(seen)} "
                "tokens. Use a new cache, or reset() this one."
            )

    def activate_past_recording(self) -> None:
        """Let drafts be taken back (assisted decoding): the prompt is compressed once its first draft is judged."""
        self._schedule.start_recording()
        # Older transformers take every draft back without asking first.
        if hasattr(super(), "activate_past_recording"):
            super().activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens (a rejected draft), then compress the prompt if that had to wait."""
        super().crop(tokens_to_remove)
        self._schedule.after_crop(self.layers)

    def reset(self) -> None:
        """Forget everything: the next forward is a prefill."""
        super().reset()
        self._schedule.reset()
        for packer in self._packers.values():
            packer.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give every row the state of row ``beam_idx``, its budgets included."""
        super().reorder_cache(beam_idx)
        self._schedule.pick_rows(indices=beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times, its budgets included."""
        super().batch_repeat_interleave(repeats)
        self._schedule.pick_rows(repeats=repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices`` only, with their budgets."""
        super().batch_select_indices(indices)
        self._schedule.pick_rows(indices=indices)

    @property
    def is_croppable(self) -> bool:
        """Whether the newest tokens can be removed again, so that a rejected draft leaves no trace."""
        return self._schedule.can_take_back and all(
            getattr(layer, "is_croppable", True) for layer in self.layers
        )

    @property
    def is_compileable(self) -> bool:
        """False: lengths differ by layer and change with every prompt."""
        return False

    # -- what the attention hook asks ---------------------------------------------------------------------------

    def attend(self, layer_idx: int, call: AttentionCall) -> Any:
        """Run the layer's attention with its own mask; in the prefill, compress the layer afterwards."""
        layer, steps = self.layers[layer_idx], call.steps
        if layer_idx == self.layer_indices[0] and self._schedule.compressed:
            self._schedule.check_positions(layer, steps, call.options.get("position_ids"))
        slots = layer.slot_map
        self._attended[layer_idx] = (weakref.ref(call.key), slots)
        if layer_idx in self._packers:
            self._packers[layer_idx].note_frequencies(layer.seen - steps)
        call = self._fit(layer_idx, slots, call)
        output = call.run()
        if self._schedule.wants_observation(steps):
            with torch.no_grad():
                self._schedule.observe(self.layers, layer_idx, call)
        if self._schedule.compressed:
            layer.rest()
        return output

    def note_changes(self, layer_idx: int, changes: Tensor) -> None:
        """Take how far the layer's attention turned the hidden state of each token, ``[batch, token]``."""
        self._schedule.note_changes(self.layers, layer_idx, changes)

    def find_attended(self, key: Tensor) -> int | None:
        """Return the layer whose attention was last given these very keys, if there is one."""
        found = (index for index, (attended, _) in self._attended.items() if attended() is key)
        return next(found, None)

    def attend_shared(self, layer_idx: int, call: AttentionCall) -> Any:
        """Run the attention of a layer that has no keys of its own, with the mask of those kept by ``layer_idx``."""
        return self._fit(layer_idx, self._attended[layer_idx][1], call).run()

    def _fit(self, layer_idx: int, slots: SlotMap | None, call: AttentionCall) -> AttentionCall:
        """Fit one call of attention to the slots that the layer keeps."""
        if slots is None:
            return call
        # With nothing to mask, the one query of a decode step sees every slot, and no position is asked for.
        if call.mask is not None or call.steps > 1 or slots.kept_valid is not None:
            backend, query = self._backend_of._attn_implementation, call.query
            if call.mask is None and call.steps == 1 and backend in ("sdpa", "eager"):
                steps = self._step_masks.setdefault(layer_idx, StepMask())
                mask = steps.get(slots, query.shape[1], backend, query.dtype)
            else:
                where = slots.compute_positions(), slots.compute_valid()
                mask = project_mask(call.mask, *where, call.steps, query.shape[1], backend, query.dtype)
            call = replace(call, mask=mask)
        packer = self._packers.get(layer_idx)
        if packer is not None and self._schedule.row_start is not None:
            query, key = packer.pack(
                call.query,
                call.key,
                slots.compute_positions(),
                slots.compute_valid(),
                self._schedule.row_start,
            )
            call = replace(call, query=query, key=key)
        return call


def _build_layer(config: RankKVConfig) -> RankKVLayer:
    if config.head_budgets is not None:
        return HeadBudgetLayer(config.storage, config.head_floor)
    return RankKVLayer() if config.storage == "full" else StoredLayer(config.storage)


def _report_nothing_to_compress(model: Any, layers: list[Any]) -> None:
    name = type(model).__name__
    if not any(isinstance(layer, CacheLayerMixin) for layer in layers):
        raise UnsupportedModelError(f"{name} has no KV cache: there is nothing RankKV could compress.")
    warnings.warn(
        f"no layer of {name} has a full-attention KV cache, so nothing is compressed and the model runs unchanged.",
        stacklevel=3,
    )
