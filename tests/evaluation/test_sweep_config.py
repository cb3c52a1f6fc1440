"""A sweep's YAML file: what it means, and what is said of one that means nothing."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from rankkv import RankKVConfig
from rankkv.errors import ConfigError, InputError
from rankkv.evaluation.sweep.config import parse_sweep_config, read_sweep_config
from rankkv.selection import SELECTORS

ROOT = Path(__file__).resolve().parents[2]
VALID = {
    "models": ["embedded", {"name": "some/model", "dtype": "bfloat16"}],
    "tasks": ["perplexity", {"task": "needle", "lengths": [512, 1024], "count": 3, "digits": 6}],
    "selectors": ["snapkv", {"name": "h2o", "recent_fraction": 0.5}],
    "allocations": [
        "uniform",
        "default",
        {"name": "square", "strategy": "power", "strategy_options": {"exponent": 2}},
    ],
    "methods": [{"name": "recent", "selector": "streaming_llm", "allocation": "uniform", "sink_size": 8}],
    "ratios": [0.1, 0.5],
    "seeds": [0, 7],
}


def test_selectors_and_allocations_are_crossed_and_methods_added():
    config = parse_sweep_config(VALID)
    assert [method.name for method in config.methods] == [
        "snapkv + uniform", "snapkv + default", "snapkv + square",
        "h2o(recent_fraction=0.5) + uniform", "h2o(recent_fraction=0.5) + default", "h2o(recent_fraction=0.5) + square",
        "recent",
    ]  # fmt: skip
    assert config.setting_count == len(config.list_settings()) == 14
    options = {method.name: method.build_options(0.1) for method in config.methods}
    assert options["snapkv + uniform"] == {
        "strategy": "uniform", "selector": SELECTORS["snapkv"], "compression_ratio": 0.1,
    }  # fmt: skip
    default = RankKVConfig(profile=None).resolve_strategy()
    assert RankKVConfig(**options["snapkv + default"]).resolve_strategy() == default
    assert RankKVConfig(**options["snapkv + square"]).resolve_strategy() == ("power", {"exponent": 2})
    assert options["h2o(recent_fraction=0.5) + uniform"]["selector"].recent_fraction == 0.5
    assert options["recent"]["sink_size"] == 8
    assert (config.tasks[1].label, config.tasks[1].options) == ("needle", {"digits": 6})
    assert (config.models[1].dtype, config.seeds, config.blank) == ("bfloat16", (0, 7), True)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("ratios", [0.1, 1.5], r"ratios\[1\] is 1.5 but must be a number in \(0, 1\]"),
        ("ratios", ["0.1"], r"ratios\[0\] is '0.1'"),
        ("ratios", [0.1, 0.1], "ratios holds 0.1 twice"),
        ("ratios", 0.1, "ratios is 0.1 but must be a list"),
        ("ratios", None, "ratios is None but must be a list"),
        ("seeds", [-1], r"seeds\[0\] is -1 but must be an integer of at least 0"),
        ("models", [{"dtype": "bfloat16"}], r"models\[0\] is .* without a name"),
        ("models", [{"name": "a", "device": "cuda"}], r"models\[0\] has the unknown key 'device'; known: name, dtype"),
        ("tasks", ["nedle"], r"tasks\[0\].task: unknown task 'nedle'; did you mean 'needle'"),
        ("tasks", [{"task": "needle", "count": 0}], r"tasks\[0\].count is 0 but must be an integer of at least 1"),
        ("tasks", [{"task": "needle", "lengths": []}], r"tasks\[0\].lengths is \[\] but must be a list"),
        ("tasks", ["needle", "needle"], "tasks holds 'needle' twice: give each a different label"),
        ("tasks", [{"task": "needle", "data": "a.jsonl"}], "has task and data: give one of them"),
        ("tasks", [{"data": "a.jsonl", "limit": 3}], r"tasks\[0\] has the unknown key 'limit'; known: data, label"),
        ("tasks", [{"data": "a.jsonl", "max_length": 0}], r"tasks\[0\].max_length is 0"),
        ("tasks", [{"harness": 3}], r"tasks\[0\].harness is 3"),
        ("selectors", ["snapvk"], "snapvk.*did you mean 'snapkv'"),
        ("selectors", [{"name": "h2o", "pooling": "avg"}], "pooling"),
        ("allocations", ["unifrom"], "unifrom.*did you mean 'uniform'"),
        ("allocations", [{"name": "power", "compression_ratio": 0.5}], "unknown option compression_ratio=0.5"),
        ("methods", [{"name": "x", "window_size": 0}], "'x' at ratio 0.1: window_size"),
        ("methods", [{"name": "x", "prefill": "chunked"}], "prefill='chunked'.*must have 'single'"),
        ("blank", "yes", "blank is 'yes' but must be true or false"),
        ("rations", [0.1], "unknown key 'rations'; known: models, tasks"),
    ],
)  # fmt: skip
def test_every_error_names_key_value_and_remedy(key, value, message):
    record = copy.deepcopy(VALID) | {key: value}
    with pytest.raises(ConfigError, match=message):
        parse_sweep_config(record)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("ratios: [0.1\n", InputError, "is not valid YAML.*line"),
        ("ratios: [0.1]\nratios: [0.2]\n", ConfigError, "has 'ratios' twice"),
        ("- 1\n", ConfigError, "must be a mapping"),
        ("tasks: [needle]\nratios: [0.1]\n", ConfigError, "the sweep has no method: give selectors and allocations"),
        ("selectors: [snapkv]\ntasks: [needle]\nratios: [0.1]\n", ConfigError, "allocations is missing"),
    ],
)  # fmt: skip
def test_files_that_are_no_sweep(tmp_path, text, error, message):
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    with pytest.raises(error, match=message) as caught:
        read_sweep_config(path)
    assert "sweep.yaml" in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        read_sweep_config(tmp_path / "nowhere.yaml")


def test_the_shipped_example_has_three_methods_three_ratios_two_tasks():
    config = read_sweep_config(ROOT / "experiments" / "sweep.yaml")
    assert (len(config.methods), len(config.ratios), len(config.tasks)) == (3, 3, 2)
    assert {task.text for task in config.tasks} == {"python-docs"}
    assert [model.name for model in config.models] == ["embedded"]


MERGED = """
tasks:
  - &short {task: needle, lengths: [512], count: 3}
  - <<: *short
    label: long
    lengths: [1024]
