"""Record the behaviour of RankKV on 24 settings, and compare later code with the record.

The record holds kept positions, budgets, ranks, generated ids and a few logits of each setting.  Settings span model
families, head budgets, decode and prefill modes, storages, selectors and strategies.  Models are tiny and random, with
one seed, but for the embedded one.  Only public names of ``rankkv`` are imported, so the tool runs on any layout of
its modules.  A last entry holds the analyzer, the allocator and calibration, which need no cache.

Usage
-----
::

    python tools/record_behaviour.py            # write tests/data/behaviour.json
    python tools/record_behaviour.py --check    # compare, print every difference, exit 1 if there is one
    python tools/record_behaviour.py --check --only "llama default" --only qwen2

The record names the versions that it was made with; other versions of torch or transformers may differ.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers

from rankkv import (
    BudgetAllocator,
    RankKVAnalyzer,
    RankKVCache,
    RankProfile,
    analyze_attention_ranks,
    compress,
    load_model,
    load_texts,
)

RECORD = Path(__file__).resolve().parents[1] / "tests" / "data" / "behaviour.json"

#: Largest difference of a logit or a number of a profile, absolute or relative to the recorded one.
LOGIT_TOLERANCE = 1e-4
#: Largest relative difference of a rank: one unit of its sixth digit may be lost to rounding.
RANK_TOLERANCE = 1.1e-5
#: Ways to calibrate a profile.
CALIBRATION_METHODS = ("measured", "gradient")
#: Kept positions longer than this are recorded as a digest.
LONGEST_POSITIONS = 2500

VOCABULARY = 128
PROMPT_TOKENS = 150
NEW_TOKENS = 12
#: Layers with a sliding window see this many tokens.
WINDOW = 32

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_attention_heads": 4,
    # Ten times the usual spread: otherwise a random model attends so evenly that any token will do.
    "initializer_range": 0.2,
    # Tied embeddings make a random model repeat its last token.
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
_HYBRID: dict[str, Any] = {
    **_COMMON,
    "num_hidden_layers": 4,
    "head_dim": 16,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
#: Class, config class if it has another name, and options of each tiny model.
MODELS: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", None, _COMMON),
    "qwen2": ("Qwen2ForCausalLM", None, _COMMON),
    "mistral sliding": ("MistralForCausalLM", None, {**_COMMON, "sliding_window": WINDOW}),
    "ministral": ("MinistralForCausalLM", None, _HYBRID),
    "gemma 2": (
        "Gemma2ForCausalLM",
        None,
        {**_HYBRID, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0},
    ),
    "gemma 3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**_HYBRID, "query_pre_attn_scalar": 16}),
    "gemma 4": (
        "Gemma4ForCausalLM",
        "Gemma4TextConfig",
        {
            **_HYBRID,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "per_layer_config": {"01": {"head_dim": 32}, "03": {"head_dim": 32}},
        },
    ),
    "gpt-neox": ("GPTNeoXForCausalLM", None, _COMMON),
    "phi-3": ("Phi3ForCausalLM", None, {**_COMMON, "sliding_window": None}),
    "deepseek-v3": (
        "DeepseekV3ForCausalLM",
        None,
        {
            **_COMMON,
            "num_key_value_heads": 4,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 12,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
        },
    ),
    "gpt-oss": (
        "GptOssForCausalLM",
        None,
        {**_HYBRID, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
}
#: Softcaps and attention sinks are computed by the eager kernel.
EAGER = ("gemma 2", "gpt-oss")


@dataclass(frozen=True)
class Setting:
    """One way to compress and to generate.

    Parameters
    ----------
    model : str
        Key of ``MODELS``, or ``"embedded"``.
    options : mapping
        Options of the cache.
    generate : mapping
        Options of ``generate()``.
    chunks : tuple of int
        Lengths of the forwards before ``generate()``; it gets the prompt whole if there are none.
    finish : bool
        End the prefill by ``finish()`` after these forwards.
    padding : int
        Left padding of the second row; 0 means one row.
    prompt_tokens : int
        Length of the prompt.
    """

    model: str
    options: Mapping[str, Any] = field(default_factory=dict)
    generate: Mapping[str, Any] = field(default_factory=dict)
    chunks: tuple[int, ...] = ()
    finish: bool = False
    padding: int = 0
    prompt_tokens: int = PROMPT_TOKENS


def _turns(*lengths: int, finish: bool = False, **options: Any) -> Setting:
    return Setting("llama", options, chunks=lengths, finish=finish)


SETTINGS: dict[str, Setting] = {
    "llama default": Setting("llama"),
    "llama one budget per layer": Setting(
        "llama", {"head_budgets": None, "strategy": "proportional", "selector": "h2o", "min_budget": 8}
    ),
    "llama bounded": Setting("llama", {"decode": "bounded", "min_budget": 8}, {"max_new_tokens": 24}),
    "llama periodic": Setting(
        "llama", {"decode": "periodic", "decode_interval": 6, "strategy": "power"}, {"max_new_tokens": 20}
    ),
    "llama chunked": _turns(50, 50, 38, finish=True, prefill="chunked", strategy="softmax"),
    "llama streaming": _turns(50, 50, 38, finish=True, prefill="streaming", selector="streaming_llm"),
    "llama later turns": _turns(90, 40, recompress_turns=True, head_budgets=None),
    "llama int8": Setting("llama", {"storage": "int8", "budget": 40}),
    "llama beams": Setting("llama", {"decode": "bounded", "selector": "h2o"}, {"num_beams": 3}, padding=20),
    "llama protect": Setting(
        "llama", {"protect": [(10, 22)], "strategy": "pyramid", "selector": "tova", "head_budgets": None}
    ),
    "llama padded": Setting("llama", padding=40),
    "qwen2 packed": Setting("qwen2", {"positions": "packed", "selector": "expected_attention"}),
    "qwen2 offload": Setting("qwen2", {"storage": "offload", "selector": "knorm", "strategy": "uniform"}),
    "mistral sliding, nothing to compress": Setting("mistral sliding"),
    "ministral hybrid": Setting("ministral", {"selector": "lagkv", "strategy": "cake"}),
    "gemma 2 eager": Setting(
        "gemma 2", {"strategy": "adaptive", "scope": "window", "aggregation": "median", "min_budget": 8}
    ),
    "gemma 3 hybrid": Setting("gemma 3"),
    "gemma 4 shared keys": Setting("gemma 4", {"selector": "criticalkv"}),
    "gpt-neox": Setting("gpt-neox", {"selector": "keydiff", "strategy": "inverse", "scope": "full"}),
    "phi-3 adaptive heads": Setting("phi-3", {"head_budgets": "adaptive", "selector": "lava"}, padding=30),
    "deepseek-v3 latent": Setting("deepseek-v3", {"sink_size": 2, "window_size": 16}),
    "gpt-oss sinks": Setting("gpt-oss", {"selector": "chunkkv"}),
    "embedded default": Setting("embedded", {"compression_ratio": 0.2}, prompt_tokens=256),
    "embedded without profile": Setting(
        "embedded", {"compression_ratio": 0.2, "profile": None, "selector": "qfilter"}, prompt_tokens=256
    ),
}


@functools.cache
def build_model(name: str) -> tuple[Any, Any]:
    """Build the model of a setting and its tokenizer (None if it has none); the same weights every time."""
    if name == "embedded":
        return load_model("embedded")
    class_name, config_name, options = MODELS[name]
    model_class = getattr(transformers, class_name)
    config_class = model_class.config_class if config_name is None else getattr(transformers, config_name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = config_class(**options)
        config._attn_implementation = "eager" if name in EAGER else "sdpa"
        model = model_class(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                # Parameters that no initialiser knows hold what was in memory.
                if not torch.isfinite(parameter).all():
                    parameter.nan_to_num_(0.0, 0.0, 0.0)
    model.generation_config.eos_token_id = None
    return model, None


def make_prompt(setting: Setting, tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``input_ids`` and ``attention_mask`` of a setting, each ``[batch, token]`` int64."""
    rows = 2 if setting.padding else 1
    if tokenizer is None:
        generator = torch.Generator().manual_seed(7)
        ids = torch.randint(3, VOCABULARY, (rows, setting.prompt_tokens), generator=generator)
    else:
        text = "\n\n".join(load_texts("python-docs", limit=3))
        ids = tokenizer(text, return_tensors="pt").input_ids[:, : setting.prompt_tokens]
    mask = torch.ones_like(ids)
    if setting.padding:
        mask[1, : setting.padding] = 0
        ids = ids * mask
    return ids, mask


