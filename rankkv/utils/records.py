"""Records of data files: JSON Lines, JSON, CSV, Parquet and plain text, also with gzip, one file or a folder."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

from ..errors import InputError, MissingDependencyError, SourceUnavailableError
from .files import shorten

#: Most bytes of a file that is read as a whole, unpacked.
WHOLE_LIMIT = 2 * 2**30
#: Most bytes of one line of JSON Lines.
LINE_LIMIT = 256 * 2**20
# Fields whose list belongs to a single entry.
_LISTS_OF_ONE_ENTRY = {"messages", "multi_turns"}


@dataclass(frozen=True)
class Record:
    """Hold one entry of a data file.

    Attributes
    ----------
    where : str
        Place of the entry for messages, such as ``"line 3 of 'a.jsonl'"``.
    fields : dict
        Its fields by name.
    """

    where: str
    fields: dict[str, Any]


def list_data_files(path: str | Path) -> list[Path]:
    """List the data files of a folder in the order of their names, or the file itself.

    Raises
    ------
    SourceUnavailableError
        If the path does not exist.
    InputError
        If the ending is unknown, or the folder has no data file.

    Examples
    --------
    >>> list_data_files("nowhere.jsonl")
    Traceback (most recent call last):
    rankkv.errors.SourceUnavailableError: there is no file or folder 'nowhere.jsonl': check the path.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        found = sorted(item for item in path.rglob("*") if item.is_file() and _find_ending(item) in _READERS)
        if not found:
            raise InputError(
                f"the folder {str(path)!r} has no data file: give one with {_list_endings()} files."
            )
        return found
    if not path.exists():
        raise SourceUnavailableError(f"there is no file or folder {str(path)!r}: check the path.")
    if _find_ending(path) not in _READERS:
        raise InputError(f"{str(path)!r} has an unknown ending: give a {_list_endings()} file, or a folder.")
    return [path]


def read_records(path: str | Path, limit: int | None = None) -> Iterator[Record]:
    """Read the records of one file.

    A text file is one record with the field ``text``.  A JSON file holds a list of objects, one object, or one object
    of lists (columns).

    Parameters
    ----------
    path : str or Path
        File that ends in ``.jsonl``, ``.json``, ``.csv``, ``.tsv``, ``.parquet`` or ``.txt``, or one of
        these with ``.gz``.
    limit : int, optional
        Read at most this many records, the first ones.

    Yields
    ------
    Record
        In the order of the file.

    Raises
    ------
    InputError
        If the file cannot be read, is damaged or not UTF-8.  The message names the line.
    MissingDependencyError
        If a Parquet file needs pyarrow.
    """
    path = Path(path).expanduser()
    return islice(_READERS[_find_ending(path)](path), limit)


