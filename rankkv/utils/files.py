"""Atomic file writing, strict JSON, and the folder of cached files."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import SourceUnavailableError


def write_text_atomically(path: str | Path, text: str) -> Path:
    """Write ``text`` to ``path`` in one step, so that no reader sees half a file.

    The text goes to a temporary file in the same folder first. The folder is created if needed.

    Parameters
    ----------
    path : str or Path
        File to write; an existing one is replaced.
    text : str
        Content, written as UTF-8.

    Returns
    -------
    Path
        The written path.
    """
    return write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Let ``write`` fill a temporary file in the same folder, then put it in the place of ``path``.

    A symbolic link is followed, and the file gets the mode that an ordinary new file has.

    Parameters
    ----------
    path : str or Path
        File to write; an existing one is replaced.
    write : callable
        Called with the path of the temporary file.

    Raises
    ------
    SourceUnavailableError
        If the place cannot be written to: a full disk, no permission, a folder.
    """
    path = Path(path)
    target = path.resolve() if path.is_symlink() else path
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        os.close(handle)
        temporary = Path(name)
        try:
            write(temporary)
            # mkstemp makes files that only the owner can read.
            os.chmod(temporary, 0o666 & ~_read_umask())
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise SourceUnavailableError(
            f"cannot write {str(path)!r}: {error.strerror or error}; check the path, permissions and free space."
        ) from error
    return path


def _read_umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def make_json_ready(value: Any) -> Any:
    """Return a copy of a record with null for NaN and infinities, which JSON cannot write."""
    if isinstance(value, dict):
        return {str(key): make_json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [make_json_ready(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def dump_json(record: dict[str, Any]) -> str:
    """Return a record as indented JSON with a final newline."""
    return json.dumps(make_json_ready(record), indent=2, allow_nan=False) + "\n"


def find_cache_folder() -> Path:
    """Return the folder for files kept between runs: ``$RANKKV_CACHE``, else the user's cache folder."""
    if os.environ.get("RANKKV_CACHE"):
        return Path(os.environ["RANKKV_CACHE"]).expanduser()
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else Path("~/.cache").expanduser()) / "rankkv"
