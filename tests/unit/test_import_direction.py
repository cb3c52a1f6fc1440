"""Imports go one way: observe, rank, budget, select, cache, and what stands on top of them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import rankkv

PACKAGE = Path(rankkv.__file__).parent

# A module imports only modules of a lower rank. An entry covers all inside it, which may import each other.
RANKS = {
    "rankkv._version": 0,
    "rankkv.errors": 0,
    "rankkv.utils.files": 1,
    "rankkv.utils.registry": 1,
    "rankkv.config": 1,
    "rankkv.profile.record": 2,
    "rankkv.config": 3,
    "rankkv.models.compat": 1,
    "rankkv.utils.processes": 1,
    "rankkv.calibration.ray": 1,
    "rankkv.models.tensor_parallel": 2,
    "rankkv.models.placement": 1,
    # rank and budget: two pure lines that know nothing of each other
    "rankkv.rank.spectrum": 10,
    "rankkv.rank.aggregation": 11,
    "rankkv.rank_analysis": 12,
    "rankkv.budget.apportion": 10,
    "rankkv.budget.weights": 11,
    "rankkv.budget.weights": 11,
    "rankkv.budget.calibrated": 12,
    "rankkv.budget.distortion": 13,
    "rankkv.budget.heads": 13,
    "rankkv.budget.heads": 14,
    "rankkv.budget.strategies": 14,
    "rankkv.budget_allocation": 15,
    "rankkv.budget_allocation": 16,
    "rankkv.budget.plan": 17,
    "rankkv.profile.known": 16,
    # from the model to the cache
    "rankkv.observe.block_masks": 10,
    "rankkv.observe.call": 20,
    "rankkv.observe.observation": 20,
    "rankkv.observe.output_projection": 20,
    "rankkv.observe.rotary": 19,
    "rankkv.observe.call": 21,
    "rankkv.rank.observed_layer": 21,
    "rankkv.rank.observed_layer": 22,
    "rankkv.rank.measures": 23,
    "rankkv.observe.hidden_states": 20,
    "rankkv.observe.queries": 21,
    "rankkv.observe.queries": 21,
    "rankkv.selection": 30,
    "rankkv.cache.masks": 39,
    "rankkv.observe.hook": 40,
    "rankkv.cache.layer": 50,
    "rankkv.cache.storage": 49,
    "rankkv.cache.merging": 49,
    "rankkv.cache.storage": 50,
    "rankkv.cache.layer": 51,
    "rankkv.cache.masks": 51,
    "rankkv.cache.head_budget_layer": 52,
    "rankkv.cache.report": 51,
    "rankkv.cache.compressor": 51,
    "rankkv.cache.saving": 52,
    "rankkv.cache.schedule": 52,
    "rankkv.cache.cache": 53,
    "rankkv.cache.cache": 54,
    # the users of the line
    "rankkv.cache.prefill": 60,
    "rankkv.cache.kept_tokens": 60,
    "rankkv.models.prompts": 61,
    "rankkv.cli.methods": 60,
    "rankkv.analysis.measuring_cache": 60,
    "rankkv.calibration.query_filters": 61,
    "rankkv.pipeline": 61,
    "rankkv.cli.check": 61,
    "rankkv.analysis.samples": 62,
    "rankkv.calibration.settings": 2,
    "rankkv.calibration.progress": 2,
    "rankkv.calibration.single_runs": 70,
    "rankkv.calibration.gradient": 71,
    "rankkv.calibration.calibrate": 72,
    "rankkv.calibration.ray": 73,
    # loading knows nothing of compression
    "rankkv.utils.hub": 1,
    "rankkv.models.checkpoints": 1,
    "rankkv.models.embedded": 2,
    "rankkv.models.loading": 3,
    "rankkv.models.texts": 3,
    "rankkv.cache.kept_tokens": 3,
    # on top
    "rankkv.evaluation": 70,
    "rankkv.plots": 70,
    "rankkv.integrations": 70,
    "rankkv.report": 75,
    "rankkv.cli": 80,
    "rankkv.__main__": 81,
}
# `import rankkv` gives every public name, so it counts as the highest module that defines one.
ROOT_RANK = max(RANKS[home] for home in rankkv._HOME_OF.values())

# The ways up: `RankKVResult.plot()` and `RankProfile.calibrate()` look up by name when they are called.
UPWARD_BY_NAME = {
    ("rankkv.pipeline", "rankkv.plots.figures"),
    ("rankkv.profile.record", "rankkv.calibration.calibrate"),
}

# What a module may import beyond the standard library and rankkv itself.
PURE = {
    "rankkv._version": set(),
    "rankkv.errors": set(),
    "rankkv.rank.spectrum": {"torch"},
    "rankkv.rank.aggregation": {"torch"},
    "rankkv.rank_analysis": {"torch", "tqdm"},
    "rankkv.budget.apportion": {"numpy"},
    "rankkv.budget.weights": {"numpy"},
    "rankkv.budget.weights": {"numpy"},
    "rankkv.budget.strategies": {"numpy"},
    "rankkv.budget.calibrated": {"numpy"},
    "rankkv.budget.distortion": {"numpy"},
    "rankkv.budget.heads": {"numpy"},
    "rankkv.budget_allocation": set(),
    "rankkv.budget_allocation": {"numpy"},
    "rankkv.budget.plan": {"numpy"},
    "rankkv.selection": {"torch"},
}


def list_modules() -> dict[str, Path]:
    modules = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


MODULES = list_modules()


def entry_of(module: str, table: dict[str, object]) -> str | None:
    """Return the entry that covers a module: its own name, else that of the nearest package above it."""
    while module not in table and "." in module:
        module = module.rpartition(".")[0]
    return module if module in table else None


def list_imports(module: str) -> Iterator[tuple[int, str]]:
    """Yield line and absolute name of all that a module imports, in functions and for type checkers too."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant) and (module, argument.value) not in UPWARD_BY_NAME:
                    yield node.lineno, str(argument.value)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                if full in MODULES:
                    yield node.lineno, full
                elif base == "rankkv":
                    homes = {"__version__": "rankkv._version"} | rankkv._HOME_OF
                    yield node.lineno, homes.get(alias.name, "rankkv")
                else:
                    yield node.lineno, base


