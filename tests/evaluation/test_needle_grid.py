"""Needles by depth and length as a user looks for them: every cell once, one by hand, a killed run that goes on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from forced_needle import evaluate_needle

from rankkv import load_texts
from rankkv.evaluation.results import read_rows

ROOT = Path(__file__).resolve().parents[2]

pytest.importorskip("matplotlib")
pytest.importorskip("pyarrow")

ARGUMENTS = ["--lengths", "96", "128", "--depths", "0.1", "0.9", "--samples", "1", "--ratios", "0.5"]


def run(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "experiments/needle_grid.py"), *ARGUMENTS, *more]
    return subprocess.run([*command, "--output_dir", str(folder)], capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("needles")
    done = run(folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_cell_is_there_once(folder):
    rows = read_rows([folder / "rows.parquet"])
    cells = [(row["length"], row["depth"], row["strategy"], row["ratio"]) for row in rows]
    assert len(cells) == len(set(cells)) == 2 * 2 * (4 + 2)
    assert {row["length"] for row in rows} == {96, 128}
    assert {row["depth"] for row in rows} == {0.1, 0.9}


def test_a_code_is_told_from_the_full_cache_and_is_not_guessed(folder):
    rows = read_rows([folder / "rows.parquet"])
    losses = {
        name: [row["answer_loss"] for row in rows if row["strategy"] == name] for name in ("full", "blank")
    }
    assert max(losses["full"]) < min(losses["blank"])
    assert not any(row["found"] for row in rows if row["strategy"] == "blank")


def test_a_row_is_what_the_library_says_of_that_needle(folder, embedded):
    rows = read_rows([folder / "rows.parquet"])
    haystack = "\n\n".join(load_texts("python-docs"))
    # The last needle stands in the last stretch of the haystack.
    stretch = haystack[-12 * 128 :]
    options = {"uniform|0.5": {"strategy": "uniform", "selector": "snapkv", "compression_ratio": 0.5}}
    scores = evaluate_needle(*embedded, stretch, options, lengths=[128], depths=[0.9], question_aware=True)
    expected = {score.setting.partition("|")[0]: score.answer_loss for score in scores}
    found = {
        row["strategy"]: row["answer_loss"]
        for row in rows
        if (row["length"], row["depth"]) == (128, 0.9) and row["strategy"] in expected
    }
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_a_killed_run_goes_on(folder):
    whole = read_rows([folder / "rows.parquet"])
    sorted((folder / "parts").glob("*.parquet"))[0].unlink()
    done = run(folder)
    assert done.returncode == 0, done.stderr
    assert read_rows([folder / "rows.parquet"]) == whole
    assert "| 100% | full cache |" in (folder / "summary.md").read_text()
    assert (folder / "figures" / "needle_grid.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_haystack_that_is_too_short_is_one_sentence(tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("A few words, and no more of them. " * 4)
    done = run(tmp_path / "out", "--haystack", f"short={short}")
    assert done.returncode == 2
    assert "too short for 96 tokens" in done.stderr
    assert "Traceback" not in done.stderr
