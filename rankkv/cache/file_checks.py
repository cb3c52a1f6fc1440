"""Check of a saved cache before anything is built from it: names, dtypes, shapes, numbers and their bounds."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..models.fingerprint import find_state_shapes
from ..utils.files import shorten
from .layer import ROW_TENSORS

#: Largest header, in characters.
HEADER_LIMIT = 64 * 2**20
# Largest count of tokens: a bound on numbers that nothing else in the file bounds.
_MOST_TOKENS = 2**40
# Largest number of a tensor: the square of a larger one is infinite. Rotary frequencies are about 1 at most.
_LARGEST, _LARGEST_FREQUENCY = 1e18, 1e3
_NAMES = re.compile(
    rf"(0|[1-9]\d{{0,5}})\.({'|'.join(ROW_TENSORS)}|buffer\.query|buffer\.query_valid|epoch\.\d{{1,9}}\.\d{{1,13}})"
)
#: Token ids of the prompt, the one tensor that belongs to no layer.
PROMPT_IDS = "prompt_ids"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_COMPRESSED = ("RankKVLayer", "StoredLayer", "HeadBudgetLayer", "RestingLayer", "RaggedLayer")
_HEAD_BUDGETS = "HeadBudgetLayer"
_SLIDING = "DynamicSlidingWindowLayer"
_PLAN = {"length", "total_budget", "budgets", "layer_measures", "ranks", "notes"}
# Entries that files of before do not have.
_NEWER_PLAN = {"head_curves", "lost_attention"}
_CURVES = {"heads", "floor", "slopes", "widths", "owners"}


def compute_digest(header: str, tensors: Mapping[str, Tensor]) -> str:
    """Compute a digest of a header and of all tensors with their names, dtypes and shapes."""
    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        if tensor.numel():
            digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    return digest.hexdigest()


class SavedCheck:
    """Check header and tensors of one saved cache; every error names the file, the value, the bound and the remedy.

    Parameters
    ----------
    path : str
        Path of the file, for errors.
    header : mapping
        Header of the file.
    """

    def __init__(self, path: str, header: Mapping[str, Any]) -> None:
        self.path, self.header = path, header
        #: Indices of the compressible layers.
        self.compressed: list[int] = []
        self.rows = self.seen = 0

    def fail(self, what: str) -> InputError:
        """Return the error for a part of the file that is not what it must be."""
        return InputError(
            f"{self.path} is damaged: {what}; save the cache again, or get an undamaged copy of the file."
        )

    # -- header --------------------------------------------------------------------------------------------------

    def check_header(self, types: list[bool] | None = None) -> None:
        """Check types and bounds of everything in the header but the options, which their own class checks.

        Parameters
        ----------
        types : list of bool, optional
            For each layer of the model's cache, True if it is compressed and False for a sliding window.

        Raises
        ------
        InputError
            If an entry is missing, unknown, of another type or outside its bounds.
        """
        layers = self._list("layers", self.header, None)
        flow = self._record("flow", self.header)
        self._record("options", self.header)
        starts = self._list("row_start", flow, None)
        if not layers or not starts:
            raise self.fail("it lists no layers or no rows")
        own = [isinstance(record, dict) and record.get("type") in _COMPRESSED for record in layers]
        if types is not None and own != types:
            raise self.fail(
                f"it has {sum(own)} compressed of {len(own)} layers, the model has {sum(types)} of {len(types)}"
            )
        self.rows = len(starts)
        for index, record in enumerate(layers):
            self._check_layer(index, record)
        if not self.compressed:
            raise self.fail("none of its layers is compressed")
        for start in starts:
            self._integer("row_start", start, 0, self.seen - 1)
        self._integer("compressed_at", flow.get("compressed_at"), 0, self.seen)
        if not isinstance(flow.get("streaming"), bool):
            raise self.fail(f"streaming is {shorten(flow.get('streaming'))}, it must be true or false")
        holes = flow.get("holes", [])
        if not isinstance(holes, list) or len(holes) not in (0, self.rows):
            raise self.fail(f"holes is {shorten(holes)}, it must be a list of {self.rows} numbers, or empty")
        for count in holes:
            self._integer("holes", count, 0, self.seen - 1)
        offset = flow.get("position_offset")
        if offset is not None and (not isinstance(offset, list) or len(offset) not in (1, self.rows)):
            raise self.fail(f"position_offset is {shorten(offset)}, it must be a list of {self.rows} numbers")
        for value in offset or ():
            # A row has one number, in a list of its own.
            if not isinstance(value, list) or len(value) != 1:
                raise self.fail(
                    f"position_offset is {shorten(offset)}, each row of it must be a list of one number"
                )
            self._integer("position_offset", value[0], -_MOST_TOKENS, _MOST_TOKENS)
        unknown = sorted(set(flow) - {"row_start", "compressed_at", "streaming", "holes", "position_offset"})
        if unknown:
            raise self.fail(f"its flow has the unknown entry {shorten(unknown[0])}")
        for plan in self._list("plans", self.header, self.rows):
            self._check_plan(plan)

    def _check_layer(self, index: int, record: Any) -> None:
        where = f"layer {index}"
        if not isinstance(record, dict):
            raise self.fail(f"{where} is {shorten(record)}, it must be a record")
        kind = record.get("type")
        if kind == _SLIDING:
            known, count = {"type", "cumulative_length"}, record.get("cumulative_length")
        elif kind in _COMPRESSED:
            known, count = {"type", "seen", "compressed_at", "buffer_capacity"}, record.get("seen")
            if kind == _HEAD_BUDGETS:
                known.add("attends_as_held")
                if not isinstance(record.get("attends_as_held", False), bool):
                    raise self.fail(f"attends_as_held of {where} must be true or false")
        else:
            raise self.fail(f"{where} has the unknown type {shorten(kind)}")
        unknown = sorted(set(record) - known)
        if unknown:
            raise self.fail(f"{where} has the unknown entry {shorten(unknown[0])}")
        seen = self._integer(f"the number of tokens that {where} has seen", count, 1, _MOST_TOKENS)
        if self.seen not in (0, seen):
            raise self.fail(f"{where} has seen {seen} tokens, the layers before it {self.seen}")
        self.seen = seen
        if kind == _SLIDING:
            return
        self.compressed.append(index)
        self._integer(f"compressed_at of {where}", record.get("compressed_at"), 0, self.seen)
        if "buffer_capacity" in record:
            self._integer(f"buffer_capacity of {where}", record["buffer_capacity"], 1, _MOST_TOKENS)

    def _check_plan(self, plan: Any) -> None:
        count = len(self.compressed)
        if not isinstance(plan, dict) or not _PLAN <= set(plan) <= _PLAN | _NEWER_PLAN:
            listed = ", ".join(sorted(_PLAN | _NEWER_PLAN))
            raise self.fail(f"a plan is {shorten(plan)}, it must be a record of {listed}")
        lost = plan.get("lost_attention")
        if lost is not None:
            self._number("lost_attention", lost)
            if not 0.0 <= lost <= 1.0:
                raise self.fail(f"lost_attention of a plan is {lost}, it must lie in [0, 1]")
        self._integer("the length of a plan", plan["length"], 0, self.seen)
        self._integer("total_budget of a plan", plan["total_budget"], 0, _MOST_TOKENS * count)
        for budget in self._list("budgets", plan, count):
            self._integer("a budget", budget, 0, max(plan["total_budget"], self.seen))
        for name in ("layer_measures", "ranks"):
            values = plan[name]
            if not isinstance(values, list) or len(values) not in (0, count):
                raise self.fail(f"{name} of a plan must hold {count} numbers, or none")
            for value in values:
                self._number(name, value)
        if not isinstance(plan["notes"], list) or not all(isinstance(note, str) for note in plan["notes"]):
            raise self.fail("the notes of a plan must be texts")
        curves = plan.get("head_curves", [])
        if not isinstance(curves, list) or len(curves) not in (0, count):
            raise self.fail(f"head_curves of a plan must hold {count} records, or none")
        for record in curves:
            self._check_curves(record)

    def _check_curves(self, record: Any) -> None:
        if not isinstance(record, dict) or set(record) != _CURVES:
            raise self.fail(
                f"head_curves has {shorten(record)}, it must be a record of {', '.join(sorted(_CURVES))}"
            )
        self._integer("heads of head_curves", record["heads"], 1, 2**20)
        self._integer("floor of head_curves", record["floor"], 0, _MOST_TOKENS)
        slopes = self._list("slopes", record, None)
        for value in slopes:
            self._number("a slope of head_curves", value)
            if not -math.inf < value <= 0:
                raise self.fail(f"a slope of head_curves is {value}, it must be finite and not above 0")
        for width in self._list("widths", record, len(slopes)):
            self._integer("a width of head_curves", width, 0, _MOST_TOKENS)
        for owner in self._list("owners", record, len(slopes)):
            self._integer("an owner of head_curves", owner, 0, record["heads"] - 1)

    # -- tensors -------------------------------------------------------------------------------------------------

    def check_tensors(self, tensors: Mapping[str, Tensor], model: Any = None, shards: int = 1) -> None:
        """Check names, dtypes, shapes and content of all tensors, against the header, each other and the model.

        Parameters
        ----------
        tensors : mapping
            All tensors of the file.
        model : PreTrainedModel, optional
            The model that the cache will serve.
        shards : int
            Tensor-parallel processes that share the heads.

        Raises
        ------
        InputError
            If a tensor is missing, unknown, or not what it must be.
        """
        held: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name == PROMPT_IDS:
                self._expect(name, tensor, (torch.int64,), (None, None))
                if not len(tensor) or self.rows % len(tensor) or tensor.shape[1] > self.seen:
                    raise self.fail(
                        f"'{name}' is {list(tensor.shape)} for {self.rows} rows and {self.seen} tokens seen"
                    )
                continue
            found = _NAMES.fullmatch(name)
            if found is None or int(found[1]) >= len(self.header["layers"]):
                raise self.fail(f"it holds a tensor {shorten(name)}, which no cache has")
            held.setdefault(int(found[1]), {})[found[2]] = tensor
        shapes = {} if model is None else find_state_shapes(model)
        dtype = None if model is None else model.get_input_embeddings().weight.dtype
        # Where projections are fused, all layers have the shape of the first one, unless the config varies it.
        is_even = (
            not vars(model.config.get_text_config(decoder=True)).get("_heterogeneity_spec")
            if model
            else False
        )
        for index, record in enumerate(self.header["layers"]):
            own = held.get(index, {})
            for name in ("keys", "values"):
                if name not in own:
                    raise self.fail(f"the tensor '{index}.{name}' is missing")
            self._check_states(index, own, shapes.get(index), shards, dtype)
            if is_even and not shapes and record["type"] != _SLIDING:
                keys, values = own["keys"], own["values"]
                shapes = dict.fromkeys(self.compressed, (keys.shape[1], keys.shape[3], values.shape[3]))
            if record["type"] == _SLIDING:
                extra = sorted(set(own) - {"keys", "values"})
                if extra:
                    raise self.fail(f"it holds a tensor '{index}.{extra[0]}', which a sliding window has not")
            else:
                self._check_compressed(index, record, own)

    def _check_states(
        self,
        index: int,
        own: dict[str, Tensor],
        model: tuple[int, int, int] | None,
        shards: int,
        own_dtype: torch.dtype | None,
    ) -> None:
        heads, key_dim, value_dim = (None, None, None) if model is None else model
        heads = None if heads is None or shards > 1 else heads
        keys, values = own["keys"], own["values"]
        self._expect(f"{index}.keys", keys, _FLOATS, (self.rows, heads, None, key_dim))
        self._expect(f"{index}.values", values, _FLOATS, (self.rows, keys.shape[1], keys.shape[2], value_dim))
        if not keys.numel() or not values.numel():
            raise self.fail(f"the tensors of layer {index} are empty")
        for name in ("keys", "values"):
            self._check_finite(f"{index}.{name}", own[name])
        # A float32 model may have run under autocast; a model in half precision has its own kind or float32.
        if own_dtype in (torch.float16, torch.bfloat16):
            for name in ("keys", "values"):
                self._expect(f"{index}.{name}", own[name], (own_dtype, torch.float32), (None,) * 4)

    def _check_compressed(self, index: int, record: dict[str, Any], own: dict[str, Tensor]) -> None:
        keys = own["keys"]
        _, heads, width, dim = keys.shape
        later = self.seen - record["compressed_at"]
        kept = width - later
        positions, valid = own.get("kept_positions"), own.get("kept_valid")
        if kept < 0 or (positions is None and width != self.seen):
            raise self.fail(
                f"layer {index} holds {width} tokens, but has seen {self.seen} and was compressed after "
                f"{record['compressed_at']}"
            )
        if positions is None and valid is not None:
            raise self.fail(f"'{index}.kept_valid' stands without '{index}.kept_positions'")
        if positions is not None:
            self._check_positions(index, record, own, kept)
        scores, moments = own.get("running_scores"), own.get("query_moments")
        if scores is not None:
            self._expect(f"{index}.running_scores", scores, _FLOATS, (self.rows, (1, heads), None))
            if not kept <= scores.shape[2] <= width:
                raise self.fail(
                    f"'{index}.running_scores' has {scores.shape[2]} slots, it must have {kept} to {width}"
                )
            self._check_finite(f"{index}.running_scores", scores)
        if moments is not None:
            self._expect(f"{index}.query_moments", moments, _FLOATS, (self.rows, None, dim + 1, dim + 1))
            self._check_heads(f"{index}.query_moments", moments, heads)
            self._check_finite(f"{index}.query_moments", moments)
        self._check_buffer(index, record, own, dim, heads)
        self._check_epochs(index, own, dim)

    def _check_positions(self, index: int, record: dict[str, Any], own: dict[str, Tensor], kept: int) -> None:
        """Check positions and validity of the slots that the last compression kept."""
        heads, name, end = own["keys"].shape[1], f"{index}.kept_positions", record["compressed_at"]
        positions, valid = own["kept_positions"], own.get("kept_valid")
        self._expect(name, positions, (torch.int64,), (self.rows, (1, heads), kept))
        if not positions.numel() or int(positions.min()) < 0 or int(positions.max()) >= end:
            raise self.fail(f"'{name}' holds positions outside 0 to {end - 1}")
        holds = torch.ones_like(positions, dtype=torch.bool)
        if valid is not None:
            shape = (self.rows, kept) if valid.dim() == 2 else (self.rows, (1, heads), kept)
            self._expect(f"{index}.kept_valid", valid, (torch.bool,), shape)
            valid = valid if valid.dim() == 3 else valid[:, None]
            if bool((valid[..., 1:] < valid[..., :-1]).any()):
                raise self.fail(f"'{index}.kept_valid' has an empty slot after a token")
            holds = valid.expand(-1, max(valid.shape[1], positions.shape[1]), -1)
            positions = positions.expand_as(holds)
        if bool(((positions[..., 1:] <= positions[..., :-1]) & holds[..., :-1]).any()):
            raise self.fail(f"'{name}' does not ascend")
        holes = torch.tensor(self.header["flow"].get("holes") or [0] * self.rows)
        newest = positions.masked_fill(~holds, -1).flatten(1).amax(1)
        # Every selector keeps the newest token, so it tells how many tokens were seen.
        if bool((newest + holes < end - 1).any()):
            raise self.fail(
                f"the newest position of layer {index} is {int(newest.min())}, but {end} tokens were seen then"
            )

    def _check_buffer(
        self, index: int, record: dict[str, Any], own: dict[str, Tensor], dim: int, heads: int
    ) -> None:
        query, valid = own.get("buffer.query"), own.get("buffer.query_valid")
        if query is None and valid is None:
            return
        if query is None or valid is None or "buffer_capacity" not in record:
            raise self.fail(f"layer {index} holds a part of a query buffer")
        self._expect(f"{index}.buffer.query", query, _FLOATS, (self.rows, None, None, dim))
        self._check_heads(f"{index}.buffer.query", query, heads)
        count = query.shape[2]
        if count > min(record["buffer_capacity"], self.seen):
            raise self.fail(
                f"'{index}.buffer.query' holds {count} queries of {self.seen} tokens, its capacity is "
                f"{record['buffer_capacity']}"
            )
        self._expect(f"{index}.buffer.query_valid", valid, (torch.bool,), (self.rows, count))
        self._check_finite(f"{index}.buffer.query", query, valid[:, None])

    def _check_epochs(self, index: int, own: dict[str, Tensor], dim: int) -> None:
        names = [name for name in own if name.startswith("epoch.")]
        order = sorted((int(name.split(".")[1]), int(name.split(".")[2])) for name in names)
        starts = [start for _, start in order]
        if [number for number, _ in order] != list(range(len(order))) or starts != sorted({*starts}):
            raise self.fail(f"the epochs of layer {index} are not numbered by position")
        if starts and starts[-1] >= self.seen:
            raise self.fail(
                f"an epoch of layer {index} starts at {starts[-1]}, but {self.seen} tokens were seen"
            )
        for name in names:
            self._expect(f"{index}.{name}", own[name], _FLOATS, (None,))
            if not 0 < 2 * len(own[name]) <= dim:
                raise self.fail(f"'{index}.{name}' has {len(own[name])} frequencies for keys of {dim}")
            self._check_finite(f"{index}.{name}", own[name], most=_LARGEST_FREQUENCY)

    def _check_heads(self, name: str, tensor: Tensor, heads: int) -> None:
        if not tensor.shape[1] or tensor.shape[1] % heads:
            raise self.fail(f"'{name}' has {tensor.shape[1]} query heads for {heads} key/value heads")

    def _check_finite(
        self, name: str, tensor: Tensor, used: Tensor | None = None, most: float = _LARGEST
    ) -> None:
        """Raise if a number is NaN, infinite or above ``most``, where ``used`` is True or not given."""
        # 1e18 is infinite in float16, so both are needed.
        fits = tensor.isfinite() & (tensor.abs().float() <= most)
        if not bool((fits if used is None else fits | ~used[..., None]).all()):
            raise self.fail(f"'{name}' holds NaN or infinite numbers, or some above {most:g}")

    def _expect(
        self, name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[Any, ...]
    ) -> None:
        """Raise if a tensor has another dtype or shape; None stands for any size, a tuple for several."""
        fits = tensor.dim() == len(shape) and all(
            wanted is None or size == wanted or (isinstance(wanted, tuple) and size in wanted)
            for size, wanted in zip(tensor.shape, shape, strict=True)
        )
        if tensor.dtype in dtypes and fits:
            return
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        found = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        raise self.fail(f"'{name}' is {found}, it must be {kinds} [{wanted}]")

    # -- values --------------------------------------------------------------------------------------------------

    def _record(self, name: str, record: Mapping[str, Any]) -> dict[str, Any]:
        value = record.get(name)
        if not isinstance(value, dict):
            raise self.fail(f"{name} is {shorten(value)}, it must be a record")
        return value

    def _list(self, name: str, record: Mapping[str, Any], count: int | None) -> list[Any]:
        value = record.get(name)
        if not isinstance(value, list) or (count is not None and len(value) != count):
            size = "" if count is None else f" of {count} entries"
            raise self.fail(f"{name} is {shorten(value)}, it must be a list{size}")
        return value

    def _integer(self, name: str, value: Any, least: int, most: int) -> int:
        if type(value) is not int or not least <= value <= most:
            raise self.fail(f"{name} is {shorten(value)}, it must be an integer from {least} to {most}")
        return value

    def _number(self, name: str, value: Any) -> None:
        if type(value) not in (int, float):
            raise self.fail(f"{name} is {shorten(value)}, it must be a number")
