"""Result folders: one Parquet part per finished unit of work, so that a killed run resumes, and a manifest."""

from __future__ import annotations

import contextlib
import json
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .._version import __version__
from ..errors import InputError, MissingDependencyError, OutputError
from ..utils.files import dump_json, read_json, replace_atomically, shorten, write_text_atomically

MANIFEST = "manifest.json"
#: Ending of a part that cannot be read and was put aside.
DAMAGED = ".damaged"
# Most rows per byte of a file.
_INFLATED = 1000


class ResultStore:
    """Keep a folder of results: ``manifest.json`` and one Parquet part per finished unit of work.

    A unit is the work that one process does at once, such as all settings of one text.  Its part appears whole or
    not at all.  A killed run therefore resumes with no row lost and none doubled.  A part that cannot be read is
    renamed with the ending ``.damaged`` and a warning, and its unit is measured again.

    Parameters
    ----------
    folder : str or Path
        Created if it does not exist.
    config : mapping
        Everything that decides the numbers of the run, JSON-ready.

    Raises
    ------
    InputError
        If the folder holds results of another config (the message lists the differences), or a damaged manifest.
    OutputError
        If the folder cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> store = ResultStore(tempfile.mkdtemp(), {"seed": 0})
    >>> store.write("text-0", [{"loss": 1.5}])
    >>> store.is_done("text-0"), store.read()
    (True, [{'loss': 1.5}])
    """

    def __init__(self, folder: str | Path, config: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.parts = self.folder / "parts"
        try:
            self.parts.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"cannot create {str(self.parts)!r}: {error.strerror}; give a folder that you may write to."
            ) from error
        # Through JSON, so that a tuple equals the list that the manifest holds.
        self._check_manifest(json.loads(json.dumps(dict(config), sort_keys=True)))
        for part in sorted(self.parts.glob("*.parquet")):
            if not _is_readable(part):
                self._put_aside(part)

    def _check_manifest(self, config: dict[str, Any]) -> None:
        path = self.folder / MANIFEST
        if path.exists():
            found = _read_manifest(path)
            differing = sorted(key for key in {*found, *config} if found.get(key) != config.get(key))
            if differing:
                listed = "; ".join(
                    f"{key}: {shorten(found.get(key))}, now {shorten(config.get(key))}" for key in differing
                )
                raise InputError(
                    f"{self.folder} holds the results of another run ({listed}): give another folder, or the options "
                    "of that run to resume it."
                )
            if any(self.parts.glob("*.parquet")):
                return
        # No part yet: replace the manifest, because the commit or the machine may have changed since.
        write_text_atomically(path, dump_json({"config": config, "environment": describe_environment()}))

    def _path(self, unit: str) -> Path:
        if not unit or unit.startswith(".") or any(sign in unit for sign in "/\\\0"):
            raise InputError(
                f"unit {shorten(unit)} is not the name of a file in {str(self.parts)!r}: give a name without slashes "
                "that does not begin with a dot."
            )
        return self.parts / f"{unit}.parquet"

    def _put_aside(self, part: Path) -> None:
        """Rename a damaged part, so that its unit is measured again, and warn once."""
        aside = part.with_name(part.name + DAMAGED)
        # Another process of the same run may have renamed it first.
        with contextlib.suppress(FileNotFoundError):
            part.replace(aside)
            warnings.warn(
                f"{str(part)!r} cannot be read: it was renamed to {aside.name!r} and its unit will be measured again.",
                stacklevel=3,
            )

    def is_done(self, unit: str) -> bool:
        """Return True if a unit's rows are written."""
        return self._path(unit).exists()

    def write(self, unit: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write the rows of one unit of work, atomically.

        Raises
        ------
        InputError
            If the unit's name would leave the folder.
        OutputError
            If the part cannot be written.
        """
        write_rows(self._path(unit), rows)

    def read(self) -> list[dict[str, Any]]:
        """Read the rows of all finished units, sorted by unit name.

        Raises
        ------
        InputError
            If a part is damaged or holds rows of another part.
        """
        return read_rows(sorted(self.parts.glob("*.parquet")))

    def read_unit(self, unit: str) -> list[dict[str, Any]]:
        """Read the rows of one finished unit.

        Raises
        ------
        InputError
            If the unit is not finished, or its part is damaged.
        """
        return read_rows([self._path(unit)])

    def join(self, path: str | Path) -> Path:
        """Write all rows to one Parquet file and return its path."""
        return write_rows(path, self.read())


def write_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write rows to one Parquet file, atomically, and return its path.

    If a row lacks a column, its value is null.

    Raises
    ------
    OutputError
        If the file cannot be written.
    MissingDependencyError
        If pyarrow is not installed.
    """
    pyarrow, parquet = _import_pyarrow()
    path, listed = Path(path), [dict(row) for row in rows]
    columns = dict.fromkeys(key for row in listed for key in row)
    # `Table.from_pylist` would take the columns of the first row and drop all others.
    table = pyarrow.table({key: [row.get(key) for row in listed] for key in columns})
    with replace_atomically(path) as temporary:
        # Checksums let a reader notice a changed number.
        parquet.write_table(table, temporary, write_page_checksum=True)
    return path


def read_rows(paths: Iterable[str | Path]) -> list[dict[str, Any]]:
    """Read the rows of Parquet files, one dictionary per row.

    Raises
    ------
    InputError
        If a file is missing or damaged, or a row comes twice.
    MissingDependencyError
        If pyarrow is not installed.
    """
    rows: list[dict[str, Any]] = []
    first: dict[str, tuple[Path, int]] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise InputError(f"{path} does not exist: run the experiment that writes it first.")
        for number, row in enumerate(_read_table(path)):
            # Two measurements never agree in every column, their names and numbers; a copied file does.
            where = first.setdefault(json.dumps(row, sort_keys=True, default=str), (path, number))
            if where != (path, number):
                raise InputError(
                    f"row {number} of {path} is also row {where[1]} of {where[0]}, so it would count twice: remove "
                    f"{path} if it is a copy, or run the experiment again in an empty folder."
                )
            rows.append(row)
    return rows


def _read_table(path: Path) -> list[dict[str, Any]]:
    """Read one Parquet file; InputError if it is damaged."""
    _, parquet = _import_pyarrow()
    try:
        _check_size(path)
        table = parquet.read_table(path, page_checksum_verification=True)
        table.validate(full=True)
        found: list[dict[str, Any]] = table.to_pylist()
    except Exception as error:
        # pyarrow raises a dozen kinds, from OSError to UnicodeDecodeError, for a damaged file.
        reason = shorten(str(error)).strip("'\"")
        raise InputError(
            f"{path} is damaged or not Parquet ({reason}): remove it and run the same command again, which measures "
            "only these rows."
        ) from error
    return found


def _is_readable(path: Path) -> bool:
    """Return True if the footer of a Parquet file can be read."""
    _, parquet = _import_pyarrow()
    try:
        _check_size(path)
        parquet.read_metadata(path)
    except FileNotFoundError:
        return True  # Another process put it aside.
    except Exception:
        return False
    return True


def _check_size(path: Path) -> None:
    """Raise ValueError if the footer announces far more rows than fit into the file: they would be allocated."""
    _, parquet = _import_pyarrow()
    metadata = parquet.read_metadata(path)
    size = path.stat().st_size
    # No look at single columns: pyarrow ends the process where their statistics are damaged.
    if not 0 <= metadata.num_rows <= _INFLATED * size:
        raise ValueError(f"it announces {metadata.num_rows:,} rows in {size:,} bytes")


def _read_manifest(path: Path) -> dict[str, Any]:
    """Read the config of a results folder from its manifest."""
    record = read_json(path)
    found = record.get("config") if isinstance(record, dict) else None
    if not isinstance(found, dict):
        raise InputError(
            f"{str(path)!r} names no config: it is damaged; give another folder, or restore the file."
        )
    return found


def describe_origin() -> dict[str, Any]:
    """Return the command that runs now and the commit of this code, as every record names them.

    Examples
    --------
    >>> sorted(describe_origin())
    ['command', 'commit']
    """
    return {"command": _describe_command(sys.orig_argv), "commit": _find_commit()}


def describe_environment() -> dict[str, Any]:
    """Return what a reader needs to repeat a measurement: versions, machine, device, command and commit."""
    import platform

    import torch
    import transformers

    return {
        "rankkv": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": sys.version.split()[0],
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        **describe_origin(),
    }


def _describe_command(words: Sequence[str]) -> str:
    """Return a command line without the paths of this machine: programs by name, files relative to the folder."""
    folder = Path.cwd()

    def shorten_path(word: str) -> str:
        path = Path(word)
        if not path.is_absolute():
            return word
        return str(path.relative_to(folder)) if path.is_relative_to(folder) else path.name

    program, *rest = words
    # A console script is a file that Python runs; a reader types its name.
    is_script = rest[:1] and Path(rest[0]).parent.name in ("bin", "Scripts")
    first = (
        [Path(rest[0]).name]
        if is_script
        else ["python" if "python" in Path(program).name else program, *rest[:1]]
    )
    return shlex.join([*map(shorten_path, first), *map(shorten_path, rest[1:])])


def _find_commit() -> str | None:
    """Return the commit of this code, with "-dirty" if its files changed since; None outside a repository."""

    def run_git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # An installed package may lie inside another project's repository, which does not track this file.
        run_git("ls-files", "--error-unmatch", Path(__file__).name)
        return run_git("describe", "--always", "--abbrev=40", "--dirty", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def _import_pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependencyError(
            "result files are Parquet and need pyarrow: pip install 'rankkv[eval]'."
        ) from error
    return pyarrow, pyarrow.parquet
