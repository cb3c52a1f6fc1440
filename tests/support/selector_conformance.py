"""What every token selection method must do: one function a law, each for a method's name and a model.

The tests run them over the registry; a method registered from elsewhere passes them in the same way.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import oracles
import torch

from rankkv.observe.call import observe
from rankkv.selection import NEEDS, SELECTORS, get_selector

LENGTH, SHORT, WINDOW = 64, 23, 16
PROMPTS = (oracles.random_prompt(LENGTH, seed=1), oracles.random_prompt(SHORT, seed=2))


def check_entry(name: str, model: Any) -> None:
    """The registry says what the method reads, what that costs and where it comes from."""
    selector = SELECTORS[name]
    assert selector.name == name == str(selector)
    assert selector.needs in NEEDS
    assert selector.source
    assert re.fullmatch(r"O\(.+\)", selector.cost)
    assert selector.description.endswith(".")
    assert "Returns" in (selector.score.__doc__ or "")
    assert get_selector(selector) is selector


def check_scores(name: str, model: Any) -> None:
    """Every real key has a score that is a number."""
    ids, mask = oracles.left_pad(PROMPTS)
    for layer in oracles.observe_layers(model, ids, mask):
        scores = SELECTORS[name].compute_scores(layer)
        batch, heads, keys = scores.shape
        assert (batch, keys) == (2, LENGTH)
        assert heads in (1, layer.keys.shape[1])
        assert scores.is_floating_point()
        assert torch.isfinite(scores[mask.bool()[:, None].expand(scores.shape)]).all()


def check_padding(name: str, model: Any) -> None:
    """The scores of a padded row are those of the row alone."""
    ids, mask = oracles.left_pad(PROMPTS)
    for together, alone in zip(
        oracles.observe_layers(model, ids, mask), oracles.observe_layers(model, PROMPTS[1]), strict=True
    ):
        padded = SELECTORS[name].compute_scores(together)[1, :, LENGTH - SHORT :]
        own = SELECTORS[name].compute_scores(alone)[0]
        torch.testing.assert_close(padded, own, atol=1e-4, rtol=1e-4)
        # What matters is the order, where scores are not as good as equal.
        for head in range(own.shape[0]):
            for k in (4, 12):
                cut = own[head].sort(descending=True).values
                if cut[k - 1] - cut[k] > 1e-4:
                    ours, theirs = (scores[head].topk(k).indices.tolist() for scores in (padded, own))
                    assert set(ours) == set(theirs)


def check_neighbours(name: str, model: Any) -> None:
    """Scores do not depend on the other rows of a batch."""
    others = [oracles.random_prompt(LENGTH, seed) for seed in (8, 9)]
    alone = oracles.observe_layers(model, PROMPTS[0])
    together = oracles.observe_layers(model, torch.cat([others[0], PROMPTS[0], others[1]]))
    for one, three in zip(alone, together, strict=True):
        expected = SELECTORS[name].compute_scores(one)[0]
        torch.testing.assert_close(SELECTORS[name].compute_scores(three)[1], expected, atol=1e-4, rtol=1e-4)


def check_pure(name: str, model: Any) -> None:
    """Scoring changes nothing and can be repeated."""
    layer = oracles.observe_layers(model, PROMPTS[0], window_size=WINDOW)[1]
    before = [layer.query.clone(), layer.keys.clone(), layer.values.clone()]
    first = SELECTORS[name].compute_scores(layer)
    assert torch.equal(first, SELECTORS[name].compute_scores(layer))
    for old, new in zip(before, (layer.query, layer.keys, layer.values), strict=True):
        assert torch.equal(old, new)


def check_one_token(name: str, model: Any) -> None:
    """A prompt of one token has one score."""
    tensors = [torch.randn(1, heads, 1, 8) for heads in (4, 2, 2)]
    layer = observe(0, torch.nn.Module(), *tensors, None, {}, kv_heads=2, window_size=WINDOW, sink_size=4)
    layer.hidden, layer.gradient = torch.randn(1, 1, 32), torch.rand(1, 1)
    scores = SELECTORS[name].compute_scores(layer)
    assert scores.shape[-1] == 1
    assert torch.isfinite(scores).all()


def check_cache(name: str, model: Any) -> None:
    """In the cache: ratio 1.0 changes nothing, what is evicted counts as masked, the bytes are those of the budgets."""
    for prompts in (PROMPTS[:1], PROMPTS):
        batch = oracles.left_pad(prompts)
        oracles.assert_identity(model, *batch, compression_ratio=1.0, selector=name)
        cache = oracles.prefill(model, *batch, compression_ratio=0.3, selector=name, min_budget=3)
        total = round(0.3 * LENGTH * len(cache.layer_indices))
        assert sum(cache.budgets) == total
        oracles.assert_bytes_match(cache)
        oracles.assert_equals_masked_oracle(model, cache, *batch)


def check_batch(name: str, model: Any) -> None:
    """In the cache: a row of a padded batch keeps what it keeps alone, its sinks and its newest tokens included."""
    oracles.assert_batch_invariant(model, PROMPTS, selector=name, min_budget=3)
    cache = oracles.prefill(model, PROMPTS[0], selector=name, head_budgets=None)
    for budget, rows in zip(cache.budgets, oracles.kept_tokens(cache), strict=True):
        for head in rows[0]:
            assert len(head) == budget
            assert set(range(min(4, budget // 4))) <= set(head)


def check_decoding(name: str, model: Any) -> None:
    """While decoding with bounded budgets, every layer stays at its own."""
    cache = oracles.prefill(model, PROMPTS[0], selector=name, decode="bounded", budget=24)
    oracles.feed(model, cache, oracles.next_chunks(1, (1,) * 6))
    assert [cache.kept_lengths[index] for index in cache.layer_indices] == cache.budgets


CHECKS: dict[str, Callable[[str, Any], None]] = {
    "entry": check_entry,
    "scores": check_scores,
    "padding": check_padding,
    "neighbours": check_neighbours,
    "pure": check_pure,
    "one token": check_one_token,
    "cache": check_cache,
    "batch": check_batch,
    "decoding": check_decoding,
}
