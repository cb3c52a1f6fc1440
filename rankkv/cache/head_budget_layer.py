"""A cache layer whose heads keep different numbers of tokens; memory holds only the kept tokens."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from ..budget.heads import HeadSplit
from ..config import count_spanned
from ..errors import CacheStateError, ProfileError
from ..observe.observation import Observation
from ..selection import CASCADE_SLACK, select_tokens, select_tokens_across_heads
from ..utils.devices import send_numbers
from .layer import StoredLayer
from .ranked_slots import Choice, RankedSlots
from .storage import STORAGES, SlotLayout, UnpaddedStorage
from .unpadded import UnpaddedHeads, can_attend_unpadded


class HeadBudgetLayer(StoredLayer):
    """Spread the layer's budget over its heads; pad keys and values only for attention.

    Empty slots come first in each head.  Without a head split for each row, the tokens of all heads compete.  With one
    head, or with scores that are equal for all heads, every head then keeps equally many.

    Parameters
    ----------
    storage : str
        A key of :data:`rankkv.cache.storage.STORAGES`.
    head_floor : float
        Fraction of the budget that every head keeps.
    """

    def __init__(self, storage: str, head_floor: float) -> None:
        # Keys and values while decoding without padding; the storages are empty then, but for their layout.
        self._growing: UnpaddedHeads | None = None
        super().__init__(storage)
        self._head_floor = head_floor
        # Tokens of each head when the compression began, [row][kv_head]; None until they are counted.
        self._room: list[list[int]] | None = None
        # Tokens of each head after the last shrink of this compression, [row][kv_head]; None if only the device knows.
        self._known_counts: list[list[int]] | None = None
        self._are_equal = False
        # A layout, and the slots of it that hold a token.
        self._valid_of: tuple[SlotLayout | None, Tensor] | None = None

    def _forget(self) -> None:
        super()._forget()
        #: True if the layer's attention got exactly the keys and values that its last update returned.
        self.attends_as_held = False
        #: True if the next update adds its token without padding; set by the cache.
        self.stays_unpadded = False

    def _build_stores(self) -> Mapping[str, UnpaddedStorage]:
        return {name: UnpaddedStorage(STORAGES[self._storage]) for name in ("keys", "values")}

    @property
    def _stores(self) -> Mapping[str, Any]:
        # Whatever reads or changes the storages finds all tokens in them.
        self._settle()
        return self._held_stores

    @_stores.setter
    def _stores(self, stores: Mapping[str, Any]) -> None:
        self._held_stores: Mapping[str, UnpaddedStorage] = stores

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append new keys and values, and return all kept ones, padded; only the new ones if it stays unpadded."""
        stays_unpadded, self.stays_unpadded = self.stays_unpadded, False
        if self._layout is None:
            return super().update(key_states, value_states, *args, **kwargs)
        self.seen += key_states.shape[-2]
        if stays_unpadded:
            self._grow(key_states).append(key_states, value_states)
            return key_states, value_states
        stores = self._stores
        return stores["keys"].append(key_states), stores["values"].append(value_states)

    # -- decoding without padding --------------------------------------------------------------------------------

    @property
    def is_growing(self) -> bool:
        """True if the layer is decoding without padding."""
        return self._growing is not None

    def can_stay_unpadded(self, key_states: Tensor, value_states: Tensor) -> bool:
        """Return True if a new token of these states can be added, and attended from, without padding."""
        return (
            self._layout is not None
            and self.attends_as_held
            and key_states.shape[-2] == 1
            and key_states.shape[:2] == self._layout.shape[:2]
            and self._held_stores["keys"].is_plain
            and can_attend_unpadded(key_states, value_states)
        )

    def attend_unpadded(self, query: Tensor, scaling: float | None) -> Tensor:
        """Let the newest token's queries ``[batch, head, 1, head_dim]`` attend; see :class:`UnpaddedHeads`."""
        if self._growing is None:
            raise CacheStateError(
                "the layer holds its tokens padded: run the attention function on keys and values."
            )
        return self._growing.attend(query, scaling)

    def _grow(self, states: Tensor) -> UnpaddedHeads:
        """Return the tokens without padding, with room for one more."""
        if self._growing is None or not self._growing.has_room(states):
            stores, layout = self._stores, self._layout
            keys, values = stores["keys"].take_parts(), stores["values"].take_parts()
            if layout is None or keys is None or values is None:
                raise CacheStateError("the layer has no heads without padding: append its tokens padded.")
            self._growing = UnpaddedHeads(layout, (keys[0], values[0]), (keys[1], values[1]))
        return self._growing

    def _settle(self) -> None:
        """Give the tokens back to the storages, without room."""
        growing, self._growing = self._growing, None
        if growing is not None:
            for name, parts in zip(("keys", "values"), growing.split(), strict=True):
                self._held_stores[name].fill(*parts)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return a copy without room; this layer keeps its own."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        growing = self._growing
        copied.__dict__.update(
            {name: copy.deepcopy(value, memo) for name, value in vars(self).items() if name != "_growing"}
        )
        copied._growing = None
        if growing is not None:
            for name, parts in zip(("keys", "values"), growing.split(), strict=True):
                copied._held_stores[name].fill(*parts)
        return copied

    # -- compression ---------------------------------------------------------------------------------------------

    def count_full_bytes(self) -> int:
        """Count the bytes of all tokens seen, none evicted, in the model's dtype."""
        if self._growing is None or self._layout is None:
            return super().count_full_bytes()
        rows, heads = self._layout.shape[:2]
        slots = sum(held.shape[-1] * held.element_size() for held in self._growing.held())
        return rows * heads * self.seen * slots

    @property
    def room_bytes(self) -> int:
        """Bytes held for tokens to come, while the layer decodes."""
        if self._growing is not None:
            return self._growing.room_bytes
        return sum(store.room_bytes for store in self._held_stores.values())

    def held(self) -> list[Tensor]:
        """Return the tensors that hold keys and values now."""
        return super().held() if self._growing is None else self._growing.held()

    def rest(self) -> None:
        """Drop empty slots, and convert keys and values to the stored form."""
        if self._growing is None:
            self._unpad()
            super().rest()

    def begin_compression(
        self, scores: Tensor, observation: Observation, lasting: Tensor | None = None
    ) -> None:
        """Store the scores for the coming compression, and forget the token counts of the last one."""
        super().begin_compression(scores, observation, lasting)
        self._room = self._known_counts = None
        if self.sees_all and self._layout is not None:
            # The host knows them: only later tokens were added since the last compression.
            self._known_counts = self.kept_per_head
        # Where heads hold different numbers of tokens, `available` is an average.
        self._are_equal = observation.valid.dim() == 2

    def shrink(self, *args: Any, **kwargs: Any) -> None:
        """Keep as many tokens as the budgets allow, spread over the heads, and release the rest."""
        super().shrink(*args, **kwargs)
        if self._known_counts is not None:
            self._kept_tokens = [sum(row) // len(row) for row in self._known_counts]
        self._unpad()

    def _keep_slots(self, index: Tensor) -> None:
        """Keep the keys and values of some slots; where the host knows their counts, without padding them."""
        counts, stores, layout = self._known_counts, self._stores, self._layout
        if counts is None:
            super()._keep_slots(index)
            return
        batch, heads, width, device = len(counts), len(counts[0]), index.shape[-1], index.device
        index = index.expand(-1, heads, -1)
        if layout is None:
            # One head after the other, each with all its slots.
            tokens = index + torch.arange(0, batch * heads * self.width, self.width, device=device).view(
                batch, heads, 1
            )
        else:
            source, first = layout.source.view(layout.shape), sum(map(sum, layout.counts))
            later = self.width - layout.shape[-1]
            if later:
                behind = torch.arange(first, first + batch * heads * later, device=device)
                source = torch.cat([source, behind.view(batch, heads, later)], dim=-1)
            tokens = source.gather(-1, index)
        tokens = tokens.flatten()
        if any(count < width for row in counts for count in row):
            # A step that evicts as many tokens as came leaves the layout as it was.
            if layout is None or not layout.is_like(counts, width):
                layout = SlotLayout.of_counts(counts, width, device)
            tokens = tokens.index_select(0, layout.held)
        else:
            layout = None
        for store in stores.values():
            store.pick(tokens, layout, (batch, heads, width))

    @property
    def width(self) -> int:
        """Number of slots of the padded form (the largest head of all rows)."""
        if self._growing is not None and self._layout is not None:
            return self._layout.shape[-1] + self._growing.later
        return self._held_stores["keys"].slots

    @property
    def kept_length(self) -> int:
        """Average number of tokens per head, rounded up, in the row that keeps most."""
        if self._layout is None:
            return self.width
        return max(-(-sum(row) // len(row)) for row in self.kept_per_head)

    @property
    def kept_per_head(self) -> list[list[int]]:
        """Number of tokens kept, ``[row][kv_head]``."""
        layout = self._layout
        if layout is None:
            return super().kept_per_head
        later = self.width - layout.shape[-1]
        return [[count + later for count in row] for row in layout.counts]

    def count_slots(self, tokens: list[int]) -> list[int] | None:
        """Count the slots of each row from the first token of any head on; None if the host does not know them."""
        if self._layout is not None:
            return [max(row) for row in self.kept_per_head]
        return tokens if self.kept_valid is None or self.kept_valid.dim() == 2 else None

    def list_heads(self) -> list[tuple[Tensor, Tensor]]:
        """Return keys and values of each key/value head of the one row, ``[token, head_dim]``, without empty slots."""
        layout, stores = self._layout, self._stores
        parts = [stores[name].parts for name in ("keys", "values")]
        if layout is None or None in parts or layout.shape[0] != 1:
            return super().list_heads()
        heads = []
        for part in parts:
            kept = part[0].split(layout.counts[0])
            later = part[1][0]
            # Nothing is copied for a cache that has seen only its prompt.
            heads.append(
                [torch.cat(pair) if later.shape[-2] else pair[0] for pair in zip(kept, later, strict=True)]
            )
        return list(zip(*heads, strict=True))

    def count_slack(self, protection_settled: bool) -> int:
        """Return the tokens per head kept beyond a budget that may still shrink."""
        return CASCADE_SLACK

    @property
    def _layout(self) -> SlotLayout | None:
        return self._held_stores["keys"].layout

    def _unpad(self) -> None:
        """Drop the empty slots, if the layer has any and holds them."""
        if self._layout is not None or self.kept_valid is None:
            return
        valid = self.kept_valid if self.kept_valid.dim() == 3 else self.kept_valid[:, None]
        layout = SlotLayout.of(valid.expand(-1, self.keys.shape[1], -1))
        for store in self._stores.values():
            store.unpad(layout)

    def _select(
        self, scores: Tensor, real_index: Tensor, budgets: Sequence[int], keep: list[int], **how: Any
    ) -> Tensor:
        splits = self._find_splits()
        if splits:
            return self._select_by_heads(splits, scores, real_index, budgets, keep, **how)
        self._known_counts = None
        if scores.shape[1] == 1:
            if self._are_equal:
                heads = self.keys.shape[1] if self._layout is None else self._layout.shape[1]
                self._known_counts = [[count] * heads for count in keep]
            return super()._select(scores, real_index, budgets, keep, **how)
        self._are_equal = False
        # Only the device knows what each head gets: the host waits for that, and for nothing else.
        index, self._known_counts = select_tokens_across_heads(
            scores, real_index, self._lengths, budgets, keep=keep, head_floor=self._head_floor, **how
        )
        return index

    def _select_by_heads(
        self,
        splits: Sequence[HeadSplit],
        scores: Tensor,
        real_index: Tensor,
        budgets: Sequence[int],
        keep: list[int],
        **how: Any,
    ) -> Tensor:
        """Select the tokens of each head as if it were a row with its own budget."""
        batch, heads = scores.shape[0], splits[0].heads
        choice = self._split(splits, budgets, keep, how)
        self._known_counts = _fold(choice.counts, heads)
        return select_tokens(
            self._by_row(scores),
            self._by_row(real_index),
            choice.lengths,
            choice.budgets,
            keep=choice.counts,
            **choice.how,
        ).view(batch, heads, -1)

    def _split(
        self, splits: Sequence[HeadSplit], budgets: Sequence[int], keep: list[int], how: dict[str, Any]
    ) -> Choice:
        """Split the budgets of the rows over their heads."""
        heads = splits[0].heads
        # Shares come from the counts before the first shrink: they must not depend on the number of shrinks.
        counts = self._known_counts
        if counts is None:
            counts = (
                [[count] * heads for count in self._available]
                if self._are_equal or self._real_index is None
                else (self._by_row(self._real_index) >= 0).sum(-1).view(-1, heads).tolist()
            )
        if self._room is None:
            self._room = counts
        before = how.get("protect_before")
        own, kept = [], []
        for split, budget, target, room, available, length in zip(
            splits, budgets, keep, self._room, counts, before or self._lengths, strict=True
        ):
            # Until the budget is final, the target includes slack.
            final = target <= budget
            # Every head keeps the protected spans; the rest of the budget is split.
            spanned = min(count_spanned(how.get("protect", ()), length), budget)
            left_room = [max(0, count - spanned) for count in room]
            share = (split.split(budget - spanned, left_room, final) + spanned).tolist()
            own += share
            kept += [min(count + (not final), left) for count, left in zip(share, available, strict=True)]
        lengths = [length for length in self._lengths for _ in range(heads)]
        if before is not None:
            how = {**how, "protect_before": [length for length in before for _ in range(heads)]}
        return Choice(kept, own, lengths, how)

    # -- slots in the order of their scores ----------------------------------------------------------------------

    def _find_splits(self) -> list[HeadSplit]:
        """Return the split of each row's budget; empty if heads keep the same number, or compete."""
        # Not the keys themselves: they would be padded to be shown.
        heads = self.keys.shape[1] if self._layout is None else self._layout.shape[1]
        splits = [split for split in self.head_splits if split is not None]
        if splits and splits[0].heads != heads:
            raise ProfileError(
                f"the profile has {splits[0].heads} heads for a layer with {heads} key/value heads, so it does not fit "
                "this model: calibrate the model (rankkv calibrate), or use head_budgets='distortion'."
            )
        return splits if heads > 1 else []

    def _choose(self, budgets: Sequence[int], keep: list[int], how: dict[str, Any]) -> Choice | None:
        splits = self._find_splits()
        return self._split(splits, budgets, keep, how) if splits else None

    def _by_row(self, tensor: Tensor) -> Tensor:
        heads = self._find_splits()[0].heads
        return tensor.expand(-1, heads, -1).reshape(-1, 1, tensor.shape[-1])

    def _by_layer(self, index: Tensor, empty: Tensor | None) -> tuple[Tensor, Tensor | None]:
        shape = len(self._lengths), -1, index.shape[-1]
        return index.view(shape), None if empty is None else empty.view(shape)

    def _keep_ranked(self, ranked: RankedSlots) -> None:
        rows, slots = len(ranked.counts), self.width
        first = torch.arange(0, rows * slots, slots, device=ranked.order.device)
        tokens = ranked.order[:, 0] + first[:, None]
        tokens = torch.cat([row[:count] for row, count in zip(tokens, ranked.counts, strict=True)])
        self._known_counts = _fold(ranked.counts, rows // len(self._lengths))
        layout = SlotLayout.of_counts(self._known_counts, max(ranked.counts), tokens.device)
        for store in self._stores.values():
            store.pick(tokens, layout, layout.shape)

    def _keep_first(self, counts: list[int]) -> None:
        self._known_counts = _fold(counts, len(counts) // len(self._lengths))
        layout = SlotLayout.of_counts(self._known_counts, max(counts), self.device)
        for store in self._stores.values():
            store.keep_first(layout)

    def _pick_ranked(self, ranked: RankedSlots, counts: list[int], slots: Tensor) -> None:
        starts = [0, *itertools.accumulate(ranked.counts)][:-1]
        tokens, width = slots[:, 0] + send_numbers(starts, slots.device)[:, None], max(counts)
        self._known_counts = _fold(counts, len(counts) // len(self._lengths))
        shape = len(self._lengths), len(self._known_counts[0]), width
        layout = None
        if min(counts) < width:
            layout = SlotLayout.of_counts(self._known_counts, width, tokens.device)
            tokens = torch.cat([row[width - count :] for row, count in zip(tokens, counts, strict=True)])
        for store in self._stores.values():
            store.pick(tokens.flatten(), layout, shape)

    def _find_valid(self, empty: Tensor | None, keep: list[int]) -> Tensor | None:
        counts = self._known_counts
        if empty is None:
            return None
        if counts is None:
            # Empty slots stand first in a head, so heads with as many tokens have them in the same places.
            same = bool((empty == empty[:, :1]).all())
            return super()._find_valid(empty, keep) if same else ~empty
        if all(len(set(row)) == 1 for row in counts):
            return super()._find_valid(empty, [row[0] for row in counts])
        if self._valid_of is None or self._valid_of[0] is not self._layout:
            self._valid_of = self._layout, ~empty
        # The same tensor for the same layout: masks made of it serve again.
        return self._valid_of[1]


def _fold(counts: list[int], heads: int) -> list[list[int]]:
    """Return ``[row][kv_head]`` counts from those of one head after the other."""
    return [counts[start : start + heads] for start in range(0, len(counts), heads)]
