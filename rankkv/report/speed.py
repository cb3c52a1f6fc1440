"""Speed and memory from the benchmarks' and the demo's records."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from typing import Any

#: A verdict needs at least this many pairs of runs: an interval over fewer says nothing.
MIN_PAIRS = 5


def summarize_speed(bench: Mapping[str, Any], demo: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parts of both records that the page shows; a part that a record lacks is an empty list.

    Parameters
    ----------
    bench, demo : mapping
        ``bench.json`` and ``demo.json``, or empty.

    Returns
    -------
    dict
        ``ratios`` (RankKV over plain: name, ratio, bounds), ``sizes`` (name, megabytes kept and full), ``targets``
        (with a ``verdict`` each) and ``machine`` of the benchmarks, ``runs`` of the demo.
    """
    latency = [row for row in _rows(bench, "latency") if "tokens" in row]
    ratios, sizes = [], []
    for row in latency:
        setting = f"{row['tokens']:,} tokens, {row['compression_ratio']:.0%} kept"
        for key, name in (("ttft_ratio", "time to first token"), ("tpot_ratio", "time per token")):
            if key in row:
                ratios.append({"setting": setting, "what": name, **row[key]})
        if "cache_bytes" in row:
            sizes.append(
                {"setting": setting, "kept": row["cache_bytes"] / 1e6, "full": row["full_cache_bytes"] / 1e6}
            )
    sizes += [
        {
            "setting": f"{row['tokens']:,} tokens, {row['kept']:.0%} kept, peak of the prefill",
            "kept": row["peak_kv_bytes"] / 1e6,
            "full": row["full_cache_bytes"] / 1e6,
        }
        for row in _rows(bench, "memory")
        if "peak_kv_bytes" in row
    ]
    pairs = {
        f"{row['tokens']:,} tokens": row["plain_ttft"]["runs"]
        for row in latency
        if "runs" in row.get("plain_ttft", {})
    }
    runs = [
        {
            "name": run["name"],
            "megabytes": run["cache_bytes"] / 1e6,
            "ttft": run["ttft_seconds"],
            "tpot": 1e3 * run["tpot_seconds"],
            "has_fact": run.get("has_fact"),
            "answer": " ".join(run["answer"].split()),
        }
        for run in demo.get("runs", [])
    ]
    machine = (bench.get("latency") or {}).get("machine") or {}
    return {
        "ratios": ratios,
        "sizes": sizes,
        "targets": [{**row, "verdict": judge_target(row, pairs)} for row in _rows(bench, "targets")],
        "machine": ", ".join(f"{key} {value}" for key, value in machine.items()),
        "runs": runs,
    }


def judge_target(row: Mapping[str, Any], pairs: Mapping[str, int]) -> str:
    """Say if a measured ratio meets its target: only an interval of several pairs gives a verdict.

    Parameters
    ----------
    row : mapping
        ``what``, ``target`` (such as ``"<= 1.05"``), and ``low`` and ``high``, the bounds of the interval or None.
    pairs : mapping
        Words of ``what`` that tell a prompt's length to the pairs of prefills measured there.

    Examples
    --------
    >>> row = {"what": "TTFT, 8 tokens", "target": "<= 1.05", "low": 0.9, "high": 1.0}
    >>> judge_target(row, {}), judge_target({**row, "high": 1.1}, {}), judge_target(row, {"8 tokens": 2})
    ('met', 'open: the interval holds the target', 'no verdict: 2 pairs')
    """
    low, high = row.get("low"), row.get("high")
    if low is None or high is None:
        return "no verdict: no interval"
    if low == high:
        return "no verdict: 1 pair"
    own = next((count for words, count in pairs.items() if words in row["what"]), None)
    if "TTFT" in row["what"] and own is not None and own < MIN_PAIRS:
        return f"no verdict: {own} pairs"
    found = re.fullmatch(r"(<=|>=) (\d+(?:\.\d+)?)", str(row["target"]))
    if found is None:
        return "no verdict: the target is not a bound"
    holds = operator.le if found[1] == "<=" else operator.ge
    within = [holds(bound, float(found[2])) for bound in (low, high)]
    return "met" if all(within) else "not met" if not any(within) else "open: the interval holds the target"


def _rows(bench: Mapping[str, Any], part: str) -> list[dict[str, Any]]:
    found = bench.get(part)
    rows = found.get("rows", []) if isinstance(found, dict) else []
    return [row for row in rows if isinstance(row, dict)]
