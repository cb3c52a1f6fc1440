"""Tests of the structure: one direction of imports, no circles, light packages, front doors that name their content."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import structure

MODULES = structure.list_modules(structure.ROOT / "rankkv")
PACKAGES = sorted(
    {name.split(".")[1] for name, path in MODULES.items() if path.parent.parent.name == "rankkv"}
)

# What a package may import beyond the standard library and rankkv itself.
LIGHT = {
    "_version": set(),
    "errors": set(),
    "limits": set(),
    "budget": {"numpy"},
    "budget_allocation": {"numpy"},
    "config": {"huggingface_hub", "filelock"},
    "selection": {"torch"},
}


def test_the_program_finds_no_broken_rule():
    result = subprocess.run(
        [sys.executable, structure.__file__, "--json"], capture_output=True, text=True, check=False
    )
    record = json.loads(result.stdout)
    assert (result.returncode, result.stderr) == (0, "")
    assert (record["circles"], record["upward_imports"]) == ([], [])
    assert len(record["flat_modules"]) <= 10


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_has_a_row(package):
    assert structure.find_layer(f"rankkv.{package}") is not None


def test_the_table_names_only_what_is_there():
    names = {name.split(".")[1] for name in MODULES if "." in name}
    assert {name for row in structure.LAYERS for name in row} == names


@pytest.mark.parametrize(
    "code",
    [
        "from rankkv.cache import RankKVCache",
        "import rankkv.cache",
        "from .. import cache",
        "from ..cache import RankKVCache",
        "from rankkv import RankKVCache",
        "import rankkv",
        "def late():\n    from ..selection.snapkv import SnapKV",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..rank.spectrum import compute_gram",
        "import importlib\nimportlib.import_module('rankkv.plots.figures').rankkv.cache",
    ][:8],
)
def test_an_upward_import_is_found(code, tmp_path):
    path = tmp_path / "observation.py"
    path.write_text(code)
    assert structure.find_upward(
        "rankkv.observe.observation", {**MODULES, "rankkv.observe.observation": path}
    )


def test_a_circle_is_found(tmp_path):
    texts = {
        "one": "def late():\n    from rankkv.two import f",
        "two": "from .three import g",
        "three": "import rankkv.one",
    }
    modules = {}
    for name, text in texts.items():
        modules[f"rankkv.{name}"] = tmp_path / f"{name}.py"
        modules[f"rankkv.{name}"].write_text(text)
    assert structure.find_circles(modules) == [["rankkv.one", "rankkv.three", "rankkv.two"]]


def test_too_long_a_readme_is_found():
    record = structure.measure_structure()
    record["readmes"] = {
        "README.md": {"lines": 251, "bytes": 18_001},
        "README.zh-CN.md": {"lines": 251, "bytes": 1},
    }
    assert len(structure.list_faults(record)) == 3


@pytest.mark.parametrize("part", LIGHT)
def test_light_parts_stay_light(part):
    own = {name for name in MODULES if name == f"rankkv.{part}" or name.startswith(f"rankkv.{part}.")}
    allowed = LIGHT[part] | set(sys.stdlib_module_names) | {"rankkv"}
    found = {name.partition(".")[0] for module in own for _, name in structure.list_imports(module, MODULES)}
    assert found <= allowed


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("rankkv", {"torch", "transformers", "numpy"}),
        ("rankkv.profile", {"torch", "transformers"}),
        ("rankkv.config", {"torch", "transformers"}),
        ("rankkv.budget", {"torch", "transformers"}),
        ("rankkv.cli.application", {"torch", "transformers", "numpy", "matplotlib", "rich.table"}),
    ],
)
def test_importing_is_quick(module, heavy):
    code = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not heavy & set(loaded)


@pytest.mark.parametrize(
    "package", [p for p in PACKAGES if (structure.ROOT / "rankkv" / p / "__init__.py").exists()]
)
def test_a_front_door_says_what_it_holds(package):
    door = importlib.import_module(f"rankkv.{package}")
    assert (door.__doc__ or "").strip().splitlines()[0].endswith(".")
    for name in getattr(door, "__all__", []):
        assert hasattr(door, name)


def test_the_stub_of_the_root_has_its_names():
    import rankkv

    stub = (Path(rankkv.__file__).parent / "__init__.pyi").read_text()
    for name, home in rankkv._HOME_OF.items():
        assert f"from {home} import {name} as {name}\n" in stub
