"""Speed and memory from the benchmarks' and the demo's records."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def summarize_speed(bench: Mapping[str, Any], demo: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of both records can be shown; a part that a record lacks is an empty list.

    Parameters
    ----------
    bench, demo : mapping
        ``bench.json`` and ``demo.json``, or empty.

    Returns
    -------
    dict
        ``ratios`` (RankKV over plain: name, ratio, bounds), ``sizes`` (name, megabytes kept and full), ``targets`` and
        ``machine`` of the benchmarks, ``runs`` of the demo.
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
    runs = [
        {
            "name": run["name"],
            "megabytes": run["cache_bytes"] / 1e6,
            "ttft": run["ttft_seconds"],
            "tpot": 1e3 * run["tpot_seconds"],
            "answer": " ".join(run["answer"].split()),
        }
        for run in demo.get("runs", [])
    ]
    machine = (bench.get("latency") or {}).get("machine") or {}
    return {
        "ratios": ratios,
        "sizes": sizes,
        "targets": _rows(bench, "targets"),
        "machine": ", ".join(f"{key} {value}" for key, value in machine.items()),
        "runs": runs,
    }


def _rows(bench: Mapping[str, Any], part: str) -> list[dict[str, Any]]:
    found = bench.get(part)
    rows = found.get("rows", []) if isinstance(found, dict) else []
    return [row for row in rows if isinstance(row, dict)]
