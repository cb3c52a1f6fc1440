"""Record what 24 settings keep, and compare a later state of the code with the record.

``python tools/record_behaviour.py`` writes ``tests/data/behaviour.json``; with ``--check`` it compares and prints every
difference.  The program imports public names only, so it runs on any layout of the package.  Kept tokens and budgets
must be equal; logits may differ by float noise.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from rankkv import RankKVCache, compress

RECORD = Path(__file__).resolve().parent.parent / "tests" / "data" / "behaviour.json"
TOLERANCE = 2e-3
PROMPT, ANSWER = 150, 12

COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
SLIDING = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"] * 2}
LATENT = {
    **COMMON,
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
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", COMMON),
    "qwen2": ("Qwen2", COMMON),
    "phi3": ("Phi3", COMMON),
    "neox": ("GPTNeoX", COMMON),
    "gemma2": (
        "Gemma2",
        {**COMMON, **SLIDING, "head_dim": 16, "query_pre_attn_scalar": 16, "_attn_implementation": "eager"},
    ),
    "gemma3": ("Gemma3", {**COMMON, **SLIDING, "head_dim": 16, "query_pre_attn_scalar": 16}),
    "gpt_oss": (
        "GptOss",
        {
            **COMMON,
            **SLIDING,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "_attn_implementation": "eager",
        },
    ),
    "deepseek": ("DeepseekV3", LATENT),
    "mistral": ("Mistral", {**COMMON, "sliding_window": None}),
    "opt": ("OPT", {**COMMON, "ffn_dim": 96, "word_embed_proj_dim": 64}),
}
#: family, how it runs, options of the cache
SETTINGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "default": ("llama", "generate", {}),
    "equal heads": ("llama", "generate", {"head_budgets": None}),
    "adaptive heads": ("llama", "generate", {"head_budgets": "adaptive"}),
    "qwen2": ("qwen2", "generate", {}),
    "phi3": ("phi3", "generate", {}),
    "gpt-neox": ("neox", "generate", {}),
    "gemma2, softcap": ("gemma2", "generate", {}),
    "gemma3, hybrid": ("gemma3", "generate", {"head_budgets": None}),
    "gpt-oss, sinks": ("gpt_oss", "generate", {}),
    "deepseek, latent": ("deepseek", "generate", {}),
    "opt, no rope": ("opt", "generate", {}),
    "mistral, pyramid": ("mistral", "generate", {"strategy": "pyramid", "strategy_options": {"beta": 20}}),
    "bounded": ("llama", "generate", {"decode": "bounded"}),
    "periodic": ("llama", "generate", {"decode": "periodic", "decode_interval": 5}),
    "packed positions": ("llama", "generate", {"positions": "packed", "head_budgets": None}),
    "int8": ("llama", "generate", {"storage": "int8"}),
    "offload": (
        "llama",
        "generate",
        {"storage": "offload", "strategy": "power", "strategy_options": {"exponent": 2}},
    ),
    "chunked": ("llama", "chunks", {"prefill": "chunked"}),
    "streaming": ("llama", "chunks", {"prefill": "streaming", "selector": "h2o"}),
    "padded batch": ("llama", "batch", {}),
    "beams": ("llama", "beams", {"head_budgets": "distortion"}),
    "turns": ("qwen2", "turns", {"recompress_turns": True, "selector": "expected_attention"}),
    "cake, criticalkv": (
        "qwen2",
        "generate",
        {"strategy": "cake", "selector": "criticalkv", "min_budget": 8},
    ),
    "protected, tova": ("llama", "generate", {"selector": "tova", "protect": [(10, 30)], "budget": 60}),
}


def build(family: str) -> Any:
    """Build the tiny random model of a family, from one fixed seed."""
    name, options = FAMILIES[family]
    torch.manual_seed(7)
    config = getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")(**options)
    return (
        getattr(transformers, f"{name}ForCausalLM")
        ._from_config(config, attn_implementation=options.get("_attn_implementation", "sdpa"))
        .eval()
    )


def run_setting(model: Any, way: str, options: dict[str, Any]) -> tuple[Any, torch.Tensor]:
    """Run one setting and return its cache and the generated ids."""
    ids = torch.randint(3, 128, (1, PROMPT), generator=torch.Generator().manual_seed(11))
    generate: dict[str, Any] = {"max_new_tokens": ANSWER, "do_sample": False, "pad_token_id": 0}
    cache = RankKVCache(model, 0.3, **options)
    if way == "chunks":
        with torch.no_grad():
            for start in range(0, PROMPT - 1, 40):
                model(input_ids=ids[:, start : min(start + 40, PROMPT - 1)], cache=cache, use_cache=True)
        cache.finish()
    if way == "turns":
        model.generate(ids[:, :90], cache=cache, attention_mask=torch.ones(1, 90), **generate)
        ids = torch.cat([ids[:, :90], torch.full((1, ANSWER), 5), ids[:, 90:]], dim=1)
    mask = torch.ones_like(ids)
    if way == "batch":
        ids = torch.cat([ids, torch.cat([torch.zeros(1, 50, dtype=torch.long), ids[:, 50:]], dim=1)])
        mask = (ids != 0).long()
    if way == "beams":
        generate["num_beams"] = 3
    output = model.generate(ids, cache=cache, attention_mask=mask, **generate)
    return cache, output[:, ids.shape[1] :]


def describe(cache: Any, model: Any, answer: torch.Tensor) -> dict[str, Any]:
    """Describe what a cache keeps and what the model says next."""
    digest = hashlib.sha256()
    for index in cache.layer_indices:
        layer = cache.layers[index]
        positions, valid = layer.compute_positions(), layer.compute_slot_valid()
        if valid is not None:
            valid = valid[:, None] if valid.dim() == 2 else valid
            positions = torch.where(valid, positions, -1)
        digest.update(positions.contiguous().numpy().tobytes())
    rows = len(cache.row_start)
    with torch.no_grad():
        mask = torch.ones(rows, cache.seen_tokens + 1, dtype=torch.long)
        position = torch.tensor([[cache.seen_tokens - start] for start in cache.row_start])
        logits = (
            model(
                input_ids=torch.full((rows, 1), 9), cache=cache, attention_mask=mask, position_ids=position
            ).logits
            if model.config.model_type != "opt"
            else model(input_ids=torch.full((rows, 1), 9), cache=cache, attention_mask=mask).logits
        )
    return {
        "kept": digest.hexdigest(),
        "kept_lengths": cache.kept_lengths,
        "budgets": cache.budgets_per_row,
        "ranks": [[float(f"{rank:.6g}") for rank in row] for row in cache.layer_ranks_per_row],
        "answer": answer.tolist(),
        "logits": [round(value, 5) for value in logits[0, -1, :8].tolist()],
    }


def record_all(on_setting: Callable[[str], None] = lambda name: None) -> dict[str, Any]:
    """Run all settings and return what each keeps."""
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    models: dict[str, Any] = {}
    found = {}
    for name, (family, way, options) in SETTINGS.items():
        on_setting(name)
        if family not in models:
            models[family] = build(family)
        cache, answer = run_setting(models[family], way, options)
        found[name] = describe(cache, models[family], answer)
    model = models["llama"]
    context = torch.randint(3, 128, (PROMPT,), generator=torch.Generator().manual_seed(3))
    found["compress"] = describe(compress(model, context, compression_ratio=0.5), model, torch.zeros(1, 0))
    return found


def list_differences(known: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """List where two records differ, one sentence each."""
    faults = []
    for name in sorted({*known, *found}):
        if name not in known or name not in found:
            faults.append(f"{name}: only in one of the records")
            continue
        for key, value in known[name].items():
            other = found[name][key]
            if key == "logits":
                worst = max(abs(a - b) for a, b in zip(value, other, strict=True))
                if not worst <= TOLERANCE:
                    faults.append(f"{name}: logits differ by {worst:.2g}")
            elif value != other:
                faults.append(f"{name}: {key} was {str(value)[:80]}, is {str(other)[:80]}")
    return faults


def main() -> int:
    """Write the record, or compare with it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the record instead of writing it")
    parser.add_argument("--file", type=Path, default=RECORD, help="the record")
    arguments = parser.parse_args()
    found = record_all(lambda name: print(name, file=sys.stderr))
    if not arguments.check:
        arguments.file.parent.mkdir(parents=True, exist_ok=True)
        arguments.file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return 0
    faults = list_differences(json.loads(arguments.file.read_text(encoding="utf-8")), found)
    print("\n".join(faults) or f"{len(found)} settings keep what they kept")
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
