"""The file that says how each record is made: its commands can be run, and are those that the records name."""

from __future__ import annotations

import importlib
import json
import shlex
from pathlib import Path

import make_results
import pytest

ROOT = Path(__file__).resolve().parents[2]
RECORDS = make_results.read_records()
EXPERIMENTS = {
    name: entry
    for name, entry in RECORDS.items()
    if "experiments/" in entry["command"][0] and not entry.get("gone")
}


def parse(name, entry):
    """Parse a record's command with its own program."""
    words = make_results.build_commands(name, entry)[0]
    at = next(number for number, word in enumerate(words) if word.endswith(".py"))
    program = importlib.import_module(Path(words[at]).stem)
    return vars(program.parse_arguments(words[at + 1 :]))


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if ".py" in EXPERIMENTS[name]["command"][0]])
def test_a_program_takes_the_command_of_its_record(name):
    found = parse(name, EXPERIMENTS[name])
    manifest = ROOT / "results" / name / "manifest.json"
    if not manifest.is_file():
        return
    held = json.loads(manifest.read_text(encoding="utf-8"))["config"]
    same = {key for key in held.keys() & found.keys() if key not in ("texts", "command")}
    assert {"samples", "seed"} <= same
    assert {key: held[key] for key in same} == {key: json.loads(json.dumps(found[key])) for key in same}
    assert held.get("texts") == EXPERIMENTS[name].get("texts")


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_lies_where_its_name_says(name):
    path = ROOT / "results" / name
    assert path.is_file() if name.endswith(".json") else (path / "manifest.json").is_file()


def test_what_is_missing_is_said_and_nothing_runs(tmp_path, capsys):
    (tmp_path / "encyclopaedia.txt").write_text("x")
    words = ["--texts", str(tmp_path), "--only", "ablation", "asked_later_qwen", "--list"]
    assert make_results.main(words) == 1
    told = capsys.readouterr().out
    assert "must hold essays.txt, code.txt, dialogue.txt" in told
    assert "must hold code.txt, manual.txt, licences.txt" in told


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        (["--only", "ablatoin"], "no record ablatoin: one of ablation"),
        (["--models", "=x"], "must be NAME=PATH"),
        (["--texts", "/nowhere/at/all"], "must be a folder"),
    ],
)
def test_wrong_words_are_one_sentence(words, fragment, capsys):
    with pytest.raises(SystemExit):
        make_results.parse_arguments(words)
    assert fragment in capsys.readouterr().err


@pytest.mark.slow
def test_a_record_is_made_once_at_a_commit_without_a_path_of_this_machine(
    tmp_path, monkeypatch, capsys, python_docs
):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "manual.txt").write_text(python_docs[:60_000], encoding="utf-8")
    tables = tmp_path / "tools" / "make_record_tables.py"
    tables.parent.mkdir()
    tables.write_text("print('tables')")
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    command = "experiments/asked_later.py --samples 1 --context 128 --continuation 8 --ratios 0.5"
    command += " --methods echo --tasks"
    entry = {"command": [command], "texts": ["manual"]}
    monkeypatch.setattr(make_results, "ROOT", tmp_path)
    monkeypatch.setattr(make_results, "read_records", lambda: {"small": entry})
    monkeypatch.setattr(make_results, "find_commit", lambda: "a" * 40)
    assert make_results.main(["--texts", str(texts)]) == 0
    manifest = (tmp_path / "results" / "small" / "manifest.json").read_text(encoding="utf-8")
    assert str(tmp_path) not in manifest
    assert shlex.split(json.loads(manifest)["environment"]["command"])[:2] == [
        "python",
        "experiments/asked_later.py",
    ]
    assert (tmp_path / "results" / "small" / "rows.parquet").is_file()
    assert make_results.main(["--texts", str(texts)]) == 0
    assert "small: made at this commit already" in capsys.readouterr().out