def find_faults(module: str) -> list[str]:
    own = entry_of(module, RANKS)
    if own is None:
        return [f"{module} has no rank: give it a row in RANKS"]
    faults = []
    for line, name in list_imports(module):
        if name != "rankkv" and not name.startswith("rankkv."):
            continue
        other = "rankkv" if name == "rankkv" else entry_of(name, RANKS)
        if other is None:
            faults.append(f"line {line}: {name} has no rank: give it a row in RANKS")
        elif other != own and (ROOT_RANK if other == "rankkv" else RANKS[other]) >= RANKS[own]:
            faults.append(f"line {line}: {module} must not import {name}, which does not stand below it")
    return faults


@pytest.mark.parametrize("module", [name for name in MODULES if name != "rankkv"])
def test_nothing_imports_upward(module: str) -> None:
    assert find_faults(module) == []


@pytest.mark.parametrize("module", [name for name in MODULES if entry_of(name, PURE)])
def test_pure_modules_stay_pure(module: str) -> None:
    import sys

    allowed = PURE[entry_of(module, PURE) or ""] | set(sys.stdlib_module_names) | {"rankkv"}
    foreign = {name for _, name in list_imports(module) if name.partition(".")[0] not in allowed}
    assert not foreign, f"{module} may import only {sorted(PURE[entry_of(module, PURE) or ''])}"


def test_front_imports_only_the_version_at_run_time() -> None:
    tree = ast.parse(MODULES["rankkv"].read_text(encoding="utf-8"))
    imported = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    assert imported <= {"__future__", "importlib", "typing", "rankkv._version"}


def test_table_has_no_row_for_what_is_gone() -> None:
    planned = {"rankkv.evaluation"}
    assert set(RANKS) - planned <= set(MODULES)


def test_a_fault_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rules above catch an upward import in each way it can be written."""
    for number, code in enumerate(
        (
            "from rankkv.cache.cache import RankKVCache",
            "import rankkv.cache.cache",
            "from . import cache",
            "from .cache import RankKVCache",
            "from rankkv import RankKVCache",
            "import rankkv",
            "def late():\n    from .selection.snapkv import SnapKV",
            "from rankkv import attention",
            "import importlib\nimportlib.import_module('rankkv.plots.figures')",
        )
    ):
        path = tmp_path / f"case{number}.py"
        path.write_text(code)
        monkeypatch.setitem(MODULES, "rankkv.observe.observation", path)
        assert find_faults("rankkv.observe.observation"), code
