"""`rankkv eval`: the Python API's numbers, resumed after a stop, refused where nothing can be measured."""

from __future__ import annotations

import json
import sys

import pytest
from launching import launch, run
from typer.testing import CliRunner

from rankkv.cli import app
from rankkv.evaluation import Haystack, evaluate_task, get_task, make_samples
from rankkv.evaluation.comparison import compare_settings
from rankkv.evaluation.results import read_rows
from rankkv.evaluation.settings import build_settings
from rankkv.utils.files import make_json_ready


def invoke(*arguments):
    return CliRunner().invoke(app, ["eval", *(str(argument) for argument in arguments)])


@pytest.fixture(scope="module")
def small(embedded, tiny_llama, tmp_path_factory, python_docs):
    """A random model that reads the embedded model's tokens, and a text."""
    folder = tmp_path_factory.mktemp("models") / "small"
    tiny_llama(2, vocab_size=len(embedded[1])).save_pretrained(folder)
    embedded[1].save_pretrained(folder)
    (folder / "text.txt").write_text(python_docs[:30_000])
    return folder


@pytest.fixture(scope="module")
def options(small):
    return [
        "--model", small, "--text", small / "text.txt", "--lengths", 200, "--samples", 3, "--no-floor",
        "--ratios", "0.2,0.4", "--selectors", "knorm", "--strategies", "power",
    ]  # fmt: skip


