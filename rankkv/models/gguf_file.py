"""Check of a GGUF file before it is read: every count, length and offset in its header must fit the file."""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..utils.files import shorten

_VERSIONS = (2, 3)
_MOST_DIMENSIONS, _MOST_NESTING = 8, 4
# Struct codes of GGUF's scalar types.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# Fewest bytes of one metadata entry, and of one tensor's record.
_LEAST_ENTRY, _LEAST_TENSOR = 13, 24
# Sizes of a model that no tensor of the file may be smaller than.
_SIZES = ("embedding_length", "feed_forward_length", "head_count", "head_count_kv", "vocab_size")


def check_gguf(path: str | Path) -> int:
    """Check the header of a GGUF file: names, types, lengths, and the place of every tensor.

    Nothing larger than the file is allocated.

    Parameters
    ----------
    path : str or Path
        GGUF file of version 2 or 3.

    Returns
    -------
    int
        Number of weights in all tensors.

    Raises
    ------
    InputError
        If a part does not fit the file or its format; the message names it.

    References
    ----------
    GGUF specification: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    """
    path = Path(path)
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Header(data).check()
    except OSError as error:
        raise InputError(f"cannot read {str(path)!r}: {error.strerror or error}; check the path.") from error
    except (ValueError, struct.error) as error:
        raise InputError(
            f"{str(path)!r} is a damaged GGUF file ({error}): copy or download it again."
        ) from error


class _Header:
    """Reads a GGUF header from bytes; ValueError names what does not fit."""

    def __init__(self, data: Any) -> None:
        self._data, self._size, self._place, self._order = data, len(data), 0, "<"

    def check(self) -> int:
        """Check everything; return the number of weights."""
        if self._size < 24 or self._data[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF's 24 bytes")
        self._place = 4
        version = self._read("I")
        if version & 0xFFFF == 0:
            # Written on a machine of the other byte order.
            self._order, self._place = ">", 4
            version = self._read("I")
        if version not in _VERSIONS:
            raise ValueError(f"version {version}, where 2 or 3 can be read")
        tensors = self._count(self._read("Q"), _LEAST_TENSOR, "tensors")
        entries = self._count(self._read("Q"), _LEAST_ENTRY, "metadata entries")
        metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = self._read_text()
            if key in metadata:
                raise ValueError(f"the metadata has {shorten(key)} twice")
            metadata[key] = self._read_value(self._read("I"), 0)
        return self._check_tensors(tensors, metadata)

    def _check_tensors(self, count: int, metadata: dict[str, Any]) -> int:
        from gguf import GGML_QUANT_SIZES

        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment is {shorten(alignment)}, not a power of two")
        sizes = {int(kind): found for kind, found in GGML_QUANT_SIZES.items()}
        ends, names, largest, weights = [0], set(), 0, 0
        for _ in range(count):
            name = self._read_text()
            if name in names:
                raise ValueError(f"tensor {shorten(name)} comes twice")
            names.add(name)
            dimensions = self._read("I")
            if dimensions > _MOST_DIMENSIONS:
                raise ValueError(f"tensor {shorten(name)} has {dimensions} dimensions")
            shape = [self._read("Q") for _ in range(dimensions)]
            kind, offset = self._read("I"), self._read("Q")
            if kind not in sizes:
                raise ValueError(f"tensor {shorten(name)} has the unknown type {kind}")
            block, block_bytes = sizes[kind]
            elements = math.prod(shape)
            if not elements or (shape and shape[0] % block):
                raise ValueError(f"tensor {shorten(name)} has the shape {shape}, in blocks of {block}")
            if offset % alignment:
                raise ValueError(f"tensor {shorten(name)} lies at {offset}, not at a multiple of {alignment}")
            ends.append(offset + elements // block * block_bytes)
            largest, weights = max(largest, *shape, 0), weights + elements
        start = -(-self._place // alignment) * alignment
        if start + max(ends) > self._size:
            raise ValueError(f"its tensors end at byte {start + max(ends):,} of {self._size:,}")
        self._check_sizes(metadata, count, largest)
        return weights

    def _check_sizes(self, metadata: dict[str, Any], tensors: int, largest: int) -> None:
        """Check the sizes of the model, from which it would be allocated, against the tensors."""
        architecture = metadata.get("general.architecture")
        if not isinstance(architecture, str):
            raise ValueError("general.architecture is missing")
        bounds = {f"{architecture}.{name}": largest for name in _SIZES}
        bounds[f"{architecture}.block_count"] = tensors
        for key, most in bounds.items():
            value = metadata.get(key)
            if isinstance(value, int) and not 0 <= value <= most:
                raise ValueError(f"{key} is {value}, its tensors allow at most {most}")

    def _read(self, code: str) -> Any:
        length = struct.calcsize(f"={code}")
        if self._place + length > self._size:
            raise ValueError(f"it ends in its header, at byte {self._size:,}")
        (value,) = struct.unpack_from(f"{self._order}{code}", self._data, self._place)
        self._place += length
        return value

    def _count(self, number: int, least: int, what: str) -> int:
        if number * least > self._size - self._place:
            raise ValueError(f"{number:,} {what} in {self._size:,} bytes")
        return number

    def _read_text(self) -> str:
        length = self._count(self._read("Q"), 1, "characters of a name")
        text = bytes(self._data[self._place : self._place + length])
        self._place += length
        return text.decode("utf-8")

    def _skip_text(self) -> None:
        length = self._count(self._read("Q"), 1, "characters of a text")
        self._place += length

    def _read_value(self, kind: int, depth: int) -> Any:
        """Return a scalar or a text; pass over an array and return None."""
        if kind in _SCALARS:
            return self._read(_SCALARS[kind])
        if kind == _STRING:
            return self._read_text()
        if kind != _ARRAY or depth >= _MOST_NESTING:
            raise ValueError(f"a metadata entry has the unknown type {kind}")
        inner = self._read("I")
        length = self._read("Q")
        if inner in _SCALARS:
            size = struct.calcsize(f"={_SCALARS[inner]}")
            self._place += self._count(length, size, "numbers of an array") * size
            return None
        for _ in range(self._count(length, 8, "entries of an array")):
            if inner == _STRING:
                self._skip_text()
            else:
                self._read_value(inner, depth + 1)
        return None
