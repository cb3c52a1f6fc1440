"""Result folders: one Parquet part per finished unit of work, so that a killed run resumes, and a manifest."""

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
    """Keep a folder of results: ``manifest.json`` and one Parquet part per finished unit of work.

    A unit is the work that one process does at once, such as all settings of one text.  Its part appears whole or
    not at all.  A killed run therefore resumes with no row lost and none doubled.

    Parameters
    ----------
    folder : str or Path
        Created if it does not exist.
    config : mapping
        Everything that decides the numbers of the run, JSON-ready.

    Raises
    ------
    InputError
        If the folder holds results of another config; the message lists the differences.

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
        # Through JSON, so that a tuple equals the list that the manifest holds.
        self._check_manifest(json.loads(json.dumps(dict(config), sort_keys=True)))

    def _check_manifest(self, config: dict[str, Any]) -> None:
        path = self.folder / MANIFEST
        if path.exists():
            found = json.loads(path.read_text())["config"]
            differing = sorted(key for key in {*found, *config} if found.get(key) != config.get(key))
            if differing:
                listed = "; ".join(f"{key}: {found.get(key)!r}, now {config.get(key)!r}" for key in differing)
                raise InputError(
                    f"{self.folder} holds the results of another run ({listed}): give another folder, or the options "
                    "of that run to resume it."
                )
            if any(self.parts.glob("*.parquet")):
                return
        # No part yet: replace the manifest, because the commit or the machine may have changed since.
        write_text_atomically(path, dump_json({"config": config, "environment": describe_environment()}))

    def _path(self, unit: str) -> Path:
        return self.parts / f"{unit}.parquet"

    def is_done(self, unit: str) -> bool:
        """Return True if a unit's rows are written."""
        return self._path(unit).exists()

    def write(self, unit: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write the rows of one unit of work, atomically."""
        write_rows(self._path(unit), rows)

    def read(self) -> list[dict[str, Any]]:
        """Read the rows of all finished units, sorted by unit name."""
        return read_rows(sorted(self.parts.glob("*.parquet")))

    def read_unit(self, unit: str) -> list[dict[str, Any]]:
        """Read the rows of one finished unit.

        Raises
        ------
        InputError
            If the unit is not finished.
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
    MissingDependencyError
        If pyarrow is not installed.
    """
    pyarrow, parquet = _import_pyarrow()
    path, listed = Path(path), [dict(row) for row in rows]
    columns = dict.fromkeys(key for row in listed for key in row)
    # `Table.from_pylist` would take the columns of the first row and drop all others.
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
    """Read the rows of Parquet files, one dictionary per row.

    Raises
    ------
    InputError
        If a file is missing.
    MissingDependencyError
        If pyarrow is not installed.
    """
    _, parquet = _import_pyarrow()
    rows: list[dict[str, Any]] = []
    for path in paths:
        if not Path(path).exists():
            raise InputError(f"{path} does not exist: run the experiment that writes it first.")
        rows.extend(parquet.read_table(path).to_pylist())
    return rows


def describe_environment() -> dict[str, Any]:
    """Return what a reader needs to repeat a measurement: versions, machine, device and commit."""
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
