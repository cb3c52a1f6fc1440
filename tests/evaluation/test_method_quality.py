"""The table of methods as a user makes it: every cell once, numbers by hand, a killed run that goes on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rankkv import compress, load_texts
from rankkv.evaluation import compute_continuation_loss
from rankkv.evaluation.results import read_rows

ROOT = Path(__file__).resolve().parents[2]

pytest.importorskip("matplotlib")
pytest.importorskip("pyarrow")

ARGUMENTS = [
    "--samples", "2", "--context", "160", "--continuation", "8", "--ratios", "0.2", "0.5",
    "--selectors", "snapkv", "random", "--strategies", "uniform", "RankKV",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quality")
    done = run(folder)
    assert done.returncode == 0, done.stderr
    return folder


def run(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "experiments/method_quality.py"), *ARGUMENTS]
    return subprocess.run([*command, "--output_dir", str(folder)], capture_output=True, text=True, cwd=ROOT)


def test_every_cell_is_there_once_and_one_row_is_what_compress_says(folder, embedded):
    rows = read_rows([folder / "rows.parquet"])
    cells = [(row["text"], row["task"], row["selector"], row["strategy"], row["ratio"]) for row in rows]
    assert len(cells) == len(set(cells)) == 2 * (8 + 8 + 2)
    row = next(
        row
        for row in rows
        if row["task"] == "continuation" and row["selector"] == "random" and row["ratio"] == 0.5
    )
    model, tokenizer = embedded
    whole = tokenizer("\n\n".join(load_texts("python-docs")), add_special_tokens=False, verbose=False)
    ids = torch.tensor(whole["input_ids"][row["first_token"] :][:168])[None]
    cache = compress(model, ids[:, :160], compression_ratio=0.5, selector="random", strategy=row["strategy"])
    assert sum(cache.kept_lengths) == row["kept_tokens"]
    full = compress(model, ids[:, :160], compression_ratio=1.0)
    losses = [float(compute_continuation_loss(model, each, ids[:, 160:]).mean()) for each in (cache, full)]
    assert losses[0] - losses[1] == pytest.approx(row["excess"], abs=1e-4)


def test_a_killed_run_goes_on(folder):
    whole = read_rows([folder / "rows.parquet"])
    lost = sorted((folder / "parts").glob("*.parquet"))[0]
    lost.unlink()
    done = run(folder)
    assert done.returncode == 0, done.stderr
    assert read_rows([folder / "rows.parquet"]) == whole
    assert "Needles: the full cache finds" in (folder / "summary.md").read_text()
    assert (folder / "figures" / "method_quality.png").stat().st_size > 1000
