"""The rank experiment as a user runs it, checked against a computation of its own."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rankkv import BudgetAllocator, RankKVAnalyzer, compress, load_texts

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "experiments" / "rank_analysis_exp.py"

pytest.importorskip("matplotlib")


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def experiment():
    spec = importlib.util.spec_from_file_location("rank_analysis_exp", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experiment")
    done = run(
        "--model", "embedded", "--dataset", "python-docs", "--num_samples", 2, "--max-length", 256,
        "--seed", 3, "--output_dir", folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2.0/2 samples" in done.stderr
    return folder


@pytest.fixture(scope="module")
def record(output):
    return json.loads((output / "rank_analysis.json").read_text())


def test_mean_and_deviation_follow_from_the_samples(record):
    ranks = np.array([sample["layer_ranks"] for sample in record["samples"]])
    budgets = np.array([sample["budgets"] for sample in record["samples"]])
    assert ranks.shape == (2, 30)
    rows = record["layers"]
    np.testing.assert_allclose([row["rank_mean"] for row in rows], ranks.mean(0))
    np.testing.assert_allclose([row["rank_std"] for row in rows], ranks.std(0, ddof=1), atol=1e-12)
    np.testing.assert_allclose([row["budget_mean"] for row in rows], budgets.mean(0))
    assert (budgets.sum(1) == round(0.3 * 256 * 30)).all()


def test_ranks_are_those_of_the_text_that_was_drawn(record, experiment, embedded):
    model, tokenizer = embedded
    pieces = experiment.cut_samples(tokenizer, load_texts("python-docs"), 256)
    sample = record["samples"][1]
    result = RankKVAnalyzer(model).analyze(torch.tensor([pieces[sample["piece"]]]))
    np.testing.assert_allclose(sample["layer_ranks"], result.layer_ranks, rtol=1e-3)


def test_budgets_by_strategy_share_one_total(record):
    mean_ranks = [row["rank_mean"] for row in record["layers"]]
    total = round(0.3 * 256 * 30)
    floor = max(16, total // 30 // 2)
    by_strategy = dict(record["budgets_by_strategy"])
    default = by_strategy.pop("default")
    assert sum(default) == pytest.approx(total)
    for label, budgets in by_strategy.items():
        options = {"exponent": 4.0} if label.startswith("power") else {}
        allocator = BudgetAllocator(label.split()[0], min_budget=floor, max_budget=256, **options)
        assert budgets == allocator.allocate(mean_ranks, total).budgets
    assert len(by_strategy) == 6


def test_default_budgets_are_those_of_the_cache(record, experiment, embedded):
    model, tokenizer = embedded
    pieces = experiment.cut_samples(tokenizer, load_texts("python-docs"), 256)
    caches = [
        compress(model, torch.tensor([pieces[sample["piece"]]]), compression_ratio=0.3, profile=None)
        for sample in record["samples"]
    ]
    mean = np.mean([cache.budgets for cache in caches], axis=0)
    np.testing.assert_allclose(record["budgets_by_strategy"]["default"], mean)


def test_intervals_are_those_of_students_t(experiment):
    low, high = experiment.compute_intervals([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]])
    # Tabled: 4.303 standard errors at two degrees of freedom.
    np.testing.assert_allclose(low, [2 - 4.303 / 3**0.5, 5.0], rtol=1e-3)
    np.testing.assert_allclose(high, [2 + 4.303 / 3**0.5, 5.0], rtol=1e-3)


def test_record_says_how_it_came_about(record):
    assert record["arguments"]["num_samples"] == 2
    assert record["seed"] == 3
    assert record["versions"]["torch"] == torch.__version__


def test_figures_are_written(output):
    names = {path.name for path in (output / "figures").iterdir()}
    stems = ("rank_per_layer", "budgets_per_strategy")
    assert names == {f"{stem}{ending}" for stem in stems for ending in (".png", "-dark.png", ".pdf")}
    assert all(path.stat().st_size > 4_000 for path in (output / "figures").iterdir())


def test_samples_are_whole_and_apart(experiment, embedded):
    tokenizer = embedded[1]
    long, short = "one two three four five six seven eight nine ten " * 5, "a short text."
    pieces = experiment.cut_samples(tokenizer, [long, short, short, short, short], 16)
    assert {len(piece) for piece in pieces} == {16}
    ids = tokenizer(long.strip())["input_ids"]
    from_long = len(ids) // 16
    assert [token for piece in pieces[:from_long] for token in piece] == ids[: from_long * 16]
    # Each short text alone is below 16 tokens; joined they are not.
    assert len(pieces) == from_long + 1
    assert tokenizer.decode(pieces[-1]).startswith("a short text.\n\na short text.")


def test_the_seed_alone_decides_what_is_drawn(experiment):
    pieces = [[i] for i in range(50)]
    drawn = [experiment.choose_samples(pieces, 5, 1, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 5


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["--dataset", "wikitext"], "use 'python-docs' or the path of"),
        (["--model", "nobody/nothing"], "use the model 'embedded', which needs no network"),
        (["--num_samples", 0], "--num_samples is 0"),
        (["--strategy", "powr"], "did you mean 'power'?"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, fragment, tmp_path):
    done = run(*arguments, "--output_dir", tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("Error: ")
    assert fragment in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_too_little_text_is_said_with_numbers(tmp_path, experiment):
    with pytest.raises(
        experiment.InputError, match="gives 1 samples of 64 tokens but --num_samples asks for 4"
    ):
        experiment.choose_samples([[0] * 64], 4, 64, 0)
