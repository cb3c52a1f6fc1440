"""RankKVCache: the KV cache for ``model.generate()`` that compresses itself after the prefill."""

from __future__ import annotations

import copy
import operator
import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer

from ..budget.plan import BudgetPlan
from ..config import AUTO_SELECTOR, BOTH_GIVEN, DEFAULT_RATIO, RankKVConfig, check_predicted
from ..errors import CacheStateError, ConfigError, InputError, RankKVError, UnsupportedModelError
from ..models.compat import announces_linear_states, check_transformers, drop_linear_states, warn_if_dropped
from ..models.placement import find_layer_devices
from ..models.tensor_parallel import find_head_shards
from ..observe import hook
from ..observe.call import AttentionCall
from ..observe.hook import AttentionObserver
from ..observe.observation import Observation
from ..observe.rotary import LayerRotation, build_packers, find_rotations
from ..profile.loss_curve import LossCurve
from ..selection import Selector, get_selector
from . import saving
from .head_budget_layer import HeadBudgetLayer
from .layer import RankKVLayer, SlotMap, StoredLayer, release_hidden
from .masks import PaddingCheck, StepMask, project_mask
from .owner import Owner
from .progress import Progress
from .quality import (
    LONGEST_GAP,
    find_curve,
    find_longest_gap,
    list_doubts,
    settle_strategy,
)
from .replay import Replay, ReplayPlan, check_replay
from .report import (
    compute_cache_bytes,
    compute_full_cache_bytes,
    compute_kept_bytes,
    count_slots,
    summarize,
)
from .resolve import change_before_compression, check_methods, resolve_new_profile, resolve_options
from .schedule import CompressionSchedule


