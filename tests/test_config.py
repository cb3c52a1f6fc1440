"""Options are checked once, before any model runs, and each message names value, bound and remedy."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math

import pytest

from rankkv import RankKVCache, RankKVConfig
from rankkv.config import check_compression_ratio
from rankkv.errors import ConfigError, UnknownNameError
from rankkv.selection import get_selector


@pytest.mark.parametrize("ratio", [1e-9, 0.3, 1, 1.0])
def test_ratios_inside_the_range(ratio):
    assert check_compression_ratio(ratio) == float(ratio)
    assert type(check_compression_ratio(ratio)) is float


@pytest.mark.parametrize("ratio", [0, 0.0, -0.1, 1.0001, 30, math.nan, math.inf, True, "0.3", None])
def test_ratios_outside_the_range_say_what_the_number_means(ratio):
    with pytest.raises(
        ConfigError, match=r"outside \(0, 1\].*fraction of the KV cache that is kept.*kvpress"
    ):
        RankKVConfig(compression_ratio=ratio)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "budget=0 must be an integer of at least 1"),
        ({"budget": 2.5}, "budget=2.5 must be an integer"),
        ({"budget": True}, "budget=True must be an integer"),
        ({"window_size": 0}, "window_size=0 must be an integer of at least 1"),
        ({"sink_size": -1}, "sink_size=-1 must be an integer of at least 0"),
        ({"min_budget": 0}, "min_budget=0 must be an integer of at least 1"),
    ],
)
def test_integers_outside_their_range(options, message):
    with pytest.raises(ConfigError, match=message):
        RankKVConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"scope": "evictabel"},
            r"unknown scope 'evictabel'; did you mean 'evictable'\? Known: evictable, full",
        ),
        ({"decode": "grows"}, r"decode mode 'grows'; did you mean 'grow'"),
        ({"positions": "orginal"}, r"positions mode 'orginal'; did you mean 'original'"),
        ({"prefill": "singel"}, r"prefill mode 'singel'; did you mean 'single'"),
    ],
)
def test_names_that_are_not_registered(options, message):
    with pytest.raises(UnknownNameError, match=message):
        RankKVConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "powr"}, "strategy 'powr'; did you mean 'power'"),
        ({"selector": "snapvk"}, "selector 'snapvk'; did you mean 'snapkv'"),
        ({"aggregation": "conct"}, "aggregation 'conct'; did you mean 'concat'"),
    ],
)
def test_a_cache_of_unknown_names_is_refused_at_construction(tiny_llama, options, message):
    with pytest.raises(UnknownNameError, match=message):
        RankKVCache(tiny_llama(), **options)


def test_config_is_frozen_and_takes_no_later_change():
    given = {"exponent": 2.0}
    config = RankKVConfig(strategy_options=given)
    given["exponent"] = 9.0
    assert config.strategy_options == {"exponent": 2.0}
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.budget = 3
    with pytest.raises(TypeError):
        config.strategy_options["exponent"] = 3.0


def test_default_strategy():
    assert RankKVConfig().resolve_strategy() == ("distortion", {})
    options = {"rank_exponent": 1.0}
    assert RankKVConfig(strategy_options=options).resolve_strategy() == ("distortion", options)
    assert RankKVConfig(strategy="power").resolve_strategy() == ("power", {})
    assert RankKVConfig(strategy="pyramid").resolve_strategy() == ("pyramid", {})


def test_to_dict_is_json_and_builds_the_same_config():
    config = RankKVConfig(
        0.2, selector=get_selector("snapkv", pooling="avg"), strategy_options={"exponent": 2}
    )
    record = json.loads(json.dumps(config.to_dict()))
    assert record["selector"] == "snapkv(pooling='avg')"
    plain = RankKVConfig(0.2, strategy_options={"exponent": 2})
    assert RankKVConfig(**plain.to_dict()).to_dict() == plain.to_dict()


def test_the_cache_takes_the_options_of_the_config_with_the_same_defaults():
    parameters = inspect.signature(RankKVCache.__init__).parameters
    taken = {
        name: item.default for name, item in parameters.items() if name not in ("self", "model", "config")
    }
    defaults = {item.name: item.default for item in dataclasses.fields(RankKVConfig)}
    assert defaults["selector"] == "auto"
    # A cache that generate() fills has the question in its prompt.
    assert taken == {**defaults, "selector": "snapkv"}


def test_the_cache_passes_every_option_on(tiny_llama):
    """Every option differs from its default, except those that another one replaces."""
    options = {
        "compression_ratio": 0.5,
        "budget": 40,
        "selector": "h2o",
        "strategy": "power",
        "scope": "window",
        "aggregation": "mean",
        "strategy_options": {"exponent": 2.0},
        "window_size": 8,
        "sink_size": 2,
        "decode": "periodic",
        "decode_interval": 16,
        "positions": "packed",
        "prefill": "chunked",
        "recompress_turns": True,
        "storage": "int8",
        "profile": None,
        "min_budget": 20,
        "head_budgets": None,
        "head_floor": 0.5,
        "protect": [(0, 12)],
    }
    assert RankKVCache(tiny_llama(), **options).config == RankKVConfig(**options)


def test_a_config_stands_for_all_options(tiny_llama):
    model = tiny_llama()
    config = RankKVConfig(0.2, selector="h2o", window_size=8)
    used = RankKVCache(model, config=config).config
    assert used == dataclasses.replace(config, head_budgets="distortion")
    assert RankKVCache(model, config=used).config is used
    with pytest.raises(ConfigError, match=r"either config=.* or single options"):
        RankKVCache(model, 0.5, config=config)
