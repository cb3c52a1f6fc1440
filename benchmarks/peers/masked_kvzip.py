"""kvpress' masked KVzip beside RankKV's freed one on needles among needles: kept pairs and predictions of the answer.

Run in the environment of `make parity`: python -m benchmarks.peers.masked_kvzip 3 [MODEL]
"""

from __future__ import annotations

import copy
import random
import sys
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

KEPT = (0.5, 0.25)
NEEDLES = 6


def make_prompt(tokenizer: Any, text: list[int], seed: int) -> tuple[Tensor, list[int], list[int]]:
    """Return a context of six numbers with names, the question for one of them, and its answer, as token ids."""
    draw = random.Random(seed)

    def encode(part: str) -> list[int]:
        return list(tokenizer(part, add_special_tokens=False)["input_ids"])

    colours, animals = ("red", "blue", "green", "grey"), ("lion", "horse", "eagle", "whale")
    names = [f"{draw.choice(colours)}-{draw.choice(animals)}-{i}" for i in range(NEEDLES)]
    numbers = ["".join(draw.choices("123456789", k=5)) for _ in names]
    ids: list[int] = []
    for i, (name, number) in enumerate(zip(names, numbers, strict=True)):
        ids += text[i * 90 : (i + 1) * 90]
        ids += encode(f"\nOne of the special magic numbers for {name} is: {number}.\n")
    asked = draw.randrange(NEEDLES)
    what = f"the special magic number for {names[asked]}"
    question = encode(f"\nWhat is {what}? {what.capitalize()} is:")
    return torch.tensor([ids]), question, encode(f" {numbers[asked]}")


def run_masked(model: Any, tokenizer: Any, ids: Tensor, kept: float) -> tuple[Any, Tensor]:
    """Return kvpress' full cache, whose masked pairs its attention hides, and the pairs that it keeps."""
    from kvpress.presses import kvzip_press
    from transformers import DynamicCache

    loader, cache = kvzip_press.AutoTokenizer, DynamicCache()
    kvzip_press.AutoTokenizer = SimpleNamespace(from_pretrained=lambda name: tokenizer)
    try:
        with torch.no_grad(), kvzip_press.KVzipPress(1 - kept, n_sink=4)(model):
            model.model(input_ids=ids, past_key_values=cache)
    finally:
        kvzip_press.AutoTokenizer = loader
    layers = model.model.layers
    found = torch.ones(len(layers), model.config.num_key_value_heads, ids.shape[1], dtype=torch.bool)
    for index, layer in enumerate(layers):
        _, heads, tokens = layer.self_attn.masked_key_indices
        found[index, heads, tokens] = False
    return cache, found


def list_kept(cache: Any, shape: torch.Size) -> Tensor:
    """Return the pairs that a RankKV cache holds, ``[layer, kv_head, token]`` bool."""
    found = torch.zeros(shape, dtype=torch.bool)
    for index, layer in enumerate(cache.layers):
        positions = layer.compute_positions()[0].expand(shape[1], -1)
        valid = layer.compute_slot_valid()
        for head in range(shape[1]):
            real = slice(None) if valid is None else valid[0].expand(positions.shape)[head]
            found[index, head, positions[head][real]] = True
    return found


def main(seeds: int, name: str = "embedded") -> None:
    """Print one line a prompt and kept fraction: loss of the answer with each cache, and how both differ."""
    from rankkv import compress, load_model, load_texts
    from rankkv.cache.replay import ReplayPrompt

    model, tokenizer = load_model(name)
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = None
    text = tokenizer("\n".join(load_texts("python-docs"))[20000:26000], add_special_tokens=False)["input_ids"]
    for seed in range(seeds):
        ids, question, answer = make_prompt(tokenizer, text, seed)
        tail = torch.tensor([question + answer])
        positions = torch.arange(ids.shape[1], ids.shape[1] + tail.shape[1])[None]

        def predict(
            cache: Any, tail: Tensor = tail, positions: Tensor = positions, start: int = len(question) - 1
        ) -> Tensor:
            with torch.no_grad():
                logits = model(tail, position_ids=positions, past_key_values=cache).logits
            return logits[0, start:-1].float().log_softmax(dim=-1)

        for kept in KEPT:
            cache, theirs = run_masked(model, tokenizer, ids, kept)
            masked = predict(cache)
            for layer in model.model.layers:
                layer.self_attn.masked_key_indices = None
            own = compress(
                model,
                ids,
                tokenizer=ReplayPrompt.of(tokenizer),
                selector="kvzip",
                compression_ratio=kept,
                head_floor=0.0,
            )
            ours = list_kept(own, theirs.shape)
            freed = predict(own)
            losses = [-p.gather(-1, torch.tensor(answer)[:, None]).mean().item() for p in (masked, freed)]
            divergence = float((masked.exp() * (masked - freed)).sum(dim=-1).mean())
            differ = float((ours != theirs).sum() / theirs.sum() / 2)
            print(
                f"prompt {seed}, {kept:.0%} kept: loss {losses[0]:.3f} masked, {losses[1]:.3f} freed; "
                f"KL {divergence:.4f}; {differ:.1%} of the pairs differ"
            )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3, *sys.argv[2:3])
