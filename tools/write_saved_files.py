"""Write small files of every kind that RankKV saves, with the answers they give, for tests of later code.

Usage
-----
::

    python tools/write_saved_files.py           # writes tests/data/written_before/

The files stand for what users have on disk: saved caches, profiles, an interrupted calibration, query filters and the
results of a sweep.  Write them anew only if a format changes on purpose, and keep the old ones beside the new ones.
``tests/data/written_before/README.md`` says what each file is.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from rankkv import RankKVCache, RankProfile, compress, compute_query_filters, load_model, save_query_filters
from rankkv.cli import app
from rankkv.selection import get_selector

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "data" / "written_before"

#: The tiny model: PyTorch's default weights of this config after ``torch.manual_seed(0)``, saved beside it.
CONFIG: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 2048,
    # Wide, so that a random model attends unevenly and tokens differ.
    "initializer_range": 0.4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
PROMPT_TOKENS = 96
CALIBRATION: dict[str, Any] = {"context_tokens": 64, "continuation_tokens": 16, "ratios": (0.2, 0.5)}
#: Saved caches by name: their options and the tokens decoded before they are saved.
CACHES: dict[str, tuple[dict[str, Any], int]] = {
    "default": ({}, 0),
    "one_budget_per_layer": ({"head_budgets": None, "selector": "h2o", "strategy": "proportional"}, 0),
    "int8": ({"storage": "int8"}, 3),
    "periodic_packed": (
        {"decode": "periodic", "decode_interval": 8, "positions": "packed", "protect": [(8, 14)]},
        12,
    ),
}
SWEEP = """\
models: [model]
tasks:
  - task: perplexity
    label: continuation
    text: text.txt
    lengths: [128]
    count: 2
    continuation: 32
selectors: [snapkv]
allocations: [uniform, default]
ratios: [0.2, 0.5]
seeds: [0]
"""


def make_prompt() -> torch.Tensor:
    """Return the prompt of every cache, ``[1, token]`` int64."""
    return torch.randint(3, 64, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(1))


def write_model(folder: Path) -> None:
    """Write the tiny model, and a tokenizer that gives each character an id."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**CONFIG)).save_pretrained(folder)
    signs = "\n abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVW.,:;0123456"
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    vocabulary |= {sign: number for number, sign in enumerate(signs[:60], start=4)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def make_text() -> str:
    """Return 1,200 characters of plain sentences, the same every time."""
    sentence = "the cache keeps a token of each layer and one head reads it when a query comes"
    words = sentence.split()
    order = torch.randint(0, len(words), (300,), generator=torch.Generator().manual_seed(2)).tolist()
    return " ".join(words[number] for number in order)[:1200]


def describe_answers(model: Any, cache: Any) -> dict[str, Any]:
    """Describe a cache and what the model answers with it; the cache itself stays as it is.

    Parameters
    ----------
    model : PreTrainedModel
        The tiny model.
    cache : RankKVCache
        After its prefill.

    Returns
    -------
    dict
        Budgets, ranks, lengths and bytes, and the logits ``[3, 64]`` of three more tokens.
    """
    later = torch.tensor([[5, 9, 30]])
    answers = []
    going = cache.copy()
    with torch.no_grad():
        for token in later.split(1, dim=1):
            answers.append(model(token, past_key_values=going, use_cache=True).logits[0, -1].tolist())
    return {
        "seen_tokens": cache.seen_tokens,
        "kept_lengths": cache.kept_lengths,
        "kept_per_head": cache.kept_per_head,
        "budgets": cache.budgets_per_row,
        "layer_ranks": cache.layer_ranks_per_row,
        "layer_measures": cache.layer_measures_per_row,
        "bytes": [cache.cache_bytes(), cache.full_cache_bytes()],
        "logits": [[round(value, 6) for value in row] for row in answers],
    }


def write_caches(folder: Path, model: Any) -> dict[str, Any]:
    """Write one file per saved cache and return their answers."""
    answers = {}
    for name, (options, steps) in CACHES.items():
        cache = compress(model, make_prompt(), **options)
        with torch.no_grad():
            for token in range(steps):
                model(torch.tensor([[10 + token]]), past_key_values=cache, use_cache=True)
        path = cache.save(folder / f"{name}.safetensors")
        answers[name] = describe_answers(model, RankKVCache.load(path, model))
    return answers


def write_calibration(folder: Path, model: Any) -> dict[str, Any]:
    """Write profiles of both methods and calibrations to resume; return the answers with each profile."""
    texts = [make_prompt()[0], make_prompt()[0].flip(0)]
    profiles = {}
    for method in ("measured", "gradient"):
        # The file to resume from holds the first text only: calibration was interrupted there.
        unfinished = folder / f"unfinished_{method}.jsonl"
        RankProfile.calibrate(model, texts=texts[:1], method=method, resume_path=unfinished, **CALIBRATION)
        profile = RankProfile.calibrate(model, texts=texts, method=method, **CALIBRATION)
        profile.save(folder / f"profile_{method}.json")
        profiles[method] = describe_answers(model, compress(model, make_prompt(), profile=profile))
    return profiles


def write_filters(folder: Path, model: Any) -> dict[str, Any]:
    """Write query filters and return the answers with them."""
    filters = compute_query_filters(model, [make_prompt()[0], make_prompt()[0].flip(0)])
    path = save_query_filters(filters, folder / "query_filters.json")
    selector = get_selector("qfilter", filters=path)
    return describe_answers(model, compress(model, make_prompt(), selector=selector, head_budgets="adaptive"))


def write_sweep(folder: Path) -> None:
    """Write the results of a sweep over the tiny model, with the text and the YAML file that it needs."""
    (folder / "text.txt").write_text(make_text())
    (folder / "sweep.yaml").write_text(SWEEP)
    # The results name model and text as the YAML file does: relative to where the sweep was started.
    os.chdir(folder)
    done = CliRunner().invoke(app, ["sweep", "sweep.yaml", "--output-dir", "sweep"])
    if done.exit_code:
        raise SystemExit(f"the sweep failed: {done.output}")


def main() -> int:
    """Write all files."""
    shutil.rmtree(FOLDER / "sweep", ignore_errors=True)
    for old in [*FOLDER.glob("unfinished_*.jsonl")]:
        old.unlink()
    FOLDER.mkdir(parents=True, exist_ok=True)
    write_model(FOLDER / "model")
    model, _ = load_model(FOLDER / "model")
    answers = {
        "transformers": transformers.__version__,
        "prompt": make_prompt()[0].tolist(),
        "caches": write_caches(FOLDER, model),
        "profiles": write_calibration(FOLDER, model),
        "query_filters": write_filters(FOLDER, model),
    }
    (FOLDER / "answers.json").write_text(json.dumps(answers) + "\n")
    write_sweep(FOLDER)
    return 0


if __name__ == "__main__":
    sys.exit(main())
