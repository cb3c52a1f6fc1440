"""A method from outside the package: one file and one line, and it does all that the package's own do."""

from __future__ import annotations

import importlib.util
import json

import oracles
import pytest
import test_budget_laws as budget_laws
from selector_conformance import CHECKS
from typer.testing import CliRunner

from rankkv import BudgetAllocator, RankKVAnalyzer, RankKVCache
from rankkv.budget.strategies import Strategy
from rankkv.budget_allocation import STRATEGIES, register_strategy, unregister_strategy
from rankkv.cli import app
from rankkv.errors import ConfigError, UnknownNameError
from rankkv.rank.measures import register_measure, unregister_measure
from rankkv.selection import SELECTORS, Selector, get_selector, register_selector, unregister_selector

TOY = '''
"""A method somebody wrote: one function and one line."""
from rankkv.selection import Selector, register_selector


def score_vnorm(observation, power=1.0):
    """Score each key by the norm of its value.

    Returns
    -------
    Tensor
        ``[batch, kv_head, key]``.
    """
    return observation.values.float().norm(dim=-1) ** power


register_selector(Selector("vnorm", score_vnorm, "keys and values", "a toy", "O(keys)", step="rescore"))
'''


@pytest.fixture
def toy(tmp_path):
    """Import the toy's file, as a user's program would, and forget it afterwards."""
    path = tmp_path / "vnorm.py"
    path.write_text(TOY)
    spec = importlib.util.spec_from_file_location("vnorm", path)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    yield "vnorm"
    unregister_selector("vnorm")


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("family", ["llama", "neox"])
def test_a_toy_method_passes_the_conformance_suite(toy, tiny_llama, tiny_neox, family, check):
    model = {"llama": tiny_llama, "neox": tiny_neox}[family]()
    CHECKS[check](toy, model)


def test_a_toy_method_is_known_everywhere(toy, tiny_llama, tmp_path):
    assert get_selector(toy, power=2.0).options == {"power": 2.0}
    assert get_selector("chunkkv", base=toy).needs == "keys and values"
    listed = json.loads(CliRunner().invoke(app, ["methods", "--json"]).stdout)["selectors"]
    assert listed[-1]["name"] == toy
    assert listed[-1]["description"] == "Score each key by the norm of its value."
    model = tiny_llama()
    cache = oracles.prefill(model, oracles.random_prompt(60), selector=toy, strategy="pyramid")
    restored = RankKVCache.load(cache.save(tmp_path / "cache.safetensors"), model)
    assert restored.selector == cache.selector


def test_a_law_that_a_method_breaks_is_found(toy, tiny_llama, monkeypatch):
    """The suite tells a wrong method from a right one: this one looks at other rows, and at padding."""

    def score_all(observation):
        """Score all keys of a batch together."""
        values = observation.values.float()
        return (values / values.norm()).sum(dim=-1)

    monkeypatch.setitem(SELECTORS, toy, Selector(toy, score_all, "keys and values", "a toy", "O(keys)"))
    for check in ("entry", "padding", "neighbours"):
        with pytest.raises(AssertionError):
            CHECKS[check](toy, tiny_llama())


def test_what_cannot_be_registered_is_refused(toy):
    good = SELECTORS[toy]
    for selector, message in (
        (good, "a selector named 'vnorm' is already registered"),
        (SELECTORS["snapkv"], "a selector named 'snapkv' is already registered"),
        (good.score, "is not a Selector"),
        (Selector("v norm", good.score, "nothing", "a toy"), "'v norm' must be a Python name"),
        (Selector("other", good.score, "something", "a toy"), "needs='something' .* must be one of: window"),
    ):
        with pytest.raises(ConfigError, match=message):
            register_selector(selector)
    for name in ("snapkv", "other"):
        with pytest.raises(UnknownNameError, match=f"unknown registered selector '{name}'"):
            unregister_selector(name)


@pytest.fixture
def strategy():
    """Register a strategy of one line."""
    register_strategy("squares", Strategy(lambda ranks: ranks**2, True, "weight = rank ** 2", "a toy"))
    yield "squares"
    unregister_strategy("squares")


def test_a_toy_strategy_obeys_the_laws_and_works_in_the_cache(strategy, tiny_llama):
    budget_laws.test_every_strategy_spends_the_total_exactly_within_bounds(name=strategy)
    budget_laws.test_layerwise_budgets_cascade(name=strategy)
    assert BudgetAllocator(strategy, min_budget=1).allocate([1, 2], total_budget=50).budgets == [10, 40]
    prompt, model = oracles.random_prompt(60), tiny_llama()
    ours, power = (
        oracles.prefill(model, prompt, strategy=name, strategy_options=options)
        for name, options in ((strategy, None), ("power", {"exponent": 2}))
    )
    assert ours.budgets == power.budgets


def test_what_is_no_new_strategy_is_refused(strategy):
    squares = STRATEGIES[strategy]
    for name, given, message in (
        (strategy, squares, "'squares' is already registered"),
        ("power", squares, "'power' is already registered"),
        ("my strategy", squares, "'my strategy' must be a Python name"),
        ("other", squares.function, "is not a Strategy"),
    ):
        with pytest.raises(ConfigError, match=message):
            register_strategy(name, given)
    for name in ("power", "other"):
        with pytest.raises(UnknownNameError, match=f"unknown registered strategy '{name}'"):
            unregister_strategy(name)


@pytest.fixture
def measure():
    """Register a measure of one line and a strategy that weighs by it."""
    register_measure(
        "newest", lambda observation, times=1.0: times * (1.0 + observation.window_attention[:, 0, -1, -1])
    )
    newest = Strategy(
        lambda measures, times=1.0: measures,
        True,
        "weight = attention of the newest token to itself",
        "a toy",
        "newest",
    )
    register_strategy("newest", newest)
    yield "newest"
    unregister_strategy("newest")
    unregister_measure("newest")


def test_a_toy_measure_works_in_cache_and_analyzer(measure, tiny_llama):
    model, prompt = tiny_llama(), oracles.random_prompt(60)
    cache = oracles.prefill(
        model, prompt, strategy=measure, strategy_options={"times": 3.0}, compression_ratio=0.5
    )
    layers = oracles.observe_layers(model, prompt)
    expected = [3 + 3 * float(layer.window_attention[0, 0, -1, -1]) for layer in layers]
    assert cache.layer_measures == pytest.approx(expected, rel=1e-5)
    assert cache.layer_ranks == []
    result = RankKVAnalyzer(model, strategy=measure, strategy_options={"times": 3.0}).analyze(
        prompt, compression_ratio=0.5
    )
    assert (result.layer_measures, result.budgets) == (cache.layer_measures, cache.budgets)
    allocation = BudgetAllocator(measure, min_budget=cache.plans[0].floor).allocate(expected, 90, seq_len=60)
    assert allocation.budgets == cache.budgets


def test_what_is_no_new_measure_is_refused(measure, tiny_llama):
    for name, given, message in (
        (measure, len, "'newest' is already registered"),
        ("other", 3, "3 is not callable"),
    ):
        with pytest.raises(ConfigError, match=message):
            register_measure(name, given)
    for name in ("cake", "other"):
        with pytest.raises(UnknownNameError, match=f"unknown registered measure '{name}'"):
            unregister_measure(name)
    unregister_measure(measure)
    with pytest.raises(UnknownNameError, match="unknown measure 'newest'"):
        RankKVCache(tiny_llama(), strategy=measure)
    register_measure(measure, len)
