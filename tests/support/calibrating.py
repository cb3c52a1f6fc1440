"""A tiny random model in a folder, with a tokenizer, and a text whose words it knows: what a calibration needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

#: Sizes of a piece of text.
CONTEXT_TOKENS, CONTINUATION_TOKENS = 96, 32
PIECES = 5
OPTIONS = [
    "--context-tokens",
    str(CONTEXT_TOKENS),
    "--continuation-tokens",
    str(CONTINUATION_TOKENS),
    "--max-texts",
    str(PIECES),
]


def write_model_and_text(folder: Path, model: Any, pieces: int = PIECES) -> tuple[Path, Path]:
    """Write a model of the vocabulary 128 with a tokenizer of words, and a text of so many pieces; return the paths."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(128)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / "model")
    model.save_pretrained(folder / "model")
    count = pieces * (CONTEXT_TOKENS + CONTINUATION_TOKENS)
    text = " ".join(f"w{(place * place + place // 7) % 125 + 3}" for place in range(count))
    (folder / "text.txt").write_text(text)
    return folder / "model", folder / "text.txt"
