"""Read a checkpoint with transformers and say in one sentence why it cannot be read, where it cannot."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rankkv.errors import MissingDependencyError, SourceUnavailableError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def from_pretrained(
    source: str, options: dict[str, Any], gguf_file: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load model and tokenizer from a folder or hub id; ``options`` are those of transformers' loader."""
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
            f"loading {shown!r} needs another package: {first_line(error)}"
        ) from error
    except (OSError, SafetensorError) as error:
        raise SourceUnavailableError(f"the model {shown!r} cannot be loaded: {first_line(error)}") from error
    except (ValueError, KeyError, NotImplementedError) as error:
        raise UnsupportedModelError(
            f"transformers builds no causal language model from {shown!r}: {first_line(error)}"
        ) from error
    return model.eval(), tokenizer


def _dequantized(gguf_file: str | None) -> dict[str, Any]:
    """Ask for plain weights where transformers could otherwise keep GGUF's blocks for parameters."""
    if gguf_file is None:
        return {}
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def first_line(error: BaseException) -> str:
    """Return the first line of an error: transformers adds paragraphs of advice about the network."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def quiet_progress() -> Iterator[None]:
    """Hide the bars of transformers for a load that takes a second."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
