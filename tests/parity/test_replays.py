"""KVzip, KVzip+ and KVgrad beside kvpress' own: the same scores, and the same kept tokens but for the newest."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import oracles
import peers
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from rankkv import compress
from rankkv.cache.replay import ReplayPlan, ReplayPrompt, replay_prompt
from rankkv.models.compat import cache_argument
from rankkv.selection import get_selector

SINKS, NEWEST = 4, 16
KEPT = (0.5, 0.25)
#: kvpress' press and its options for each selector.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "kvzip": ("KVzipPress", {"kvzip_plus_normalization": False}),
    "kvzip_plus": ("KVzipPress", {"kvzip_plus_normalization": True}),
    "kvgrad": ("KVgradPress", {}),
}
NEWEST_KEPT = "the newest token is always kept"
NEWEST_GLOBAL = "every head keeps its 16 newest tokens, and a layer a whole number of tokens per head"
#: A template that writes nothing before the context: kvpress does not repeat that part, and RankKV does.
TEMPLATE = "{{ messages[0]['content'] }}<|im_end|>\n<|im_start|>assistant\n"


class LetterTokenizer:
    """One token for each character, for models of 128 tokens."""

    chat_template = None

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(letter) % 120 for letter in text]}

    def encode(self, text: str, **options: Any) -> Tensor:
        return torch.tensor([self(text)["input_ids"]], dtype=torch.long)


def run_kvpress(
    model: Any, ids: Tensor, tokenizer: Any, name: str, removed: float, chunk: int, layerwise: bool
) -> tuple[Tensor, Tensor]:
    """Return kvpress' scores and kept tokens, each ``[layer, kv_head, token]``."""
    import kvpress
    from kvpress.presses import kvzip_press

    press_name, options = METHODS[name]
    press = getattr(kvpress, press_name)(
        removed, layerwise=layerwise, n_sink=SINKS, chunk_size=chunk, **options
    )
    finish, noted = press.compress_post, []

    def note_and_finish(model: Any) -> None:
        finish(model)
        noted.append(press.score_val[:, 0].float().clone())

    press.compress_post = note_and_finish
    loader = kvzip_press.AutoTokenizer
    kvzip_press.AutoTokenizer = SimpleNamespace(from_pretrained=lambda name: tokenizer)
    try:
        with torch.no_grad(), press(model):
            model.model(input_ids=ids, **cache_argument(DynamicCache()))
    finally:
        kvzip_press.AutoTokenizer = loader
    (scores,) = noted
    kept = torch.ones_like(scores, dtype=torch.bool)
    for index, layer in enumerate(model.model.layers):
        _, heads, tokens = layer.self_attn.masked_key_indices
        kept[index, heads, tokens] = False
        layer.self_attn.masked_key_indices = None
    return scores, kept


def mark_kept(cache: Any, shape: torch.Size) -> Tensor:
    kept = torch.zeros(shape, dtype=torch.bool)
    for layer, rows in enumerate(oracles.kept_tokens(cache)):
        for head, tokens in enumerate(rows[0]):
            kept[layer, head, tokens] = True
    return kept


def pick(scores: Tensor, counts: list[int], newest: int) -> Tensor:
    """Mark the highest scores of each layer, ``counts`` over all its heads, each head's newest tokens first."""
    ranked = raise_newest(scores, newest)
    kept = torch.zeros_like(ranked, dtype=torch.bool)
    for layer, count in enumerate(counts):
        kept[layer].view(-1)[ranked[layer].flatten().topk(count).indices] = True
    return kept


def raise_newest(scores: Tensor, newest: int) -> Tensor:
    ranked = scores.clone()
    ranked[..., -newest:] = float("inf")
    return ranked


def differ(ours: Tensor, theirs: Tensor, scores: Tensor) -> str:
    """Compare two choices of the same group of heads, ``[kv_head or more, token]``."""
    index = [mask.flatten().nonzero()[:, 0] for mask in (ours, theirs)]
    return peers.compare_kept(*index, scores.flatten())


