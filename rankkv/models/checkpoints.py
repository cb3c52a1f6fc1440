"""Checkpoint reading through transformers, with one-sentence errors."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..errors import MissingDependencyError, RankKVError, SourceUnavailableError, UnsupportedModelError
from .gguf_file import check_gguf

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def from_pretrained(
    source: str, options: dict[str, Any], gguf_file: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer from a folder or hub id.

    Parameters
    ----------
    source : str
        Folder or hub id.
    options : dict
        Options of transformers' loader.
    gguf_file : str, optional
        Name of a GGUF file in ``source``.

    Raises
    ------
    InputError
        If ``gguf_file`` is damaged.
    MissingDependencyError
        If transformers needs another package to read the checkpoint.
    SourceUnavailableError
        If a file is missing or damaged, or cannot be downloaded.
    UnsupportedModelError
        If transformers cannot build a causal language model from it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shown = source if gguf_file is None else os.path.join(source, gguf_file)
    extra: dict[str, Any] = {} if gguf_file is None else {"gguf_file": gguf_file}
    if gguf_file is not None:
        check_gguf(shown)
    try:
        model = AutoModelForCausalLM.from_pretrained(source, **options, **extra, **_plain_options(gguf_file))
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


def _plain_options(gguf_file: str | None) -> dict[str, Any]:
    """Return the options for plain weights; without them newer transformers keeps GGUF blocks as parameters."""
    if gguf_file is None:
        return {}
    try:
        from transformers import GgufConfig
    except ImportError:
        # Older transformers always unpacks the weights.
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def first_line(error: BaseException) -> str:
    """Return the first line of an error; transformers adds paragraphs of advice about the network."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def quiet_progress() -> Iterator[None]:
    """Hide the progress bars of transformers during a load that takes a second."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def get_context_length(model: Any) -> int | None:
    """Return the model's context length in tokens, or None if its configuration does not give it."""
    length = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None
