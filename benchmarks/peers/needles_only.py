"""Answers of kvpress' and RankKV's pipelines where the context is nothing but needles, as in RULER's niah_multikey_2.

Runs where kvpress is installed:

python -m benchmarks.peers.needles_only --contexts 4

Each line of a context gives one name a number, and four of the names are asked for after the compression.  An answer is
right if it holds the number.  Three ways answer: kvpress' pipeline without a press and with KVzipPress, and RankKV's
pipeline with selector `kvzip`.
"""

from __future__ import annotations

import argparse
import random
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kvpress
from kvpress.presses import kvzip_press
from transformers import pipeline

from benchmarks.common import print_rows, publish
from rankkv import load_model
from rankkv.integrations.pipeline import register

ASKED = 4
COLOURS = ("amber", "blue", "crimson", "green", "grey", "ivory", "purple", "red")
ANIMALS = ("badger", "crane", "eagle", "horse", "lion", "otter", "tiger", "whale")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--contexts", type=int, default=4)
    parser.add_argument("--needles", type=int, default=32, help="lines of a context, 64 at most")
    parser.add_argument("--kept", type=float, default=0.5, help="fraction of the cache kept")
    parser.add_argument("--output", default="results/peers.json")
    options = parser.parse_args()
    register()
    model, tokenizer = load_model(options.model)
    given = {"model": model, "tokenizer": tokenizer, "device": "cpu"}
    theirs, ours = (
        pipeline(task, **given) for task in ("kv-press-text-generation", "rankkv-text-generation")
    )
    kvzip_press.AutoTokenizer = SimpleNamespace(from_pretrained=lambda name: tokenizer)
    press = kvpress.KVzipPress(1.0 - options.kept)
    ways: dict[str, Any] = {
        "kvpress, no press": lambda text, **asked: theirs(text, **asked),
        "kvpress, KVzipPress": lambda text, **asked: theirs(text, press=press, **asked),
        "RankKV, kvzip": lambda text, **asked: ours(
            text, selector="kvzip", compression_ratio=options.kept, **asked
        ),
    }
    right = {way: [0, 0] for way in ways}
    for seed in range(options.contexts):
        text, questions, numbers = make_context(options.needles, seed)
        for way, ask in ways.items():
            answers = ask(text, questions=questions, max_new_tokens=24)["answers"]
            found = [number in answer for number, answer in zip(numbers, answers, strict=True)]
            right[way] = [right[way][0] + sum(found), right[way][1] + len(found)]
            print(seed, way, sum(found), answers, flush=True)
    rows = [
        {
            "way": way,
            "model": Path(options.model).name,
            "kept": 1.0 if "no press" in way else options.kept,
            "needles": options.needles,
            "right": found,
            "asked": asked,
            "kvpress": version("kvpress"),
        }
        for way, (found, asked) in right.items()
    ]
    print_rows("needles only", rows, dict.fromkeys(("way", "kept", "right", "asked"), "{}"))
    publish(f"needles_only {Path(options.model).name}", rows, options.output)


def make_context(needles: int, seed: int) -> tuple[str, list[str], list[str]]:
    """Return the text, the questions, and the numbers that answer them."""
    draw = random.Random(seed)
    names = draw.sample([f"{colour}-{animal}" for colour in COLOURS for animal in ANIMALS], needles)
    numbers = {name: "".join(draw.choices("123456789", k=5)) for name in names}
    lines = [f"One of the special magic numbers for {name} is: {numbers[name]}." for name in names]
    asked = draw.sample(names, ASKED)
    before = "Some special magic numbers are hidden in the following text. Memorize them.\n"
    questions = [f"\nWhat is the special magic number for {name} in the text above?" for name in asked]
    return before + "\n".join(lines) + "\n", questions, [numbers[name] for name in asked]


if __name__ == "__main__":
    main()
