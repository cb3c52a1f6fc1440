"""Tables of numbers for each layer in a JSON file, such as query filters: read once, and checked whole."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from os import PathLike, fspath, stat
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..utils.files import read_json, shorten

# Largest file, in bytes: 128 layers of 128 heads of 256 numbers take 84 MB.
_SIZE_LIMIT = 256 * 2**20


def load_layer_tables(path: object, what: str, entry: str, axes: str, remedy: str) -> Mapping[int, Tensor]:
    """Load a file's table for each layer, float32; a file written again is read again.

    Parameters
    ----------
    path : str or PathLike
        The file: ``{"format": "rankkv.<entry>/1", "layers": {"0": table, ...}}``, or a record that holds this under
        ``entry``.
    what : str
        Words for the tables in messages.
    entry : str
        Name of the tables in a larger record, and in their format.
    axes : str
        Names of a table's axes, such as ``"[key_head, key_dim]"``; a digit is the size that the axis must have.
    remedy : str
        Words of what to do instead.

    Raises
    ------
    InputError
        If the path is none, the file does not exist, or it holds no such tables of finite numbers.
    """
    if not isinstance(path, str | PathLike):
        raise InputError(f"{shorten(path)} is no path of a file of {what}: {remedy}.")
    try:
        found = stat(path)
    except OSError as error:
        raise InputError(f"no {what} at {fspath(path)!r} ({error.strerror}): {remedy}.") from error
    return _read(fspath(path), what, entry, axes, remedy, found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=8)
def _read(
    path: str, what: str, entry: str, axes: str, remedy: str, changed_at: int, size: int
) -> Mapping[int, Tensor]:
    # Time and size are part of the cache's key.
    try:
        record = read_json(path, _SIZE_LIMIT)
        record = record.get(entry, record)
        if record["format"] != name_format(entry):
            raise ValueError(f"format {shorten(record['format'])}")
        return {
            _read_layer(layer): _read_table(layer, rows, axes) for layer, rows in record["layers"].items()
        }
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise InputError(
            f"{path!r} holds no {what} of format {name_format(entry)!r} ({error}): {remedy}."
        ) from error


def name_format(entry: str) -> str:
    """Return the name of the format of a file's tables.

    Examples
    --------
    >>> name_format("query_filters")
    'rankkv.query_filters/1'
    """
    return f"rankkv.{entry}/1"


def _read_layer(name: str) -> int:
    """Return the layer index that a key of the file names."""
    if not (name.isascii() and name.isdigit()) or str(int(name[:9])) != name:
        raise ValueError(f"{shorten(name)} is not the index of a layer")
    return int(name)


def _read_table(layer: str, rows: object, axes: str) -> Tensor:
    """Return the table of one layer, float32, if it has these axes and finite numbers alone."""
    wanted = [axis.strip() for axis in axes.strip("[]").split(",")]
    shape = _find_shape(rows, len(wanted))
    numbers: list[Any] = [rows]
    fits = shape is not None and all(
        size == int(axis) for size, axis in zip(shape, wanted, strict=True) if axis.isdigit()
    )
    if not fits:
        raise ValueError(f"layer {layer} has no table {axes}")
    for _ in wanted:
        numbers = [value for row in numbers for value in row]
    if not all(type(value) in (int, float) and math.isfinite(value) for value in numbers):
        raise ValueError(f"the table of layer {layer} holds something other than finite numbers")
    found = torch.tensor(rows, dtype=torch.float64).float()
    if not bool(found.isfinite().all()):
        raise ValueError(f"the table of layer {layer} holds numbers beyond float32")
    return found


def _find_shape(rows: Any, axes: int) -> tuple[int, ...] | None:
    """Return the sizes of nested lists, at least 1 each; None if they have another depth or differ."""
    if axes == 0:
        return None if isinstance(rows, list) else ()
    if not isinstance(rows, list) or not rows:
        return None
    shapes = {_find_shape(row, axes - 1) for row in rows}
    (inner, *others) = shapes
    return None if others or inner is None else (len(rows), *inner)
