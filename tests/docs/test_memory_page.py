"""The arithmetic of docs/memory.md, against transformers' own configuration and model classes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "memory.md"
SHAPES = {
    "Llama-2-7B": {
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "vocab_size": 32000,
    },
    "Llama-3.1-8B": {
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "vocab_size": 128256,
    },
    "Llama-3.1-70B": {
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "vocab_size": 128256,
    },
    "Llama-3.1-405B": {
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
        "num_key_value_heads": 8,
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "vocab_size": 128256,
    },
}


def read_rows() -> dict[str, list[str]]:
    rows = re.findall(r"^\| (Llama-\S+) \| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return {name: cells.split(" | ") for name, cells in rows}


def test_every_model_has_a_row() -> None:
    assert list(read_rows()) == list(SHAPES)


@pytest.mark.parametrize("name", SHAPES)
def test_numbers_are_those_of_the_classes(name: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SHAPES[name], tie_word_embeddings=False)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    attention = [layer.self_attn for layer in model.model.layers]
    # What the projections of all layers give for one token.
    numbers = sum(module.k_proj.out_features + module.v_proj.out_features for module in attention)
    token_bytes = numbers * torch.bfloat16.itemsize
    weights = sum(parameter.numel() * parameter.itemsize for parameter in model.parameters())
    expected = [str(len(attention)), str(config.num_key_value_heads), f"{weights / 2**30:.1f}"]
    expected.append(f"{token_bytes:,}")
    expected += [f"{share * 131_072 * token_bytes / 2**30:.1f}" for share in (1.0, 0.3, 0.1)]
    assert read_rows()[name] == expected


def test_an_8b_model_at_each_length() -> None:
    page = PAGE.read_text(encoding="utf-8")
    token_bytes = int(read_rows()["Llama-3.1-8B"][3].replace(",", ""))
    assert f"{token_bytes:,} bytes per token" in page
    rows = re.findall(r"^\| \d+k \(([\d,]+)\) \| (.*) \|$", page, re.MULTILINE)
    assert [tokens for tokens, _ in rows] == ["8,192", "32,768", "131,072"]
    for tokens, cells in rows:
        full = int(tokens.replace(",", "")) * token_bytes / 2**30
        assert cells.split(" | ") == [f"{share * full:.1f}" for share in (1.0, 0.3, 0.1)]
    batch = 16 * 32_768 * token_bytes / 2**30
    assert f"16 sequences of 32k take {batch:.1f} GiB in full and\n  {0.3 * batch:.1f} GiB at 30 %" in page
