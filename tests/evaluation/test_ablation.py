"""The ablation as a user runs it: rows by hand, a killed run that goes on, and the default's advantage."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rankkv import compress, load_texts
from rankkv.evaluation import compute_continuation_loss, evaluate_continuation, record_prefill
from rankkv.evaluation.results import read_rows

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "experiments" / "allocation_ablation.py"

pytest.importorskip("matplotlib")
pytest.importorskip("pyarrow")

ARGUMENTS = [
    "--samples", "2", "--context", "160", "--continuation", "8", "--ratios", "0.1", "0.2", "0.4",
    "--strategies", "default", "inverse", "--scopes", "full",
]  # fmt: skip


def run(folder: Path, *more: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *ARGUMENTS, "--output_dir", str(folder), *map(str, more)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablation")
    done = run(folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.fixture(scope="module")
def rows(output):
    return read_rows([output[0] / "rows.parquet"])


def test_every_cell_is_there_once(rows):
    cells = [(row["text"], row["strategy"], row["ratio"]) for row in rows]
    assert len(cells) == len(set(cells)) == 2 * 4 * 3
    assert {row["strategy"] for row in rows} == {"uniform", "default", "inverse", "power 4, full"}


def test_a_row_is_what_compress_and_the_model_say(rows, embedded):
    model, tokenizer = embedded
    row = next(row for row in rows if row["strategy"] == "inverse" and row["ratio"] == 0.2)
    whole = tokenizer("\n\n".join(load_texts("python-docs")), add_special_tokens=False, verbose=False)
    ids = torch.tensor(whole["input_ids"][row["first_token"] :][:168])[None]
    cache = compress(model, ids[:, :160], compression_ratio=0.2, strategy="inverse")
    assert sum(cache.kept_lengths) == row["kept_tokens"]
    loss = compute_continuation_loss(model, cache, ids[:, 160:])
    assert float(loss.mean()) == pytest.approx(row["loss"], rel=1e-4)


def test_tables_and_figure_are_written(output):
    folder, printed = output
    assert (folder / "summary.md").read_text().strip() == printed.strip()
    assert "share of the cache with the excess of uniform budgets at 20 %" in printed
    for ending in (".png", "-dark.png", ".pdf"):
        assert (folder / "figures" / f"allocation_ablation{ending}").stat().st_size > 1000


def test_what_a_killed_run_left_is_kept(output):
    folder, printed = output
    kept, lost = sorted((folder / "parts").glob("*.parquet"))
    stamp = kept.stat().st_mtime_ns
    lost.unlink()
    again = run(folder)
    assert again.stdout == printed
    assert "1 of 2 texts are there already" in again.stderr
    assert kept.stat().st_mtime_ns == stamp


def test_other_options_in_the_same_folder_are_refused(output):
    refused = run(output[0], "--seed", 1)
    assert refused.returncode == 2
    assert "seed: 0, now 1" in refused.stderr


def test_budgets_by_rank_lose_less_than_uniform_ones_at_a_tenth(embedded):
    """On six stretches of the Python reference, without calibration: divergence from the full cache's predictions."""
    model, tokenizer = embedded
    whole = tokenizer("\n\n".join(load_texts("python-docs")), add_special_tokens=False, verbose=False)[
        "input_ids"
    ]
    cells = {
        name: {"compression_ratio": 0.1, "profile": None, **options}
        for name, options in {"uniform": {"strategy": "uniform"}, "default": {}}.items()
    }
    totals = dict.fromkeys(cells, 0.0)
    for start in range(2000, len(whole) - 900, (len(whole) - 2900) // 6 + 1):
        ids = torch.tensor(whole[start : start + 896])[None]
        scores = dict(evaluate_continuation(record_prefill(model, ids[:, :768]), ids[:, 768:], cells))
        for name in cells:
            totals[name] += scores[name].divergence
    assert totals["default"] < 0.95 * totals["uniform"], totals
