"""Sweeps as users run them: what the rows say, one prefill a sample, killed and resumed, and shared by processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from launching import launch, run
from typer.testing import CliRunner

with contextlib.suppress(ImportError):
    # Its import sets up logging anew, which closes the streams of some handlers: not while a test captures them.
    import submitit  # noqa: F401

from rankkv import compress, load_model
from rankkv.cli import app
from rankkv.errors import ConfigError, InputError, UnknownNameError
from rankkv.evaluation import compute_continuation_loss
from rankkv.evaluation.results import read_rows
from rankkv.evaluation.sweep.config import parse_sweep_config
from rankkv.evaluation.sweep.submitit import submit_sweep
from rankkv.evaluation.sweep.sweep import ModelSweep, Sweep
from rankkv.utils.processes import ProcessRank

RECORD = {
    "tasks": [
        {"task": "perplexity", "lengths": [160], "count": 3, "continuation": 24},
        {"task": "needle", "lengths": [120, 160], "count": 2, "depths": [0.2, 0.8]},
    ],
    "selectors": ["snapkv", "streaming_llm"],
    "allocations": ["uniform", "default"],
    "ratios": [0.3, 0.6],
}


@pytest.fixture(scope="module")
def record(small):
    return RECORD | {"models": [str(small)]}


@pytest.fixture(scope="module")
def config_file(record, tmp_path_factory):
    path = tmp_path_factory.mktemp("sweep") / "sweep.yaml"
    path.write_text(yaml.safe_dump(record))
    return path


@pytest.fixture(scope="module")
def whole(record, tmp_path_factory):
    """The sweep run in one go: its folder and rows."""
    folder = tmp_path_factory.mktemp("whole")
    config = parse_sweep_config(record)
    sweep = Sweep(config, folder, ProcessRank(0, 1))
    list(sweep.load(config.models[0]).run())
    return folder, read_rows([sweep.finish()])


def strip(rows):
    """Return rows without what depends on the clock, in an order of their own."""
    kept = [{key: value for key, value in row.items() if key != "unit_seconds"} for row in rows]
    return sorted(kept, key=lambda row: json.dumps(row, sort_keys=True))


def test_every_cell_is_there_once(whole):
    _, rows = whole
    cells = [(row["label"], row["sample"], row["method"], row["ratio"]) for row in rows]
    assert len(cells) == len(set(cells)) == 7 * (1 + 1 + 4 * 2)
    assert {row["metric"] for row in rows if row["label"] == "perplexity"} == {"loss"}
    kept = {
        row["ratio"]: row["kept_tokens"] / row["full_tokens"] for row in rows if row["sample"] == "160-000"
    }
    assert kept == pytest.approx({0.3: 0.3, 0.6: 0.6, 1.0: 1.0}, abs=0.01)


def test_a_cell_is_what_the_python_api_gives(record, whole):
    folder, rows = whole
    config = parse_sweep_config(record)
    part = Sweep(config, folder, ProcessRank(0, 1)).load(config.models[0])
    assert part.waiting == []
    sample = part.units[1].sample
    model, _ = load_model(record["models"][0])
    cache = compress(model, torch.tensor(sample.context_ids)[None], compression_ratio=0.3, strategy="uniform")
    answer = torch.tensor(sample.prompts[0].answer_ids)[None]
    expected = float(compute_continuation_loss(model, cache, answer).mean())
    (row,) = [
        row for row in rows
        if (row["label"], row["sample"], row["method"], row["ratio"])
        == ("perplexity", sample.name, "snapkv + uniform", 0.3)
    ]  # fmt: skip
    assert row["score"] == pytest.approx(expected, abs=1e-5)
    assert (row["selector"], row["allocation"], row["seed"]) == ("snapkv", "uniform", 0)


def test_one_prefill_serves_all_cells_of_a_sample(record, tmp_path):
    config = parse_sweep_config(record | {"blank": False})
    part = Sweep(config, tmp_path, ProcessRank(0, 1)).load(config.models[0])
    widths = []
    part.model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    for unit in part.run():
        assert [width for width in widths if width >= 100] == [len(unit.sample.context_ids)]
        widths.clear()


def test_portraits_describe_what_is_kept(whole):
    portraits = [read_rows([path]) for path in sorted((whole[0] / "portraits").glob("*.parquet"))]
    assert [len(portrait) for portrait in portraits] == [8, 8]
    for cell in (cell for portrait in portraits for cell in portrait):
        heads = [len(kept) for kept in cell["head_kept"]]
        total = sum(sum(kept) for kept in cell["head_kept"])
        assert sum(cell["token_shares"]) * sum(heads) == pytest.approx(total, rel=1e-4)
        assert [sum(kept) // len(kept) for kept in cell["head_kept"]] == cell["budgets"]
        assert len(cell["pieces"]) == len(cell["token_layers"]) >= 120
        assert max(cell["token_layers"]) <= len(cell["layer_indices"]) == len(cell["head_ranks"]) == 3
        assert [len(ranks) for ranks in cell["head_ranks"]] == [4, 4, 4]


def test_a_sweep_that_is_killed_goes_on_where_it_was(config_file, whole, tmp_path):
    command = [sys.executable, "-m", "rankkv", "sweep", str(config_file), "--output-dir", str(tmp_path)]
    paths = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    )
    parts = tmp_path / "parts"
    while len(list(parts.glob("*.parquet"))) < 2:
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    first = {path.name: path.stat().st_mtime_ns for path in parts.glob("*.parquet")}
    assert 2 <= len(first) < 7, "the kill came too late to say anything"
    assert not (tmp_path / "rows.parquet").exists()

    done = run([*command, "--json"])
    assert json.loads(done.stdout)["measured"] == 7 - len(first)
    assert f"{len(first)} are done" in done.stderr
    assert strip(read_rows([tmp_path / "rows.parquet"])) == strip(whole[1])
    assert {
        path.name: path.stat().st_mtime_ns for path in parts.glob("*.parquet") if path.name in first
    } == first
    assert {path.name for path in (tmp_path / "portraits").glob("*.parquet")} == {
        path.name for path in (whole[0] / "portraits").iterdir()
    }


def test_shares_make_the_whole(record, whole, tmp_path):
    config = parse_sweep_config(record)
    written = []
    for rank in range(2):
        sweep = Sweep(config, tmp_path, ProcessRank(rank, 2))
        written.append(len(list(sweep.load(config.models[0]).run())))
        assert (sweep.finish() is None) == (rank == 0)
    assert written == [4, 3]
    assert strip(read_rows([tmp_path / "rows.parquet"])) == strip(whole[1])


def test_the_plan_measures_nothing(config_file, tmp_path):
    result = CliRunner().invoke(app, ["sweep", str(config_file), "--output-dir", str(tmp_path), "--plan"])
    assert result.exit_code == 0
    assert "7 of 7 samples to measure, 0 are done; about" in result.stderr
    assert list((tmp_path / "parts").iterdir()) == []


def test_files_and_harness_tasks_stand_in_a_sweep(small, tmp_path, python_docs):
    pytest.importorskip("lm_eval")
    lines = [{"text": python_docs[2000 * i :][:600], "gold": i % 2} for i in range(4)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "own.yaml").write_text(
        f"task: two_choices\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path}/own.jsonl\n"
        'test_split: test\noutput_type: multiple_choice\ndoc_to_text: "{{text}}"\ndoc_to_target: gold\n'
        'doc_to_choice: ["A", "B"]\nmetric_list:\n  - metric: acc\n'
    )
    entry = {"context": python_docs[:1500], "input": "What?", "answers": ["a"], "dataset": "hotpotqa"}
    (tmp_path / "hotpotqa.jsonl").write_text("".join(json.dumps(entry | {"_id": i}) + "\n" for i in range(1)))
    record = RECORD | {
        "models": [str(small)],
        "tasks": [
            {"harness": "two_choices", "count": 3, "include_path": str(tmp_path / "tasks")},
            {"data": str(tmp_path / "hotpotqa.jsonl"), "count": 5, "max_new_tokens": 3, "max_length": 200},
        ],
        "ratios": [0.3],
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(record))
    arguments = ["sweep", str(tmp_path / "sweep.yaml"), "--output-dir", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    rows = read_rows([tmp_path / "out" / "rows.parquet"])
    counted = {}
    for row in rows:
        counted.setdefault(row["label"], []).append(row["method"])
    # Three documents, each with the full cache, four methods and the guess rate; one context of the file.
    assert {label: len(methods) for label, methods in counted.items()} == {
        "two_choices": 3 * 6,
        "hotpotqa": 6,
    }
    assert set(counted["two_choices"]) == set(counted["hotpotqa"])
    cut = [row for row in rows if row["label"] == "hotpotqa" and row["setting"] == "full"]
    assert cut[0]["cut_tokens"] > 0
    again = CliRunner().invoke(app, arguments)
    assert "Nothing to measure: 2 of 2 samples are done" in " ".join(again.stderr.split())
    page = tmp_path / "report.html"
    assert CliRunner().invoke(app, ["report", str(tmp_path / "out"), "-o", str(page)]).exit_code == 0
    assert "two_choices" in page.read_text()


def test_another_sweep_in_the_same_folder_is_refused(record, whole):
    with pytest.raises(InputError, match=r"holds the results of another run \(ratios"):
        Sweep(parse_sweep_config(record | {"ratios": [0.5]}), whole[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--share", "3/2"], "--share is '3/2' but must be number/count, such as 2/4"),
        (["--jobs", "2"], "--jobs and --submitit-option need --submitit"),
        (["--submitit", "slrum"], "unknown cluster 'slrum'; did you mean 'slurm'"),
        (["--submitit", "local", "--jobs", "0"], "jobs is 0 but must be at least 1"),
        (["--submitit", "local", "--submitit-option", "colour=1"], "submitit refuses these jobs"),
    ],
)
def test_bad_options_end_in_one_sentence(config_file, tmp_path, arguments, message):
    result = CliRunner().invoke(app, ["sweep", str(config_file), "--output-dir", str(tmp_path), *arguments])
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_samples_that_cannot_be_made_name_their_task(record, tmp_path):
    tasks = [{"task": "needle", "lengths": [160], "count": 1, "colour": "red"}]
    config = parse_sweep_config(record | {"tasks": tasks})
    with pytest.raises(ConfigError, match=r"tasks\[0\] \(needle\).*colour"):
        Sweep(config, tmp_path).load(config.models[0])


def test_a_job_of_a_cluster_runs_the_sweep(config_file, whole, tmp_path):
    (job,) = submit_sweep(config_file, tmp_path, "local", jobs=1, options={"timeout_min": 10})
    deadline = time.monotonic() + 240
    while not (tmp_path / "rows.parquet").exists():
        assert time.monotonic() < deadline, (tmp_path / "jobs" / f"{job}_0_log.err").read_text()
        time.sleep(0.2)
    assert strip(read_rows([tmp_path / "rows.parquet"])) == strip(whole[1])
    with pytest.raises(UnknownNameError, match="unknown cluster 'slrum'"):
        submit_sweep(config_file, tmp_path, "slrum")


@pytest.mark.slow
def test_several_jobs_run_in_this_process_when_debugging(config_file, whole, tmp_path):
    assert len(submit_sweep(config_file, tmp_path, "debug", jobs=2)) == 2
    assert strip(read_rows([tmp_path / "rows.parquet"])) == strip(whole[1])


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
def test_processes_of_a_launcher_share_the_samples(config_file, whole, tmp_path, launcher):
    done = launch(["-m", "rankkv", "sweep", str(config_file), "--output-dir", str(tmp_path)], 2, launcher)
    assert "process 1 of 2" in done.stderr
    assert "process 2 of 2" in done.stderr
    assert strip(read_rows([tmp_path / "rows.parquet"])) == strip(whole[1])


def test_seconds_of_a_unit_are_the_sum_of_its_parts():
    """Per prefilled token 2, per token of a built cache 3, per decode step 10 seconds, counted by hand."""
    prompts = [
        # Two tokens follow: at least one step. No answers: nothing is decoded.
        SimpleNamespace(question_ids=[1], answer_ids=[2], answers=(), max_new_tokens=None),
        # Eight tokens follow, 16 seconds; then the answer of 3 tokens and 8 more are decoded.
        SimpleNamespace(question_ids=[1] * 5, answer_ids=[2] * 3, answers=("x",), max_new_tokens=None),
    ]
    asking = 10 + 16 + 10 * (3 + 8)
    for blank in (False, True):
        for maps in (False, True):
            sample = SimpleNamespace(prompts=prompts, context_ids=[0] * 100, blank_ids=[0] * 100)
            unit = SimpleNamespace(sample=sample, maps_kept_tokens=maps)
            sweep = object.__new__(ModelSweep)
            sweep._settings = {"a": None, "b": None}
            sweep._sweep = SimpleNamespace(config=SimpleNamespace(blank=blank))
            expected = (1 + blank) * 100 * 2 + 3 * (100 * 3 + asking) + blank * asking + maps * 2 * 100 * 3
            assert sweep._estimate_unit(unit, 2.0, 3.0, 10.0) == expected