def test_numbers_are_those_of_the_python_api(small, options, tmp_path):
    from rankkv import load_model

    arguments = ["--tasks", "perplexity,niah_single", "--task-option", "continuation=20", *options]
    result = invoke(*arguments, "-o", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    model, tokenizer = load_model(small)
    haystack = Haystack(tokenizer, (small / "text.txt").read_text())
    settings, uniform_of = build_settings([0.2, 0.4], ["knorm"], ["power"])
    rows = []
    for name, more in (("perplexity", {"continuation": 20}), ("niah_single", {})):
        samples = make_samples(get_task(name), tokenizer, haystack, lengths=[200], count=3, **more)
        rows += evaluate_task(model, tokenizer, samples, settings)
    expected = [make_json_ready(one.to_dict()) for one in compare_settings(rows, uniform_of)]
    assert record["comparisons"] == expected
    assert sorted(map(str, read_rows([tmp_path / "rows.parquet"]))) == sorted(map(str, rows))
    for shown in ("perplexity: loss, lower is better; 3 contexts", "guess rate", "knorm|power|0.2"):
        assert shown in result.stderr


def test_a_loss_stands_beside_the_ratios(small, tmp_path):
    result = invoke(
        "--model", small, "--text", small / "text.txt", "--lengths", 300, "--samples", 2, "--no-floor", "--json",
        "--tasks", "perplexity", "--task-option", "continuation=20", "--ratios", 0.2, "--max-losses", "0.05,0.5",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = {one["setting"]: one for one in json.loads(result.stdout)["comparisons"]}
    shares = [found[f"auto|max_loss|{loss}"]["kept_share"] for loss in (0.05, 0.5)]
    assert 1 > shares[0] > shares[1] > 0


def test_every_row_auto_has_the_selector_that_is_printed(small):
    """Uniform budgets too: they are compared with others of the same selector."""
    result = invoke(
        "--model", small, "--text", small / "text.txt", "--lengths", 300, "--samples", 1, "--no-floor", "--json",
        "--tasks", "perplexity", "--task-option", "continuation=20", "--ratios", 0.2,
        "--selectors", "auto,echo", "--strategies", "auto,default",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "Selector auto: echo, as compress() takes it." in result.stderr
    found = {one["setting"]: one["score"] for one in json.loads(result.stdout)["comparisons"]}
    for strategy in ("uniform", "auto", "default"):
        assert found[f"auto|{strategy}|0.2"] == found[f"echo|{strategy}|0.2"]


def test_what_is_there_is_not_computed_again(options, tmp_path):
    arguments = ["--tasks", "perplexity", *options, "-o", tmp_path]
    assert invoke(*arguments).exit_code == 0
    parts = sorted((tmp_path / "parts").iterdir())
    before = [part.stat().st_mtime_ns for part in parts]
    (tmp_path / "rows.parquet").unlink()
    parts[1].unlink()
    assert invoke(*arguments).exit_code == 0
    after = [part.stat().st_mtime_ns for part in parts]
    assert (after[0], after[2]) == (before[0], before[2])
    assert len(read_rows([tmp_path / "rows.parquet"])) == 3 * 6
    other = invoke(*arguments, "--seed", 1)
    assert other.exit_code == 2
    assert "seed: 0, now 1" in other.stderr


def test_a_model_that_guesses_is_refused(options):
    """A random model finds no needle, so no cache can be told from another."""
    result = invoke("--tasks", "niah_single", *[item for item in options if item != "--no-floor"])
    assert result.exit_code == 2
    assert "cannot tell a good cache from a bad one" in result.stderr


def test_a_task_of_the_harness_stands_beside_own_ones(options, tmp_path, python_docs):
    pytest.importorskip("lm_eval")
    documents = [{"text": python_docs[2000 * i :][:600], "gold": i % 2} for i in range(4)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    (tmp_path / "two.yaml").write_text(
        f"task: two_choices\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path}/data.jsonl\n"
        'test_split: test\noutput_type: multiple_choice\ndoc_to_text: "{{text}}"\ndoc_to_target: gold\n'
        'doc_to_choice: ["A", "B"]\nmetric_list:\n  - metric: acc\n'
    )
    result = invoke(
        "--tasks", "two_choices", "--include-path", tmp_path, *options, "--json", "--question-aware"
    )
    assert result.exit_code == 0, result.output
    found = {one["setting"]: one for one in json.loads(result.stdout)["comparisons"]}
    assert found["blank"]["score"]["mean"] == 0.5
    assert found["full"]["score"]["samples"] == 3
    assert set(found) == {
        "full",
        "blank",
        *(f"knorm|{s}|{r}" for s in ("uniform", "power") for r in (0.2, 0.4)),
    }
    assert 0.15 < found["knorm|power|0.2"]["kept_share"] < 0.3


@pytest.fixture
def longbench(tmp_path, python_docs):
    """A file in LongBench's form: two entries that fit and one that is too long."""
    path = tmp_path / "hotpotqa.jsonl"
    entries = [
        {
            "input": f"What is topic {i}?",
            "context": python_docs[3000 * i :][: 900 if i < 2 else 6000],
            "answers": ["a statement"],
            "dataset": "hotpotqa",
            "all_classes": None,
        }
        for i in range(4)
    ]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


@pytest.mark.parametrize("question", ["after", "before"])
def test_a_published_file_is_scored_as_it_is(small, longbench, tmp_path, question):
    arguments = [
        "--data", longbench, "--model", small, "--ratios", "0.5", "--limit", 3, "--max-new-tokens", 4,
        "--max-length", 700, "--question", question, "-o", tmp_path / "out",
    ]  # fmt: skip
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.output
    shown = " ".join(result.stderr.split())
    for words in (
        "hotpotqa.jsonl: recognised as LongBench",
        "hotpotqa: 3 contexts; qa_f1 of at most 4 new tokens",
        f"Question {question} the compression",
        "1 of 3 prompts are too long for 700 tokens. They lose their middle",
        "hotpotqa: qa_f1, higher is better; 3 contexts",
        "cannot tell a good cache from a bad one",
        "With fewer than 20 the intervals are too narrow",
        "rankkv report",
    ):
        assert words in shown, words
    rows = read_rows([tmp_path / "out" / "rows.parquet"])
    assert len(rows) == 3 * 4
    # Without --selectors each question is asked of the cache that serves it by default.
    selector = {"after": "auto", "before": "snapkv"}[question]
    assert ("Selector auto: echo, as compress() takes it." in shown) == (question == "after")
    settings = {f"{selector}|uniform|0.5", f"{selector}|auto|0.5"}
    assert {row["setting"] for row in rows} == {"full", "blank", *settings}
    assert {row["question_aware"] for row in rows} == {question == "before"}
    assert sorted({(row["index"], row["cut_tokens"] > 0) for row in rows}) == [
        (0, False),
        (1, False),
        (2, True),
    ]
    found = {one["setting"]: one for one in json.loads(result.stdout)["comparisons"]}
    assert found[f"{selector}|auto|0.5"]["bytes_share"] == pytest.approx(0.5, abs=0.05)
    # A file that changed is another run.
    longbench.write_text(longbench.read_text().replace("topic 0", "topic zero"))
    again = invoke(*arguments)
    assert again.exit_code == 2
    assert "holds the results of another run" in again.stderr


def test_an_unknown_file_is_refused_before_the_model_loads(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"title": "x"}\n')
    result = invoke("--data", tmp_path / "a.jsonl", "--model", tmp_path)
    assert result.exit_code == 2
    assert "none of the known shapes: SCBench (multi_turns); LongBench v2" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        # Slow: the harness lists its thousands of tasks first.
        pytest.param(
            ["--tasks", "neddle"], "unknown task 'neddle'; did you mean 'needle'", marks=pytest.mark.slow
        ),
        (["--tasks", "hellaswag", "--include-path", "nowhere"], "'nowhere' is not a folder"),
        (["--tasks", ","], "--tasks ',' is an empty list"),
        (["--selectors", ""], "--selectors '' is an empty list"),
        (["--ratios", "2"], "compression_ratio=2.0 is outside"),
        (["--max-losses", "0"], "max_loss=0.0 is outside (0, 10]"),
        (["--max-losses", "0.1", "--selectors", "h2o"], "'h2o' was not measured"),
        (["--ratios", "half"], "'half' must be a number"),
        (["--samples", "0"], "--samples is 0"),
        (["--limit", "0"], "--limit is 0"),
        (["--question", "during"], "--question is 'during' but must be 'after' or 'before'"),
        (["--data", "nowhere.jsonl"], "there is no file or folder 'nowhere.jsonl'"),
        (["--task-option", "hops=2"], "no task has the option 'hops'"),
        (["--selectors", "snapvk"], "unknown selector 'snapvk'"),
    ],
)
def test_refusals(arguments, words):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())


def test_own_tasks_are_listed():
    result = invoke("--list")
    assert result.exit_code == 0
    assert all(name in result.stdout for name in ("variable_tracking", "hops=4", "2404.06654"))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_launched_processes_measure_the_same(options, tmp_path, launcher):
    program = [
        "-m",
        "rankkv",
        "eval",
        "--tasks",
        "perplexity,niah_single",
        *map(str, options),
        "--json",
        "-o",
    ]
    one = run([sys.executable, *program, str(tmp_path / "one")])
    two = launch([*program, str(tmp_path / "two")], 2, launcher)
    # Printed once, every number bit by bit, and nothing measured twice.
    assert json.loads(two.stdout)["comparisons"] == json.loads(one.stdout)["comparisons"]
    rows = [read_rows([tmp_path / name / "rows.parquet"]) for name in ("one", "two")]
    assert rows[0] == rows[1]
    assert two.stderr.count("perplexity: loss, lower is better; 3 contexts") == 1
