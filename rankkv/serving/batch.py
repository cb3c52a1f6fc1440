"""The batch: answers that decode together, each behind a context that all rows about it share without a copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationMode

from ..cache.cache import RankKVCache
from ..cache.layer import RankKVLayer
from ..config import RankKVConfig
from ..errors import RankKVError, UnsupportedModelError
from ..models.compat import accepts_argument, cache_argument, find_offset_owner
from ..observe import hook
from ..observe.call import AttentionCall
from ..observe.hook import AttentionObserver
from .tails import Tail

#: Options of a cache that keeps every token: the answer is that of the plain model.
WHOLE = RankKVConfig(
    compression_ratio=1.0, selector="streaming_llm", strategy="uniform", head_budgets=None, profile=None
)
# Tokens of a question in one forward: its attention holds a matrix of these by all keys.
_CHUNK = 512
# Slots for the newest tokens of a row at first and at most, and the longest question that is put there.
_FIRST_SLOTS, _MOST_SLOTS, _LONGEST_START = 64, 256, 128
# Largest difference of a logit in the check at the start, as a part of the largest logit.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_HALF_TOLERANCE = 5e-2

#: Attention over a part of the keys: largest logit, sum of weights, weighted sum of values.
Part = tuple[Tensor, Tensor, Tensor]


class Base:
    """A context as rows share it: keys and values of each head, in the memory of its cache.

    Parameters
    ----------
    cache : RankKVCache
        A cache of one row at rest.  It must not change as long as rows use it.
    """

    def __init__(self, cache: RankKVCache) -> None:
        self.cache, self.seen = cache, cache.seen_tokens
        #: Keys and values, ``[token, head_dim]``, by layer and key/value head.
        self.layers = [layer.list_heads() for layer in cache.layers]


@dataclass(eq=False)
class Row:
    """One conversation in the batch.

    Attributes
    ----------
    base : Base
        What other rows may share.
    own : Tail, optional
        Its own older tokens; the newest ones stand in the memory of the batch.
    newest : int
        Number of those.
    owner : object
        Whoever waits for its tokens; the batch does not use it.
    """

    base: Base
    own: Tail | None = None
    newest: int = 0
    owner: Any = None

    @property
    def seen(self) -> int:
        """Number of tokens seen."""
        return self.base.seen + (0 if self.own is None else self.own.length) + self.newest


@dataclass
class _Pass:
    """State of one forward, which runs one row's question or one token of every row."""

    filled: Row | None = None
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    attended: int = 0
    # Of a step: place of each row, slot of its new token, which slots are empty, and the places of the rows of each
    # context.
    places: Tensor | None = None
    slots: Tensor | None = None
    width: int = 0
    bias: Tensor | None = None
    groups: list[tuple[Base, Tensor | None]] = field(default_factory=list)