def _find_ending(path: Path) -> str:
    """Return the ending that says the format, in lower case, without ``.gz``."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def _list_endings() -> str:
    return f"{', '.join(_READERS)} (also with .gz)"


def _open(path: Path) -> IO[bytes]:
    """Open a file for reading, unpacked if it ends in ``.gz``."""
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    return path.open("rb")


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where} is not UTF-8 (byte {error.start}: {error.reason}); convert it to UTF-8."
        ) from error


def _guard(reader: Callable[[Path], Iterator[Record]]) -> Callable[[Path], Iterator[Record]]:
    """Turn the errors of reading into errors of one sentence."""

    def read(path: Path) -> Iterator[Record]:
        try:
            yield from reader(path)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(f"{str(path)!r} is a damaged gzip file ({error}): copy it again.") from error
        except OSError as error:
            raise InputError(
                f"cannot read {str(path)!r}: {error.strerror or error}; give a readable file."
            ) from error

    return read


def _read_whole(path: Path) -> str:
    with _open(path) as file:
        content = file.read(WHOLE_LIMIT + 1)
    if len(content) > WHOLE_LIMIT:
        raise InputError(
            f"{str(path)!r} has more than {WHOLE_LIMIT:,} bytes: write it as JSON Lines, which is read line by line."
        )
    return _decode(content, repr(str(path)))


@_guard
def _read_txt(path: Path) -> Iterator[Record]:
    text = _read_whole(path)
    if text.strip():
        yield Record(repr(str(path)), {"text": text})


@_guard
def _read_jsonl(path: Path) -> Iterator[Record]:
    with _open(path) as file:
        number = 0
        # Read up to a bound: iterating over the lines would read a file without line ends as a whole.
        while line := file.readline(LINE_LIMIT + 1):
            number += 1
            where = f"line {number} of {str(path)!r}"
            if len(line) > LINE_LIMIT:
                raise InputError(f"{where} has more than {LINE_LIMIT:,} bytes: split it.")
            text = _decode(line, where)
            if text.strip():
                yield Record(where, _check_object(_parse(text, where), where))


@_guard
def _read_json(path: Path) -> Iterator[Record]:
    found = _parse(_read_whole(path), repr(str(path)))
    if isinstance(found, dict):
        found = _find_entries(found)
    if not isinstance(found, list):
        raise InputError(f"{str(path)!r} is not a list of objects: give JSON of the form [{{...}}, {{...}}].")
    for number, item in enumerate(found, start=1):
        where = f"entry {number} of {str(path)!r}"
        yield Record(where, _check_object({"text": item} if isinstance(item, str) else item, where))


def _find_entries(found: dict[str, Any]) -> list[Any]:
    """Return the entries of a JSON object: under one name, as columns, or the object itself."""
    lists = {name: values for name, values in found.items() if isinstance(values, list)}
    if len(lists) != len(found) or not lists or set(lists) & _LISTS_OF_ONE_ENTRY:
        return [found]
    (first, *others) = lists.values()
    if not others and all(isinstance(item, dict) for item in first):
        return first
    if any(len(values) != len(first) for values in others):
        return [found]
    return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "its lists are nested too deeply" if isinstance(error, RecursionError) else error
        raise InputError(f"{where} is not JSON: {reason}.") from error


def _check_object(item: Any, where: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise InputError(f"{where} is not an object with named fields, but {shorten(item)}.")
    return item


@_guard
def _read_csv(path: Path) -> Iterator[Record]:
    # The module's own bound, 131,072 characters, is below a long context.
    csv.field_size_limit(LINE_LIMIT)
    # As a whole, because a field may hold line ends.
    with io.StringIO(_read_whole(path), newline="") as file:
        rows = csv.DictReader(file, delimiter="\t" if _find_ending(path) == ".tsv" else ",")
        try:
            for number, row in enumerate(rows, start=1):
                where = f"row {number} of {str(path)!r}"
                if None in row or None in row.values():
                    raise InputError(
                        f"{where} has another number of fields than the header, {len(rows.fieldnames or [])}."
                    )
                yield Record(where, {name: _read_list(value) for name, value in row.items()})
        except csv.Error as error:
            raise InputError(f"{str(path)!r} is damaged or not CSV: {error}.") from error


def _read_list(value: str) -> Any:
    """Return the list that a CSV field holds as JSON; any other field as it is."""
    if value.startswith("[") and value.endswith("]"):
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            return value
        return found if isinstance(found, list) else value
    return value


@_guard
def _read_parquet(path: Path) -> Iterator[Record]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise MissingDependencyError(
            "reading a Parquet file needs the package 'pyarrow'; install it with: pip install \"rankkv[eval]\""
        ) from error
    packed = path.suffix.lower() == ".gz"
    try:
        with _open(path) as file:
            source = io.BytesIO(file.read(WHOLE_LIMIT)) if packed else file
            number = 0
            for batch in parquet.ParquetFile(source).iter_batches(batch_size=16):
                for row in batch.to_pylist():
                    number += 1
                    yield Record(f"row {number} of {str(path)!r}", row)
    except ArrowException as error:
        raise InputError(f"{str(path)!r} is damaged or not Parquet ({shorten(str(error))}).") from error


_READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}
