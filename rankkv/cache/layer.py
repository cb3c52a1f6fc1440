"""Cache layers: tokens seen, tokens kept, and the positions of the kept tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ..budget.heads import HeadSplit
from ..errors import CacheStateError
from ..observe.observation import Observation
from ..observe.queries import QueryBuffer
from ..selection import Selector, select_tokens
from .ranked_slots import Choice, RankedSlots
from .storage import STORAGES, PlainStorage

#: Names of a layer's tensors whose first axis is the row of the batch.
ROW_TENSORS = (
    "keys",
    "values",
    "kept_positions",
    "kept_valid",
    "running_scores",
    "query_moments",
)


@dataclass(frozen=True)
class SlotMap:
    """Map the slots of a layer at one moment to token positions.

    Parameters
    ----------
    kept_positions : Tensor
        Logical positions of the tokens kept at the last compression, ``[batch, kv_head or 1, slot]`` int64.
    kept_valid : Tensor, optional
        ``[batch, slot]`` bool for those slots, ``[batch, kv_head, slot]`` if heads differ; None if every slot held a
        token.
    compressed_at, seen : int
        Tokens seen at the last compression, and at this moment.
    """

    kept_positions: Tensor
    kept_valid: Tensor | None
    compressed_at: int
    seen: int

    def compute_positions(self) -> Tensor:
        """Compute the logical position of every slot, ``[batch, kv_head or 1, slot]`` int64."""
        later = torch.arange(self.compressed_at, self.seen, device=self.kept_positions.device)
        return torch.cat([self.kept_positions, later.expand(*self.kept_positions.shape[:2], -1)], dim=-1)

    def compute_valid(self) -> Tensor | None:
        """Compute which slots hold a token, ``[batch, slot]`` or ``[batch, kv_head, slot]`` bool; None if all do."""
        if self.kept_valid is None:
            return None
        later = self.kept_valid.new_ones((*self.kept_valid.shape[:-1], self.seen - self.compressed_at))
        return torch.cat([self.kept_valid, later], dim=-1)


class RankKVLayer(DynamicLayer):
    """A cache layer that counts the tokens it has *seen* and holds only those it *keeps*.

    Keys and values are ``[batch, kv_head, slot, head_dim]``, with slots in the order of their positions.  A row that
    keeps fewer tokens than the longest row starts with empty slots.  Only while decoding there is spare memory behind
    the slots (:data:`rankkv.cache.storage.ROOM`).
    """

    is_sliding = False
    is_croppable = True
    #: False if each step moves the tokens anyway, so that room behind them is of no use.
    makes_room = True
    #: Holds "keys" and "values".
    _stores: Mapping[str, Any]

    def __init__(self) -> None:
        # Before the base class sets `keys` and `values`, which are properties here.
        self._stores = self._build_stores()
        super().__init__()
        self._forget()

    def _build_stores(self) -> Mapping[str, PlainStorage]:
        return {"keys": PlainStorage(), "values": PlainStorage()}

    def _forget(self) -> None:
        self.seen = 0
        #: Number of tokens seen at the last compression; all later tokens are kept.
        self.compressed_at = 0
        #: Logical positions of the tokens that compression kept, ``[batch, kv_head or 1, slot]`` int64; None if all.
        self.kept_positions: Tensor | None = None
        #: True where those slots hold a token, ``[batch, slot]`` bool, ``[batch, kv_head, slot]`` if heads differ;
        #: None if all do.
        self.kept_valid: Tensor | None = None
        #: Scores continued while decoding, ``[batch, kv_head or 1, slot]``; None unless the decode mode needs them.
        self.running_scores: Tensor | None = None
        #: Moments of all earlier queries; None unless the selector needs them.
        self.query_moments: Tensor | None = None
        #: The last queries; None unless a later compression needs them.
        self.buffer: QueryBuffer | None = None
        self._scores: Tensor | None = None
        # Scores to continue while decoding; None if they equal the scores that select.
        self._lasting: Tensor | None = None
        self._real_index: Tensor | None = None
        # True if the keys that the scores belong to are all tokens of each row, none missing.
        self._in_order = False
        # Order of the slots while the budget may still shrink; None if they are in the order of their positions.
        self._ranked: RankedSlots | None = None
        # Slots kept by the last shrink of a compression, whose scores may be asked for.
        self._last_kept: Tensor | None = None
        #: Split of each row's budget over the heads; None if heads keep the same number, or compete.
        self.head_splits: Sequence[HeadSplit | None] = []
        self._lengths: list[int] = []
        self._available: list[int] = []
        #: True if the newest query saw every token of the layer.
        self.sees_all = False
        # Tokens of each row at the last compression, an average over its heads; None if only the device knows.
        self._kept_tokens: list[int] | None = None

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

    # -- called by transformers ---------------------------------------------------------------------------------

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append new keys and values, and return all kept ones."""
        if self.seen == 0:
            self.dtype, self.device = key_states.dtype, key_states.device
            # Joined to nothing, so that the layer holds a copy: the model's tensor may be part of a larger one.
            self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]
            self.is_initialized = True
        stores, room = self._stores, self.makes_room
        keys, values = stores["keys"].append(key_states, room), stores["values"].append(value_states, room)
        self.seen += key_states.shape[-2]
        return keys, values

    def get_seq_length(self, *args: Any) -> int:
        """Return the number of tokens seen, evicted ones included: positions continue from here."""
        return self.seen

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Return the mask's key length and offset in logical coordinates (all tokens seen)."""
        if isinstance(query_length, Tensor):
            query_length = query_length.shape[0]
        return self.seen + query_length, 0

    def get_max_cache_shape(self) -> int:
        """Return -1: the layer has no maximum."""
        return -1

    def get_max_length(self) -> int:
        """Return -1: the layer has no maximum."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = None
        self.is_initialized = False
        self._forget()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove ``-tokens_to_remove`` newest tokens, or crop to that length if it is positive.

        Raises
        ------
        CacheStateError
            If evicted tokens would be needed again.
        """
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        removed = -tokens_to_remove if tokens_to_remove < 0 else max(0, self.seen - tokens_to_remove)
        self.check_removable(removed)
        if removed and self.buffer is not None:
            self.buffer.drop(removed)
        self.withdraw(removed)

    def withdraw(self, removed: int) -> None:
        """Remove the newest tokens before their attention ran: none of their queries was stored."""
        if removed:
            # Cloned, so that the removed tokens' memory is freed and not only hidden.
            self.keys = self.keys[..., :-removed, :].clone(memory_format=torch.contiguous_format)
            self.values = self.values[..., :-removed, :].clone(memory_format=torch.contiguous_format)
            self.seen -= removed
            self.compressed_at = min(self.compressed_at, self.seen)
            if self.running_scores is not None:
                self.running_scores = self.running_scores[..., : self.width]

    def check_removable(self, removed: int) -> None:
        """Raise CacheStateError if removing the newest tokens would need evicted ones back."""
        if removed > self.seen - self.compressed_at and self.kept_positions is not None:
            raise CacheStateError(
                f"cannot remove {removed} tokens: the cache was compressed after {self.compressed_at} of its "
                f"{self.seen} tokens, and evicted tokens cannot come back; remove at most "
                f"{self.seen - self.compressed_at} tokens, or build a new cache."
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give every row the state of row ``beam_idx``."""
        self._map_rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows ``indices``."""
        self._map_rows(lambda tensor: tensor[indices.to(tensor.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times."""
        self._map_rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def _map_rows(self, change: Any) -> None:
        if not self.is_initialized:
            return
        # The new rows may be known to the device alone.
        self._kept_tokens = None
        for name in ROW_TENSORS:
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, change(tensor))
        if self.buffer is not None:
            self.buffer.map_rows(change)

    # -- called by the compression ------------------------------------------------------------------------------

    @property
    def width(self) -> int:
        """Number of slots (kept tokens of the longest row)."""
        held = self._stores["keys"].held()
        return held[0].shape[-2] if held else 0

    @property
    def kept_length(self) -> int:
        """Number of tokens per head in the row that keeps most; an average if heads differ."""
        return self.width

    def count_slack(self, protection_settled: bool) -> int:
        """Return how many tokens to keep beyond a budget that may still shrink.

        They ensure that a smaller budget later finds all tokens it would select.  ``protection_settled`` is True if the
        smaller budget will protect equally many of the first and the newest tokens.
        """
        return 0 if protection_settled else 1

    @property
    def kept_per_head(self) -> list[list[int]]:
        """Number of tokens kept, ``[row][kv_head]``; padding counts until it is evicted."""
        if not self.is_initialized:
            return []
        rows, heads = self.keys.shape[:2]
        valid = self.compute_slot_valid()
        counts = [self.width] * rows if valid is None else valid.sum(-1).tolist()
        return [[count] * heads for count in counts]

    def list_heads(self) -> list[tuple[Tensor, Tensor]]:
        """Return keys and values of each key/value head of the one row, ``[token, head_dim]``, without empty slots.

        They share the layer's memory wherever its form allows: do not change them.

        Raises
        ------
        CacheStateError
            If the layer holds more than one row, or none.
        """
        if not self.is_initialized or self.keys.shape[0] != 1:
            raise CacheStateError(
                "the heads of a layer are listed for one row: keep one with batch_select_indices() first."
            )
        heads = list(zip(self.keys[0], self.values[0], strict=True))
        valid = self.compute_slot_valid()
        if valid is None:
            return heads
        held = valid[0].expand(len(heads), -1)
        return [(keys[slots], values[slots]) for (keys, values), slots in zip(heads, held, strict=True)]

    def count_tokens(self, row_start: Sequence[int] | None) -> list[int] | None:
        """Count the tokens of each row, an average over its heads rounded down; None if only the device knows.

        Parameters
        ----------
        row_start : sequence of int, optional
            Padding before each row's first token.
        """
        if self.kept_positions is None:
            return None if row_start is None else [self.seen - start for start in row_start]
        if self._kept_tokens is None:
            return None
        return [count + self.seen - self.compressed_at for count in self._kept_tokens]

    def count_slots(self, tokens: list[int]) -> list[int] | None:
        """Count the slots of each row from its first token on, given :meth:`count_tokens`; None if unknown."""
        return tokens

    def note_tokens(self, available: Sequence[int]) -> None:
        """Note the tokens of each row, as :meth:`count_tokens` counts them."""
        if self.kept_positions is not None:
            self._kept_tokens = [count - (self.seen - self.compressed_at) for count in available]

    @property
    def slot_map(self) -> SlotMap | None:
        """Positions of the slots now; None if all tokens are kept."""
        if self.kept_positions is None:
            return None
        return SlotMap(self.kept_positions, self.kept_valid, self.compressed_at, self.seen)

    def compute_positions(self) -> Tensor:
        """Compute the logical position of every slot, ``[batch, kv_head or 1, slot]`` int64."""
        slots = self.slot_map
        if slots is None:
            return torch.arange(self.seen, device=self.device).expand(self.keys.shape[0], 1, -1)
        return slots.compute_positions()

    def compute_slot_valid(self) -> Tensor | None:
        """Compute which slots hold a token, ``[batch, slot]`` or ``[batch, kv_head, slot]`` bool; None if all."""
        slots = self.slot_map
        return None if slots is None else slots.compute_valid()

    def compute_head_valid(self) -> Tensor | None:
        """Compute which slots hold a token, ``[batch, kv_head, slot]`` bool; None unless heads differ."""
        return (
            self.compute_slot_valid() if self.kept_valid is not None and self.kept_valid.dim() == 3 else None
        )

    def begin_compression(
        self, scores: Tensor, observation: Observation, lasting: Tensor | None = None
    ) -> None:
        """Store the scores ``[batch, kv_head or 1, slot]`` by which the layer may shrink, once or repeatedly.

        ``lasting`` are the scores that decoding may continue; None means the same scores.
        """
        self._lasting = None if lasting is scores else lasting
        self._scores, self._real_index = scores, observation.real_index
        self._lengths, self._available = observation.lengths, observation.available
        held = {*self._lengths, *self._available}
        self._in_order = self.kept_positions is None and held == {observation.key_length}
        self._ranked = self._last_kept = None
        self._kept_tokens = list(observation.available)
        if self.kept_positions is not None:
            self.kept_positions, by_head = observation.positions, observation.valid.dim() == 3
            # What the newest query sees is what the slots hold, if it sees every token.
            valid = observation.valid if by_head and self.sees_all else self.compute_slot_valid()
            self.kept_valid = valid
        self.compressed_at = self.seen

    def shrink(
        self,
        budgets: Sequence[int],
        selector: Selector,
        window_size: int,
        sink_size: int,
        protect: Sequence[tuple[int, int]] = (),
        slack: int = 0,
        protect_before: Sequence[int] | None = None,
        final: bool = True,
    ) -> None:
        """Keep ``budgets`` tokens per row (plus ``slack``), and release the rest.

        Unless the budgets are ``final``, the slots may stand in the order of their scores: nothing but the next shrink
        can read them then.  After the final shrink no other one may follow.

        Raises
        ------
        CacheStateError
            If no compression is under way.
        """
        if self._scores is None or self._real_index is None:
            raise CacheStateError("the layer has no scores to select by: call begin_compression() first.")
        keep = [min(budget + slack, count) for budget, count in zip(budgets, self._available, strict=True)]
        if self._ranked is None and min(keep) == self.width:
            return
        how: dict[str, Any] = {
            "selector": selector,
            "window_size": window_size,
            "sink_size": sink_size,
            "protect": protect,
            "protect_before": protect_before,
        }
        if self._shrink_ranked(budgets, keep, how, final):
            self._available = self._kept_tokens = keep
            return
        kept = self._select(self._scores, self._real_index, budgets, keep, **how)
        empty = kept < 0
        index = kept.clamp(min=0)
        self._keep_slots(index)
        self._note_kept(index, empty, keep, final)
        self._available = self._kept_tokens = keep

    def _shrink_ranked(
        self, budgets: Sequence[int], keep: list[int], how: dict[str, Any], final: bool
    ) -> bool:
        """Shrink with the slots in the order of their scores, and return True, if that order tells what to keep."""
        ranked = self._ranked
        if ranked is None and (final or self.kept_positions is not None):
            return False
        choice = self._choose(budgets, keep, how)
        if choice is None or self._scores is None or self._real_index is None:
            return False
        if ranked is None:
            scores, real_index = self._by_row(self._scores), self._by_row(self._real_index)
            self._ranked = RankedSlots.of(scores, real_index, choice, self._in_order)
            self._keep_ranked(self._ranked)
            self._ranked.compact()
            return True
        if ranked.protected != choice.protected:
            # Other tokens come first: back to the order of positions.
            self._settle_order(ranked.counts, final=False)
            return False
        if final:
            self._settle_order(choice.counts, final=True)
        elif ranked.counts != choice.counts:
            ranked.counts = choice.counts
            self._keep_first(choice.counts)
        return True

    def _choose(self, budgets: Sequence[int], keep: list[int], how: dict[str, Any]) -> Choice | None:
        """Return how many tokens each row keeps; None if the order of its scores does not tell which ones."""
        return Choice(keep, list(budgets), self._lengths, how)

    def _by_row(self, tensor: Tensor) -> Tensor:
        """Return ``[batch, kv_head or 1, slot]`` with the rows of a :class:`RankedSlots`."""
        return tensor

    def _keep_ranked(self, ranked: RankedSlots) -> None:
        """Keep the slots of ``ranked``, in its order."""
        self._keep_slots(ranked.order)

    def _keep_first(self, counts: list[int]) -> None:
        """Keep the first slots, in memory of their own."""
        width = max(counts)
        for name in ("keys", "values"):
            setattr(
                self, name, getattr(self, name)[..., :width, :].clone(memory_format=torch.contiguous_format)
            )

    def _settle_order(self, counts: list[int], final: bool) -> None:
        """Keep the first ``counts`` slots of each row, and put them in the order of their positions."""
        ranked, self._ranked = self._ranked, None
        if ranked is None:
            return
        keys, slots = ranked.sort(counts)
        empty = None
        if min(counts) < max(counts):
            empty, keys = keys < 0, keys.clamp(min=0)
        self._pick_ranked(ranked, counts, slots)
        self._note_kept(*self._by_layer(keys, empty), counts, final)

    def _pick_ranked(self, ranked: RankedSlots, counts: list[int], slots: Tensor) -> None:
        """Keep some slots of ``ranked``, ``[row, kv_head or 1, slot]``; of each row the last ``counts``."""
        self._keep_slots(slots)

    def _by_layer(self, index: Tensor, empty: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return what has the rows of a :class:`RankedSlots` as ``[batch, kv_head or 1, slot]``."""
        return index, empty

    def _note_kept(self, index: Tensor, empty: Tensor | None, counts: list[int], final: bool) -> None:
        """Note which slots were kept, ``[batch, kv_head or 1, slot]``, and which of them are empty."""
        if self._scores is None or self._real_index is None:
            return
        self.kept_positions = (
            index if self.kept_positions is None else _gather_heads(self.kept_positions, index)
        )
        if final:
            # Nothing is selected any more.
            self._last_kept = index
        else:
            self._real_index = _gather_heads(self._real_index, index)
            if empty is not None:
                self._real_index = self._real_index.masked_fill(empty, -1)
            self._scores = _gather_heads(self._scores, index)
            if self._lasting is not None:
                self._lasting = _gather_heads(self._lasting, index)
        self.kept_valid = self._find_valid(empty, counts)

    def _keep_slots(self, index: Tensor) -> None:
        """Keep the keys and values of some slots, ``index [batch, kv_head or 1, slot]``."""
        places: Tensor | None = None
        # One after the other: the evicted keys are freed before the values are copied.
        for name in ("keys", "values"):
            held = getattr(self, name)
            batch, heads, slots, size = held.shape
            if places is None:
                start = torch.arange(0, batch * heads * slots, slots, device=held.device)
                places = (start.view(batch, heads, 1) + index).flatten()
            # Copy whole rows of head_dim numbers: several times faster than gathering single numbers.
            kept = held.reshape(-1, size).index_select(0, places)
            del held
            setattr(self, name, kept.view(batch, heads, -1, size))

    def _select(
        self, scores: Tensor, real_index: Tensor, budgets: Sequence[int], keep: list[int], **how: Any
    ) -> Tensor:
        return select_tokens(scores, real_index, self._lengths, budgets, keep=keep, **how)

    def _find_valid(self, empty: Tensor | None, keep: list[int]) -> Tensor | None:
        return ~empty[:, 0] if empty is not None and min(keep) < max(keep) else None

    def end_compression(self, keep_scores: bool = False) -> None:
        """Release the scores, or keep them for decoding."""
        if self._ranked is not None:
            self._settle_order(self._ranked.counts, final=True)
        lasting = self._scores if self._lasting is None else self._lasting
        if keep_scores and lasting is not None and self._last_kept is not None:
            lasting = _gather_heads(lasting, self._last_kept)
        self.running_scores = lasting if keep_scores else None
        self._last_kept = None
        self._scores = self._lasting = self._real_index = None
        self.head_splits = []

    def count_full_bytes(self) -> int:
        """Count the bytes of all tokens seen, none evicted, in the model's dtype."""
        if not self.is_initialized:
            return 0
        states = (tensor for tensor in (self.keys, self.values) if tensor.numel())
        return sum(tensor.nbytes // tensor.shape[-2] * self.seen for tensor in states)

    def rest(self) -> None:
        """Convert keys and values to their stored form, until the next forward; here they stay unchanged."""

    @property
    def room_bytes(self) -> int:
        """Bytes held for tokens to come, while the layer decodes."""
        return sum(store.room_bytes for store in self._stores.values())

    def held(self) -> list[Tensor]:
        """Return the tensors that hold keys and values now."""
        return [tensor for store in self._stores.values() for tensor in store.held()]


class StoredLayer(RankKVLayer):
    """A cache layer that evicts first, then stores the kept tokens in another form; attention sees them in full.

    Parameters
    ----------
    storage : str
        A key of :data:`rankkv.cache.storage.STORAGES`.
    """

    def __init__(self, storage: str) -> None:
        self._storage = storage
        super().__init__()

    def _build_stores(self) -> Mapping[str, PlainStorage]:
        return {"keys": STORAGES[self._storage](), "values": STORAGES[self._storage]()}

    def rest(self) -> None:
        """Convert keys and values to their stored form."""
        for store in self._stores.values():
            store.rest()

    def withdraw(self, removed: int) -> None:
        """Remove the newest tokens, then convert the rest to its stored form again."""
        super().withdraw(removed)
        self.rest()

    def _map_rows(self, change: Any) -> None:
        super()._map_rows(change)
        self.rest()


def release_hidden(layer: Any) -> None:
    """Free the tokens outside a sliding window: its keys and values are views of the whole prompt's."""
    for name in ("keys", "values"):
        tensor = getattr(layer, name, None)
        if isinstance(tensor, Tensor) and tensor.nbytes < tensor.untyped_storage().nbytes():
            setattr(layer, name, tensor.clone(memory_format=torch.contiguous_format))


def _gather_heads(tensor: Tensor, index: Tensor) -> Tensor:
    # Either tensor may have one head that stands for all.
    heads = max(tensor.shape[1], index.shape[1])
    return tensor.expand(-1, heads, -1).gather(-1, index.expand(-1, heads, -1))