def compare(model: Any, ids: Tensor, tokenizer: Any, name: str, chunk: int, tally: Any) -> list[str]:
    length, faults = ids.shape[1], []
    prompt = ReplayPrompt.of(tokenizer)
    for fraction in KEPT:
        for layerwise in (True, False):
            kept = int(fraction * length)
            shape = (model.config.num_hidden_layers, model.config.num_key_value_heads, length)
            heads = shape[1] if layerwise else shape[0] * shape[1]
            # kvpress rounds the number of removed pairs down.
            removed = (heads * (length - kept) + 0.5) / (heads * length)
            scores, theirs = run_kvpress(model, ids, tokenizer, name, removed, chunk, layerwise)
            assert scores.shape == shape
            options: dict[str, Any] = {"selector": get_selector(name, chunk_size=chunk)}
            newest = NEWEST
            if layerwise:
                options = {
                    "selector": get_selector(name, chunk_size=chunk, recent_fraction=0.0),
                    "strategy": "uniform",
                    "head_budgets": "adaptive",
                    "min_budget": 1,
                }
                newest = 1
            elif shape[1] == 1:
                # One kv head has no other to compete with.
                options |= {"strategy": "global", "head_budgets": None}
            cache = compress(model, ids, tokenizer=prompt, budget=kept, head_floor=0.0, **options)
            ours = mark_kept(cache, scores.shape)
            assert int(ours.sum()) == int(theirs.sum()) == kept * shape[0] * shape[1]
            counts = [budget * shape[1] for budget in cache.budgets]
            ranked = raise_newest(scores, newest)
            if not layerwise:
                best = ranked.flatten().topk(kept * shape[0] * shape[1]).indices
                wanted = torch.bincount(best // (shape[1] * length), minlength=shape[0]).tolist()
                assert all(abs(a - b) < shape[1] for a, b in zip(counts, wanted, strict=True)), name
            stated = pick(scores, counts, newest)
            label = f"{name}, {'each layer' if layerwise else 'all layers'}"
            remark = NEWEST_KEPT if layerwise else NEWEST_GLOBAL
            spans = [slice(i, i + 1) for i in range(shape[0])] if layerwise else [slice(None)]
            for span in spans:
                verdict = differ(ours[span], theirs[span], scores[span])
                as_stated = [differ(ours[i], stated[i], ranked[i]) for i in range(shape[0])[span]]
                if verdict == "different" and "different" not in as_stated:
                    verdict = "stated"
                for own, other in zip(ours[span].flatten(0, 1), theirs[span].flatten(0, 1), strict=True):
                    tally(label, "equal" if own.equal(other) else verdict, remark)
                if verdict == "different":
                    faults.append(
                        f"{label}, kept {kept}, layers {span}: {int((ours != theirs).sum())} differ"
                    )
    return faults


def compare_scores(model: Any, ids: Tensor, tokenizer: Any, name: str, chunk: int) -> None:
    scores, _ = run_kvpress(model, ids, tokenizer, name, 0.5, chunk, layerwise=False)
    plain = DynamicCache()
    oracles.forward(model, plain, ids)
    plan = ReplayPlan(ids, ReplayPrompt.of(tokenizer))
    layers = range(model.config.num_hidden_layers)
    selector = get_selector(name, chunk_size=chunk)
    found = replay_prompt(model, plain.layers, layers, plan, [0], selector, SINKS)
    ours = torch.stack([found[layer][0] for layer in layers])
    torch.testing.assert_close(ours, scores, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", peers.TINY_FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_on_tiny_models(name, family, tally):
    model, ids = peers.build_tiny(family), oracles.random_prompt(160)
    compare_scores(model, ids, LetterTokenizer(), name, 64)
    assert compare(model, ids, LetterTokenizer(), name, 64, tally) == []


@pytest.mark.parametrize("template", [None, TEMPLATE], ids=["no template", "template"])
@pytest.mark.parametrize("name", METHODS)
def test_on_the_embedded_model(name, template, embedded, python_docs, tally):
    model, tokenizer = embedded
    ids = tokenizer(python_docs[:4000], return_tensors="pt").input_ids[:, :500]
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = template
    compare_scores(model, ids, tokenizer, name, 200)
    assert compare(model, ids, tokenizer, name, 200, tally) == []
