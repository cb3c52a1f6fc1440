"""What transformers and the attention hook ask of the cache: update, reorder, crop, and one layer's attention."""

from __future__ import annotations

import warnings
import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer

from .attention_call import AttentionCall
from .budget.heads import compute_head_weights
from .budget.plan import BudgetPlan
from .budget.strategies import get_strategy
from .cache.head_budget_layer import RaggedLayer
from .cache.layer import RankKVLayer, SlotMap, release_hidden
from .cache.masks import can_mask_heads, check_head_budgets, project_mask
from .cache.schedule import Flow
from .config import RankKVConfig
from .errors import CacheStateError, ConfigError, UnsupportedModelError
from .models.compat import check_transformers
from .models.tensor_parallel import find_head_shards
from .observe import hook as attention
from .observe.hidden_states import watch_hidden_states
from .observe.rotary import LayerRotation, build_packers, find_rotations
from .profile.known import resolve_head_budgets, resolve_profile
from .rank.measures import get_measure
from .resting_layer import RestingLayer
from .selection import get_selector
from .step_mask import StepMask


class ObservedCache(DynamicCache):
    """A cache whose layers show their attention to RankKV, which compresses them when their time has come.

    Parameters
    ----------
    model : PreTrainedModel
        The model the cache is for.
    config : RankKVConfig
        All options.

    Raises
    ------
    UnknownNameError, ConfigError
        If an option names something that is not registered, or an option of it is out of range.
    UnsupportedModelError
        If the model's attention cannot be observed, or it has no KV cache.
    """

    layers: list[Any]

    def __init__(self, model: Any, config: RankKVConfig) -> None:
        check_transformers()
        attention.check_observable(model)
        self.config = config
        self.selector = get_selector(self.config.selector)
        BudgetPlan.check(config)
        self._strategy = get_strategy(config.resolve_strategy()[0])
        if self._strategy.measure is not None:
            get_measure(self._strategy.measure)
        text_config = model.config.get_text_config(decoder=True)
        if config.head_budgets not in (None, "auto"):
            check_head_budgets(text_config._attn_implementation)
        super().__init__(config=text_config)
        self.layer_indices = [i for i, layer in enumerate(self.layers) if type(layer) is DynamicLayer]
        if not self.layer_indices:
            _report_nothing_to_compress(model, self.layers)
        shards = find_head_shards(model)
        if shards is not None and config.head_budgets not in (None, "auto"):
            raise ConfigError(
                f"head_budgets={config.head_budgets!r} spreads a layer's budget over all its heads, and tensor "
                f"parallelism keeps them in {shards.size} processes: use head_budgets=None with this model."
            )
        one_head = getattr(text_config, "num_key_value_heads", None) == 1 or (
            getattr(text_config, "multi_query", False) is True
        )
        can_spread = shards is None and not one_head and can_mask_heads(text_config._attn_implementation)
        config = resolve_profile(config, model, self.layer_indices, can_spread)
        self.config = config = resolve_head_budgets(config, can_spread)
        for index in self.layer_indices:
            self.layers[index] = self._build_layer()
        if self.config.head_budgets == "profile" and self.layer_indices:
            compute_head_weights(self.config.profile)
        self._strategy = get_strategy(self.config.resolve_strategy()[0])
        self._backend_of = text_config
        rotations = self._find_rotations(model)
        self._step_masks: dict[int, StepMask] = {}
        self._packers = build_packers(rotations) if self.config.positions == "packed" else {}
        # Weak: a cache must not keep a model alive, and copies of it must not copy the model.
        self._model = weakref.ref(model)
        self._flow = Flow(self.config, self.selector, self.layer_indices, rotations, shards)
        # The keys each layer's attention was last given, for layers that attend to those of another.
        self._attended: dict[int, tuple[weakref.ref[Tensor], SlotMap | None]] = {}
        self._watch(model)

    def _watch(self, model: Any) -> None:
        """Be shown the attention of the model's layers, and what else the strategy measures."""
        attention.watch_for(self, model)
        if model is not None and self._strategy.needs == "hidden states":
            watch_hidden_states(self, model, self.layer_indices)

    def _find_rotations(self, model: Any) -> dict[int, LayerRotation | None]:
        if self.config.positions == "packed":
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

    def _build_layer(self) -> RankKVLayer:
        storage = self.config.storage
        if self.config.head_budgets is not None:
            return RaggedLayer(storage, self.config.head_floor)
        return RankKVLayer() if storage == "full" else RestingLayer(storage)

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
            self._flow.before_update(self.layers, layer, key_states.shape[-2])
        states = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if isinstance(layer, RankKVLayer):
            attention.hand_off(self, layer_idx, states[0].shape[-2])
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
        self._flow.start_recording()
        # Older transformers take every draft back without asking first.
        if hasattr(super(), "activate_past_recording"):
            super().activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens (a rejected draft), then compress the prompt if that had to wait."""
        super().crop(tokens_to_remove)
        self._flow.after_crop(self.layers)

    def reset(self) -> None:
        """Forget everything: the next forward is a prefill."""
        super().reset()
        self._flow.reset()
        for packer in self._packers.values():
            packer.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give every row the state of row ``beam_idx``, its budgets included."""
        super().reorder_cache(beam_idx)
        self._flow.pick_rows(indices=beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times, its budgets included."""
        super().batch_repeat_interleave(repeats)
        self._flow.pick_rows(repeats=repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices`` only, with their budgets."""
        super().batch_select_indices(indices)
        self._flow.pick_rows(indices=indices)

    @property
    def is_croppable(self) -> bool:
        """Whether the newest tokens can be removed again, so that a rejected draft leaves no trace."""
        return self._flow.can_take_back and all(getattr(layer, "is_croppable", True) for layer in self.layers)

    @property
    def is_compileable(self) -> bool:
        """False: lengths differ by layer and change with every prompt."""
        return False

    # -- what the attention hook asks ---------------------------------------------------------------------------

    def attend(self, layer_idx: int, call: AttentionCall) -> Any:
        """Run the layer's attention with its own mask; in the prefill, compress the layer afterwards."""
        layer, steps = self.layers[layer_idx], call.steps
        if layer_idx == self.layer_indices[0] and self._flow.compressed:
            self._flow.check_positions(layer, steps, call.options.get("position_ids"))
        slots = layer.slot_map
        self._attended[layer_idx] = (weakref.ref(call.key), slots)
        if layer_idx in self._packers:
            self._packers[layer_idx].note_frequencies(layer.seen - steps)
        call = self._fit(layer_idx, slots, call)
        output = call.run()
        if self._flow.wants_observation(steps):
            with torch.no_grad():
                self._flow.observe(self.layers, layer_idx, call)
        if self._flow.compressed:
            layer.rest()
        return output

    def note_changes(self, layer_idx: int, changes: Tensor) -> None:
        """Take how far the layer's attention turned the hidden state of each token, ``[batch, token]``."""
        self._flow.note_changes(self.layers, layer_idx, changes)

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
        if packer is not None and self._flow.row_start is not None:
            query, key = packer.pack(
                call.query, call.key, slots.compute_positions(), slots.compute_valid(), self._flow.row_start
            )
            call = replace(call, query=query, key=key)
        return call


def _report_nothing_to_compress(model: Any, layers: list[Any]) -> None:
    name = type(model).__name__
    if not any(isinstance(layer, CacheLayerMixin) for layer in layers):
        raise UnsupportedModelError(f"{name} has no KV cache: there is nothing RankKV could compress.")
    warnings.warn(
        f"no layer of {name} has a full-attention KV cache, so nothing is compressed and the model runs unchanged.",
        stacklevel=3,
    )
