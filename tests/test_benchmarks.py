"""`make bench-gpu` runs to its end where there is no GPU: its small mode, of which only the rows are looked at."""

from __future__ import annotations

import argparse
import json

from benchmarks.gpu import Bench, run


def test_the_gpu_benchmark_runs_in_small(tmp_path):
    output = tmp_path / "gpu.json"
    run(Bench(argparse.Namespace(small=True, budget=330.0, output=str(output))))
    record = json.loads(output.read_text())
    rows = record["rows"]
    assert {row["part"] for row in rows} == {
        "correct", "ways", "numerics", "unpadded", "waits", "ttft", "tpot", "backends",
    }  # fmt: skip
    assert not [row for row in rows if "failed" in row or "skipped" in row]
    # Without a GPU both sides run on the CPU.
    assert all(row["same_counts"] and row["logit_error"] < 1e-3 for row in rows if row["part"] == "correct")
    assert all(row["same_tokens"] for row in rows if row["part"] in ("correct", "ways"))
    assert all(row["same_kept"] == 1 for row in rows if row["part"] == "numerics")
    unpadded = next(row for row in rows if row["part"] == "unpadded")
    assert unpadded["layers_without_padding"]
    assert unpadded["logit_error"] < 1e-3
    assert unpadded["kernel_error"] < 1e-5
    assert record["machine"]["small"]
