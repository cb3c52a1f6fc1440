"""Compressing layer by layer while prefilling keeps exactly what one decision at the end would keep."""

from __future__ import annotations

import numpy as np
import oracles
import pytest

from rankkv import RankKVCache
from rankkv.budget.plan import BudgetPlan
from rankkv.budget_allocation import STRATEGIES
from rankkv.selection import get_selector

LAYERS = 6


@pytest.fixture(scope="module", params=["llama", "neox"])
def model(request, tiny_llama, tiny_neox):
    return {"llama": tiny_llama, "neox": tiny_neox}[request.param](LAYERS)


@pytest.fixture
def one_shot(monkeypatch):
    """Return a function that prefills with nothing released before the last layer."""

    def run(*args, **options):
        with monkeypatch.context() as patch:
            patch.setattr(BudgetPlan, "compute_ceilings", lambda plan: [plan.length] * plan._added)
            return oracles.prefill(*args, **options)

    return run


def assert_same(cascade: RankKVCache, reference: RankKVCache) -> None:
    assert cascade.budgets_per_row == reference.budgets_per_row
    assert cascade.kept_lengths == reference.kept_lengths
    for layer_idx in cascade.layer_indices:
        assert oracles.kept_positions(cascade, layer_idx) == oracles.kept_positions(reference, layer_idx)


MEASURED = [name for name, strategy in STRATEGIES.items() if strategy.measure is not None]


# The one decides how much a layer keeps and the other what: each is crossed with a few of the other kind.
PAIRS = sorted(
    {
        *((name, "snapkv") for name in MEASURED),
        *(("power", name) for name in oracles.ONE_PASS),
        ("cake", "h2o"),
    }
)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("strategy", "selector"), PAIRS)
def test_cascade_equals_one_shot(model, one_shot, strategy, selector, seed):
    prompt = oracles.random_prompt(100 + 17 * seed, seed)
    options = {"strategy": strategy, "selector": selector, "compression_ratio": (0.2, 0.35, 0.6)[seed]}
    assert_same(oracles.prefill(model, prompt, **options), one_shot(model, prompt, **options))


@pytest.mark.parametrize("min_budget", [1, 2, 5])
@pytest.mark.parametrize("selector", oracles.ONE_PASS)
def test_cascade_with_a_low_floor(model, one_shot, selector, min_budget):
    # Exponent 16 drives most layers down to the floor, and the bounds with them.
    for seed in range(3):
        options = {
            "budget": 11 + seed,
            "min_budget": min_budget,
            "selector": selector,
            "strategy": "power",
            "strategy_options": {"exponent": 16.0},
        }
        prompt = oracles.random_prompt(90, seed)
        assert_same(oracles.prefill(model, prompt, **options), one_shot(model, prompt, **options))


@pytest.mark.parametrize("min_budget", [1, 5, None])
@pytest.mark.parametrize("selector", oracles.ONE_PASS)
def test_cascade_of_a_padded_batch(model, one_shot, selector, min_budget):
    for seed in range(2):
        ids, mask = oracles.left_pad([oracles.random_prompt(n, seed + n) for n in (110, 20, 63)])
        options = {"compression_ratio": 0.3, "min_budget": min_budget, "selector": selector}
        assert_same(oracles.prefill(model, ids, mask, **options), one_shot(model, ids, mask, **options))


@pytest.mark.parametrize("recent_fraction", [0.0, 0.5, 1.0])
def test_cascade_with_a_recent_fraction(model, one_shot, recent_fraction):
    selector = get_selector("h2o", recent_fraction=recent_fraction)
    for min_budget in (1, 7):
        options = {"budget": 15, "min_budget": min_budget, "selector": selector}
        prompt = oracles.random_prompt(90, 3)
        assert_same(oracles.prefill(model, prompt, **options), one_shot(model, prompt, **options))


@pytest.mark.parametrize("scope", ["full", "window", "evictable"])
def test_cascade_in_every_scope(model, one_shot, scope):
    prompt = oracles.random_prompt(90, 4)
    assert_same(
        oracles.prefill(model, prompt, scope=scope, min_budget=2),
        one_shot(model, prompt, scope=scope, min_budget=2),
    )


def record_peak(model, cache, prompt) -> int:
    """Return the most slots that all layers hold together after any layer's attention."""
    held = []
    hooks = [
        module.register_forward_hook(lambda *_: held.append(sum(cache.kept_lengths)))
        for module in oracles.attention_modules(model).values()
    ]
    try:
        oracles.forward(model, cache, prompt)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(held) == len(cache.layers)
    return max(held)


@pytest.mark.parametrize("strategy", [name for name, known in STRATEGIES.items() if known.layerwise])
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.6])
def test_peak_is_the_total_and_one_layer(tiny_llama, strategy, ratio):
    model, prompt = tiny_llama(12), oracles.random_prompt(400)
    cache = RankKVCache(model, ratio, strategy=strategy)
    # After its attention the newest layer is compressed already: the layer to come adds one prompt to this.
    peak = record_peak(model, cache, prompt)
    assert peak + 400 <= 1.05 * (sum(cache.budgets) + 400)


@pytest.mark.parametrize(("min_budget", "spare"), [(64, 0), (16, 1)])
def test_no_token_is_held_beyond_a_budget_that_protects_what_the_smallest_does(tiny_llama, min_budget, spare):
    model, prompt, held = tiny_llama(8), oracles.random_prompt(200), []
    cache = RankKVCache(model, budget=80, min_budget=min_budget, strategy="uniform")
    hook = oracles.attention_modules(model)[0].register_forward_hook(
        lambda *_: held.append(cache.kept_lengths[0])
    )
    try:
        oracles.forward(model, cache, prompt)
    finally:
        hook.remove()
    # Half of a budget below 64 protects fewer than 32 of the newest tokens, so one more has to wait for it.
    assert held == [80 + spare]
    assert cache.kept_lengths[0] == 80


def test_static_strategies_release_every_layer_at_once(tiny_llama):
    model, prompt = tiny_llama(8), oracles.random_prompt(200)
    cache = RankKVCache(model, 0.2, strategy="pyramid")
    assert record_peak(model, cache, prompt) <= sum(cache.budgets) + 2 * 8


def test_one_shot_strategies_hold_the_prompt_until_the_end(tiny_llama):
    # Said in the documentation: softmax, adaptive and inverse weigh a layer by those still to come.
    model, prompt = tiny_llama(6), oracles.random_prompt(120)
    cache = RankKVCache(model, 0.3, strategy="softmax")
    assert record_peak(model, cache, prompt) == 5 * 120
    assert np.isclose(sum(cache.budgets), 0.3 * 120 * 6, atol=1)