class RankKVCache(AttentionObserver, DynamicCache):
    """Compress the KV cache of one model once, at the end of the prefill, layer by layer.

    Pass it to the ordinary ``model.generate(..., cache=RankKVCache(model))`` (``past_key_values=`` before transformers
    5.24).  The first forward on the empty cache is the prefill.  After the attention of each layer, the strategy
    measures the layer, for instance by its effective rank.  Budgets follow from the layers measured so far, and each
    layer releases the tokens with the lowest scores of the selector.  Later tokens are all kept.  Positions continue
    from the tokens *seen*, so the first generated token always equals the one of the uncompressed model.

    Parameters
    ----------
    model : PreTrainedModel
        The model the cache is for.  Only its config and attention backend are read; nothing is stored on it.
    compression_ratio : float, default 0.3
        Fraction of the KV cache **kept**, in (0, 1]; kvpress means the fraction removed.
    config : RankKVConfig, optional
        All options in one frozen object, instead of single ones.
    budget, selector, strategy, ...
        All other options by name, documented in :class:`~rankkv.RankKVConfig`.

    Raises
    ------
    ConfigError, UnknownNameError
        If an option is outside its range or not registered.
    UnsupportedModelError
        If the model's attention cannot be observed, or it has no KV cache.
    ProfileError
        If ``profile`` belongs to another model, or the strategy needs a profile and none is known.

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
    #: The prompt this cache is for, if its selector replays it.
    _replay_plan: ReplayPlan | None = None

    def __init__(
        self,
        model: Any,
        compression_ratio: float = DEFAULT_RATIO,
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
        profile: Any = "auto",
        min_budget: int | None = None,
        head_budgets: str | None = "auto",
        head_floor: float = 0.2,
        protect: Any = None,
        max_loss: float | None = None,
        on_doubt: str = "say",
        config: RankKVConfig | None = None,
    ) -> None:
        # The first statement: the arguments are the only local variables yet.
        given = RankKVConfig(**_pick_options(locals()))
        if config is not None and given != RankKVConfig(selector="snapkv"):
            raise ConfigError(BOTH_GIVEN)
        config = config or given
        check_transformers()
        hook.check_observable(model)
        self.selector = get_selector(config.selector)
        self.selector.check_complete()
        if config.selector == AUTO_SELECTOR:
            config = replace(config, selector=self.selector.name)
        #: Sentences on what was decided for the user; `summary` tells them.
        self.remarks: list[str] = []
        check_methods(config)
        if self.selector.replays:
            check_replay(config, self.selector, model, self._replay_plan)
        text_config = model.config.get_text_config(decoder=True)
        super().__init__(config=text_config)
        self.layer_indices = [i for i, layer in enumerate(self.layers) if type(layer) is DynamicLayer]
        if not self.layer_indices:
            _report_nothing_to_compress(model, self.layers)
        shards = find_head_shards(model)
        check_predicted(config.max_loss, self.selector.name)
        config = settle_strategy(config)
        config = resolve_options(config, model, self.layer_indices, shards, self.selector)
        for index in self.layer_indices:
            self.layers[index] = _build_layer(config)
        #: Config of the language model, which names the attention backend.
        self.text_config = text_config
        rotations = self._find_rotations(model, config)
        self._step_masks: dict[int, StepMask] = {}
        self._packers = build_packers(rotations) if config.positions == "packed" else {}
        self._owner = Owner(model)
        self._schedule = CompressionSchedule(config, self.selector, self.layer_indices, rotations, shards)
        # The loss curve and whether it is the model's own, once they are needed.
        self._known_curve: tuple[LossCurve | None, bool] | None = None
        if config.max_loss is not None:
            self._schedule.compressor.curve = self.find_loss_curve()[0]
        # The keys that each layer's attention last used: some models share them with layers that have none.
        self._attended: dict[int, tuple[weakref.ref[Tensor], SlotMap | None]] = {}
        #: The layer that was updated and whose attention was not observed yet.
        self._awaited: int | None = None
        # The keys and values that the last update returned.
        self._shown: tuple[weakref.ref[Tensor], weakref.ref[Tensor]] | None = None
        # True once a layer attended to the keys of another one.
        self._shares_keys = False
        self._padding = PaddingCheck()
        self._progress = Progress()
        #: Token ids of the prompt, ``[batch, token]`` on the CPU, where they are known.
        self.prompt_ids: Tensor | None = None
        if self.selector.replays and self._replay_plan is not None:
            replay = Replay(self._owner, self._replay_plan, self.selector, self.layer_indices, shards)
            self._schedule.replay = replay
        self._watch(model)
        warn_if_dropped(model)

    @classmethod
    def for_prompt(cls, model: Any, plan: ReplayPlan, **options: Any) -> RankKVCache:
        """Build an empty cache for one known prompt, which a selector may replay after its prefill.

        :func:`rankkv.cache.prefill.build_cache` is the way to call this.

        Parameters
        ----------
        model : PreTrainedModel
            The model the cache is for.
        plan : ReplayPlan
            The prompt.
        **options
            As for the class.
        """
        cache = cls.__new__(cls)
        cache._replay_plan = plan
        cache.__init__(model, **options)  # type: ignore[misc]
        return cache

    def _find_rotations(self, model: Any, config: RankKVConfig) -> dict[int, LayerRotation | None]:
        if config.positions == "packed":
            return find_rotations(model, self.layer_indices)
        if not self.selector.needs_rotation:
            return {}
        try:
            return find_rotations(model, self.layer_indices)
        except UnsupportedModelError as error:
            if self.selector.turns:
                raise UnsupportedModelError(
                    f"selector {self.selector.name!r} turns queries by the model's rotary embedding, but how "
                    f"{type(model).__name__} applies positions is not known ({error}): use selector='snapkv' or 'h2o'."
                ) from error
            warnings.warn(
                f"how {type(model).__name__} applies positions to queries is not known, so selector "
                f"{self.selector.name!r} uses past queries unchanged.",
                stacklevel=4,
            )
            return {}

    def _watch(self, model: Any) -> None:
        """Register the cache with the attention hook."""
        hook.watch_for(self, model)

    # -- read by users -------------------------------------------------------------------------------------------

    @property
    def config(self) -> RankKVConfig:
        """All options; those left to "auto" are resolved for the model."""
        return self._schedule.config

    @property
    def seen_tokens(self) -> int:
        """Number of tokens seen, evicted ones included (for a padded batch, its padded width)."""
        return self.get_seq_length()

    @property
    def kept_lengths(self) -> list[int]:
        """Number of slots in each model layer; 0 for a layer without keys.

        If heads keep different numbers of tokens, it is the average over heads.
        """
        self._check_awaited()
        return [count_slots(layer) for layer in self.layers]

    @property
    def kept_per_head(self) -> list[list[list[int]]]:
        """Number of tokens that each kv head keeps, ``[compressible layer][row][kv_head]``."""
        self._check_awaited()
        return [self.layers[index].kept_per_head for index in self.layer_indices]

    @property
    def budgets(self) -> list[int]:
        """Prompt tokens kept by each compressible layer (row 0)."""
        return self.budgets_per_row[0] if self.plans else []

    @property
    def budgets_per_row(self) -> list[list[int]]:
        """Prompt tokens kept, ``[row][compressible layer]``; empty before the prefill."""
        return [list(plan.budgets) for plan in self.plans]

    @property
    def layer_ranks(self) -> list[float]:
        """Effective rank of each compressible layer (row 0); empty if the strategy needs no rank."""
        return self.layer_ranks_per_row[0] if self.plans else []

    @property
    def layer_ranks_per_row(self) -> list[list[float]]:
        """Effective ranks, ``[row][compressible layer]``; empty rows if the strategy needs no rank."""
        return [plan.layer_ranks for plan in self.plans]

    @property
    def layer_measures(self) -> list[float]:
        """Measure of each compressible layer (row 0); see :attr:`layer_measures_per_row`."""
        return self.layer_measures_per_row[0] if self.plans else []

    @property
    def layer_measures_per_row(self) -> list[list[float]]:
        """Measures of the strategy, ``[row][compressible layer]``; empty rows if it measures nothing.

        For most strategies the measure is the effective rank, for ``"cake"`` the layer's preference
        (:attr:`rankkv.budget_allocation.Strategy.measure` names it).  If a layer is measured by several numbers, it is
        the weight computed from them.
        """
        return [list(plan.layer_measures) for plan in self.plans]

    @property
    def plans(self) -> list[BudgetPlan]:
        """Budget plans of the last compression, one per row; empty before the prefill."""
        self._check_awaited()
        return self._schedule.compressor.plans

    @property
    def predicted_loss(self) -> float | None:
        """Loss to expect of row 0, nats per token; see :attr:`predicted_losses`."""
        return self.predicted_losses[0] if self.plans else None

    @property
    def predicted_losses(self) -> list[float | None]:
        """Loss to expect of each row, nats per token; empty before the prefill.

        It is the mean KL divergence of the next-token distribution from the full cache's, over the 128 tokens that
        follow, which half of the prompts stay below.  It is predicted from :attr:`lost_attention`.  None with a
        selector whose loss was not measured, with ``prefill="streaming"`` or ``recompress_turns=True``, and on a GPU
        without ``max_loss`` or :meth:`measure_lost_attention`.
        """
        return [None if loss is None else loss[0] for loss in self._predict()]

    @property
    def loss_bounds(self) -> list[float | None]:
        """Loss that nine of ten prompts stay below, one entry per row; what ``max_loss`` bounds."""
        return [None if loss is None else loss[1] for loss in self._predict()]

    @property
    def lost_attention(self) -> list[float | None]:
        """Share of the attention of the prompt's last queries that goes to evicted tokens, one entry per row.

        The mean over all heads of all compressible layers.
        """
        return [plan.lost_attention for plan in self.plans]

    @property
    def doubts(self) -> list[str]:
        """Reasons for which the predicted loss of row 0 is weak, as phrases."""
        plan = next(iter(self.plans), None)
        if plan is None or plan.lost_attention is None:
            return []
        doubts = list_doubts(plan, self.find_loss_curve()[0])
        layers = [self.layers[index] for index in self.layer_indices]
        first, stop = find_longest_gap(layers, self.row_start[0], plan.length)
        if stop - first >= LONGEST_GAP:
            doubts.append(f"the tokens {first} to {stop - 1} are kept by no head of any layer")
        if str(self.selector) != self.selector.name:
            doubts.append(f"the curve was measured with the plain selector {self.selector.name!r}")
        if self.config.decode == "bounded":
            doubts.append("decode='bounded' evicts more with every token")
        if self.config.storage == "int8":
            doubts.append("the rounding of storage='int8' is left out")
        return doubts

    def measure_lost_attention(self) -> RankKVCache:
        """Measure what eviction loses on a GPU too, as with ``max_loss``; return the cache.

        On a CPU it is always measured.
        """
        self._schedule.compressor.measures_lost = True
        return self

    def find_loss_curve(self) -> tuple[LossCurve | None, bool]:
        """Return the curve that predicts losses, None if there is none, and if it was measured on this model."""
        if self._known_curve is None:
            model = self._owner.model
            if model is None:
                # A summary needs no model: it then predicts nothing.
                return None, False
            self._known_curve = find_curve(self.config, model, self.layer_indices, self.selector)
        return self._known_curve

    def _predict(self) -> list[tuple[float, float] | None]:
        lost = self.lost_attention
        curve = self.find_loss_curve()[0] if any(share is not None for share in lost) else None
        return [None if curve is None or share is None else curve.predict(share) for share in lost]

    @property
    def row_start(self) -> list[int]:
        """Number of padding tokens before the first real token of each row; empty before the prefill."""
        return list(self._schedule.row_start or [])

    def cache_bytes(self) -> int:
        """Return the bytes of all keys and values held, and of room for tokens to come; shared storage counts once."""
        return compute_cache_bytes(self)

    def kept_bytes(self) -> int:
        """Return the bytes of all keys and values held, without room for tokens to come."""
        return compute_kept_bytes(self)

    def full_cache_bytes(self) -> int:
        """Return the bytes of an uncompressed cache after the same tokens."""
        return compute_full_cache_bytes(self)

    def summary(self) -> str:
        """Return a short text: tokens and bytes kept, rank and budget of each layer (row 0)."""
        self._check_usable()
        return summarize(self)

    # -- complete, copy, rewind, save ----------------------------------------------------------------------------

    def finish(self) -> RankKVCache:
        """Compress a prompt that came in chunks, check that the prefill is complete, and return the cache."""
        self._check_usable()
        with self._progress.change():
            self._schedule.finish(self.layers)
        return self

    def copy(self) -> RankKVCache:
        """Return an independent copy: generating with one does not change the other."""
        self._check_usable()
        copied = type(self).__new__(type(self))
        copied.__dict__.update(self.__dict__)
        copied.layers = copy.deepcopy(self.layers)
        copied._schedule, copied._progress = self._schedule.copy(), self._progress.copy()
        # The copy has tensors of its own, so what was remembered by tensor identity does not apply.
        copied._attended, copied._step_masks = {}, {}
        copied._shown, copied._padding = None, PaddingCheck()
        copied._packers = {index: packer.copy() for index, packer in self._packers.items()}
        copied._watch(self._owner.model)
        copied._restore_offset()
        return copied

    def _restore_offset(self) -> None:
        # A prompt that waits for its last chunk has an offset too.
        if self.seen_tokens:
            self._owner.restore_offset(self._schedule.position_offset)

    def __deepcopy__(self, memo: dict[int, Any]) -> RankKVCache:
        return self.copy()

    def __copy__(self) -> RankKVCache:
        return self.copy()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise CacheStateError(
            "a cache cannot be pickled, because it belongs to a model in this process: write it with save(path) and "
            "read it with RankKVCache.load(path, model)."
        )

    def copy_with(self, **options: Any) -> RankKVCache:
        """Return a copy of an uncompressed prefill that will be compressed with other options.

        Parameters
        ----------
        **options
            Options of :class:`~rankkv.RankKVConfig` that are read at compression, those of
            :data:`rankkv.cache.resolve.READ_AT_COMPRESSION`.

        Raises
        ------
        ConfigError
            If an option was read earlier, or strategy ``"global"`` cannot compare the selector's scores.
        CacheStateError
            If the prompt is already compressed: build the cache with ``prefill="chunked"`` and do not finish it.
        """
        if self._schedule.compressed:
            raise CacheStateError(
                "the prompt of this cache is already compressed, so other options come too late: build the cache with "
                "prefill='chunked' and copy it before finish()."
            )
        config = change_before_compression(self.config, self.selector, options)
        copied = self.copy()
        if "profile" in options:
            config = resolve_new_profile(config, self._owner.get(), self.layer_indices, self.selector)
            copied._known_curve = None
        copied._schedule.compressor.config = config
        if config.max_loss is not None:
            copied._schedule.compressor.measures_lost = True
            copied._schedule.compressor.curve = copied.find_loss_curve()[0]
        return copied

    def take_prefill(
        self,
        observations: Mapping[int, Observation],
        other_layers: Sequence[Any],
        selector: Selector | None = None,
    ) -> RankKVCache:
        """Fill an empty cache from a recorded prefill, compress it, and return it.

        Parameters
        ----------
        observations : mapping
            Observation of the whole prompt for each compressible layer.
        other_layers : sequence
            Layers of a plain cache after the prompt; those that are not compressible are copied.
        selector : Selector, optional
            Selector with recorded scores, used in place of this cache's selector.
        """
        with self._progress.change(), torch.no_grad():
            for index, layer in enumerate(self.layers):
                if isinstance(layer, RankKVLayer):
                    layer.update(observations[index].keys, observations[index].values)
                else:
                    self.layers[index] = copy.deepcopy(other_layers[index])
            self._schedule.compress_observed(self.layers, observations, selector)
        return self

    def rewind(self, seen_tokens: int) -> RankKVCache:
        """Drop the newest tokens until ``seen_tokens`` have been seen; return the cache.

        Raises
        ------
        CacheStateError
            If evicted tokens or scores would be needed, ``seen_tokens`` exceeds the tokens seen, or a layer of another
            kind (sliding window, linear attention) cannot go back.  Nothing has changed then.
        """
        self._check_usable()
        if not 0 < seen_tokens <= self.seen_tokens:
            raise CacheStateError(
                f"cannot rewind to {seen_tokens} tokens: the cache has seen {self.seen_tokens}; give 1 to that many."
            )
        if seen_tokens < self.seen_tokens:
            self._check_removable(self.seen_tokens - seen_tokens)
            self.crop(seen_tokens - self.seen_tokens)
        self._restore_offset()
        return self

    def _check_removable(self, count: int) -> None:
        """Raise, before anything changes, if the newest ``count`` tokens cannot be removed."""
        self._schedule.check_removable()
        for index, layer in enumerate(self.layers):
            if isinstance(layer, RankKVLayer):
                layer.check_removable(count)
                continue
            try:
                copy.deepcopy(layer).crop(-count)
            except RuntimeError as error:
                raise CacheStateError(
                    f"cannot rewind by {count} tokens: layer {index} ({type(layer).__name__}) no longer holds its "
                    "earlier state; copy() the cache before each answer, or call activate_past_recording() first."
                ) from error

    def save(self, path: str | Path) -> Path:
        """Write the compressed cache to one safetensors file and return its path.

        Raises
        ------
        CacheStateError
            If the prefill is not complete, a layer holds something other than keys and values, or a number is not
            finite.
        OutputError
            If the file cannot be written.
        """
        self._check_usable()
        return saving.save_cache(self, path, self._owner.get())

    @classmethod
    def load(cls, path: str | Path, model: Any) -> RankKVCache:
        """Read a cache that :meth:`save` wrote, for the same model with the same adapters in use.

        The whole file is checked before anything is built from it.

        Raises
        ------
        InputError
            If the file is missing, is damaged, or belongs to another model, dtype or adapter.
        """
        saved = saving.read_cache(path, model)
        try:
            # A saved cache is compressed already, so nothing is left to replay.
            cache = cls.for_prompt(model, ReplayPlan.nothing(), config=saved.config)
            saving.restore_state(cache, saved, find_layer_devices(model))
            cache._restore_offset()
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
            raise InputError(
                f"{path} describes a cache that this version of RankKV cannot build ({str(error)[:200]}): save it "
                "again."
            ) from error
        return cache

    # -- called by transformers ----------------------------------------------------------------------------------

    @torch.compiler.disable
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append new keys and values, and announce the next attention call of this layer to the hook."""
        if layer_idx >= len(self.layers):
            raise CacheStateError(
                f"layer {layer_idx} updates a cache of {len(self.layers)} layers: it was built for another model "
                f"({self._owner.describe()}); build a RankKVCache for the model that runs."
            )
        layer = self.layers[layer_idx]
        self._check_shape((layer_idx, "keys"), key_states)
        if key_states.shape[0] != value_states.shape[0]:
            # Rotary positions of other rows spread the keys of one row over theirs.
            raise CacheStateError(
                f"the new keys have {key_states.shape[0]} rows and the new values {value_states.shape[0]}: the model "
                "holds positions of another call with more rows; copy(), rewind() or load() the cache right before it "
                "is used, which restores its own."
            )
        self._check_rows(key_states.shape[0])
        if not isinstance(layer, RankKVLayer):
            with self._progress.update((layer_idx, "keys"), self.layers):
                states = super().update(key_states, value_states, layer_idx, *args, **kwargs)
                if key_states.shape[-2] > 1:
                    release_hidden(layer)
            return states
        self._check_awaited(layer_idx)
        if layer_idx == self.layer_indices[0]:
            self._check_seen()
        with self._progress.update((layer_idx, "keys"), self.layers):
            self._schedule.before_update(self.layers, layer, key_states.shape[-2])
            self._awaited = layer_idx
            if isinstance(layer, HeadBudgetLayer):
                layer.stays_unpadded = self._may_stay_unpadded(layer_idx, key_states, value_states)
            states = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self._shown = weakref.ref(states[0]), weakref.ref(states[1])
        hook.hand_off(self, layer_idx, states[0].shape[-2])
        return states

    def _may_stay_unpadded(self, layer_idx: int, keys: Tensor, values: Tensor) -> bool:
        """Return True if a layer can add one token, and attend from it, without padding its heads."""
        layer, schedule = self.layers[layer_idx], self._schedule
        return (
            keys.shape[-2] == 1
            and schedule.compressed
            and not schedule.needs_observation(1)
            and self.text_config._attn_implementation == "sdpa"
            # Both need all keys in one tensor: packed positions turn them, and other layers read them.
            and layer_idx not in self._packers
            and not self._shares_keys
            and layer.can_stay_unpadded(keys, values)
        )

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Return the convolution state of a linear layer, which begins the layer's forward with this."""
        held = super().get_conv_state(layer_idx, state_idx)
        return self._note_linear((layer_idx, f"convolution state {state_idx}"), held)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Return the recurrent state of a linear layer, which begins the layer's forward with this."""
        held = super().get_recurrent_state(layer_idx, state_idx)
        return self._note_linear((layer_idx, f"recurrent state {state_idx}"), held)

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor:
        """Update the convolution state of a linear layer."""
        self._check_shape((layer_idx, "convolution state"), conv_states)
        self._check_rows(conv_states.shape[0])
        with self._progress.change():
            return super().update_conv_state(conv_states, layer_idx, *args, **kwargs)

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Update the recurrent state of a linear layer."""
        self._check_shape((layer_idx, "recurrent state"), recurrent_states)
        with self._progress.change():
            return super().update_recurrent_state(recurrent_states, layer_idx, *args, **kwargs)

    def _note_linear(self, state: tuple[int, str], held: Tensor | None) -> Tensor | None:
        if announces_linear_states():
            self._progress.read(state, held, self.layers)
        return held

    def _check_shape(self, state: tuple[int, str], tensor: Tensor) -> None:
        """Raise, before anything changes, if new keys or states cannot be those of the cache's model."""
        layer = self.layers[state[0]]
        kind = "update" if state[1] == "keys" else "update_conv_state"
        keys = getattr(layer, "keys", None) if state not in self._progress.shapes else None
        if not hasattr(layer, kind) or not self._progress.fits(state, tensor, keys):
            raise CacheStateError(
                f"this cache belongs to {self._owner.describe()}, and another model uses it: layer {state[0]} "
                f"({type(layer).__name__}) cannot take new {state[1]} of shape {list(tensor.shape)}; build a cache "
                "for each model."
            )

    def _check_rows(self, rows: int) -> None:
        """Repeat the one row of the cache for as many rows as the new tokens have (beams, several answers)."""
        held = len(self._schedule.row_start or [])
        if held in (0, rows):
            return
        if held != 1:
            raise InputError(
                f"the new tokens have {rows} rows, the cache has {held}: give one row for each, or repeat the rows of "
                f"the cache first with batch_repeat_interleave({rows // held or 1})."
            )
        self.batch_repeat_interleave(rows)

    def _check_usable(self) -> None:
        """Raise if the last forward with this cache did not run to its end, or was not observed."""
        self._check_awaited()
        self._check_complete()

    def _check_awaited(self, layer_idx: int | None = None) -> None:
        """Raise if a layer updated the cache and its attention was not observed; ``layer_idx`` updates it now."""
        if self._awaited is None:
            return
        if layer_idx is not None and layer_idx > self._awaited:
            # The same forward has gone on to a later layer.
            raise UnsupportedModelError(
                f"layer {self._awaited} was not observed: its attention does not go through transformers' attention "
                "interface; use a model whose attention supports AttentionInterface."
            )
        raise CacheStateError(
            f"layer {self._awaited} updated this cache, but its attention was not observed: it does not use "
            "transformers' attention interface, or the forward was interrupted. Use a model whose attention supports "
            "AttentionInterface; after an interruption use a new cache, or reset() this one."
        )

    def _check_complete(self) -> None:
        self._check_seen()
        self._progress.check(self.layers)

    def _check_seen(self) -> None:
        seen = {self.layers[index].seen for index in self.layer_indices}
        if len(seen) > 1:
            raise CacheStateError(
                f"an earlier forward with this cache was interrupted (its layers have seen {min(seen)} to {max(seen)} "
                "tokens): use a new cache, or reset() this one."
            )

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Remove the newest tokens (a rejected draft), then compress the prompt if it had to wait for that."""
        # Some versions of transformers, 5.17 among them, give a tensor; the layers count tokens in numbers.
        count = operator.index(tokens_to_remove)
        with self._progress.change():
            self._schedule.settle(self.layers)
            super().crop(count)
            self._schedule.after_crop(self.layers)

    def activate_past_recording(self) -> None:
        """Allow rejected drafts to be removed (assisted decoding); the prompt is compressed after the first draft."""
        self._schedule.start_recording()
        # Older transformers have no such method: they crop rejected drafts without announcing it.
        if hasattr(super(), "activate_past_recording"):
            super().activate_past_recording()

    @property
    def is_croppable(self) -> bool:
        """True if the newest tokens can be removed again, so that a rejected draft leaves no trace."""
        return self._schedule.can_take_back and all(
            getattr(layer, "is_croppable", True) for layer in self.layers
        )

    @property
    def is_compileable(self) -> bool:
        """False: lengths differ by layer and change with every prompt."""
        return False

    def reset(self) -> None:
        """Forget everything: the next forward is a prefill."""
        hook.take_back(self)
        super().reset()
        for layer in self.layers:
            drop_linear_states(layer)
        self._schedule.reset()
        self._progress = Progress()
        self._awaited = self.prompt_ids = None
        for packer in self._packers.values():
            packer.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give every row the state and budgets of row ``beam_idx``."""
        with self._progress.change():
            self._schedule.settle(self.layers)
            super().reorder_cache(beam_idx)
            self._schedule.pick_rows(indices=beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row and its budgets ``repeats`` times."""
        with self._progress.change():
            self._schedule.settle(self.layers)
            super().batch_repeat_interleave(repeats)
            self._schedule.pick_rows(repeats=repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows ``indices`` and their budgets."""
        with self._progress.change():
            self._schedule.settle(self.layers)
            super().batch_select_indices(indices)
            if self.prompt_ids is not None and len(self.prompt_ids) == len(self._schedule.row_start or []):
                self.prompt_ids = self.prompt_ids[indices.cpu()]
            self._schedule.pick_rows(indices=indices)

    # -- called by the attention hook ----------------------------------------------------------------------------

    def attend(self, layer_idx: int, call: AttentionCall) -> Any:
        """Run the layer's attention with its own mask; during the prefill, then compress the layer."""
        # The first layer stands for all: they get the same position_ids.
        if layer_idx == self.layer_indices[0]:
            self._padding.forget()
            try:
                self._check_turn(self.layers[layer_idx], call)
            except RankKVError:
                # The new tokens leave again, so that the cache still serves as before.
                self.layers[layer_idx].withdraw(call.steps)
                self._progress.take_back((layer_idx, "keys"))
                self._awaited = None
                raise
        output = self._attend(layer_idx, call)
        # Not reached by an error: the next use says that this forward was interrupted.
        self._awaited = None
        return output

    def _check_turn(self, layer: RankKVLayer, call: AttentionCall) -> None:
        """Check that the new tokens come from the cache's model, and continue after those it has seen."""
        steps = call.steps
        if not self._owner.has(call.module):
            raise self._owner.refuse(call.module)
        self._owner.check_length(layer.seen - steps, layer.seen)
        self._schedule.position_offset = self._owner.check_offset(
            self._schedule.position_offset, steps, self._schedule.compressed
        )
        self._schedule.check_positions(layer, steps, call.options.get("position_ids"))

    def _attend(self, layer_idx: int, call: AttentionCall) -> Any:
        layer, steps = self.layers[layer_idx], call.steps
        slots = layer.slot_map
        self._attended[layer_idx] = (weakref.ref(call.key), slots)
        if isinstance(layer, HeadBudgetLayer):
            as_held = self._shows(call)
            if layer.is_growing:
                if not as_held:
                    raise UnsupportedModelError(
                        f"the attention of layer {layer_idx} uses other keys and values than its cache returned, but "
                        "did not before: use head_budgets=None for this model."
                    )
                if self._needs_no_padding(layer, call):
                    return layer.attend_unpadded(call.query, call.options.get("scaling")), None
                call = replace(call, key=layer.keys, value=layer.values)
            layer.attends_as_held = as_held
        if layer_idx in self._packers:
            self._packers[layer_idx].note_frequencies(layer.seen - steps)
        observes = self._schedule.needs_observation(steps)
        sees_all = observes and self._sees_all(layer, call)
        call = self._fit_to_slots(layer_idx, slots, call)
        output = call.run_without_plans() if self._schedule.compressed else call.run()
        if observes:
            with torch.no_grad():
                self._schedule.after_attention(self.layers, layer_idx, call, sees_all)
        # Until the round is over, layers stay in full: they may shrink again.
        if self._schedule.compressed:
            layer.rest()
        return output

    def _sees_all(self, layer: RankKVLayer, call: AttentionCall) -> bool:
        """Return True if one new query sees every token of a compressed layer, so that the host can count them."""
        if call.steps > 1 or not self._schedule.compressed:
            return False
        return call.mask is None or self._padding.hides_only_padding(
            call.mask, layer.seen, self._schedule.row_start or [], may_wait=True
        )

    def _shows(self, call: AttentionCall) -> bool:
        """Return True if a call attends to exactly the keys and values that the last update returned."""
        return self._shown is not None and self._shown[0]() is call.key and self._shown[1]() is call.value

    def _needs_no_padding(self, layer: HeadBudgetLayer, call: AttentionCall) -> bool:
        """Return True if a call is plain attention to every token of the layer, so that no mask is needed."""
        if not call.is_plain_sdpa or call.query.dtype != call.key.dtype:
            return False
        if call.query.shape[1] % call.key.shape[1]:
            return False
        return call.mask is None or self._padding.hides_only_padding(
            call.mask, layer.seen, self._schedule.row_start or []
        )

    def attend_shared(self, layer_idx: int, call: AttentionCall) -> Any:
        """Run the attention of a layer without keys, with the mask of layer ``layer_idx``, which shares its keys."""
        self._shares_keys = True
        layer = self.layers[layer_idx]
        if isinstance(layer, HeadBudgetLayer) and call.key.shape[-2] < layer.width:
            # The owner was shown its newest token alone.
            call = replace(call, key=layer.keys, value=layer.values)
        call = self._fit_to_slots(layer_idx, self._attended[layer_idx][1], call)
        return call.run_without_plans() if self._schedule.compressed else call.run()

    def find_attended(self, key: Tensor) -> int | None:
        """Return the layer whose attention last used exactly this key tensor, or None."""
        found = (index for index, (attended, _) in self._attended.items() if attended() is key)
        return next(found, None)

    def _fit_to_slots(self, layer_idx: int, slots: SlotMap | None, call: AttentionCall) -> AttentionCall:
        """Return the attention call with mask, query and key fitted to the slots that the layer keeps."""
        if slots is None:
            return call
        # A single query with no mask and no empty slot sees every slot: nothing needs masking then.
        if call.mask is not None or call.steps > 1 or slots.kept_valid is not None:
            backend, query = self.text_config._attn_implementation, call.query
            if call.steps == 1 and backend in ("sdpa", "eager"):
                steps = self._step_masks.setdefault(layer_idx, StepMask())
                mask = steps.get(slots, query.shape[1], backend, query.dtype, call.mask)
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


def _pick_options(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {option.name: arguments[option.name] for option in fields(RankKVConfig)}


def _build_layer(config: RankKVConfig) -> RankKVLayer:
    layer: RankKVLayer
    if config.head_budgets is not None:
        layer = HeadBudgetLayer(config.storage, config.head_floor)
    else:
        layer = RankKVLayer() if config.storage == "full" else StoredLayer(config.storage)
    # Bounded decoding evicts with every token.
    layer.makes_room = config.decode != "bounded"
    return layer


def _report_nothing_to_compress(model: Any, layers: list[Any]) -> None:
    name = type(model).__name__
    if not any(isinstance(layer, CacheLayerMixin) for layer in layers):
        raise UnsupportedModelError(f"{name} has no KV cache, so there is nothing to compress.")
    warnings.warn(
        f"no layer of {name} has a full-attention KV cache, so nothing is compressed and the model runs unchanged.",
        stacklevel=3,
    )
