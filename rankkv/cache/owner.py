"""Owner: the model that a cache belongs to, and the checks that no other model, image or length slips in."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CacheStateError
from ..models.compat import find_offset_owner, find_position_limit


class Owner:
    """The model of one cache, by weak reference: the cache does not keep it alive, and copies do not copy it.

    Parameters
    ----------
    model : PreTrainedModel
        The model the cache was built for.
    """

    def __init__(self, model: Any) -> None:
        self._model = weakref.ref(model)
        self._modules = weakref.WeakSet(module for module in model.modules() if hasattr(module, "layer_idx"))
        self._text_config = model.config.get_text_config(decoder=True)
        owner = find_offset_owner(model)
        self._offset_owner = None if owner is None else weakref.ref(owner)

    @property
    def model(self) -> Any:
        """The model, or None if it is gone."""
        return self._model()

    def get(self) -> Any:
        """Return the model.

        Raises
        ------
        CacheStateError
            If it is gone.
        """
        model = self._model()
        if model is None:
            raise CacheStateError(
                "the model of this cache is gone: keep a reference to it while you use the cache."
            )
        return model

    def has(self, module: nn.Module) -> bool:
        """Return True if an attention module belongs to the model."""
        return module in self._modules

    def describe(self) -> str:
        """Describe the model in a few words: class, name and layers."""
        model = self._model()
        if model is None:
            return "a model that is gone"
        name = getattr(model.config, "_name_or_path", "") or model.config.model_type
        layers = getattr(self._text_config, "num_hidden_layers", "unknown")
        return f"{type(model).__name__} {name!r} with {layers} layers"

    def refuse(self, module: nn.Module) -> CacheStateError:
        """Build the error for an attention module of another model."""
        config = getattr(module, "config", None)
        other = getattr(config, "_name_or_path", "") or getattr(config, "model_type", "unknown")
        return CacheStateError(
            f"this cache belongs to {self.describe()}, and another model uses it ({other!r}, with "
            f"{type(module).__name__}): keys and values of one model mean nothing to another; build a cache for each."
        )

    def check_length(self, before: int, seen: int) -> None:
        """Warn once, when the text passes the positions that the model was made for.

        Parameters
        ----------
        before, seen : int
            Tokens before and after this forward.
        """
        limit = find_position_limit(self._text_config)
        if limit is not None and before <= limit < seen:
            warnings.warn(
                f"the text has {seen} tokens, and the model was made for {limit} positions "
                "(max_position_embeddings): compressing the cache does not extend that; shorten the prompt, or set the "
                "model's rope scaling.",
                stacklevel=2,
            )

    def check_offset(self, known: Tensor | None, steps: int, compressed: bool) -> Tensor | None:
        """Check that the model holds the image offset of this conversation, and return the offset to remember.

        Qwen2-VL and others keep on the model how far positions and token numbers differ after the last image.

        Parameters
        ----------
        known : Tensor, optional
            Offset of the prefill, ``[batch, 1]``.
        steps : int
            New tokens of this forward.
        compressed : bool
            False during the prefill, which sets the offset.

        Raises
        ------
        CacheStateError
            If a decode step would take the positions of another image.
        """
        owner = None if self._offset_owner is None else self._offset_owner()
        if owner is None:
            return known
        now: Tensor | None = owner.rope_deltas
        if not compressed or now is known:
            return now
        if now is not None and known is not None and torch.equal(now.cpu(), known.cpu()):
            return known
        says = (
            "the model holds the position offset of another image than this cache: copy(), rewind() or load() the "
            "cache right before it is used, which restores its own"
        )
        if steps == 1:
            raise CacheStateError(f"{says}.")
        # A new image in this turn changes the offset rightly, and cannot be told from a foreign one.
        warnings.warn(f"{says}; if this turn brings a new image, all is well.", stacklevel=2)
        return now

    def restore_offset(self, offset: Tensor | None) -> None:
        """Give the model the image offset of this conversation."""
        owner = None if self._offset_owner is None else self._offset_owner()
        if owner is not None:
            owner.rope_deltas = offset
