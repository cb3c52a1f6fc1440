"""Change the package in one small way at a time, and count the changes that its tests notice.

``python tools/mutants.py`` copies the package and its tests to a temporary folder, applies one mutant after the other,
runs the tests named in ``TESTS`` with ``-x -m "not slow"``, and writes ``results/mutants.json``.  A later call goes on
where the record ends.  ``--again`` runs the survivors once more, after tests were added; ``--list`` only prints.

Mutants are drawn by a hash of their text, so the same code gives the same ones and an edit moves only its own.  A
mutant that changes no result is in ``EQUIVALENT`` with its reason and is not drawn.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import importlib
import json
import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "results" / "mutants.json"
PACKAGES = ("rank", "budget", "selection", "cache", "evaluation")
SEED, COUNT = "rankkv mutants 1", 27
#: At most this many mutants of one function, and of changed numbers in a package: most numbers are axes, whose change
#: crashes.
PER_FUNCTION, NUMBERS = 2, 6
#: A mutant that makes the tests take so many seconds, and so many times what they take without it, is noticed too: it
#: makes a loop endless.
LEAST_SECONDS, MORE_SECONDS = 60.0, 5.0

# The longest prefix of a module's path decides: tests run first, and those that survivors meet besides.
TESTS: dict[str, tuple[str, str]] = {
    "rank/": ("rank/test_rank_analysis", "rank/test_rank_laws rank/test_observed_layer rank/test_measures"),
    "rank/observed_layer": ("rank/test_observed_layer", "rank/test_measures rank/test_rank_laws"),
    "rank/measures": ("rank/test_measures", "budget/test_weights cache/test_cascade"),
    "budget/": (
        "budget/test_weights budget/test_heads budget/test_plan budget/test_budget_allocation",
        "profile/test_record cache/test_head_budgets budget/test_budget_laws",
    ),
    "budget/calibrated": ("profile/test_record", "budget/test_weights calibration/test_calibrate"),
    "selection/": (
        "selection/test_select selection/test_formulas",
        "selection/test_across_heads selection/test_wrapping selection/test_registering",
    ),
    "selection/q": ("selection/test_formulas", "utils/test_damaged_files"),
    "selection/c": ("selection/test_wrapping", "selection/test_formulas selection/test_select"),
    "cache/": (
        "cache/test_prefill evaluation/test_evaluation",
        "cache/test_operations cache/test_misuse cache/test_cascade cache/test_robustness cache/test_cache",
    ),
    "cache/kept_tokens": ("cache/test_kept_tokens", "cli/test_explain"),
    "cache/file_checks": ("cache/test_saving cache/test_damaged_files", "utils/test_damaged_files"),
    "cache/progress": ("cache/test_mixed_calls", "cache/test_misuse cache/test_robustness"),
    "cache/report": (
        "cache/test_report cache/test_cache",
        "cache/test_storage_modes cache/test_head_budgets",
    ),
    "cache/saving": ("cache/test_saving", "cache/test_written_before"),
    "cache/schedule": (
        "cache/test_prefill cache/test_operations",
        "cache/test_generation_ways cache/test_misuse",
    ),
    "cache/storage": ("cache/test_storage", "cache/test_storage_modes cache/test_head_budgets"),
    "cache/resolve": (
        "profile/test_record cache/test_head_budgets",
        "cache/test_cache",
    ),
    "evaluation/": ("evaluation/test_evaluation", "evaluation/test_tasks_on_caches"),
    "evaluation/comparison": ("evaluation/test_comparison", "evaluation/test_sweep"),
    "evaluation/lm_eval": ("evaluation/test_lm_eval", ""),
    "evaluation/results": ("evaluation/test_results", "evaluation/test_sweep"),
    "evaluation/settings": (
        "evaluation/test_comparison",
        "evaluation/test_tasks_on_caches cli/test_evaluate",
    ),
    "evaluation/statistics": ("evaluation/test_statistics", ""),
    "evaluation/sweep": ("evaluation/test_sweep_config evaluation/test_sweep", "report/test_report"),
    "evaluation/task_runner": ("evaluation/test_tasks_on_caches", ""),
    "evaluation/tasks": ("evaluation/test_tasks", "evaluation/test_tasks_on_caches"),
}

#: Where the code says that a number or a branch is for speed or memory alone, or a mutant meets no input:
#: (path, changed lines joined) to the reason.
EQUIVALENT: dict[tuple[str, str], str] = {
    (
        "rank/spectrum.py",
        "scaled = values / torch.where(largest >= 0, largest, 1.0)",
    ): "a matrix of zeros gives NaN here, which the last line replaces by 0",
    (
        "rank/spectrum.py",
        "together = max(1, min(flat.shape[0], elements // (rows / keys)))",
    ): "the number of matrices converted at a time: memory alone",
    (
        "rank/measures/base.py",
        "if columns.shape[1] >= 1:",
    ): "one column for all heads is repeated for each: the products are the same",
    (
        "rank/observed_layer.py",
        "if bool(torch.maximum((high + rank).abs(), (low - rank).abs()) <= SINGLE_TOLERANCE * rank):",
    ): "never true, so float64 decides: time alone",
    (
        "rank/observed_layer.py",
        "if bool(torch.maximum((high - rank).abs(), (low - rank).abs()) <= SINGLE_TOLERANCE / rank):",
    ): "a rank is at least 1, so this is stricter, and float64 decides more often: time alone",
    (
        "budget/distortion.py",
        "return errors.reshape(len(errors), -1).mean(axis=1)",
    ): "all weights times one number: only ratios count",
    (
        "evaluation/statistics.py",
        "if len(numbers) == 1 and np.ptp(numbers) == 0.0:",
    ): "the bootstrap of equal values gives that value too: time alone",
    (
        "selection/lagkv.py",
        "scores[..., first:] = torch.arange(tokens - first, device=scores.device) / max(2, tokens - first)",
    ): "differs for one token, whose number is 0",
}

#: Mutants chosen by hand: path, text, other text.  Each was once a hole in the tests.
BY_HAND: tuple[tuple[str, str, str], ...] = (
    ("evaluation/statistics.py", "wanted[draws].mean(axis=-1)", "wanted[draws[::-1]].mean(axis=-1)"),
    ("evaluation/statistics.py", "tail = (1.0 - confidence) / 2.0", "tail = 1.0 - confidence"),
    ("evaluation/prefill_record.py", "str(self._selector),", "self._selector.name,"),
    ("budget/plan.py", "self._lower[self._added] = self._upper[self._added] = share", "pass"),
    (
        "budget/plan.py",
        "self._lower[self._added] = self._upper[self._added] = share",
        "self._lower[self._added] = share",
    ),
    (
        "budget/distortion.py",
        "np.interp(np.log(budgets), np.log([*grid, length])",
        "np.interp(budgets, [*grid, length]",
    ),
)

_COMPARISONS: dict[type[ast.cmpop], tuple[str, ...]] = {
    ast.Lt: ("<=", ">="),
    ast.LtE: ("<", ">"),
    ast.Gt: (">=", "<="),
    ast.GtE: (">", "<"),
    ast.Eq: ("!=",),
    ast.NotEq: ("==",),
    ast.Is: ("is not",),
    ast.IsNot: ("is",),
    ast.In: ("not in",),
    ast.NotIn: ("in",),
}
_OPERATORS: dict[type[ast.operator], str] = {
    ast.Add: "-",
    ast.Sub: "+",
    ast.Mult: "/",
    ast.Div: "*",
    ast.FloorDiv: "*",
    ast.Mod: "+",
    ast.Pow: "*",
    ast.BitAnd: "|",
    ast.BitOr: "&",
}
_TWINS = [
    ("min", "max"),
    ("amin", "amax"),
    ("minimum", "maximum"),
    ("any", "all"),
    ("floor", "ceil"),
    ("sum", "mean"),
]
_NAMES = {one: other for pair in _TWINS for one, other in (pair, pair[::-1])} | {"mean": "sum"}
# Errors there are crashes that any call shows, or layout of an error's text.
_SKIPPED_KEYWORDS = {"dim", "axis", "keepdim", "stacklevel", "dtype", "strict", "repr", "frozen", "maxsize"}


@dataclass(frozen=True)
class Mutant:
    """One change: lines of a module from ``line`` on, and what stands there instead."""

    path: str
    function: str
    line: int
    change: str
    before: str
    after: str
    start: int
    stop: int
    new: str

    @property
    def is_number(self) -> bool:
        """True if a number is changed."""
        return self.change[0].isdigit()

    @property
    def name(self) -> str:
        """Key of the record; other lines of the module do not change it."""
        text = "\n".join((self.path, self.function, self.change, self.before, self.after))
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def find_mutants(path: Path, root: Path) -> Iterator[Mutant]:
    """Find every mutant of a module."""
    source = path.read_bytes()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def locate(node: Any) -> tuple[int, int]:
        return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset

    def make(function: str, start: int, stop: int, new: str, change: str) -> Mutant:
        first, last = source.rfind(b"\n", 0, start) + 1, source.find(b"\n", stop)
        before = source[first:last].decode()
        after = (source[first:start] + new.encode() + source[stop:last]).decode()
        line = source.count(b"\n", 0, start) + 1
        return Mutant(
            str(path.relative_to(root)),
            function,
            line,
            change,
            " ".join(before.split()),
            " ".join(after.split()),
            start,
            stop,
            new,
        )

    def replace_between(left: Any, right: Any, old: tuple[str, ...], new: str) -> tuple[int, int] | None:
        begin, end = locate(left)[1], locate(right)[0]
        gap = source[begin:end].decode()
        for word in old:
            if word in gap and "#" not in gap:
                at = begin + len(gap[: gap.index(word)].encode())
                return at, at + len(word)
        return None

    def visit(node: ast.AST, function: str) -> Iterator[Mutant]:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            function = f"{function}.{node.name}".lstrip(".")
        yield from mutate(node, function)
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns", "type_comment", "decorator_list", "bases"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST) and not _is_talk(child):
                    yield from visit(child, function)

    def mutate(node: ast.AST, function: str) -> Iterator[Mutant]:
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            for new in _COMPARISONS.get(type(node.ops[0]), ()):
                olds = {ast.IsNot: ("is not",), ast.NotIn: ("not in",), ast.Is: ("is",), ast.In: ("in",)}
                old = olds.get(type(node.ops[0])) or (_SYMBOLS[type(node.ops[0])],)
                where = replace_between(node.left, node.comparators[0], old, new)
                if where:
                    yield make(function, *where, new, f"{old[0]} -> {new}")
        elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            if not any(
                isinstance(side, ast.Constant | ast.JoinedStr) and _is_text(side)
                for side in (node.left, node.right)
            ):
                old = _SYMBOLS[type(node.op)]
                where = replace_between(node.left, node.right, (old,), "")
                if where:
                    yield make(
                        function, *where, _OPERATORS[type(node.op)], f"{old} -> {_OPERATORS[type(node.op)]}"
                    )
        elif isinstance(node, ast.BoolOp):
            old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
            where = replace_between(node.values[0], node.values[1], (old,), new)
            if where:
                yield make(function, *where, new, f"{old} -> {new}")
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub | ast.Invert):
            if isinstance(node.operand, ast.Constant):
                return
            start, _ = locate(node)
            stop, _ = locate(node.operand)
            if source[start:stop].strip() in (b"not", b"-", b"~"):
                yield make(function, start, stop, "", f"{source[start:stop].decode().strip()} dropped")
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float, bool):
            start, stop = locate(node)
            value = node.value
            new = repr(
                not value
                if isinstance(value, bool)
                else value + 1
                if type(value) is int
                else value * 2 or 1.0
            )
            yield make(function, start, stop, new, f"{value!r} -> {new}")
        elif isinstance(node, ast.Call):
            named = node.func
            name = named.id if isinstance(named, ast.Name) else getattr(named, "attr", "")
            if name in _NAMES and not (isinstance(named, ast.Name) and name == "sum"):
                _, stop = locate(named)
                yield make(function, stop - len(name), stop, _NAMES[name], f"{name} -> {_NAMES[name]}")
        elif isinstance(node, ast.IfExp):
            (a, b), (c, d) = locate(node.body), locate(node.orelse)
            middle = source[b:c].decode()
            new = source[c:d].decode() + middle + source[a:b].decode()
            yield make(function, a, d, new, "branches swapped")
        elif isinstance(node, ast.AugAssign) or (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
        ):
            start, stop = locate(node)
            yield make(function, start, stop, "pass", "statement dropped")
        elif isinstance(node, ast.Continue | ast.Break):
            start, stop = locate(node)
            new = "break" if isinstance(node, ast.Continue) else "continue"
            yield make(function, start, stop, new, f"-> {new}")

    yield from visit(ast.parse(source), "")


_SYMBOLS: dict[Any, str] = {
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.Div: "/",
    ast.FloorDiv: "//",
    ast.Mod: "%",
    ast.Pow: "**",
    ast.BitAnd: "&",
    ast.BitOr: "|",
}


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _is_talk(node: ast.AST) -> bool:
    """Return True for what only words an error, a warning or a text, and for options that say nothing of a result."""
    if isinstance(node, ast.Raise | ast.Import | ast.ImportFrom | ast.JoinedStr | ast.Assert):
        return True
    if isinstance(node, ast.keyword) and node.arg in _SKIPPED_KEYWORDS:
        return True
    value = node.value if isinstance(node, ast.Expr) else node
    return isinstance(value, ast.Call) and ast.unparse(value.func) in ("warnings.warn", "cast", "bar.close")


def draw_mutants(count: int) -> list[Mutant]:
    """Draw ``count`` mutants of each package, and add those chosen by hand."""
    drawn: list[Mutant] = []
    for package in PACKAGES:
        found = [
            mutant
            for path in sorted((ROOT / "rankkv" / package).rglob("*.py"))
            for mutant in find_mutants(path, ROOT / "rankkv")
        ]
        found.sort(key=lambda mutant: hashlib.sha256((SEED + mutant.name).encode()).hexdigest())
        functions: Counter[tuple[str, str]] = Counter()
        names: set[str] = set()
        numbers = 0
        for mutant in found:
            where = mutant.path, mutant.function
            same = (mutant.path, mutant.after) in EQUIVALENT or mutant.name in names
            if same or functions[where] >= PER_FUNCTION or len(names) >= count:
                continue
            numbers += mutant.is_number
            if mutant.is_number and numbers > NUMBERS:
                continue
            functions[where] += 1
            names.add(mutant.name)
            drawn.append(mutant)
    for path, old, new in BY_HAND:
        source = (ROOT / "rankkv" / path).read_text()
        if old not in source:
            raise SystemExit(f"{path} has no {old!r} any more: correct BY_HAND.")
        start = source.rindex(old)
        drawn.append(
            Mutant(
                path,
                "",
                source.count("\n", 0, start) + 1,
                "by hand",
                old,
                new,
                len(source[:start].encode()),
                len(source[: start + len(old)].encode()),
                new,
            )
        )
    return drawn


def find_tests(path: str) -> tuple[list[str], list[str]]:
    """Return the test files of a module: those run first, and those that survivors meet besides."""
    prefix = max((key for key in TESTS if path.startswith(key)), key=len)
    first, more = ([f"tests/{name}.py" for name in names.split()] for names in TESTS[prefix])
    return [f"rankkv/{path}", *first], more


class _Failures:
    """Note the tests that fail; draw no smaller example, which takes minutes and decides nothing."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def pytest_collection(self) -> None:
        from hypothesis import Phase, settings

        settings.register_profile("mutants", settings.default, phases=(Phase.explicit, Phase.generate))
        settings.load_profile("mutants")

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.names.append(report.nodeid)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.names.append(report.nodeid)


