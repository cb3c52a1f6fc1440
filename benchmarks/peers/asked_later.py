"""Questions after the compression, by kvpress' own code and by RankKV: answers right, loss, CPU time and bytes.

Runs where kvpress is installed (`make peers`):

python -m benchmarks.peers.asked_later --contexts 8

Each context is text of the Python documentation that hides four codes.  Each method compresses it without a question,
by its own prefill, and answers four questions from copies of its cache.  Answers are scored with the right answer given
token by token: mean loss, and whether each token is the most likely one.  A method that masks instead of freeing holds
the bytes of the whole cache.  All contexts lack a chat template, so both libraries repeat the same text.
"""

from __future__ import annotations

import argparse
import copy
import random
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kvpress
import torch
from kvpress.presses import kvzip_press
from torch import Tensor
from transformers import DynamicCache

from benchmarks.common import print_rows, publish, time_both
from rankkv import compress, load_model
from rankkv.cache.replay import ReplayPrompt
from rankkv.evaluation.tasks import get_task, make_samples
from rankkv.models.compat import cache_argument
from rankkv.models.texts import python_docs_text

#: Equal layers, whose heads are equal or compete by their scores.
EQUAL: dict[str, Any] = {"strategy": "uniform", "head_budgets": None, "profile": None}
HEADS: dict[str, Any] = {"strategy": "uniform", "head_budgets": "adaptive", "profile": None}
#: kvpress' press for the share removed, and RankKV's options that stand for the same method.
PAIRS: dict[str, tuple[Callable[[float], Any], dict[str, Any]]] = {
    "KVzip": (lambda removed: kvpress.KVzipPress(removed), {"selector": "kvzip"}),
    "KVzip+": (
        lambda removed: kvpress.KVzipPress(removed, kvzip_plus_normalization=True),
        {"selector": "kvzip_plus"},
    ),
    "KVgrad": (lambda removed: kvpress.KVgradPress(removed), {"selector": "kvgrad"}),
    "Compactor": (lambda removed: kvpress.CompactorPress(removed), {"selector": "compactor", **EQUAL}),
    "ExpectedAttention": (
        lambda removed: kvpress.ExpectedAttentionPress(removed),
        {"selector": "expected_attention", **EQUAL},
    ),
    "AdaKV(SnapKV)": (
        lambda removed: kvpress.AdaKVPress(kvpress.SnapKVPress(removed)),
        {"selector": "snapkv", **HEADS},
    ),
    "CriticalAdaKV(SnapKV)": (
        lambda removed: kvpress.CriticalAdaKVPress(kvpress.SnapKVPress(removed)),
        {"selector": "criticalkv", **HEADS},
    ),
}
#: What RankKV does by default.
OWN: dict[str, dict[str, Any]] = {"Echo, the default of compress()": {}}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--contexts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=768, help="tokens of a context")
    parser.add_argument("--kept", type=float, nargs="+", default=[0.125], help="fractions of the cache kept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="embedded", help="name of the rows in the record")
    parser.add_argument("--output", default="results/peers.json")
    options = parser.parse_args()
    model, tokenizer = load_model(options.model)
    if not hasattr(model.config, "head_dim"):
        # kvpress' CriticalKV reads it, and some models leave it to its default.
        model.config.head_dim = model.config.hidden_size // model.config.num_attention_heads
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = None
    runs = build_runs(model, tokenizer, options.kept)
    found: dict[tuple[str, str, float], list[dict[str, float]]] = {}
    for number in range(options.contexts):
        sample = make_sample(tokenizer, options.tokens, options.seed + number)
        ids = torch.tensor(sample.context_ids)[None]
        for key, run in runs.items():
            found.setdefault(key, []).append(measure(model, run, ids, sample.prompts))
        # After each context, so that a run that is stopped leaves what it has.
        publish(options.name, build_rows(found, options), options.output)
    forms = ("method", "library"), ("kept", "right", "loss", "cpu_seconds", "bytes_of_full")
    columns = dict.fromkeys(forms[0], "{}") | dict.fromkeys(forms[1], "{:.3f}")
    print_rows(f"asked later, beside kvpress {version('kvpress')}", build_rows(found, options), columns)


def build_rows(
    found: dict[tuple[str, str, float], list[dict[str, float]]], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return a row for each method, library and kept fraction, with the means over the contexts."""
    return [
        {
            "method": method,
            "library": library,
            "kept": kept,
            "model": Path(options.model).name,
            "contexts": len(each),
            "tokens": options.tokens,
            "kvpress": version("kvpress"),
            "by_context": each,
            **{name: sum(one[name] for one in each) / len(each) for name in each[0]},
        }
        for (method, library, kept), each in found.items()
    ]


def make_sample(tokenizer: Any, tokens: int, seed: int) -> Any:
    """Make a context with four codes, and a question for each."""
    text = python_docs_text()
    # Ten characters a token are more than enough.
    start = random.Random(seed).randrange(len(text) - 10 * tokens)
    (sample,) = make_samples(
        get_task("multi_question"),
        tokenizer,
        text[start : start + 10 * tokens],
        lengths=[tokens],
        count=1,
        seed=seed,
    )
    return sample


def build_runs(
    model: Any, tokenizer: Any, fractions: list[float]
) -> dict[tuple[str, str, float], Callable[[Tensor], Any]]:
    """Return a function from ids to a compressed cache, by method, library and kept fraction."""
    runs: dict[tuple[str, str, float], Callable[[Tensor], Any]] = {
        ("full cache", "", 1.0): lambda ids: run_press(model, tokenizer, ids, None)
    }
    prompt = ReplayPrompt.of(tokenizer)
    for kept in fractions:
        for method, (press, options) in PAIRS.items():
            runs[method, "kvpress", kept] = lambda ids, press=press, kept=kept: run_press(  # type: ignore[misc]
                model, tokenizer, ids, press(1.0 - kept)
            )
            runs[method, "RankKV", kept] = lambda ids, options=options, kept=kept: compress(  # type: ignore[misc]
                model, ids, tokenizer=prompt, compression_ratio=kept, **options
            )
        for method, options in OWN.items():
            runs[method, "RankKV", kept] = lambda ids, options=options, kept=kept: compress(  # type: ignore[misc]
                model, ids, tokenizer=prompt, compression_ratio=kept, **options
            )
    return runs


def run_press(model: Any, tokenizer: Any, ids: Tensor, press: Any) -> Any:
    """Prefill a plain cache with a press, as its users do; None stands for none."""
    cache = DynamicCache()
    loader = kvzip_press.AutoTokenizer
    kvzip_press.AutoTokenizer = SimpleNamespace(from_pretrained=lambda name: tokenizer)
    try:
        with torch.no_grad():
            if press is None:
                model.model(input_ids=ids, **cache_argument(cache))
            else:
                with press(model):
                    model.model(input_ids=ids, **cache_argument(cache))
    finally:
        kvzip_press.AutoTokenizer = loader
    return cache


def measure(model: Any, run: Callable[[Tensor], Any], ids: Tensor, prompts: Any) -> dict[str, float]:
    """Compress a context, answer its questions, and return the scores, CPU time and bytes."""
    caches: list[Any] = []
    seconds, cpu_seconds = time_both(lambda: caches.append(run(ids)))
    (cache,) = caches
    whole = model.config.num_hidden_layers * 2 * model.config.num_key_value_heads * ids.shape[1]
    whole *= getattr(model.config, "head_dim", None) or (
        model.config.hidden_size // model.config.num_attention_heads
    )
    own = getattr(cache, "kept_bytes", None)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) if own is None else own()
    scores = list(score_answers(model, cache, ids.shape[1], prompts))
    for layer in model.model.layers:
        layer.self_attn.masked_key_indices = None
    return {
        "right": sum(right for _, right in scores) / len(scores),
        "loss": sum(loss for loss, _ in scores) / len(scores),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "bytes_of_full": held / (whole * model.dtype.itemsize),
    }


def score_answers(model: Any, cache: Any, length: int, prompts: Any) -> Iterator[tuple[float, bool]]:
    """Yield the mean loss of each answer, and True if each of its tokens is the most likely one."""
    for prompt in prompts:
        asked, answer = list(prompt.question_ids), list(prompt.answer_ids)
        ids = torch.tensor([asked + answer])
        # What is kept has other places in the cache than in the text.
        positions = torch.arange(length, length + ids.shape[1])[None]
        own = cache.copy() if hasattr(cache, "kept_bytes") else copy.deepcopy(cache)
        with torch.no_grad():
            logits = model(ids, position_ids=positions, **cache_argument(own)).logits
        predicted = logits[0, len(asked) - 1 : -1].float().log_softmax(dim=-1)
        told = torch.tensor(answer)
        losses = -predicted.gather(-1, told[:, None])[:, 0]
        yield float(losses.mean()), bool((predicted.argmax(dim=-1) == told).all())


if __name__ == "__main__":
    main()
