"""Print the structure of the package: flat modules, import circles, upward imports, the longest file, README size.

Run it from anywhere: ``python tools/structure.py`` (``--json`` for a record).  The exit status is 1 where a rule is
broken.  ``LAYERS`` is the only table of the direction of imports, and ``tests/test_structure.py`` runs this file.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

# A package imports packages of lower rows only. Names of one row know nothing of each other.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("_version", "errors"),
    ("utils", "limits"),
    ("models", "plots"),
    ("profile",),
    ("config",),
    ("observe",),
    ("rank", "budget"),
    ("selection",),
    ("cache",),
    ("calibration", "analysis"),
    ("rank_analysis", "budget_allocation"),
    ("pipeline",),
    ("integrations", "evaluation", "serving"),
    ("report",),
    ("cli",),
    ("__main__",),
)
# `RankProfile.calibrate` asks the root, which resolves names on use, for the function that stands above it.
ASKS_THE_ROOT = {"rankkv.profile.record"}
README_LINES, README_BYTES = 250, 18_000


def list_modules(package: Path) -> dict[str, Path]:
    """List the modules of a package by their dotted names."""
    modules = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def list_imports(module: str, modules: dict[str, Path]) -> Iterator[tuple[int, str]]:
    """Yield line and absolute name of all that a module imports: in functions and for type checkers too."""
    path = modules[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
            yield from ((node.lineno, str(a.value)) for a in node.args[:1] if isinstance(a, ast.Constant))
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield node.lineno, full if full in modules else base


def find_layer(name: str) -> int | None:
    """Return the row of a module's package in ``LAYERS``; None for a name that has none."""
    part = name.removeprefix("rankkv.").partition(".")[0]
    return next((row for row, names in enumerate(LAYERS) if part in names), None)


def find_upward(module: str, modules: dict[str, Path]) -> list[str]:
    """Describe the imports of a module that do not go down."""
    if module == "rankkv":
        return []
    own = find_layer(module)
    if own is None:
        return [f"{module} has no row in LAYERS"]
    faults = []
    for line, name in list_imports(module, modules):
        if name == "rankkv":
            if module not in ASKS_THE_ROOT:
                faults.append(f"{module}:{line} imports the root; import the module that defines the name")
        elif name.startswith("rankkv."):
            other = find_layer(name)
            same = name.split(".")[1] == module.split(".")[1]
            if other is None:
                faults.append(f"{module}:{line} imports {name}, which has no row in LAYERS")
            elif other >= own and not same:
                faults.append(f"{module}:{line} imports {name}, which does not stand below it")
    return faults


def find_circles(modules: dict[str, Path]) -> list[list[str]]:
    """Find the groups of modules that import each other in a loop.

    A front door (``__init__.py``) hands names on: it counts as importing them, and a module inside its own package does
    not count as importing the door.
    """
    arrows: dict[str, set[str]] = {}
    for module in modules:
        found = {name for _, name in list_imports(module, modules) if name in modules and name != "rankkv"}
        arrows[module] = found - {module}
    order: list[str] = []
    seen: set[str] = set()

    def visit(start: str, graph: dict[str, set[str]], out: list[str]) -> None:
        stack = [(start, iter(sorted(graph[start])))]
        seen.add(start)
        while stack:
            node, rest = stack[-1]
            for other in rest:
                if other not in seen:
                    seen.add(other)
                    stack.append((other, iter(sorted(graph[other]))))
                    break
            else:
                stack.pop()
                out.append(node)

    for module in arrows:
        if module not in seen:
            visit(module, arrows, order)
    backward: dict[str, set[str]] = {module: set() for module in arrows}
    for module, others in arrows.items():
        for other in others:
            backward[other].add(module)
    seen.clear()
    circles = []
    for module in reversed(order):
        if module not in seen:
            group: list[str] = []
            visit(module, backward, group)
            if len(group) > 1:
                circles.append(sorted(group))
    return circles


def measure_structure(root: Path = ROOT) -> dict[str, Any]:
    """Measure everything that this program prints."""
    modules = list_modules(root / "rankkv")
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in modules.items()}
    longest = max(lines, key=lambda name: lines[name])
    readmes = {}
    for path in sorted(root.glob("README*.md")):
        data = path.read_bytes()
        readmes[path.name] = {"lines": data.count(b"\n"), "bytes": len(data)}
    return {
        "modules": len(modules),
        "flat_modules": sorted(name for name, path in modules.items() if path.parent == root / "rankkv"),
        "circles": find_circles(modules),
        "upward_imports": [fault for module in modules for fault in find_upward(module, modules)],
        "longest_file": {"module": longest, "lines": lines[longest]},
        "readmes": readmes,
    }


def list_faults(record: dict[str, Any]) -> list[str]:
    """List the rules that a record breaks, one sentence each."""
    faults = [f"circle: {', '.join(circle)}" for circle in record["circles"]] + record["upward_imports"]
    for name, size in record["readmes"].items():
        if size["lines"] > README_LINES:
            faults.append(f"{name} has {size['lines']} lines; {README_LINES} are the most")
        # A Chinese character takes three bytes, so the bound on bytes holds for the English text.
        if name == "README.md" and size["bytes"] > README_BYTES:
            faults.append(f"{name} has {size['bytes']} bytes; {README_BYTES} are the most")
    return faults


def main() -> int:
    """Print the record and the broken rules."""
    record = measure_structure()
    if "--json" in sys.argv[1:]:
        print(json.dumps(record, indent=2))
    else:
        print(f"modules             {record['modules']}")
        print(f"flat modules        {len(record['flat_modules'])}: {', '.join(record['flat_modules'])}")
        print(f"import circles      {len(record['circles'])}")
        print(f"upward imports      {len(record['upward_imports'])}")
        print(
            f"longest file        {record['longest_file']['module']}, {record['longest_file']['lines']} lines"
        )
        for name, size in record["readmes"].items():
            print(f"{name:<19} {size['lines']} lines, {size['bytes']} bytes")
    faults = list_faults(record)
    for fault in faults:
        print(f"broken: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
