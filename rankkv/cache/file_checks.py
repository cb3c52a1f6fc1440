"""Checks of a saved cache before anything is built of it: names, types, shapes, bounds and finiteness."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .layer import ROW_TENSORS, RankKVLayer

#: Most tokens that a saved cache may have seen: masks are as long as that.
MOST_TOKENS = 1 << 24
_FIELDS = "|".join((*ROW_TENSORS, r"buffer\.query", r"buffer\.query_valid", r"epoch\.\d{1,9}\.\d{1,9}"))
_NAME = re.compile(rf"(\d{{1,5}})\.({_FIELDS})")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_header(header: Any, layers: int, compressible: list[int], path: str) -> None:
    """Check the description of a saved cache against the model's layers.

    Parameters
    ----------
    header : object
        What the file says.
    layers : int
        Layers of the model's cache.
    compressible : list of int
        Model indices of the compressible layers.
    path : str
        Name of the file, for the message.

    Raises
    ------
    InputError
        With the entry that is wrong.
    """
    check = _Checker(path)
    check.that(isinstance(header.get("options"), dict), "options", "an object")
    flow = header.get("flow")
    check.that(isinstance(flow, dict), "flow", "an object")
    unknown = set(flow) - {"row_start", "compressed_at", "streaming", "holes", "position_offset"}
    check.that(not unknown, f"flow.{min(unknown, default='')}", "absent")
    rows = flow.get("row_start")
    check.that(isinstance(rows, list) and 0 < len(rows) <= 1 << 16, "flow.row_start", "a list of rows")
    for start in rows:
        check.number(start, "flow.row_start", 0, MOST_TOKENS)
    check.number(flow.get("compressed_at"), "flow.compressed_at", 0, MOST_TOKENS)
    check.that(isinstance(flow.get("streaming"), bool), "flow.streaming", "true or false")
    for name in ("holes", "position_offset"):
        values = flow.get(name)
        check.that(
            values is None or (isinstance(values, list) and len(values) in (0, 1, len(rows))),
            f"flow.{name}",
            "a list",
        )
        for value in values or []:
            check.number(value, f"flow.{name}", -MOST_TOKENS, MOST_TOKENS)
    records = header.get("layers")
    check.that(
        isinstance(records, list) and len(records) == layers,
        "layers",
        f"a list of the model's {layers} layers",
    )
    for index, record in enumerate(records):
        where = f"layers[{index}]"
        check.that(isinstance(record, dict), where, "an object")
        known = {"type", "seen", "compressed_at", "cumulative_length", "buffer_capacity"}
        check.that(set(record) <= known, where, f"an object of {sorted(known)}")
        if index in compressible:
            seen = check.number(record.get("seen"), f"{where}.seen", 0, MOST_TOKENS)
            check.number(record.get("compressed_at"), f"{where}.compressed_at", 0, seen)
        for name in ("cumulative_length", "buffer_capacity"):
            if name in record:
                check.number(record[name], f"{where}.{name}", 0, MOST_TOKENS)
    plans = header.get("plans")
    check.that(
        isinstance(plans, list) and len(plans) in (0, len(rows)), "plans", f"a list of {len(rows)} rows"
    )
    for row, plan in enumerate(plans):
        where = f"plans[{row}]"
        check.that(isinstance(plan, dict), where, "an object")
        known = {"length", "total_budget", "budgets", "layer_measures", "ranks", "notes", "head_curves"}
        check.that(set(plan) <= known, where, f"an object of {sorted(known)}")
        check.number(plan.get("length"), f"{where}.length", 1, MOST_TOKENS)
        check.number(plan.get("total_budget"), f"{where}.total_budget", 0, MOST_TOKENS * layers)
        budgets = plan.get("budgets")
        check.that(
            isinstance(budgets, list) and len(budgets) == len(compressible),
            f"{where}.budgets",
            "one per layer",
        )
        for budget in budgets:
            check.number(budget, f"{where}.budgets", 0, MOST_TOKENS * layers)
        for name in ("layer_measures", "ranks", "notes", "head_curves"):
            check.that(isinstance(plan.get(name, []), list), f"{where}.{name}", "a list")


def check_tensor_name(name: str, layers: int, path: str) -> tuple[int, str]:
    """Return the layer and the field that a tensor's name says, if both exist."""
    match = _NAME.fullmatch(name)
    if match is None or int(match[1]) >= layers:
        raise InputError(
            f"{path} holds a tensor {name!r}, which a saved cache of {layers} layers does not have."
        )
    return int(match[1]), match[2]


