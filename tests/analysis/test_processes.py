"""Several prompts analyzed by launched processes: the ranks and budgets of one process, bit by bit."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrating import write_model_and_text
from launching import launch, run

from rankkv import RankKVAnalyzer, RankKVResult
from rankkv.errors import BudgetError, InputError
from rankkv.pipeline import analyze_samples, summarize_layers

EXPERIMENT = str(Path(__file__).resolve().parents[2] / "experiments" / "rank_analysis_exp.py")
LENGTHS = (130, 150, 170)


@pytest.fixture(scope="module")
def small_words(tiny_llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in a folder, with a tokenizer of words."""
    return write_model_and_text(tmp_path_factory.mktemp("words"), tiny_llama(2))[0]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    generator = torch.Generator().manual_seed(9)
    return [
        " ".join(f"w{number}" for number in torch.randint(3, 128, (length,), generator=generator).tolist())
        for length in LENGTHS
    ]


@pytest.fixture(scope="module")
def command(texts: list[str], small_words: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """`rankkv analyze` of one prompt in a text file and two in a JSONL file."""
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "one.txt").write_text(texts[0])
    (folder / "more.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[1:]))
    files = ["--prompt-file", str(folder / "one.txt"), "--prompt-file", str(folder / "more.jsonl")]
    return ["-m", "rankkv", "analyze", "--model", str(small_words), *files]


@pytest.fixture(scope="module")
def alone(command: list[str]) -> dict[str, Any]:
    """What one process finds."""
    return json.loads(run([sys.executable, *command, "--json"]).stdout)


def test_every_prompt_is_analyzed_by_itself(
    alone: dict[str, Any], command: list[str], texts: list[str], small_words: Path
) -> None:
    from rankkv import load_model
    from rankkv.config import DEFAULT_STRATEGY

    model, tokenizer = load_model(small_words)
    analyzer = RankKVAnalyzer(model, strategy=DEFAULT_STRATEGY)
    assert [sample["seq_len"] for sample in alone["samples"]] == list(LENGTHS)
    for text, sample in zip(texts, alone["samples"], strict=True):
        expected = analyzer.analyze(tokenizer(text, return_tensors="pt")["input_ids"])
        assert sample["budgets"] == expected.budgets
        assert sample["layer_ranks"] == pytest.approx(expected.layer_ranks, rel=1e-5)
    for place, row in enumerate(alone["layers"]):
        for name, field in (("rank", "layer_ranks"), ("budget", "budgets")):
            values = [sample[field][place] for sample in alone["samples"]]
            assert row[f"{name}_mean"] == pytest.approx(statistics.fmean(values))
            assert row[f"{name}_std"] == pytest.approx(statistics.stdev(values))


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("accelerate", marks=pytest.mark.slow)])
def test_launched_processes_find_the_same_numbers(
    command: list[str], alone: dict[str, Any], tmp_path: Path, launcher: str
) -> None:
    path = tmp_path / "ranks.json"
    done = launch([*command, "--output", str(path)], 2, launcher)
    # Every float bit by bit, written and shown once.
    assert json.loads(path.read_text()) == alone
    assert done.stdout == ""
    assert done.stderr.count("Written:") == 1
    assert done.stderr.count("mean ± standard deviation over 3 prompts of 130 to 170 tokens") == 1
    rows = [line.split() for line in done.stderr.splitlines() if line.split()[:1] in (["0"], ["1"])]
    assert [row[0] for row in rows] == ["0", "1"]
    assert all(row.count("±") == 2 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_the_experiment_gives_the_same_record(
    texts: list[str], small_words: Path, tmp_path: Path, launcher: str
) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "texts.txt").write_text(" ".join(texts * 3))
    options = ["--model", str(small_words), "--dataset", str(tmp_path / "texts.txt"), "--max_length", "96"]
    program = [EXPERIMENT, *options, "--num_samples", "5", "--output_dir"]
    one = run([sys.executable, *program, str(tmp_path / "one")])
    two = launch([*program, str(tmp_path / "two")], 2, launcher)
    records = [json.loads((tmp_path / name / "rank_analysis.json").read_text()) for name in ("one", "two")]
    for record in records:
        # The folder of the results is another.
        del record["arguments"], record["versions"]["command"]
    assert records[0] == records[1]
    assert len(records[0]["samples"]) == 5
    assert two.stdout == one.stdout
    assert two.stderr.count("Written:") == two.stderr.count("Loading ") == 1


def test_what_cannot_be_analyzed_is_refused(tiny_llama: Any) -> None:
    analyzer = RankKVAnalyzer(tiny_llama(2))
    with pytest.raises(InputError, match="there is no prompt"):
        analyze_samples(analyzer, [])
    with pytest.raises(InputError, match="1 total budgets are given for 2 prompts"):
        analyze_samples(analyzer, [torch.arange(60)] * 2, total_budgets=[60])
    with pytest.raises(BudgetError):
        analyze_samples(analyzer, [torch.arange(60)] * 2, total_budgets=[60, 3])
    with pytest.raises(InputError, match="results are empty or of different layers"):
        summarize_layers([])


def test_progress_counts_prompts_by_their_layers(tiny_llama: Any) -> None:
    told: list[tuple[float, int]] = []
    analyze_samples(
        RankKVAnalyzer(tiny_llama(2)), [torch.arange(60)] * 2, on_progress=lambda *step: told.append(step)
    )
    assert told == [(0.5, 2), (1.0, 2), (1.5, 2), (2.0, 2)]


def test_what_a_strategy_measures_beside_ranks_is_summarized(tiny_llama: Any) -> None:
    analyzer = RankKVAnalyzer(tiny_llama(2), strategy="cake")
    results = analyze_samples(analyzer, [torch.arange(60), torch.arange(70)])
    rows = summarize_layers(results)
    assert [row["measure_mean"] for row in rows] == pytest.approx(
        [statistics.fmean(result.layer_measures[place] for result in results) for place in range(2)]
    )
    assert isinstance(results[0], RankKVResult)
