"""Parity with kvpress: not collected where it is not installed, counted and reported where it is."""

from __future__ import annotations

from collections import defaultdict
from importlib.metadata import version
from typing import Any

import peers
import pytest

#: A set may also differ in the way that the selector's docstring states; "different" is what is left, a failure.
COUNTS = ("sets", "equal", "tie", "stated", "different")
_tallies: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(COUNTS, 0))
_remarks: dict[str, str] = {}


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--parity-report", default=None, help="file for the counts of equal sets, as JSON")


if not peers.IS_INSTALLED:
    # `make parity` runs these, in an environment that has kvpress.
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def tally() -> Any:
    """Count one verdict of a method, ``tally(method, verdict, remark)``."""

    def count(method: str, verdict: str, remark: str = "") -> None:
        _tallies[method]["sets"] += 1
        _tallies[method][verdict] += 1
        if remark:
            _remarks[method] = remark

    return count


def _build_report() -> dict[str, Any]:
    import torch
    import transformers

    from rankkv import __version__
    from rankkv.evaluation.results import describe_origin

    total = {name: sum(tally[name] for tally in _tallies.values()) for name in COUNTS}
    return {
        "what": "sets of kept tokens, one a (method, model, kept length, layer, kv head): equal, equal but for ties, "
        "different as the selector's docstring states, different otherwise",
        **describe_origin(),
        "versions": {
            "rankkv": __version__,
            "kvpress": version("kvpress"),
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        },
        "total": total,
        "methods": {name: {**_tallies[name], "remark": _remarks.get(name, "")} for name in sorted(_tallies)},
    }


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    if not _tallies:
        return
    report = _build_report()
    terminalreporter.section("parity with kvpress")
    row = "{:<26}{:>7}{:>7}{:>6}{:>8}{:>11}  {}"
    terminalreporter.write_line(row.format("method", *COUNTS, ""))
    for name, counts in {**report["methods"], "all": {**report["total"], "remark": ""}}.items():
        terminalreporter.write_line(row.format(name, *(counts[key] for key in COUNTS), counts["remark"]))
    path = config.getoption("--parity-report", default=None)
    if path is not None:
        from rankkv.utils.files import dump_json, write_text_atomically

        write_text_atomically(path, dump_json(report))
        terminalreporter.write_line(f"written to {path}")
