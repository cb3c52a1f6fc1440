"""Converted GGUF files: unpacked and saved once, then loaded from the cache folder."""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import SourceUnavailableError, UnsupportedModelError
from ..utils.files import find_cache_folder
from ..utils.hub import require
from .checkpoints import first_line, from_pretrained, quiet_progress
from .gguf_file import check_gguf

EXTRA_INSTALL = 'pip install "rankkv[embedded]"'
#: Largest float32 copy that is kept, in bytes.
KEPT_LIMIT = 16 * 10**9

_MARKER = "complete.json"
# Covers words, digits, spaces, a special-looking piece and letters beyond ASCII.
_PROBE = "Hello  world, 2048 \u00fc\u4f60\u597d <|x|>\n\tdef f(x): return x"

#: Changes the tokenizer before it is saved.
Adapt = Callable[[Any, Any], Any]


def load_converted(
    gguf: Path,
    options: dict[str, Any],
    label: str | None = None,
    version: str = "",
    adapt: Adapt | None = None,
) -> tuple[Any, Any]:
    """Load a GGUF file; the first call keeps its float32 weights in the cache folder.

    Later calls read that copy, which is recognised by the file's SHA-256.  If the copy cannot be kept, each call
    converts again and warns.

    Parameters
    ----------
    gguf : Path
        The GGUF file.
    options : dict
        Options of transformers' loader.
    label : str, optional
        Name of the model in messages; by default the file's name.
    version : str
        Part of the folder's name, if the file has a version of its own.
    adapt : callable, optional
        ``adapt(tokenizer, config)`` returns the tokenizer to save.

    Raises
    ------
    InputError
        If the file is damaged.
    MissingDependencyError
        If gguf is not installed and the file is not converted yet.
    """
    label = label or gguf.name
    try:
        folder = ensure_converted(gguf, label, version, adapt)
    except CacheNotWritable as error:
        warnings.warn(
            f"the converted model {label!r} cannot be kept ({error}), so every load converts it again; "
            "set RANKKV_CACHE to a writable folder with enough space.",
            stacklevel=4,
        )
        model, tokenizer = from_pretrained(str(gguf.parent), options, gguf_file=gguf.name)
        drop_quantization_mark(model.config)
        return model, tokenizer
    return _load_folder(gguf, folder, options, (label, version, adapt))


def _load_folder(gguf: Path, folder: Path, options: dict[str, Any], how: tuple[Any, ...]) -> tuple[Any, Any]:
    """Load the converted model; convert again if its files are damaged."""
    options = options | {"local_files_only": True}
    with quiet_progress():
        try:
            return from_pretrained(str(folder), options)
        except (SourceUnavailableError, UnsupportedModelError):
            # The lengths are right and the content is wrong, as after a disk fault: convert again.
            (folder / _MARKER).unlink(missing_ok=True)
    ensure_converted(gguf, *how)
    with quiet_progress():
        return from_pretrained(str(folder), options)


def find_converted_folder(gguf: Path, version: str = "") -> Path:
    """Return the folder of the converted model: its name has version, digest and transformers version."""
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:12]
    # One transformers version may misread the tokenizer files that another one wrote.
    written_by = ".".join(importlib.metadata.version("transformers").split(".")[:2])
    parts = [gguf.stem[:100], *([version] if version else []), digest, "transformers", written_by]
    return find_cache_folder() / "-".join(parts)


class CacheNotWritable(Exception):
    """The cache folder cannot be created, written or locked, or has no room."""


def ensure_converted(gguf: Path, label: str, version: str = "", adapt: Adapt | None = None) -> Path:
    """Return the folder of the converted model, converting it first if it is not complete.

    Raises
    ------
    CacheNotWritable
        If the copy cannot be kept; the message says why.
    MissingDependencyError
        If gguf is not installed.
    """
    folder = find_converted_folder(gguf, version)
    if _is_complete(folder):
        return folder
    require("gguf", EXTRA_INSTALL, f"converting {label!r}, which is done once,")

    from filelock import FileLock
    from safetensors import SafetensorError

    size = 4 * check_gguf(gguf)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # A second process waits here and then finds the work done. A lock ends with its process.
        with FileLock(f"{folder}.lock"):
            if not _is_complete(folder):
                _check_room(size, folder.parent)
                _convert(gguf, folder, label, size, adapt)
    except SourceUnavailableError:
        raise
    except (OSError, SafetensorError) as error:
        raise CacheNotWritable(first_line(error)) from error
    return folder