class Batch(AttentionObserver, DynamicCache):
    """Run one forward for one token of every row; rows join and leave between two of them.

    The model calls it like a cache.  Each layer's attention is computed in parts and added up: the shared context once
    for all rows about it, then the older tokens of a row, then the newest of all rows.

    Parameters
    ----------
    model : PreTrainedModel
        A model that :meth:`check` accepts.
    limit : int
        Most rows.
    """

    def __init__(self, model: Any, limit: int) -> None:
        super().__init__(config=model.config.get_text_config(decoder=True))
        self.rows: list[Row] = []
        self._model, self._limit = model, limit
        # The newest tokens, [row, kv_head, slot, head_dim] for each layer; rows without a gap.
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._pass = _Pass()
        self._extra = {"logits_to_keep": 1} if accepts_argument(model, "logits_to_keep") else {}
        hook.watch_for(self, model)

    @classmethod
    def check(cls, model: Any) -> str | None:
        """Return why this model's answers cannot decode together, in a few words; None if they can.

        Six tokens run through the batch and through the model alone: both must give the same logits.
        """
        plain = RankKVCache(model, config=WHOLE)
        indices = {
            module.layer_idx
            for module in model.modules()
            if isinstance(getattr(module, "layer_idx", None), int)
        }
        if not all(isinstance(layer, RankKVLayer) for layer in plain.layers):
            return "some layers have no ordinary keys and values"
        if indices != set(range(len(plain.layers))):
            return "layers share their keys"
        if plain.text_config._attn_implementation != "sdpa":
            return "its attention does not run through sdpa"
        if not accepts_argument(model, "position_ids") or find_offset_owner(model) is not None:
            return "its positions are not given by position_ids alone"
        if any(_depends_on_length(module) for module in model.modules()):
            return "its rotary embedding depends on the longest text of a batch"
        if model.generation_config.stop_strings is not None:
            return "its generation config has stop strings"
        mode = model.generation_config.get_generation_mode()
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            return f"its generation config asks for {mode.value.replace('_', ' ')}"
        ids = torch.arange(6, device=model.device)[None] % model.get_input_embeddings().num_embeddings
        try:
            with torch.no_grad():
                expected = model(input_ids=ids).logits[0, -1].float()
                model(input_ids=ids[:, :3], use_cache=True, **cache_argument(plain))
                batch, row = cls(model, 1), Row(Base(plain.finish()))
                batch.fill(row, ids[0, 3:5])
                batch.join(row)
                found = batch.step([int(ids[0, 5])])[0].float()
        except (RankKVError, TypeError, ValueError, RuntimeError) as error:
            return f"{type(error).__name__} in a trial"
        tolerance = _TOLERANCE.get(model.dtype, _HALF_TOLERANCE) * float(expected.abs().max())
        return None if float((found - expected).abs().max()) <= tolerance else "a trial gave other logits"

    # -- rows ----------------------------------------------------------------------------------------------------

    def open(self, cache: RankKVCache, tail: Tail | None = None) -> Row:
        """Return a row behind a cache and a tail, with the context of other rows if they have the same cache."""
        shared = (row.base for row in self.rows if row.base.cache is cache)
        return Row(next(shared, None) or Base(cache), tail)

    def prefill(self, cache: RankKVCache, ids: Tensor) -> tuple[Row, Tensor]:
        """Prefill a new cache with tokens ``[token]``; return its row and the last logits, ``[1, token]``."""
        with torch.no_grad():
            output = self._model(input_ids=ids[None], use_cache=True, **self._extra, **cache_argument(cache))
        return self.open(cache.finish()), output.logits[:, -1]

    def fill(self, row: Row, ids: Tensor) -> Tensor:
        """Prefill tokens ``[token]`` of a row that has not joined yet; return the last one's logits, ``[1, token]``."""
        for chunk in ids.split(_CHUNK):
            work = _Pass(filled=row)
            positions = torch.arange(row.seen, row.seen + len(chunk), device=ids.device)
            logits = self._forward(work, chunk[None], positions[None])
            row.own = Tail(work.keys, work.values)
        return logits

    def join(self, row: Row) -> None:
        """Let a row take part in the next step."""
        place, own = len(self.rows), row.own
        moved = own if own is not None and row.newest == 0 and own.length <= _LONGEST_START else None
        self._reserve(row, 1 if moved is None else moved.length + 1)
        for memory in (*self._keys, *self._values):
            # What an earlier row left here may be NaN, and no weight of 0 takes that away.
            memory[place].zero_()
        if moved is not None:
            for target_memory, states in ((self._keys, moved.keys), (self._values, moved.values)):
                for target, source in zip(target_memory, states, strict=True):
                    target[place, :, : moved.length] = source
            row.newest, row.own = moved.length, None
        # Last: a failure above leaves the batch as it was.
        self.rows.append(row)

    def leave(self, row: Row) -> None:
        """Take a row out of the batch; its own tokens are then all in ``row.own``."""
        place, last = self.rows.index(row), len(self.rows) - 1
        try:
            self._settle(place)
        finally:
            # Also where there was no memory for its tokens: the batch must lose the row.
            moved = self.rows.pop()
            if place != last:
                self.rows[place] = moved
                for memory in (*self._keys, *self._values):
                    memory[place] = memory[last]
            if not self.rows:
                self._keys, self._values = [], []

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Run the next token of every row and return the logits after it, ``[row, token]``."""
        for place, row in enumerate(self.rows):
            if row.newest == _MOST_SLOTS:
                self._settle(place)
        newest = [row.newest for row in self.rows]
        self._reserve(self.rows[0], max(newest) + 1)
        device = self._keys[0].device
        slots = torch.tensor(newest, device=device)
        places = torch.arange(len(self.rows), device=device)
        work = _Pass(places=places, slots=slots, width=max(newest) + 1, groups=self._group(device))
        if min(newest) < max(newest):
            empty = torch.arange(work.width, device=device) > slots[:, None]
            work.bias = torch.zeros(empty.shape, device=device).masked_fill_(empty, -torch.inf)[:, None, None]
        ids = torch.tensor(tokens, device=device)[:, None]
        logits = self._forward(
            work, ids, torch.tensor([row.seen for row in self.rows], device=device)[:, None]
        )
        for row in self.rows:
            row.newest += 1
        return logits

    def _group(self, device: torch.device) -> list[tuple[Base, Tensor | None]]:
        places: dict[Base, list[int]] = {}
        for place, row in enumerate(self.rows):
            places.setdefault(row.base, []).append(place)
        if len(places) == 1:
            return [(base, None) for base in places]
        return [(base, torch.tensor(found, device=device)) for base, found in places.items()]

    def _settle(self, place: int) -> None:
        """Move the newest tokens of a row into memory of its own."""
        row = self.rows[place]
        if row.newest:
            keys, values = (
                [tensor[place, :, : row.newest].clone() for tensor in memory]
                for memory in (self._keys, self._values)
            )
            tail = Tail(keys, values)
            row.own, row.newest = tail if row.own is None else row.own.join(tail), 0

    def _reserve(self, row: Row, slots: int) -> None:
        """Make room for so many newest tokens of each row."""
        held = self._keys[0].shape[2] if self._keys else 0
        if held >= slots:
            return
        room = _FIRST_SLOTS
        while room < slots:
            room *= 2
        both: list[list[Tensor]] = []
        for before, part in ((self._keys, 0), (self._values, 1)):
            grown: list[Tensor] = []
            for index, heads in enumerate(row.base.layers):
                like = heads[0][part]
                memory = like.new_zeros((self._limit, len(heads), room, like.shape[-1]))
                if before:
                    memory[:, :, :held] = before[index]
                grown.append(memory)
            both.append(grown)
        self._keys, self._values = both

    # -- called by the model -------------------------------------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: every row has a length of its own, and the positions say it."""
        return 0

    def get_mask_sizes(self, query_length: int | Tensor, layer_idx: int = 0) -> tuple[int, int]:
        """Return the length of the new tokens alone: the batch knows itself what each row may see."""
        length = query_length.shape[0] if isinstance(query_length, Tensor) else query_length
        return length, 0

    @property
    def is_compileable(self) -> bool:
        """False: lengths change with every step."""
        return False

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take the keys and values of new tokens, and announce the attention call of this layer."""
        work = self._pass
        if work.filled is not None:
            own = work.filled.own
            keys, values = key_states[0], value_states[0]
            if own is not None:
                keys = torch.cat([own.keys[layer_idx], keys], dim=1)
                values = torch.cat([own.values[layer_idx], values], dim=1)
            work.keys.append(keys)
            work.values.append(values)
        else:
            self._keys[layer_idx][work.places, :, work.slots] = key_states[:, :, 0]
            self._values[layer_idx][work.places, :, work.slots] = value_states[:, :, 0]
        hook.hand_off(self, layer_idx, key_states.shape[-2])
        return key_states, value_states

    def attend(self, layer_idx: int, call: AttentionCall) -> Any:
        """Run the attention of one layer over all that each row has seen."""
        if not call.is_plain_sdpa:
            raise UnsupportedModelError(
                "the attention of this model does more than scale, add up and mask: its answers cannot decode together."
            )
        self._pass.attended += 1
        scaling = call.options.get("scaling")
        query = call.query * (call.query.shape[-1] ** -0.5 if scaling is None else scaling)
        attend = self._attend_step if self._pass.filled is None else self._attend_question
        _, total, output = attend(layer_idx, query)
        return (output / total).to(call.query.dtype).transpose(1, 2).contiguous(), None

    def _forward(self, work: _Pass, ids: Tensor, positions: Tensor) -> Tensor:
        # A step may run between two layers of a question's prefill.
        before, self._pass = self._pass, work
        try:
            with torch.no_grad():
                output = self._model(
                    input_ids=ids, position_ids=positions, use_cache=True, return_dict=True,
                    **self._extra, **cache_argument(self),
                )  # fmt: skip
        finally:
            hook.take_back(self)
            self._pass = before
        if work.attended != len(self.layers):
            raise UnsupportedModelError(
                f"{work.attended} of {len(self.layers)} layers attended through the batch: some use another interface."
            )
        logits: Tensor = output.logits[:, -1]
        return logits

    # -- attention -----------------------------------------------------------------------------------------------

    def _attend_step(self, layer_idx: int, query: Tensor) -> Part:
        """Let one query ``[row, head, 1, head_dim]`` of every row attend."""
        work = self._pass
        keys, values = (
            memory[layer_idx][: len(self.rows), :, : work.width] for memory in (self._keys, self._values)
        )
        rows, kv_heads = keys.shape[:2]
        grouped = query.reshape(rows, kv_heads, -1, query.shape[-1])
        logits = torch.matmul(grouped, keys.transpose(-1, -2)).float()
        found = _weigh(logits if work.bias is None else logits + work.bias, values)
        for place, row in enumerate(self.rows):
            if row.own is not None:
                logits = torch.matmul(grouped[place], row.own.keys[layer_idx].transpose(-1, -2)).float()
                _add_at(found, place, _weigh(logits, row.own.values[layer_idx]))
        for base, places in work.groups:
            asked = grouped if places is None else grouped[places]
            # The rows of a context are rows of one product: its keys are read once for all of them.
            flat = asked.transpose(0, 1).reshape(kv_heads, -1, asked.shape[-1])
            part = [
                tensor.view(kv_heads, len(asked), -1, tensor.shape[-1]).transpose(0, 1)
                for tensor in _attend_heads(flat, base.layers[layer_idx])
            ]
            if places is None:
                found = _merge(found, (part[0], part[1], part[2]))
            else:
                _add_at(found, places, (part[0], part[1], part[2]))
        top, total, output = (tensor.reshape(rows, -1, 1, tensor.shape[-1]) for tensor in found)
        return top, total, output

    def _attend_question(self, layer_idx: int, query: Tensor) -> Part:
        """Let the queries ``[1, head, query, head_dim]`` of one row's new tokens attend."""
        keys, values = self._pass.keys[layer_idx], self._pass.values[layer_idx]
        row = self._pass.filled
        kv_heads, held, steps = keys.shape[0], keys.shape[1], query.shape[-2]
        grouped = query[0].reshape(kv_heads, -1, steps, query.shape[-1])
        logits = torch.matmul(grouped, keys[:, None].transpose(-1, -2)).float()
        hidden = torch.ones(steps, held, dtype=torch.bool, device=keys.device).triu_(held - steps + 1)
        found = _weigh(logits.masked_fill_(hidden, -torch.inf), values[:, None])
        if row is not None and row.base.seen:
            flat = grouped.reshape(kv_heads, -1, grouped.shape[-1])
            part = [
                tensor.view(kv_heads, -1, steps, tensor.shape[-1])
                for tensor in _attend_heads(flat, row.base.layers[layer_idx])
            ]
            found = _merge(found, (part[0], part[1], part[2]))
        top, total, output = (tensor.reshape(1, -1, steps, tensor.shape[-1]) for tensor in found)
        return top, total, output