selectors: [snapkv]
allocations: [uniform]
ratios: [0.1]
"""


def test_merge_keys_are_supported(tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(MERGED)
    tasks = read_sweep_config(path).tasks
    assert [(task.label, task.lengths, task.count) for task in tasks] == [
        ("needle", (512,), 3),
        ("long", (1024,), 3),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: " + "[" * 50_000, "nested too deeply"),
        ("a: &a [*a]", "a value inside itself"),
        ("\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" if i else "a0: &a0 [1]" for i in range(12)),
         "more than 100,000 values"),
        ("a: 2001-99-99", "is not valid YAML"),
        ("a: !!int x", "is not valid YAML"),
        ("a: " + "x" * 2**21, "bytes but must have at most 1,048,576"),
    ],
    ids=["deep", "loop", "aliases", "date", "tag", "long"],
)  # fmt: skip
def test_yaml_that_cannot_be_built_is_one_sentence(tmp_path, text, message):
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_sweep_config(path)
    assert len(str(caught.value)) < 600


def test_an_error_does_not_repeat_the_whole_file(tmp_path):
    path = tmp_path / "prose.yaml"
    path.write_text("word " * 10_000)
    with pytest.raises(ConfigError) as caught:
        read_sweep_config(path)
    assert len(str(caught.value)) < 400


def test_the_seed_of_a_sweep_that_names_none_is_zero():
    config = parse_sweep_config(
        {"tasks": [{"task": "needle"}], "selectors": ["snapkv"], "allocations": ["uniform"], "ratios": [0.3]}
    )
    assert config.seeds == (0,)