def check_layer(
    index: int,
    layer: Any,
    record: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    rows: int,
    dtype: torch.dtype,
    path: str,
) -> None:
    """Check the tensors of one layer against each other and against its record.

    Raises
    ------
    InputError
        With the tensor that is wrong.
    """
    check = _Checker(path)
    check.that("keys" in tensors and "values" in tensors, f"{index}.keys and {index}.values", "present")
    keys, values = tensors["keys"], tensors["values"]
    for name, tensor in tensors.items():
        where = f"{index}.{name}"
        if name in ("kept_valid", "buffer.query_valid"):
            check.that(tensor.dtype == torch.bool, where, f"bool, not {tensor.dtype}")
        elif name == "kept_positions":
            check.that(tensor.dtype == torch.int64, where, f"int64, not {tensor.dtype}")
        else:
            check.that(tensor.dtype in _FLOATS, where, f"floating-point, not {tensor.dtype}")
            check.that(bool(torch.isfinite(tensor).all()), where, "finite")
        if not name.startswith("epoch."):
            check.that(
                tensor.dim() > 1 and tensor.shape[0] == rows,
                where,
                f"of {rows} rows, not {tuple(tensor.shape)}",
            )
    for name in ("keys", "values"):
        tensor = tensors[name]
        check.that(tensor.dtype == dtype, f"{index}.{name}", f"{dtype} as the model, not {tensor.dtype}")
        check.that(tensor.dim() == 4, f"{index}.{name}", "[row, kv_head, slot, head_dim]")
    check.that(
        keys.shape[:3] == values.shape[:3], f"{index}.values", f"of the shape of keys {tuple(keys.shape)}"
    )
    if not isinstance(layer, RankKVLayer):
        return
    heads, slots = keys.shape[1], keys.shape[2]
    seen, compressed_at = record["seen"], record["compressed_at"]
    kept, valid = tensors.get("kept_positions"), tensors.get("kept_valid")
    if kept is None:
        check.that(
            slots == seen and valid is None,
            f"{index}.keys",
            f"as long as the {seen} tokens seen, not {slots}",
        )
    else:
        shape = tuple(kept.shape)
        check.that(
            kept.dim() == 3 and shape[1] in (1, heads),
            f"{index}.kept_positions",
            f"[row, kv_head, slot], not {shape}",
        )
        later = seen - compressed_at
        check.that(
            shape[2] + later == slots,
            f"{index}.keys",
            f"{shape[2]} kept and {later} later slots, not {slots}",
        )
        within = bool(((kept >= 0) & (kept < max(1, compressed_at))).all())
        check.that(within, f"{index}.kept_positions", f"from 0 to {compressed_at - 1}")
        if valid is not None:
            fits = tuple(valid.shape) in ((rows, shape[2]), (rows, heads, shape[2]))
            check.that(
                fits, f"{index}.kept_valid", f"of the shape of kept_positions, not {tuple(valid.shape)}"
            )
    scores = tensors.get("running_scores")
    if scores is not None:
        fits = scores.dim() == 3 and scores.shape[1] in (1, heads) and scores.shape[2] <= slots
        check.that(
            fits,
            f"{index}.running_scores",
            f"at most one for each of {slots} slots, not {tuple(scores.shape)}",
        )
    check.that(("buffer.query" in tensors) == ("buffer.query_valid" in tensors), f"{index}.buffer", "whole")
    if "buffer.query" in tensors:
        check.that("buffer_capacity" in record, f"layers[{index}].buffer_capacity", "present")
        query, real = tensors["buffer.query"], tensors["buffer.query_valid"]
        fits = query.dim() == 4 and tuple(real.shape) == (rows, query.shape[2])
        check.that(fits, f"{index}.buffer.query", f"[row, head, query, head_dim], not {tuple(query.shape)}")


class _Checker:
    """Raises an InputError that names the file and the entry."""

    def __init__(self, path: str) -> None:
        self._path = path

    def that(self, holds: bool, entry: str, wanted: str) -> None:
        """Raise if a condition on an entry does not hold."""
        if not holds:
            raise InputError(
                f"{self._path} is not a cache that save() wrote: {entry} must be {wanted}; save it again."
            )

    def number(self, value: Any, entry: str, low: int, high: int) -> int:
        """Return an integer inside its bounds."""
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        self.that(
            is_integer and low <= value <= high,
            entry,
            f"an integer from {low} to {high}, not {str(value)[:40]}",
        )
        return int(value)
