"""kvpress beside RankKV on the same prompt: which tokens each keeps, and by which scores.

kvpress is imported in functions only, so that this file can be read where it is not installed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rankkv import RankKVCache
from rankkv.models.compat import cache_argument
from rankkv.selection import Selector, get_selector

IS_INSTALLED = importlib.util.find_spec("kvpress") is not None
#: Two scores that differ by less, relative to the larger, may be told apart one way or the other.
TIE = 1e-4


@dataclass
class LayerRun:
    """What one layer kept: token indices of each kv head, ascending, and the scores of all tokens."""

    kept: list[Tensor] = field(default_factory=list)
    scores: Tensor | None = None


def run_kvpress(model: Any, input_ids: Tensor, press: Any, scorer: Any = None) -> list[LayerRun]:
    """Prefill with a press as its users do, and find what it kept by the cached keys themselves.

    ``scorer`` is the press whose scores are noted, where another one is wrapped around it.
    """
    from transformers import DynamicCache

    scorer = press if scorer is None else scorer
    runs: dict[int, LayerRun] = {}
    score, compress = getattr(scorer, "score", None), press.compress

    def score_and_note(module: Any, *args: Any, **kwargs: Any) -> Tensor:
        scores = score(module, *args, **kwargs)
        runs.setdefault(module.layer_idx, LayerRun()).scores = scores[0].float().clone()
        return scores

    def compress_and_note(module: Any, hidden: Tensor, keys: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        module.masked_key_indices = None
        kept_keys, kept_values = compress(module, hidden, keys, *args)
        run = runs.setdefault(module.layer_idx, LayerRun())
        run.kept = [find_rows(mine, whole) for mine, whole in zip(kept_keys[0], keys[0], strict=True)]
        if module.masked_key_indices is not None:
            _, heads, slots = module.masked_key_indices
            run.kept = [drop(kept, slots[heads == head]) for head, kept in enumerate(run.kept)]
            module.masked_key_indices = None
        return kept_keys, kept_values

    if score is not None:
        scorer.score = score_and_note
    press.compress = compress_and_note
    with torch.no_grad(), press(model):
        model.model(input_ids=input_ids, **cache_argument(DynamicCache()))
    return [runs[layer] for layer in sorted(runs)]


def find_rows(rows: Tensor, among: Tensor) -> Tensor:
    """Return where each of ``rows`` stands in ``among``, ascending; all are there once."""
    same = (rows[:, None] == among[None]).all(dim=-1)
    assert same.sum(dim=-1).eq(1).all(), "a kept key is not exactly one of the keys of the prompt"
    return same.int().argmax(dim=-1).sort().values


def drop(kept: Tensor, dropped: Tensor) -> Tensor:
    return kept[~torch.isin(kept, dropped)]


def run_rankkv(
    model: Any, input_ids: Tensor, selector: str, budget: int, options: dict[str, Any], **cache_options: Any
) -> list[LayerRun]:
    """Prefill with a RankKV cache of equal budgets, noting what each layer keeps and the selector's scores."""
    chosen = get_selector(selector, **options)
    noted: list[Tensor] = []

    def score_and_note(observation: Any) -> Tensor:
        scores = chosen.compute_scores(observation)
        noted.append(scores[0].expand(observation.kv_heads, -1).clone())
        return scores

    # A plain selector, also where the method wraps another one.
    note = Selector(
        chosen.name,
        score_and_note,
        chosen.needs,
        chosen.source,
        recent_fraction=chosen.recent_fraction,
        step=chosen.step,
        past_queries=chosen.past_queries,
        turns=chosen.turns,
        whole_prompt=chosen.whole_prompt,
    )
    cache = RankKVCache(
        model,
        budget=budget,
        min_budget=1,
        strategy="uniform",
        selector=note,
        **cache_options,
    )
    with torch.no_grad():
        model.model(input_ids=input_ids, **cache_argument(cache))
    cache.finish()
    runs = []
    for layer, scores in zip(cache.layers, noted, strict=True):
        positions = layer.compute_positions()[0].expand(scores.shape[0], -1)
        valid = layer.compute_slot_valid()
        # Heads that keep fewer than the widest one start with empty slots.
        valid = (
            torch.ones_like(positions, dtype=torch.bool)
            if valid is None
            else valid[0].expand(positions.shape)
        )
        runs.append(LayerRun([row[real] for row, real in zip(positions, valid, strict=True)], scores))
    return runs


def pick_highest(scores: Tensor, counts: list[int]) -> list[Tensor]:
    """Return the indices of the highest scores of each row, ascending."""
    return [row.topk(count).indices.sort().values for row, count in zip(scores, counts, strict=True)]


def compare_kept(ours: Tensor, theirs: Tensor, scores: Tensor) -> str:
    """Tell how two choices by the same scores relate: ``"equal"``, ``"tie"`` or ``"different"``.

    A tie: what only one of them kept scores as much as the lowest that was kept, but for rounding.
    """
    if ours.equal(theirs):
        return "equal"
    only = torch.cat([drop(ours, theirs), drop(theirs, ours)])
    if len(ours) != len(theirs):
        return "different"
    border = scores[theirs].min()
    near = (scores[only] - border).abs() <= TIE * torch.maximum(scores[only].abs(), border.abs())
    return "tie" if bool(near.all()) else "different"


def join_heads(kept: list[Tensor], length: int) -> Tensor:
    """Return what all heads of a layer kept as places in their joined scores, ascending."""
    return torch.cat([row + head * length for head, row in enumerate(kept)])


@contextmanager
def attention_backend(model: Any, name: str) -> Iterator[None]:
    """Let a shared model compute its attention another way for a while."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


TINY_SHAPE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    # Ten times the usual spread, so that attention is not even.
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
#: Families that kvpress knows, in small: the config class and what differs from four query heads on two kv heads.
TINY_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-mha": ("LlamaConfig", {"num_key_value_heads": 4}),
    "llama-mqa": ("LlamaConfig", {"num_key_value_heads": 1}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "phi3": ("Phi3Config", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
}


def build_tiny(family: str, seed: int = 0) -> Any:
    """Build a tiny random model of a family."""
    import transformers

    class_name, options = TINY_FAMILIES[family]
    config = getattr(transformers, class_name)(**(TINY_SHAPE | options))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def describe_difference(ours: Tensor, theirs: Tensor) -> str:
    return f"only ours {drop(ours, theirs).tolist()}, only theirs {drop(theirs, ours).tolist()}"
