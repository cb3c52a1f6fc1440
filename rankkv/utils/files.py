"""Atomic file writing, bounded JSON reading, and JSON that every reader takes."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import InputError, OutputError

#: Largest JSON file that is read, in bytes. Parsed JSON takes up to fifty times the file.
JSON_LIMIT = 64 * 2**20
# Characters of a value that an error shows.
_SHOWN = 80


@contextlib.contextmanager
def replace_atomically(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the target's folder; replace the target with it when the block ends.

    A symlink stays, and the file that it points to is replaced.  A new file gets the ordinary mode (umask); an
    existing one keeps its mode.  The content reaches the disk before the name does, so no crash leaves an empty file.

    Parameters
    ----------
    path : str or Path
        File to write.  Its folder is created if needed.

    Yields
    ------
    Path
        An empty temporary file for the content.

    Raises
    ------
    OutputError
        If the file cannot be written (permission, full disk, a folder of that name).  The old file is unchanged then.

    Examples
    --------
    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "note.txt"
    >>> with replace_atomically(target) as temporary:
    ...     _ = temporary.write_text("done")
    >>> target.read_text()
    'done'
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        target = Path(os.path.realpath(path)) if path.is_symlink() else path
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = _create_beside(target)
        mode = (target if target.exists() else temporary).stat().st_mode & 0o7777
        yield temporary
        _flush_to_disk(temporary)
        # Some writers, such as safetensors, put a file of their own mode in its place.
        os.chmod(temporary, mode)
        os.replace(temporary, target)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        reason = error.strerror or str(error) or type(error).__name__
        raise OutputError(
            f"cannot write {str(path)!r}: {reason}; free space there, or give a path that you may write to."
        ) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def write_text_atomically(path: str | Path, text: str) -> Path:
    """Write ``text`` to ``path`` through a temporary file in the same folder, creating the folder if needed.

    Parameters
    ----------
    path : str or Path
        File to write; an existing one is replaced in one step.
    text : str
        Its content, written as UTF-8.

    Returns
    -------
    Path
        The path written.

    Raises
    ------
    OutputError
        If the file cannot be written.
    """
    with replace_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def read_json(path: str | Path, limit: int = JSON_LIMIT) -> Any:
    """Read a JSON file of at most ``limit`` bytes.

    Parameters
    ----------
    path : str or Path
        File to read, UTF-8.
    limit : int
        Largest size in bytes.

    Raises
    ------
    InputError
        If the file is missing, larger, not UTF-8, not JSON, or nested too deeply.

    Examples
    --------
    >>> import tempfile
    >>> read_json(write_text_atomically(Path(tempfile.mkdtemp()) / "a.json", '{"seed": 0}'))
    {'seed': 0}
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > limit:
            raise InputError(
                f"{str(path)!r} has {size:,} bytes, at most {limit:,} are read: is it this file?"
            )
        return parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {str(path)!r}: {error.strerror or error}; check the path.") from error
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{str(path)!r} is damaged or not JSON ({error}): write it again.") from error


def parse_json(text: str | bytes) -> Any:
    """Parse JSON.

    Raises
    ------
    ValueError
        If it is not JSON, or nested too deeply to be read.

    Examples
    --------
    >>> parse_json("[1, 2]")
    [1, 2]
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("its lists are nested too deeply") from error


def shorten(value: object) -> str:
    """Return the repr of a value for an error message, cut to 80 characters.

    Examples
    --------
    >>> len(shorten("x" * 1000))
    80
    """
    try:
        text = repr(value)
    except RecursionError:
        return f"a deeply nested {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


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


def _create_beside(target: Path) -> Path:
    # Created like an ordinary file, so that its mode follows the umask; `tempfile` would give 0600.
    for _ in range(100):
        # A long name leaves no room for more characters.
        temporary = target.parent / f".{target.name[:80]}.{secrets.token_hex(6)}"
        try:
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except FileExistsError:
            continue
        return temporary
    raise FileExistsError(f"no free temporary name beside {target}")


def _flush_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
