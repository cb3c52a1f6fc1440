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
from rich.console import Console
from rich.table import Table

import rankkv
from rankkv.evaluation.results import describe_origin
from rankkv.models.texts import python_docs_text
from rankkv.utils.files import write_text_atomically


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
    return time_interleaved_both(runs, repeats, warm_ups)[0]


def time_interleaved_both(
    runs: dict[str, Callable[[], Any]], repeats: int, warm_ups: int = 1
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Wall seconds and seconds of CPU time of each run, taken in turn as :func:`time_interleaved` does."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(-warm_ups, repeats):
        names = list(runs) if turn % 2 == 0 else list(runs)[::-1]
        for name in names:
            taken, cpu_taken = time_both(runs[name])
            if turn >= 0:
                seconds[name].append(taken)
                cpu_seconds[name].append(cpu_taken)
            print(f"  {name}: {taken:.3f} s, {cpu_taken:.3f} s CPU", file=sys.stderr, flush=True)
    return seconds, cpu_seconds


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


def synchronize() -> None:
    """Wait for the GPU, if there is one, so that a clock read next counts its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_once(run: Callable[[], Any]) -> float:
    """Seconds of one run, the GPU's work included."""
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def time_both(run: Callable[[], Any]) -> tuple[float, float]:
    """Wall seconds of one run, and seconds of CPU time of all its threads, which other programs do not lengthen."""
    synchronize()
    start, cpu_start = time.perf_counter(), time.process_time()
    run()
    synchronize()
    return time.perf_counter() - start, time.process_time() - cpu_start


def measure_bandwidth(megabytes: int = 512, repeats: int = 5) -> float:
    """Bytes a second that a matrix-vector product reads here, with this process' threads: the best of a few."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    matrix = torch.ones(megabytes * 256, 1024, device=device)
    vector = torch.ones(1024, device=device)
    total = matrix.nbytes
    fastest = min(time_once(lambda: torch.mv(matrix, vector)) for _ in range(repeats))
    return total / min(fastest, *(time_once(matrix.sum) for _ in range(repeats)))


def count_weight_bytes(model: Any) -> int:
    """Bytes of weights that one decode step reads: all, but of an input embedding that is not the output's one row."""
    embedding = model.get_input_embeddings().weight
    tied = embedding.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    total = sum(parameter.nbytes for parameter in model.parameters())
    return total if tied else total - embedding.nbytes


def reset_peak_memory() -> int:
    """Start measuring peak memory, of the GPU or else of this process (Linux); return what is held now, in bytes."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return _read_status("VmRSS")


def read_peak_memory() -> int:
    """The peak since :func:`reset_peak_memory`, in bytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return _read_status("VmHWM")


def _read_status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"{field} is not in /proc/self/status: this measurement needs Linux")


def describe_machine() -> dict[str, Any]:
    """Describe versions, machine, command and commit, as every result names them."""
    return {
        "rankkv": rankkv.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "machine": platform.machine(),
        **describe_origin(),
    }


def print_rows(title: str, rows: list[dict[str, Any]], columns: dict[str, str]) -> None:
    """Print rows as a table on stderr; ``columns`` maps a key to a format such as ``"{:.2f}"``."""
    table = Table(title=title)
    for key in columns:
        table.add_column(key.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(form.format(row[key]) for key, form in columns.items()))
    # Wide where nobody looks on, so that a log has whole numbers.
    Console(stderr=True, width=None if sys.stderr.isatty() else 150).print(table)


def publish(name: str, rows: list[dict[str, Any]], output: str) -> None:
    """Add the rows to ``output`` under ``name`` and print them as one JSON line."""
    publish_all({name: rows}, output)


def publish_all(found: dict[str, list[dict[str, Any]]], output: str) -> None:
    """Add all rows to ``output`` at once, each list under its name, and print them as one JSON line."""
    path = Path(output)
    record = json.loads(path.read_text()) if path.is_file() else {}
    record |= {name: {"machine": describe_machine(), "rows": rows} for name, rows in found.items()}
    write_text_atomically(path, json.dumps(record, indent=2) + "\n")
    print(json.dumps(found))
