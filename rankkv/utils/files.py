"""Writing files so that a reader never sees half of one, and JSON that every reader takes."""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any


def write_text_atomically(path: str | Path, text: str) -> Path:
    """Write ``text`` to ``path`` through a temporary file in the same folder, creating the folder if needed.

    Parameters
    ----------
    path : str or Path
        Where the file goes; an existing one is replaced in one step.
    text : str
        Its content, written as UTF-8.

    Returns
    -------
    Path
        The path written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def make_json_ready(value: Any) -> Any:
    """Return a record with null for numbers that JSON cannot write (NaN, infinities)."""
    if isinstance(value, dict):
        return {str(key): make_json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [make_json_ready(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def dump_json(record: dict[str, Any]) -> str:
    """Return a record as indented JSON that ends in a newline."""
    return json.dumps(make_json_ready(record), indent=2, allow_nan=False) + "\n"


def find_cache_folder() -> Path:
    """Return the folder for what is kept between runs: ``$RANKKV_CACHE``, else the user's cache folder."""
    if os.environ.get("RANKKV_CACHE"):
        return Path(os.environ["RANKKV_CACHE"]).expanduser()
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else Path("~/.cache").expanduser()) / "rankkv"
