"""A cache layer whose heads keep different numbers of tokens, and whose memory is that of the tokens kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..budget.heads import HeadSplit
from ..config import count_spanned
from ..errors import ProfileError
from ..observe.observation import Observation
from ..selection import CASCADE_SLACK, select_tokens, select_tokens_across_heads
from .layer import StoredLayer
from .storage import STORAGES, PackedStorage, SlotLayout


class HeadBudgetLayer(StoredLayer):
    """Spreads the layer's budget over its heads; keys and values wait packed and are padded for attention only.

    Empty slots stand at the start of a head.  Without a split for each row the heads' tokens compete; with one head, or
    with scores that are the same for all heads, every head then keeps as many as any other.

    Parameters
    ----------
    storage : str
        A key of :data:`rankkv.cache.storage.STORAGES`.
    head_floor : float
        Fraction of the budget that every head keeps.
    """

    def __init__(self, storage: str, head_floor: float) -> None:
        super().__init__(storage)
        self._stores: Mapping[str, PackedStorage] = {
            name: PackedStorage(STORAGES[storage]) for name in ("keys", "values")
        }
        self._head_floor = head_floor
        self._room: list[list[int]] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the keys and values of new tokens and return all that are kept, padded."""
        if self._layout is None:
            return super().update(key_states, value_states, *args, **kwargs)
        self.seen += key_states.shape[-2]
        return self._stores["keys"].append(key_states), self._stores["values"].append(value_states)

    @property
    def _layout(self) -> SlotLayout | None:
        return self._stores["keys"].layout

    @property
    def width(self) -> int:
        """Number of slots of the padded form (the widest head's kept tokens)."""
        return self._stores["keys"].slots

    @property
    def kept_length(self) -> int:
        """Tokens that a head keeps on average, rounded up, in the row that keeps most."""
        if self._layout is None:
            return self.width
        return max(-(-sum(row) // len(row)) for row in self.kept_per_head)

    def count_slack(self, protection_settled: bool) -> int:
        """Return the tokens a head beyond a budget that may still shrink."""
        return CASCADE_SLACK

    @property
    def kept_per_head(self) -> list[list[int]]:
        """Tokens kept, ``[row][kv_head]``."""
        layout = self._layout
        if layout is None:
            return super().kept_per_head
        later = self.width - layout.shape[-1]
        return [[count + later for count in row] for row in layout.counts]

    def begin_compression(
        self, scores: Tensor, observation: Observation, lasting: Tensor | None = None
    ) -> None:
        """Take the scores by which the layer may shrink, and note how many tokens each head has."""
        super().begin_compression(scores, observation, lasting)
        self._room = None

    def shrink(self, *args: Any, **kwargs: Any) -> None:
        """Keep as many tokens as the budgets say, spread over the heads, and release the rest."""
        super().shrink(*args, **kwargs)
        self._pack()

    def rest(self) -> None:
        """Go over to the packed form, stored as the storage says."""
        self._pack()
        super().rest()

    def _pack(self) -> None:
        if self._layout is not None or self.kept_valid is None:
            return
        valid = self.kept_valid if self.kept_valid.dim() == 3 else self.kept_valid[:, None]
        layout = SlotLayout.of(valid.expand(-1, self.keys.shape[1], -1))
        for store in self._stores.values():
            store.pack(layout)

    def _select(
        self, scores: Tensor, real_index: Tensor, budgets: Sequence[int], keep: list[int], **how: Any
    ) -> Tensor:
        heads = self.keys.shape[1]
        splits = [split for split in self.head_splits if split is not None]
        if splits and splits[0].heads != heads:
            raise ProfileError(
                f"the profile weighs {splits[0].heads} heads of a layer that has {heads} key/value heads: it is "
                "damaged or of another model; calibrate this one (rankkv calibrate), or use head_budgets='distortion'."
            )
        if splits and heads > 1:
            return self._select_by_heads(splits, scores, real_index, budgets, keep, **how)
        if scores.shape[1] == 1:
            return super()._select(scores, real_index, budgets, keep, **how)
        return select_tokens_across_heads(
            scores, real_index, self._lengths, budgets, keep=keep, head_floor=self._head_floor, **how
        )

    def _select_by_heads(
        self,
        splits: Sequence[HeadSplit],
        scores: Tensor,
        real_index: Tensor,
        budgets: Sequence[int],
        keep: list[int],
        **how: Any,
    ) -> Tensor:
        """Select each head's tokens as if it were a row of its own, with the budget that it is given."""
        batch, heads, keys = scores.shape[0], splits[0].heads, scores.shape[-1]
        scores, real_index = (
            tensor.expand(-1, heads, -1).reshape(batch * heads, 1, keys) for tensor in (scores, real_index)
        )
        counts = (real_index >= 0).sum(-1).view(batch, heads).tolist()
        if self._room is None:
            self._room = counts
        spanned_in = how.get("protect_before") or self._lengths
        own, kept = [], []
        for split, budget, some, room, there, length in zip(
            splits, budgets, keep, self._room, counts, spanned_in, strict=True
        ):
            final = some <= budget
            # Every head keeps the protected spans; what is left of the budget is split.
            spanned = min(count_spanned(how.get("protect", ()), length), budget)
            left_room = [max(0, count - spanned) for count in room]
            share = (split.split(budget - spanned, left_room, final) + spanned).tolist()
            own += share
            kept += [min(count + (not final), left) for count, left in zip(share, there, strict=True)]
        lengths = [length for length in self._lengths for _ in range(heads)]
        if how.get("protect_before") is not None:
            how["protect_before"] = [length for length in how["protect_before"] for _ in range(heads)]
        return select_tokens(scores, real_index, lengths, own, keep=kept, **how).view(batch, heads, -1)

    def _find_valid(self, empty: Tensor, keep: list[int]) -> Tensor | None:
        return super()._find_valid(empty, keep) if bool((empty == empty[:, :1]).all()) else ~empty
