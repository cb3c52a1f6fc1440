"""Atomic file writing, strict JSON, and the folder of cached files."""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any


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
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        # mkstemp makes files that only the owner can read.
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


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
