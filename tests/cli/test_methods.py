"""The list of methods: in records, on the command line and in docs/choosing.md, always that of the registries."""

from __future__ import annotations

import inspect
import json
import re

import make_method_table
import pytest
from typer.testing import CliRunner

from rankkv.budget.strategies import PROFILE_STRATEGIES
from rankkv.budget_allocation import STRATEGIES
from rankkv.cli import app
from rankkv.cli.known import describe_methods
from rankkv.selection import SELECTORS, get_selector

KEYS = {"name", "options", "description", "needs", "cost", "source"}
#: What the field has, and this package therefore too.
EXPECTED = {
    "selectors": {
        "snapkv",
        "h2o",
        "streaming_llm",
        "tova",
        "knorm",
        "keydiff",
        "expected_attention",
        "lagkv",
        "cur",
        "lava",
        "criticalkv",
        "chunkkv",
        "random",
    },
    "strategies": {
        "uniform",
        "pyramid",
        "cake",
        "lava",
        "zigzagkv",
        "dynamickv",
        "distortion",
        "proportional",
        "softmax",
        "adaptive",
        "power",
        "inverse",
        "random",
    },
}


def test_records_are_those_of_the_registries():
    methods = describe_methods()
    assert [method["name"] for method in methods["selectors"]] == list(SELECTORS)
    assert [method["name"] for method in methods["strategies"]] == [*STRATEGIES, *PROFILE_STRATEGIES]
    for kind, expected in EXPECTED.items():
        assert expected <= {method["name"] for method in methods[kind]}
        for method in methods[kind]:
            assert set(method) == KEYS
            assert all(method[key] for key in KEYS - {"options"}), method


def test_options_are_those_that_the_method_takes():
    for method in describe_methods()["selectors"]:
        again = get_selector(method["name"], **method["options"])
        assert set(method["options"]) <= {*SELECTORS[method["name"]].option_names, "recent_fraction"}
        for name, value in method["options"].items():
            if name in inspect.signature(again.score).parameters:
                assert inspect.signature(again.score).parameters[name].default == value


def test_the_command_prints_them():
    shown = CliRunner().invoke(app, ["methods", "--json"])
    assert shown.exit_code == 0
    assert json.loads(shown.stdout) == json.loads(json.dumps(describe_methods()))
    text = CliRunner().invoke(app, ["methods"]).stdout
    for methods in describe_methods().values():
        for method in methods:
            assert re.search(rf"^ +{method['name']}$", text, re.MULTILINE)
            assert method["source"].split()[0] in text


@pytest.mark.parametrize("kind", ["selectors", "strategies"])
def test_the_page_shows_them(kind):
    text = make_method_table.PAGE.read_text(encoding="utf-8")
    assert make_method_table.make_table(kind) in text, "run python tools/make_method_table.py"
