"""Read a checkpoint with transformers and say in one sentence why it cannot be read, where it cannot."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rankkv.errors import MissingDependencyError, RankKVError, SourceUnavailableError, UnsupportedModelError
from rankkv.models.gguf_file import check_gguf

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def from_pretrained(
    source: str, options: dict[str, Any], gguf_file: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load model and tokenizer from a folder or hub id; ``options`` are those of transformers' loader.

    Raises
    ------
    InputError
        If ``gguf_file`` is damaged.
    MissingDependencyError
        If another package is needed.
    SourceUnavailableError
        If the files cannot be read.
    UnsupportedModelError
        If transformers builds no causal language model from them.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shown = source if gguf_file is None else os.path.join(source, gguf_file)
    extra: dict[str, Any] = {} if gguf_file is None else {"gguf_file": gguf_file}
    if gguf_file is not None:
        check_gguf(shown)
    try:
        model = AutoModelForCausalLM.from_pretrained(source, **options, **extra, **_dequantized(gguf_file))
        keep = {key: value for key, value in options.items() if key not in ("dtype", "device_map")}
        tokenizer = AutoTokenizer.from_pretrained(source, **keep, **extra)
    except ImportError as error:
        raise MissingDependencyError(
            f"loading {shown!r} needs another package: {first_line(error)}"
        ) from error
    except Exception as error:
        translated = _translate(error, shown, gguf_file)
        if translated is None:
            raise
        raise translated from error
    return model.eval(), tokenizer


def _translate(error: Exception, shown: str, gguf_file: str | None) -> RankKVError | None:
    """Return the error of RankKV for one of transformers; None for a kind that it has no word for."""
    from safetensors import SafetensorError

    if gguf_file is not None:
        # transformers blames a configuration file, or raises whatever the values of the file lead to.
        return UnsupportedModelError(
            f"transformers builds no causal language model from the GGUF file {shown!r}: {first_line(error)}; its "
            "architecture is not supported, or its content is damaged"
        )
    if isinstance(error, OSError | SafetensorError):
        return SourceUnavailableError(f"the model {shown!r} cannot be loaded: {first_line(error)}")
    if isinstance(error, ValueError | KeyError | NotImplementedError):
        return UnsupportedModelError(
            f"transformers builds no causal language model from {shown!r}: {first_line(error)}"
        )
    return None


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