def _as_argument(cache: Any) -> dict[str, Any]:
    # The keyword changed its name in transformers 5.24.
    new = tuple(int(part) for part in transformers.__version__.split(".")[:2]) >= (5, 24)
    return {"cache" if new else "past_key_values": cache}


def run_setting(setting: Setting) -> dict[str, Any]:
    """Run one setting and return what it kept and generated, JSON-ready.

    Parameters
    ----------
    setting : Setting
        Model, prompt and options.

    Returns
    -------
    dict
        ``prefill`` and ``end``: the state of the cache after the prompt and after generation; ``ids``: generated ids
        of every row; ``logits``: six logits after the second and the last generated token, row 0.
    """
    model, tokenizer = build_model(setting.model)
    ids, mask = make_prompt(setting, tokenizer)
    record: dict[str, Any] = {"prompt": _digest(ids.tolist())}
    cache = RankKVCache(model, **setting.options)
    with torch.no_grad():
        if setting.chunks:
            for chunk in ids[:, : sum(setting.chunks)].split(setting.chunks, dim=1):
                model(chunk, **_as_argument(cache))
            if setting.finish:
                cache.finish()
            record["prefill"] = describe_cache(cache)
        else:
            # Left open, compress() takes another selector than generate(); the record is of one for both.
            options = {"selector": "snapkv", **setting.options}
            record["prefill"] = describe_cache(compress(model, ids, mask, **options))
    output = model.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **{"max_new_tokens": NEW_TOKENS, **setting.generate},
        **_as_argument(cache),
    )
    record["end"] = describe_cache(cache)
    record["ids"] = output.sequences[:, ids.shape[1] :].tolist()
    # The first logits are those of the whole prompt: compression shows from the second on.
    record["logits"] = [
        [round(value, 6) for value in output.logits[step][0, 3:9].tolist()] for step in (1, -1)
    ]
    return record


