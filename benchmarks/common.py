"""What the benchmarks share: a prompt of real text, interleaved runs, peak memory, one JSON line at the end."""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import rankkv
from rankkv.files import write_text_atomically
from rankkv.texts import python_docs_text


def build_prompt(tokenizer: Any, tokens: int) -> torch.Tensor:
    """The first ``tokens`` tokens of the embedded language reference, ``[1, tokens]``."""
    ids = tokenizer(python_docs_text()[: tokens * 12], return_tensors="pt").input_ids[:, :tokens]
    if ids.shape[1] < tokens:
        raise SystemExit(f"the embedded text gives only {ids.shape[1]} tokens, {tokens} were asked for")
    return ids


def time_interleaved(
    runs: dict[str, Callable[[], Any]], repeats: int, warm_ups: int = 1
) -> dict[str, list[float]]:
    """Seconds of each run, taken in turn (A B, B A, A B, ...), so that a drifting machine hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(-warm_ups, repeats):
        names = list(runs) if turn % 2 == 0 else list(runs)[::-1]
        for name in names:
            start = time.perf_counter()
            runs[name]()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
            print(f"  {name}: {time.perf_counter() - start:.2f} s", file=sys.stderr, flush=True)
    return seconds


def compute_ratio(seconds: list[float], base: list[float], seed: int = 0) -> dict[str, float]:
    """Median of the paired ratios with a 95% bootstrap interval over the pairs."""
    pairs = np.array(seconds) / np.array(base)
    draws = np.random.default_rng(seed).integers(0, len(pairs), size=(2000, len(pairs)))
    medians = np.median(pairs[draws], axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return {"ratio": float(np.median(pairs)), "low": float(low), "high": float(high)}


def summarize_seconds(seconds: list[float]) -> dict[str, float]:
    """Median, smallest and number of the runs."""
    return {"median_seconds": statistics.median(seconds), "min_seconds": min(seconds), "runs": len(seconds)}


def reset_peak_memory() -> int:
    """Start measuring the peak of this process' memory (Linux), and return what it holds now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _read_status("VmRSS")


def read_peak_memory() -> int:
    """The peak since :func:`reset_peak_memory`, in bytes."""
    return _read_status("VmHWM")


def _read_status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"{field} is not in /proc/self/status: this measurement needs Linux")


def describe_machine() -> dict[str, Any]:
    """Versions and the machine, as every result names them."""
    return {
        "rankkv": rankkv.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "machine": platform.machine(),
    }


def publish(name: str, rows: list[dict[str, Any]], output: str) -> None:
    """Add the rows to ``output`` under ``name`` and print them as one JSON line."""
    path = Path(output)
    record = json.loads(path.read_text()) if path.is_file() else {}
    record[name] = {"machine": describe_machine(), "rows": rows}
    write_text_atomically(path, json.dumps(record, indent=2) + "\n")
    print(json.dumps({name: rows}))
