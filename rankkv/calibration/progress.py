"""DoneRecords: the progress file of a calibration, with one line per measured text chunk."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..utils.files import parse_json, shorten, write_text_atomically

FORMAT = "rankkv-unfinished-calibration"
VERSION = 1
# Digests are meaningless to a reader, so a difference in one of these is put into words.
_DIGESTS = {"model": "a model of another shape", "weights": "other weights"}


class DoneRecords:
    """Measurements by text chunk, appended to a file as soon as they are made.

    The file is JSON lines. The first line identifies the calibration. Each other line holds one text chunk and is
    flushed to the disk before the next chunk is measured. Lines are only ever added. An unfinished last line, left by a
    crash, is ignored and its text chunk is measured again. Each process writes a file of its own and reads all.

    Parameters
    ----------
    path : str or Path, optional
        Without it the measurements are kept in memory only.
    identity : mapping, optional
        Everything that all measurements depend on, JSON-ready; from `CalibrationSettings.describe`.
    rank : int, default 0
        Number of this process. Process 0 writes to ``path``, others to ``path`` with their number appended.

    Raises
    ------
    InputError
        If an existing file holds something else, or another calibration; the message names the differences.

    Examples
    --------
    >>> done = DoneRecords(None)
    >>> done.add("first chunk", {"nll": 2.5})
    >>> "first chunk" in done, done["first chunk"]
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
        """Add the measurements of one text chunk.

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
                f"cannot write the measurements to {str(self._own)!r} ({error.strerror or error}): name another file."
            ) from error

    def _append(self, path: Path, line: str) -> None:
        # A run that was stopped may have left half a line; cut it off before the first line of this run.
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
            # The file holds at most its first line, or the beginning of it.
            return {}
        first, *lines = content.split(b"\n")
        self._check_header(path, first)
        done = {}
        # After the last newline comes an unfinished line, or nothing.
        for number, line in enumerate(lines[:-1], start=2):
            entry = _parse(line)
            if not isinstance(entry.get("piece"), str) or not isinstance(entry.get("measured"), dict):
                raise InputError(
                    f"line {number} of {str(path)!r} is damaged: delete that line to measure its text chunk again."
                )
            done[entry["piece"]] = entry["measured"]
        return done

    def _check_header(self, path: Path, line: bytes) -> None:
        found, wanted = _parse(line), json.loads(self._header)
        if found.get("format") != FORMAT:
            raise InputError(
                f"{str(path)!r} holds no measurements that this RankKV can resume: delete it, or name another file."
            )
        differing = [
            _DIGESTS.get(name, f"{name}: file {shorten(found.get(name))}, now {shorten(value)}")
            for name, value in wanted.items()
            if found.get(name) != value
        ]
        if differing:
            raise InputError(
                f"{str(path)!r} holds measurements of another calibration ({'; '.join(differing)}): use its options, "
                "delete the file, or name another."
            )


def forget_done(path: str | Path) -> None:
    """Delete the files that `DoneRecords` wrote, those of all processes."""
    for file in _list_files(Path(path)):
        file.unlink(missing_ok=True)


def _cut_unfinished_line(path: Path) -> bool:
    """Cut off an unfinished last line and return whether any line is left."""
    with path.open("rb+") as file:
        content = file.read()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            file.truncate(end)
    return end > 0


def _parse(line: bytes) -> dict[str, Any]:
    """Parse one line; empty if it is not a JSON object."""
    try:
        found = parse_json(line)
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
