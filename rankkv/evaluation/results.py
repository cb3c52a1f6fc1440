"""Rows of measurements that outlive a kill: one part file a unit of work, a manifest that says what they are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .._version import __version__
from ..errors import InputError, MissingDependencyError
from ..utils.files import dump_json, write_text_atomically

MANIFEST = "manifest.json"


class ResultStore:
    """A folder of results: ``manifest.json`` and one Parquet part for each finished unit of work.

    A unit is what one process computes in one go, such as all settings of one text.  Its part appears whole or not at
    all, so a run that was killed goes on where it stood, with nothing lost or doubled.

    Parameters
    ----------
    folder : str or Path
        Made if it is not there.
    config : mapping
        What the run is: everything that decides its numbers, JSON-ready.

    Raises
    ------
    InputError
        If the folder holds the results of another config; the message says what differs.

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
        self.parts.mkdir(parents=True, exist_ok=True)
        self._check_manifest(json.loads(json.dumps(dict(config), sort_keys=True)))

    def _check_manifest(self, config: dict[str, Any]) -> None:
        path = self.folder / MANIFEST
        if path.exists():
            found = json.loads(path.read_text())["config"]
            differing = sorted(key for key in {*found, *config} if found.get(key) != config.get(key))
            if differing:
                listed = "; ".join(f"{key}: {found.get(key)!r}, now {config.get(key)!r}" for key in differing)
                raise InputError(
                    f"{self.folder} holds the results of another run ({listed}): give another folder, or the same "
                    "options to resume it."
                )
            if any(self.parts.glob("*.parquet")):
                return
        # Of a run that begins anew, what another commit or machine wrote there is no longer true.
        write_text_atomically(path, dump_json({"config": config, "environment": describe_environment()}))

    def _path(self, unit: str) -> Path:
        return self.parts / f"{unit}.parquet"

    def is_done(self, unit: str) -> bool:
        """Tell whether a unit's rows are there."""
        return self._path(unit).exists()

    def write(self, unit: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write the rows of one unit of work, all at once."""
        write_rows(self._path(unit), rows)

    def read(self) -> list[dict[str, Any]]:
        """Read the rows of all finished units, in the order of their names."""
        return read_rows(sorted(self.parts.glob("*.parquet")))

    def read_unit(self, unit: str) -> list[dict[str, Any]]:
        """Read the rows of one finished unit.

        Raises
        ------
        InputError
            If it is not finished.
        """
        return read_rows([self._path(unit)])

    def join(self, path: str | Path) -> Path:
        """Write all rows to one Parquet file and return its path."""
        return write_rows(path, self.read())


def write_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write rows to one Parquet file, which appears whole or not at all, and return its path.

    A column that some rows lack is null there.
    """
    pyarrow, parquet = _import_pyarrow()
    path, listed = Path(path), [dict(row) for row in rows]
    columns = dict.fromkeys(key for row in listed for key in row)
    # Left to itself, pyarrow takes the columns of the first row and drops what other rows have besides.
    table = pyarrow.table({key: [row.get(key) for row in listed] for key in columns})
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        os.close(handle)
        parquet.write_table(table, temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def read_rows(paths: Iterable[str | Path]) -> list[dict[str, Any]]:
    """Read the rows of Parquet files, one dictionary a row.

    Raises
    ------
    InputError
        If a file is missing.
    """
    _, parquet = _import_pyarrow()
    rows: list[dict[str, Any]] = []
    for path in paths:
        if not Path(path).exists():
            raise InputError(f"{path} does not exist: run the experiment first.")
        rows.extend(parquet.read_table(path).to_pylist())
    return rows


def describe_environment() -> dict[str, Any]:
    """Return what a reader needs to repeat a measurement: versions, device, threads, commit."""
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
        "commit": _find_commit(),
    }


def _find_commit() -> str | None:
    """Return the commit that this code is, with "-dirty" after it if files of it were changed since."""

    def ask(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # An installed package may lie inside a repository that is not its own.
        ask("ls-files", "--error-unmatch", Path(__file__).name)
        return ask("describe", "--always", "--abbrev=40", "--dirty", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def _import_pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependencyError(
            "results are written as Parquet, which needs pyarrow: pip install 'rankkv[eval]'."
        ) from error
    return pyarrow, pyarrow.parquet
