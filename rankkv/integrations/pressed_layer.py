"""Kept keys and values in a cache that knows nothing of RankKV: each layer's attention gets a mask of its length."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from rankkv.attention_call import AttentionCall
from rankkv.cache.cache import RankKVCache
from rankkv.cache.layer import RankKVLayer
from rankkv.cache.masks import project_mask
from rankkv.errors import InputError
from rankkv.observe import hook as attention


class PressedAttention:
    """What the layers of one cache, and of its copies, share: the attention hook asks it for each call's mask.

    transformers builds one mask for all layers, as wide as its first layer.  It is left aside: all kept tokens precede
    all later ones, so a query sees every kept token and the later tokens up to its own.

    Parameters
    ----------
    model : PreTrainedModel
        The model that runs on the cache.
    """

    def __init__(self, model: Any) -> None:
        self._backend_of = model.config.get_text_config(decoder=True)
        self._attended: dict[int, weakref.ref[Tensor]] = {}
        attention.watch_for(self, model)

    def attend(self, layer_idx: int, call: AttentionCall) -> Any:
        """Run the layer's attention with a mask of its own width."""
        self._attended[layer_idx] = weakref.ref(call.key)
        return self.attend_shared(layer_idx, call)

    def find_attended(self, key: Tensor) -> int | None:
        """Return the layer whose attention was last given these very keys, if there is one."""
        return next((index for index, attended in self._attended.items() if attended() is key), None)

    def attend_shared(self, layer_idx: int, call: AttentionCall) -> Any:
        """Run the attention of a layer that attends to the keys of layer ``layer_idx``."""
        batch, slots = call.key.shape[0], call.key.shape[-2]
        positions = torch.arange(slots, device=call.key.device).expand(batch, 1, -1)
        backend = self._backend_of._attn_implementation
        mask = project_mask(None, positions, None, call.steps, call.query.shape[1], backend, call.query.dtype)
        return replace(call, mask=mask).run()

    def __deepcopy__(self, memo: dict[int, Any]) -> PressedAttention:
        # Nothing of one conversation is in it; and only this very object keeps the attention calls watched.
        return self


class PressedLayer(DynamicLayer):
    """A layer of transformers' own kind that starts with the tokens another one kept.

    Parameters
    ----------
    shared : PressedAttention
        What the layers of the cache share.
    layer_idx : int
        Index of the layer in the model.
    kept : RankKVLayer
        The compressed layer; its tensors are taken, not copied.
    """

    def __init__(self, shared: PressedAttention, layer_idx: int, kept: RankKVLayer) -> None:
        super().__init__()
        self.keys, self.values = kept.keys, kept.values
        self.dtype, self.device, self.is_initialized = kept.dtype, kept.device, True
        self._shared = shared
        self._layer_idx = layer_idx

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append new keys and values, and let this layer's next attention call have its own mask."""
        states = super().update(key_states, value_states, *args, **kwargs)
        attention.hand_off(self._shared, self._layer_idx, states[0].shape[-2])
        return states


def build_pressed_layers(cache: RankKVCache, model: Any) -> list[PressedLayer]:
    """Build one layer for each of a compressed cache, holding its very keys and values.

    Raises
    ------
    InputError
        If the rows of a batch keep different numbers of tokens: the layers have no place for empty slots.
    """
    if any(layer.compute_slot_valid() is not None for layer in cache.layers):
        raise InputError(
            "the rows of this batch keep different numbers of tokens, and a press' cache has no place for empty slots: "
            "give one prompt at a time, or use a RankKVCache."
        )
    shared = PressedAttention(model)
    return [PressedLayer(shared, index, layer) for index, layer in enumerate(cache.layers)]