def _run_tests(copy: str, files: list[str], options: list[str], sender: Any) -> None:
    """Run tests in a process of its own, and send the exit code and the failures."""
    os.setsid()
    os.chdir(copy)
    sys.path.insert(0, copy)
    os.environ["PYTHONPATH"] = copy
    silence = os.open(os.path.join(copy, "output.txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    import pytest

    failures = _Failures()
    arguments = ["-q", "-m", "not slow", "-p", "no:cacheprovider", "-p", "no:xdist", *options, *files]
    code = int(pytest.main(arguments, plugins=[failures]))
    sender.send((code, failures.names))
    sender.close()
    # Threads that a broken test leaves behind do not hold the process back.
    os._exit(0)


def run_stage(copy: Path, files: list[str], options: list[str], seconds: float) -> tuple[str, list[str]]:
    """Return ``killed``, ``survived`` or ``timeout``, and the failing tests."""
    receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(
        target=_run_tests, args=(str(copy), files, options, sender)
    )
    process.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            return "timeout", []
        code, names = receiver.recv()
    except EOFError:
        code, names = 1, ["the process died"]
    finally:
        if process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.join()
    # 5: a module without a doctest, alone.
    if code not in (0, 1, 2, 5):
        raise SystemExit(f"pytest ended with {code}: see {copy / 'output.txt'}")
    return ("survived" if code in (0, 5) else "killed"), names


class Bench:
    """A copy of the package and its tests, where one mutant at a time stands."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("rankkv", "tests", "tools", "experiments", "pyproject.toml"):
            source, target = ROOT / name, folder / name
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.parquet"))
            else:
                shutil.copy(source, target)
        # Compiled code is found by a time in whole seconds and a size, which a mutant may share with the original.
        self._time = int(time.time())
        #: Test files run without a mutant: the seconds they took, and the tests that failed.
        self.seconds: dict[str, float] = {}
        self.failing: list[str] = []

    def _write(self, path: Path, source: bytes) -> None:
        path.write_bytes(source)
        self._time += 2
        os.utime(path, (self._time, self._time))

    def check(self, files: list[str]) -> None:
        """Find the tests that fail without a mutant, and leave them out from now on: they would notice anything."""
        for file in files:
            if file in self.seconds:
                continue
            began = time.monotonic()
            outcome, names = run_stage(self.folder, [file], [], 1800.0)
            self.seconds[file] = time.monotonic() - began
            if outcome == "timeout":
                raise SystemExit(f"without a mutant {file} takes more than half an hour.")
            for name in names:
                print(f"left out, because it fails without a mutant: {name}", flush=True)
                self.failing.append(name)

    def run(self, files: list[str]) -> tuple[str, str]:
        """Return ``killed``, ``survived`` or ``timeout``, and the first failing test."""
        options = ["-x", *(f"--deselect={name}" for name in self.failing if "::" in name)]
        files = [file for file in files if file not in self.failing]
        seconds = LEAST_SECONDS + MORE_SECONDS * sum(self.seconds[file] for file in files)
        outcome, names = run_stage(self.folder, files, options, seconds)
        return outcome, names[0] if names else ""

    def try_mutant(self, mutant: Mutant, wide: bool) -> dict[str, Any]:
        """Run the tests of a mutant, and return its record."""
        path = self.folder / "rankkv" / mutant.path
        source = path.read_bytes()
        first, more = find_tests(mutant.path)
        changed = source[: mutant.start] + mutant.new.encode() + source[mutant.stop :]
        self.check(first)
        stage, outcome, began = 1, "survived", time.monotonic()
        try:
            self._write(path, changed)
            outcome, name = self.run(first)
            if outcome == "survived" and more and wide:
                self._write(path, source)
                checking = time.monotonic()
                self.check(more)
                began += time.monotonic() - checking
                self._write(path, changed)
                outcome, name = self.run(more)
                stage = 2
        finally:
            self._write(path, source)
        record = {key: value for key, value in asdict(mutant).items() if key not in ("start", "stop", "new")}
        seconds = round(time.monotonic() - began, 1)
        return {
            "name": mutant.name,
            **record,
            "outcome": outcome,
            "by": name,
            "stage": stage,
            "seconds": seconds,
        }


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Count the outcomes, in all and by package."""

    def count(some: list[dict[str, Any]]) -> dict[str, Any]:
        outcomes = Counter(row["outcome"] for row in some)
        noticed = outcomes["killed"] + outcomes["timeout"]
        return {"mutants": len(some), **outcomes, "noticed": round(noticed / max(1, len(some)), 3)}

    packages = {name: [row for row in rows if row["path"].startswith(f"{name}/")] for name in PACKAGES}
    return {"all": count(rows), **{name: count(some) for name, some in packages.items() if some}}


def write_record(path: Path, rows: dict[str, dict[str, Any]], order: list[str]) -> None:
    """Write the record whole or not at all; mutants that the code no longer has are left out."""
    kept = [rows[name] for name in order if name in rows]
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    versions = {
        name: importlib.import_module(name).__version__
        for name in ("torch", "transformers", "numpy", "pytest")
    }
    record = {
        "what": "one small change of the code at a time, and whether a test that is not slow fails by it",
        "command": "OMP_NUM_THREADS=1 python tools/mutants.py --jobs 1",
        "commit": commit,
        "seed": SEED,
        "versions": {"python": platform.python_version(), **versions},
        "drawn": len(order),
        "left_out_as_equivalent": [
            {"path": path, "after": after, "reason": reason} for (path, after), reason in EQUIVALENT.items()
        ],
        "summary": summarize(kept),
        "mutants": kept,
    }
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    os.replace(temporary, path)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--limit", type=int, help="mutants run by this call")
    parser.add_argument("--only", choices=PACKAGES, help="one package")
    parser.add_argument("--minutes", type=float, help="start no mutant after so many minutes")
    parser.add_argument("--quick", action="store_true", help="the first tests only")
    parser.add_argument("--again", action="store_true", help="run survivors of the record again")
    parser.add_argument("--list", action="store_true", help="print the mutants and end")
    parser.add_argument("--record", type=Path, default=RECORD)
    given = parser.parse_args()
    drawn = draw_mutants(COUNT)
    mutants = [mutant for mutant in drawn if given.only in (None, mutant.path.partition("/")[0])]
    if given.list:
        for mutant in mutants:
            print(f"{mutant.name} {mutant.path}:{mutant.line} {mutant.function}: {mutant.change}")
            print(f"    - {mutant.before}\n    + {mutant.after}")
        return
    rows: dict[str, dict[str, Any]] = {}
    if given.record.is_file():
        rows = {row["name"]: row for row in json.loads(given.record.read_text())["mutants"]}
    wanted = [
        mutant
        for mutant in mutants
        if mutant.name not in rows or (given.again and rows[mutant.name]["outcome"] == "survived")
    ][: given.limit]
    # Loaded once and shared by all processes; the package itself is loaded by each.
    for name in ("torch", "pytest", "hypothesis", "scipy.stats", "transformers.models.llama.modeling_llama"):
        importlib.import_module(name)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        benches = [Bench(Path(folder) / str(number)) for number in range(given.jobs)]

        def work(number: int) -> None:
            bench = benches[number]
            for mutant in wanted[number :: given.jobs]:
                if given.minutes and time.monotonic() - began > 60.0 * given.minutes:
                    return
                rows[mutant.name] = row = bench.try_mutant(mutant, not given.quick)
                print(
                    f"{row['outcome']:9}{row['seconds']:6.1f} s  {row['path']}:{row['line']} {row['change']}  "
                    f"{row['by']}",
                    flush=True,
                )
                write_record(given.record, rows, [mutant.name for mutant in drawn])

        with ThreadPoolExecutor(given.jobs) as pool:
            list(pool.map(work, range(given.jobs)))
    print(json.dumps(summarize(list(rows.values())), indent=1))


if __name__ == "__main__":
    main()