def _check_room(size: int, folder: Path) -> None:
    """Raise CacheNotWritable if the copy is too large to be kept."""
    if size > KEPT_LIMIT:
        raise CacheNotWritable(
            f"its float32 weights take {format_size(size)}, and at most {format_size(KEPT_LIMIT)} are kept: save it "
            "once with save_pretrained() and load that folder"
        )
    free = shutil.disk_usage(folder).free
    # The tokenizer's files come on top of the weights.
    if free < size + 50 * 10**6:
        raise CacheNotWritable(
            f"its float32 weights take {format_size(size)}, and {str(folder)!r} has {format_size(free)} of free space"
        )


def format_size(size: int) -> str:
    """Return a number of bytes in MB or GB.

    Examples
    --------
    >>> format_size(540_000_000), format_size(1_976_000_000)
    ('540 MB', '2.0 GB')
    """
    return f"{size / 1e9:.1f} GB" if size >= 10**9 else f"{max(1, round(size / 1e6))} MB"


def _is_complete(folder: Path) -> bool:
    """Tell whether every file that the conversion listed exists and has its recorded length."""
    try:
        sizes = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
        return bool(sizes) and all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def _convert(gguf: Path, folder: Path, label: str, size: int, adapt: Adapt | None) -> None:
    """Write the converted model to a temporary folder, then rename it to ``folder``."""
    print(
        f"Converting {label} once: {format_size(size)} of float32 weights in {folder.parent} make later loads fast. "
        "RANKKV_CACHE names another folder ...",
        file=sys.stderr,
        flush=True,
    )
    # This process holds the lock, so these folders are leftovers of a process that died.
    for stale in folder.parent.glob(f".{folder.name}-*"):
        shutil.rmtree(stale, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write_plain_checkpoint(gguf, temporary, adapt)
        sizes = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
        (temporary / _MARKER).write_text(json.dumps(sizes, indent=1), encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_plain_checkpoint(gguf: Path, folder: Path, adapt: Adapt | None) -> None:
    """Write the unpacked float32 model and its tokenizer to ``folder``."""
    import torch
    from transformers import AutoModelForCausalLM

    options = {"dtype": torch.float32, "trust_remote_code": False}
    unpacked, tokenizer = from_pretrained(str(gguf.parent), options, gguf_file=gguf.name)
    # transformers refuses to save a model that was read from GGUF, even with unpacked weights.  So move the
    # weights into a new model of the same architecture.
    config = copy.deepcopy(unpacked.config)
    drop_quantization_mark(config)
    # On the meta device, so that the weights are not held twice.
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=options["dtype"])
    plain.load_state_dict(unpacked.state_dict(), strict=True, assign=True)
    plain.tie_weights()
    plain.generation_config = unpacked.generation_config
    plain.save_pretrained(folder)
    _save_tokenizer(tokenizer if adapt is None else adapt(tokenizer, config), folder)


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save a tokenizer; raise CacheNotWritable if it reads back as another one."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    expected = _describe(tokenizer)
    for attempt in range(2):
        if attempt:
            # Classes of a family may add tokens of their own when they read the files.
            names = ("bos_token", "eos_token", "pad_token", "unk_token")
            tokenizer = PreTrainedTokenizerFast(
                tokenizer_object=tokenizer.backend_tokenizer,
                chat_template=tokenizer.chat_template,
                **{name: getattr(tokenizer, name) for name in names if getattr(tokenizer, name) is not None},
            )
        tokenizer.save_pretrained(folder)
        if _describe(AutoTokenizer.from_pretrained(folder, local_files_only=True)) == expected:
            return
    raise CacheNotWritable("its tokenizer changes when it is saved and read back")


def _describe(tokenizer: Any) -> tuple[Any, ...]:
    """Return what a tokenizer makes of a probe, its template and its special tokens."""
    return (
        tokenizer(_PROBE)["input_ids"],
        tokenizer(_PROBE, add_special_tokens=False)["input_ids"],
        tokenizer.chat_template,
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )


def drop_quantization_mark(config: Any) -> None:
    """Remove the quantization config, which would mark unpacked weights as quantized."""
    if hasattr(config, "quantization_config"):
        del config.quantization_config
