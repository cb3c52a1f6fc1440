"""A cache layer whose kept keys and values wait for the next forward as int8, or in CPU memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .cache.layer import RankKVLayer
from .cache.storage import STORAGES, PlainStorage


class RestingLayer(RankKVLayer):
    """Evicts first, then stores what stays in another form; attention sees keys and values in full.

    Parameters
    ----------
    storage : str
        A key of :data:`rankkv.cache.storage.STORAGES`.
    """

    def __init__(self, storage: str) -> None:
        self._stores: Mapping[str, PlainStorage] = {
            "keys": STORAGES[storage](),
            "values": STORAGES[storage](),
        }
        super().__init__()

    @property
    def keys(self) -> Any:
        """Keys in full, ``[batch, kv_head, slot, head_dim]``."""
        return self._stores["keys"].get()

    @keys.setter
    def keys(self, tensor: Tensor | None) -> None:
        self._stores["keys"].put(tensor)

    @property
    def values(self) -> Any:
        """Values in full, ``[batch, kv_head, slot, head_dim]``."""
        return self._stores["values"].get()

    @values.setter
    def values(self, tensor: Tensor | None) -> None:
        self._stores["values"].put(tensor)

    @property
    def width(self) -> int:
        """Number of slots (the widest row's kept tokens)."""
        held = self._stores["keys"].held()
        return held[0].shape[-2] if held else 0

    def rest(self) -> None:
        """Go over to the stored form."""
        for store in self._stores.values():
            store.rest()

    def held(self) -> list[Tensor]:
        """Return the tensors that hold keys and values now."""
        return [tensor for store in self._stores.values() for tensor in store.held()]

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens, then rest again."""
        super().crop(tokens_to_remove)
        self.rest()

    def _map_rows(self, change: Any) -> None:
        super()._map_rows(change)
        self.rest()
