"""The mask of one-token steps over slots of which some are empty, made once for many steps."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .cache.layer import SlotMap
from .cache.masks import project_mask

# Steps for which a mask is made at once: a byte a head and step.
_AHEAD = 256


class StepMask:
    """Remembers the mask of one layer: which slots are empty does not change until the layer is compressed again."""

    def __init__(self) -> None:
        self._valid: Tensor | None = None
        self._mask: Tensor | None = None

    def get(self, slots: SlotMap, query_heads: int, backend: str | None, dtype: torch.dtype) -> Tensor:
        """Return the mask ``[batch, 1 or query_heads, 1, slot]`` for one query that sees every slot with a token.

        Parameters
        ----------
        slots : SlotMap
            Where the slots stand; some are empty.
        query_heads, backend, dtype
            See :func:`rankkv.cache.masks.project_mask`.
        """
        count = slots.kept_positions.shape[-1] + slots.seen - slots.compressed_at
        if self._mask is None or self._valid is not slots.kept_valid or self._mask.shape[-1] < count:
            ahead = replace(slots, seen=slots.seen + _AHEAD)
            where = ahead.compute_positions(), ahead.compute_valid()
            self._mask = project_mask(None, *where, 1, query_heads, backend, dtype)
            self._valid = slots.kept_valid
        return self._mask[..., :count]