def describe_cache(cache: Any) -> dict[str, Any]:
    """Describe what a cache holds: budgets, ranks, lengths, bytes, and the kept positions of each layer and head."""
    return {
        "seen_tokens": cache.seen_tokens,
        "kept_lengths": cache.kept_lengths,
        "kept_per_head": _shorten(cache.kept_per_head),
        "budgets": cache.budgets_per_row,
        "layer_ranks": [[_round(rank) for rank in row] for row in cache.layer_ranks_per_row],
        "layer_measures": [[_round(value) for value in row] for row in cache.layer_measures_per_row],
        "bytes": [cache.kept_bytes(), cache.full_cache_bytes()],
        "positions": _shorten(
            {str(index): read_positions(cache.layers[index]) for index in cache.layer_indices}
        ),
    }


def read_positions(layer: Any) -> list[list[str]]:
    """Return the kept positions of a layer as text like ``"0-3 9 12-14"``, ``[row][kv_head or 1]``.

    This is the one place that asks a layer and not the cache: no public name of the cache gives positions.
    """
    positions = layer.compute_positions()
    valid = layer.compute_slot_valid()
    valid = torch.ones_like(positions, dtype=torch.bool) if valid is None else valid
    valid = valid[:, None] if valid.dim() == 2 else valid
    positions, valid = torch.broadcast_tensors(positions, valid)
    return [
        [_to_ranges(head[there].tolist()) for head, there in zip(row, slots, strict=True)]
        for row, slots in zip(positions, valid, strict=True)
    ]


def _to_ranges(positions: list[int]) -> str:
    # The order is part of the record: a position that does not follow its neighbour begins a range.
    ranges: list[list[int]] = []
    for position in positions:
        if ranges and position == ranges[-1][1] + 1:
            ranges[-1][1] = position
        else:
            ranges.append([position, position])
    return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def _shorten(value: Any) -> Any:
    return value if len(json.dumps(value)) <= LONGEST_POSITIONS else _digest(value)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _round(value: float) -> float:
    return float(f"{value:.6g}")


def run_without_cache() -> dict[str, Any]:
    """Run the analyzer, the allocator and the ranks alone; they need no cache."""
    model, _ = build_model("llama")
    ids, mask = make_prompt(Setting("llama"), None)
    result = RankKVAnalyzer(model, strategy="power", strategy_options={"exponent": 2}).analyze(ids, mask)
    generator = torch.Generator().manual_seed(3)
    attention = torch.rand(1, 4, 40, 40, generator=generator).tril().add(1e-6).softmax(-1)
    found = analyze_attention_ranks([attention, attention**2])
    ranks = [3.0, 7.5, 1.25, 12.0, 5.0]
    budgets = {
        strategy: BudgetAllocator(strategy, min_budget=4, max_budget=60).allocate(ranks, 120).budgets
        for strategy in (
            "proportional",
            "softmax",
            "adaptive",
            "power",
            "uniform",
            "pyramid",
            "inverse",
            "random",
        )
    }
    texts = [ids[0, :100], ids[0, 30:]]
    profiles = {
        method: RankProfile.calibrate(
            model, texts=texts, context_tokens=64, continuation_tokens=16, ratios=(0.2, 0.5), method=method
        )
        for method in CALIBRATION_METHODS
    }
    return {
        "analyzer": {
            "budgets": result.budgets,
            "layer_ranks": [_round(rank) for rank in result.layer_ranks],
            "layer_indices": result.layer_indices,
        },
        "attention_ranks": [_round(rank) for rank in found.layer_ranks],
        "allocator": budgets,
        "profiles": {method: _describe_profile(profile) for method, profile in profiles.items()},
        "with profile": {
            method: describe_cache(compress(model, ids, profile=profile))
            for method, profile in profiles.items()
        },
    }