def _depends_on_length(module: Any) -> bool:
    """Return True for a rotary embedding whose frequencies are chosen by the largest position of a forward."""
    kind = getattr(module, "rope_type", None)
    kinds = kind.values() if isinstance(kind, dict) else [kind]
    return any(isinstance(name, str) and ("dynamic" in name or name == "longrope") for name in kinds)


def _attend_heads(queries: Tensor, heads: Sequence[tuple[Tensor, Tensor]]) -> Part:
    """Let queries ``[kv_head, query, head_dim]`` attend to heads of different lengths."""
    parts = []
    for query, (keys, values) in zip(queries, heads, strict=True):
        if len(keys):
            parts.append(_weigh(torch.mm(query, keys.T).float(), values))
        else:
            # A head that keeps nothing: no weight, whatever else there is.
            lead = (*query.shape[:-1], 1)
            parts.append((
                torch.full(lead, -torch.inf, device=query.device), torch.zeros(lead, device=query.device),
                torch.zeros((*query.shape[:-1], values.shape[-1]), device=query.device),
            ))  # fmt: skip
    top, total, output = (torch.stack(found) for found in zip(*parts, strict=True))
    return top, total, output


def _weigh(logits: Tensor, values: Tensor) -> Part:
    """Return attention over one part of the keys: largest logit, sum of weights, weighted sum of values."""
    top = logits.amax(dim=-1, keepdim=True)
    weights = (logits - top).exp_()
    return top, weights.sum(dim=-1, keepdim=True), torch.matmul(weights.to(values.dtype), values).float()


def _merge(one: Part, other: Part) -> Part:
    """Add up attention over two parts of the keys; the first one has a key for every query."""
    top = torch.maximum(one[0], other[0])
    first, second = (one[0] - top).exp_(), (other[0] - top).exp_()
    return top, one[1] * first + other[1] * second, one[2] * first + other[2] * second


def _add_at(found: Part, places: Any, part: Part) -> None:
    """Add up, in place, attention over a further part of the keys of some rows."""
    merged = _merge((found[0][places], found[1][places], found[2][places]), part)
    for target, source in zip(found, merged, strict=True):
        target[places] = source
