"""The file from which an interrupted calibration goes on: one line for each piece that is done."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..utils.files import write_text_atomically

FORMAT = "rankkv-unfinished-calibration"
VERSION = 1
#: What it means where the digest of one of these is another.
_DIGESTS = {"model": "a model of another shape", "weights": "other weights"}


class DoneRecords:
    """Measurements by piece, kept in a file as they are made; several processes keep one file each and read all.

    The file is JSON lines: the first says of which calibration, each other one holds a piece and is flushed to the disk
    before the next is measured. Lines are only ever added. A last line that was half written when the process or the
    machine stopped counts as not there, and its piece is measured again.

    Parameters
    ----------
    path : str or Path, optional
        Without it they live in memory only.
    identity : mapping, optional
        What all pieces depend on, JSON-ready; from `CalibrationSettings.describe`.
    rank : int, default 0
        Number of this process; 0 writes to ``path``, others to ``path`` with their number behind it.

    Raises
    ------
    InputError
        If a file is there and holds something else, or pieces of another calibration; the message says what differs.

    Examples
    --------
    >>> done = DoneRecords(None)
    >>> done.add("first piece", {"nll": 2.5})
    >>> "first piece" in done, done["first piece"]
    (True, {'nll': 2.5})
    """

    def __init__(
        self, path: str | Path | None, identity: Mapping[str, Any] | None = None, rank: int = 0
    ) -> None:
        self._own = None if path is None else _name_file(Path(path), rank)
        self._header = json.dumps({"format": FORMAT, "version": VERSION, **(identity or {})}) + "\n"
        self._is_ready = False
        self._done: dict[str, Any] = {}
        for file in [] if path is None else _list_files(Path(path)):
            self._done |= self._read(file)

    def __contains__(self, key: str) -> bool:
        return key in self._done

    def __len__(self) -> int:
        return len(self._done)

    def __getitem__(self, key: str) -> Any:
        return self._done[key]

    def add(self, key: str, record: dict[str, Any]) -> None:
        """Keep the measurements of one more piece.

        Raises
        ------
        InputError
            If the file cannot be written.
        """
        self._done[key] = record
        if self._own is None:
            return
        try:
            self._append(self._own, json.dumps({"piece": key, "measured": record}) + "\n")
        except OSError as error:
            raise InputError(
                f"cannot write {str(self._own)!r}, which keeps what is measured: {error.strerror or error}."
            ) from error

    def _append(self, path: Path, line: str) -> None:
        if not path.is_file() or not (self._is_ready or _cut_unfinished_line(path)):
            write_text_atomically(path, self._header)
        self._is_ready = True
        with path.open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())

    def _read(self, path: Path) -> dict[str, Any]:
        content = path.read_bytes()
        if self._header.encode().startswith(content):
            # Nothing is in it but its beginning, or not even all of that.
            return {}
        first, *lines = content.split(b"\n")
        self._check_header(path, first)
        done = {}
        # What stands behind the last newline is half a line, or nothing.
        for number, line in enumerate(lines[:-1], start=2):
            entry = _parse(line)
            if not isinstance(entry.get("piece"), str) or not isinstance(entry.get("measured"), dict):
                raise InputError(
                    f"line {number} of {str(path)!r} is damaged: delete that line, and its piece is measured again."
                )
            done[entry["piece"]] = entry["measured"]
        return done

    def _check_header(self, path: Path, line: bytes) -> None:
        found, wanted = _parse(line), json.loads(self._header)
        if found.get("format") != FORMAT:
            raise InputError(
                f"{str(path)!r} holds no measurements that this RankKV can go on from: delete it, or name another "
                "file."
            )
        differing = [
            _DIGESTS.get(name, f"{name} {found.get(name)!r} there, {value!r} here")
            for name, value in wanted.items()
            if found.get(name) != value
        ]
        if differing:
            raise InputError(
                f"{str(path)!r} holds pieces of another calibration ({'; '.join(differing)}): go on with its options, "
                "delete the file, or name another."
            )


def forget_done(path: str | Path) -> None:
    """Delete what `DoneRecords` kept, of all processes."""
    for file in _list_files(Path(path)):
        file.unlink(missing_ok=True)


def _cut_unfinished_line(path: Path) -> bool:
    """Cut off what stands behind the last newline, and say whether anything is left."""
    with path.open("rb+") as file:
        content = file.read()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            file.truncate(end)
    return end > 0


def _parse(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _name_file(path: Path, rank: int) -> Path:
    return path.with_name(f"{path.name}.{rank}") if rank else path


def _list_files(path: Path) -> list[Path]:
    others = path.parent.iterdir() if path.parent.is_dir() else []
    numbered = sorted(
        file
        for file in others
        if file.name.removeprefix(f"{path.name}.").isdecimal() and file.name != path.name
    )
    return [file for file in (path, *numbered) if file.is_file()]