def _describe_profile(profile: RankProfile) -> dict[str, Any]:
    described = profile.to_dict()
    # Versions and names may change where numbers do not.
    return {
        key: value
        for key, value in described.items()
        if key not in ("format", "version", "name", "calibration")
    }


def describe_versions() -> dict[str, str]:
    """Return the versions that numbers depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def dump_record(record: dict[str, Any]) -> str:
    """Return a record as JSON, one line per setting, so that a change of one setting is one line of a diff."""
    lines = ",\n".join(
        f"  {json.dumps(name)}: {json.dumps(setting, sort_keys=True)}"
        for name, setting in sorted(record["settings"].items())
    )
    return f'{{\n"versions": {json.dumps(record["versions"])},\n"settings": {{\n{lines}\n}}\n}}\n'


def find_differences(recorded: Any, found: Any, path: str = "") -> Iterator[str]:
    """Yield one line per value that differs, with its place; ranks and logits have a tolerance."""
    if isinstance(recorded, dict) and isinstance(found, dict):
        for key in [*recorded, *(key for key in found if key not in recorded)]:
            place = f"{path} / {key}" if path else key
            if key not in found or key not in recorded:
                yield f"{place}: {'not recorded' if key in found else 'missing now'}"
            else:
                yield from find_differences(recorded[key], found[key], place)
    elif isinstance(recorded, list) and isinstance(found, list) and len(recorded) == len(found):
        for index, (old, new) in enumerate(zip(recorded, found, strict=True)):
            yield from find_differences(old, new, f"{path}[{index}]")
    elif isinstance(recorded, float) and isinstance(found, float | int):
        is_loose = " / logits" in path or " / profiles" in path
        relative, absolute = (LOGIT_TOLERANCE, LOGIT_TOLERANCE) if is_loose else (RANK_TOLERANCE, 1e-9)
        if not math.isclose(recorded, found, rel_tol=relative, abs_tol=absolute):
            yield f"{path}: recorded {recorded}, now {found}"
    elif recorded != found:
        yield f"{path}: recorded {recorded}, now {found}"


def main() -> int:
    """Write the record, or compare with it; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the record, exit 1 if they differ")
    parser.add_argument(
        "--only", action="append", help="with --check: settings whose name contains this text"
    )
    parser.add_argument(
        "--record", type=Path, default=RECORD, help="the file, default tests/data/behaviour.json"
    )
    given = parser.parse_args()
    if given.only and not given.check:
        parser.error("--only needs --check: a record holds all settings.")
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    start = time.perf_counter()
    runs: dict[str, Callable[[], dict[str, Any]]] = {
        name: functools.partial(run_setting, setting) for name, setting in SETTINGS.items()
    }
    runs["without a cache"] = run_without_cache
    chosen = [name for name in runs if not given.only or any(text in name for text in given.only)]
    found = {}
    for name in chosen:
        began = time.perf_counter()
        found[name] = json.loads(json.dumps(runs[name]()))
        print(f"{name}: {time.perf_counter() - began:.1f} s", file=sys.stderr)
    if not given.check:
        given.record.parent.mkdir(parents=True, exist_ok=True)
        given.record.write_text(dump_record({"versions": describe_versions(), "settings": found}))
        print(f"{len(found)} settings written to {given.record} in {time.perf_counter() - start:.0f} s")
        return 0
    recorded = json.loads(given.record.read_text())
    for name, version in describe_versions().items():
        if recorded["versions"][name] != version:
            print(f"note: recorded with {name} {recorded['versions'][name]}, now {version}")
    wanted = recorded["settings"] if not given.only else {name: recorded["settings"][name] for name in chosen}
    differences = list(find_differences(wanted, found))
    print(*differences, sep="\n", end="\n" if differences else "")
    print(f"{len(found)} settings, {len(differences)} differences, {time.perf_counter() - start:.0f} s")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
