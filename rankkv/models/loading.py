"""Loading a model and its tokenizer: from the hub, a folder, a GGUF file, or the embedded model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, InputError, SourceUnavailableError
from ..utils.hub import check_model_name, is_hub_reachable, looks_like_path, require
from .checkpoints import from_pretrained, quiet_progress
from .converted import load_converted
from .embedded import EMBEDDED, load_embedded

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_model(
    name: str | os.PathLike[str] = EMBEDDED,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model in evaluation mode, and its tokenizer.

    The embedded model is SmolLM2-135M-Instruct (30 layers, 9 query heads on 3 kv heads, 8,192 positions) in
    4-bit weights. The first load of a GGUF file, and of the embedded model, converts the weights to float32. The
    result (4 bytes per weight, 540 MB for the embedded model) stays in ``$RANKKV_CACHE``, else
    ``$XDG_CACHE_HOME/rankkv``, else ``~/.cache/rankkv``. Later loads take seconds. Code in a model's repository
    is never run.

    Parameters
    ----------
    name : str or path, default="embedded"
        "embedded", a local folder, the path of a GGUF file, or a hub id. A name is a path if it starts with
        ``.``, ``/`` or ``~``, ends in ``.gguf`` or exists on disk.
    dtype : torch.dtype or str, optional
        Type of the weights, such as ``torch.bfloat16`` or "bfloat16". By default float32 for the embedded
        model, and the checkpoint's own type otherwise.
    device_map : str, dict or torch.device, optional
        Passed on to transformers. By default the model stays on the CPU.

    Returns
    -------
    model : PreTrainedModel
    tokenizer : PreTrainedTokenizerBase

    Raises
    ------
    ConfigError
        If ``dtype`` is not a floating-point type of torch, or ``device_map`` names a device that is not there.
    InputError
        If ``name`` can be neither a path nor a hub id, or a file is not GGUF.
    MissingDependencyError
        If a needed package is not installed; the message gives the command that installs it.
    SourceUnavailableError
        If a path does not exist, or the hub cannot be reached and its local cache lacks the model.
    UnsupportedModelError
        If transformers cannot build a causal language model from the checkpoint.

    Examples
    --------
    >>> model, tokenizer = load_model("embedded")  # doctest: +SKIP
    >>> model.config.num_hidden_layers  # doctest: +SKIP
    30
    """
    options: dict[str, Any] = {"dtype": _resolve_dtype(dtype), "trust_remote_code": False}
    if device_map is not None:
        require("accelerate", "pip install accelerate", "device_map")
        _check_device(device_map)
        options["device_map"] = device_map

    text = os.fspath(name)
    if text == EMBEDDED:
        if dtype is None:
            options["dtype"] = _resolve_dtype("float32")
        return load_embedded(options)
    check_model_name(text)
    if isinstance(name, os.PathLike) or looks_like_path(text):
        return _load_path(Path(text).expanduser(), options)
    return _load_hub(text, options)


def _check_device(device_map: Any) -> None:
    """Raise, before weights are converted or downloaded, if a device is asked for that this machine lacks."""
    import torch

    kind = str(device_map).partition(":")[0]
    backend = {"cuda": torch.cuda, "mps": torch.backends.mps}.get(kind)
    if backend is not None and not backend.is_available():
        raise ConfigError(
            f"device_map={str(device_map)!r} needs a device that torch {torch.__version__} does not find here: use "
            "'cpu' or None, or install a build of torch for your device."
        )


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


def _load_path(path: Path, options: dict[str, Any]) -> tuple[Any, Any]:
    if not path.exists():
        raise SourceUnavailableError(
            f"no model at {str(path)!r}: there is no such file or folder; check the path."
        )
    if path.is_file():
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise InputError(f"{str(path)!r} is not a GGUF file; give the model's folder or a GGUF file.")
        model, tokenizer = load_converted(path, options)
        # The path that was given, not the one of the converted copy.
        model.name_or_path = model.config._name_or_path = tokenizer.name_or_path = str(path)
        return model, tokenizer
    if not (path / "config.json").is_file():
        raise SourceUnavailableError(
            f"the folder {str(path)!r} has no config.json; give a folder that save_pretrained() wrote."
        )
    with quiet_progress():
        return from_pretrained(str(path), options | {"local_files_only": True})


def _load_hub(name: str, options: dict[str, Any]) -> tuple[Any, Any]:
    if is_hub_reachable(name, "model"):
        return from_pretrained(name, options)

    from huggingface_hub import try_to_load_from_cache

    if not isinstance(try_to_load_from_cache(name, "config.json"), str):
        raise SourceUnavailableError(
            f"the hub cannot be reached to load {name!r} and its local cache lacks it; "
            "use the model 'embedded', which needs no network."
        )
    return from_pretrained(name, options | {"local_files_only": True})
