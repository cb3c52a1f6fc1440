"""lm-evaluation-harness on a compressed cache: the cache is read, and read in full it changes nothing."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import lm_eval
import pytest
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from typer.testing import CliRunner

from rankkv.cli import app
from rankkv.errors import ConfigError, InputError, UnknownNameError
from rankkv.evaluation.lm_eval.model import RankKVLM
from rankkv.evaluation.lm_eval.rows import build_task_manager, evaluate_harness_task

TASKS = ["local_generation", "local_choice", "local_letter", "local_rolling"]
YAML = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {kind}
"""
PROMPT = "{{context}}\\n\\n{{question}}\\nThe access code for the north gate is"
REST = {
    "local_generation": (
        "generate_until",
        f'doc_to_text: "{PROMPT}"\ndoc_to_target: " {{{{answer}}}}"\n'
        'generation_kwargs:\n  until: ["\\n"]\n  max_gen_toks: 8\nmetric_list:\n  - metric: exact_match\n',
    ),
    "local_choice": (
        "multiple_choice",
        f'doc_to_text: "{PROMPT}"\ndoc_to_choice: "{{{{choices}}}}"\ndoc_to_target: 2\n'
        "metric_list:\n  - metric: acc\n",
    ),
    "local_letter": (
        "multiple_choice",
        f'doc_to_text: "{PROMPT}"\ndoc_to_choice: ["A", "B"]\ndoc_to_target: 1\n'
        "metric_list:\n  - metric: acc\n",
    ),
    "local_rolling": (
        "loglikelihood_rolling",
        'doc_to_text: ""\ndoc_to_target: "{{context}}"\nmetric_list:\n  - metric: bits_per_byte\n',
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, python_docs):
    """Four tasks as YAML files, with their data beside them."""
    folder = tmp_path_factory.mktemp("tasks")
    documents = []
    for number in range(3):
        text, code = python_docs[20_000 * number :][:900], str(47_113 + 9_111 * number)
        context = f"{text[:300]} The access code for the north gate is {code}. {text[300:]} End."
        choices = ["98214", "55173", code]
        documents.append({"context": context, "question": "What is it?", "answer": code, "choices": choices})
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    for name, (kind, rest) in REST.items():
        (folder / f"{name}.yaml").write_text(YAML.format(name=name, data=data, kind=kind) + rest)
    return folder


@pytest.fixture(scope="module")
def small(embedded, tiny_llama):
    return tiny_llama(2, vocab_size=len(embedded[1])), embedded[1]


@pytest.fixture(scope="module")
def small_folder(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "small"
    for part in small:
        part.save_pretrained(folder)
    return folder


def run(model, folder, tasks=TASKS):
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return lm_eval.simple_evaluate(
        model, tasks=list(tasks), task_manager=manager, log_samples=True, bootstrap_iters=0
    )


def list_answers(results):
    """Return what the model said for every document, numbers and strings."""
    return {
        task: [sample["filtered_resps"] for sample in results["samples"][task]] for task in results["samples"]
    }


def flatten(answers):
    if isinstance(answers, list | tuple):
        return [value for part in answers for value in flatten(part)]
    return [answers]


@pytest.fixture(scope="module")
def own(small, folder):
    model, tokenizer = small
    return list_answers(run(HFLM(pretrained=model, tokenizer=tokenizer), folder))


def wrap(small, **options):
    model, tokenizer = small
    return RankKVLM(pretrained=model, tokenizer=tokenizer, **options)


@pytest.mark.parametrize("aware", [True, False], ids=["aware", "agnostic"])
def test_everything_kept_is_the_harness_own_model(small, folder, own, aware):
    found = list_answers(run(wrap(small, compression_ratio=1.0, question_aware=aware, batch_size=2), folder))
    for task in TASKS:
        for given, expected in zip(flatten(found[task]), flatten(own[task]), strict=True):
            assert given == (pytest.approx(expected, abs=1e-3) if isinstance(expected, float) else expected)


@pytest.mark.parametrize(
    "aware", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["aware", "agnostic"]
)
def test_a_twentieth_of_the_cache_changes_every_score(small, folder, own, aware):
    """A cache compressed after the only forward would never be read: a one-letter answer shows it first."""
    results = run(wrap(small, compression_ratio=0.05, question_aware=aware), folder)
    found = list_answers(results)
    for task in ("local_choice", "local_letter", "local_rolling"):
        pairs = list(zip(flatten(found[task]), flatten(own[task]), strict=True))
        numbers = [(a, b) for a, b in pairs if isinstance(b, float)]
        assert len(numbers) >= 3
        assert all(abs(a - b) > 1e-3 for a, b in numbers), task
    assert found["local_generation"] != own["local_generation"]
    assert results["config"]["rankkv"]["kept_share"] < 0.3


def test_question_agnostic_is_compress_then_ask(small, folder):
    """The same number from the library's own functions."""
    import torch

    from rankkv import compress
    from rankkv.models.compat import cache_argument

    model, tokenizer = small
    options = {"compression_ratio": 0.1, "selector": "knorm"}
    results = run(
        wrap(small, question_aware=False, context_field="context", **options), folder, ["local_choice"]
    )
    for sample in results["samples"]["local_choice"]:
        context = sample["doc"]["context"]
        question = "\n\nWhat is it?\nThe access code for the north gate is"
        for number, choice in enumerate(sample["doc"]["choices"]):
            ids, asked, said = (
                tokenizer(text, return_tensors="pt").input_ids for text in (context, question, f" {choice}")
            )
            cache = compress(model, ids, **options)
            with torch.no_grad():
                logits = model(torch.cat([asked, said], dim=1), **cache_argument(cache)).logits[0]
            predicted = logits[asked.shape[1] - 1 : -1].log_softmax(-1)
            expected = float(predicted.gather(-1, said[0, :, None]).sum())
            assert sample["filtered_resps"][number][0] == pytest.approx(expected, abs=1e-3)


@pytest.fixture
def restored_logging():
    """The harness' command line sets up logging for its process, on a stream that is gone after the test."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = before


@pytest.mark.slow
def test_command_line_gives_the_numbers_of_the_python_api(
    restored_logging, small, small_folder, folder, tmp_path
):
    options = {"compression_ratio": 0.1, "selector": "h2o"}
    expected = run(wrap(small, **options), folder)["results"]
    arguments = [
        "lm-eval", "--model", "rankkv", "--include_path", folder, "--tasks", ",".join(TASKS), "--device", "cpu",
        "--model_args", f"pretrained={small_folder},compression_ratio=0.1,selector=h2o,dtype=float32",
        "--output_path", tmp_path,
    ]  # fmt: skip
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    assert "local_rolling" in result.output
    (path,) = tmp_path.rglob("results_*.json")
    found = json.loads(path.read_text())
    assert found["config"]["rankkv"]["selector"] == "h2o"
    for task in TASKS:
        numbers = {name: value for name, value in expected[task].items() if isinstance(value, float)}
        assert numbers
        assert {name: found["results"][task][name] for name in numbers} == pytest.approx(numbers, abs=1e-4)


@pytest.mark.parametrize("task", ["local_letter", "local_rolling", "local_generation"])
def test_rows_say_what_was_kept_and_what_is_guessed(small, folder, task):
    manager = build_task_manager([task], str(folder))
    settings = {"few": {"compression_ratio": 0.2}}
    rows = list(evaluate_harness_task(*small, task, settings, manager, count=2))
    by_setting = {name: [row for row in rows if row["setting"] == name] for name in ("full", "blank", "few")}
    assert {row["questions"] for row in rows} == {1}
    assert [row["index"] for row in by_setting["few"]] == [0, 1]
    assert [row["score"] for row in by_setting["blank"]] == ([0.5, 0.5] if task == "local_letter" else [])
    for row in by_setting["few"]:
        assert 0 < row["cache_bytes"] < 0.4 * row["full_cache_bytes"]
    assert {row["cache_bytes"] for row in by_setting["full"]} == {None}


def test_a_prompt_shorter_than_what_is_kept_is_said(small, folder, caplog):
    with caplog.at_level("WARNING"):
        run(wrap(small, budget=5000), folder, ["local_letter"])
    assert "Nothing was evicted" in caplog.text


def test_the_block_of_rolling_likelihoods_is_the_documented_one(small):
    assert wrap(small).get_model_info()["rankkv"]["rolling_block"] == 512


def test_refusals(small, folder):
    with pytest.raises(UnknownNameError, match="'snapkv'"):
        wrap(small, selector="snapvk")
    with pytest.raises(ConfigError, match="compression_ratio=0"):
        wrap(small, compression_ratio=0)
    with pytest.raises(ConfigError, match="rolling_block=0"):
        wrap(small, rolling_block=0)
    with pytest.raises(InputError, match="question_separator"):
        run(wrap(small, question_aware=False, question_separator="###"), folder, ["local_letter"])
    with pytest.raises(InputError, match="have no text under 'passage'"):
        run(wrap(small, question_aware=False, context_field="passage"), folder, ["local_letter"])


@pytest.mark.slow
def test_embedded_model_from_a_shell(folder):
    """As a user types it, in a process of its own; the fact is found by name, and lost with a twentieth."""
    scores = []
    for ratio in (1.0, 0.05):
        command = [
            sys.executable,
            "-m",
            "rankkv",
            "lm-eval",
            "--model",
            "rankkv",
            "--include_path",
            str(folder),
        ]
        command += [
            "--tasks",
            "local_choice",
            "--model_args",
            f"pretrained=embedded,compression_ratio={ratio}",
        ]
        command += ["--output_path", str(folder / f"out-{ratio}")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        (path,) = (folder / f"out-{ratio}").rglob("results_*.json")
        scores.append(json.loads(path.read_text())["results"]["local_choice"]["acc,none"])
    assert scores[0] == 1.0
    assert scores[1] < 1.0


@pytest.mark.parametrize("name", ["longbench_qasper", "niah_single_1", "ruler_vt"])
def test_packages_of_published_tasks_are_one_command(name, monkeypatch):
    from rankkv.errors import MissingDependencyError
    from rankkv.evaluation.lm_eval.rows import check_task_packages

    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    with pytest.raises(MissingDependencyError, match=rf'{name} .* pip install "rankkv\[lm-eval-tasks\]"'):
        check_task_packages([name])
    check_task_packages(["hellaswag"])


def test_ruler_scores_at_the_length_that_was_measured():
    from rankkv.evaluation.lm_eval.rows import _choose_metric

    sample = {"metrics": ["4096", "8192"], "4096": -1.0, "8192": 0.5}
    assert _choose_metric(sample) == "8192"
    assert _choose_metric({"metrics": ["acc", "other"], "acc": -1.0, "other": 1.0}) == "acc"


def raise_own_error():
    raise ValueError("the task's own function couldn't do it")


def test_data_that_cannot_be_loaded_are_one_sentence_and_other_errors_stay(tmp_path):
    datasets = pytest.importorskip("datasets")
    from rankkv.errors import SourceUnavailableError
    from rankkv.evaluation.lm_eval.rows import shorten_harness_errors

    text = tmp_path / "some.txt"
    text.write_text("a line")
    loads = [
        lambda: datasets.load_dataset("nobody/nothing-of-this-name"),
        lambda: datasets.load_dataset("text", data_files=str(text), split="missing", cache_dir=str(tmp_path)),
    ]
    for load in loads:
        with (
            pytest.raises(SourceUnavailableError, match="the data set of mine cannot be loaded"),
            shorten_harness_errors("mine"),
        ):
            load()
    others = [raise_own_error, lambda: (tmp_path / "missing").read_text(), lambda: int("couldn't")]
    for other in others:
        with pytest.raises((ValueError, FileNotFoundError)) as caught, shorten_harness_errors("mine"):
            other()
        assert not isinstance(caught.value, SourceUnavailableError)
