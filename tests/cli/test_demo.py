"""The demo as a user runs it: three caches, one question, one record."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from rankkv.cli import app

pytest.importorskip("matplotlib")

LAYERS, KV_HEADS, HEAD_DIM, FLOAT32 = 30, 3, 64, 4


def run_demo(folder, *arguments):
    result = CliRunner().invoke(app, ["demo", "--output-dir", str(folder), *map(str, arguments)])
    assert result.exit_code == 0, result.stderr
    return result, json.loads((folder / "demo.json").read_text())


def check_record(record, ratio):
    full, uniform, rankkv = record["runs"]
    assert record["order"] == [full["name"], uniform["name"], rankkv["name"]]
    assert len({run["prompt_tokens"] for run in record["runs"]}) == 1
    assert uniform["total_budget"] == rankkv["total_budget"] == round(ratio * LAYERS * full["prompt_tokens"])
    assert max(uniform["budgets"]) - min(uniform["budgets"]) <= 1
    assert len(set(rankkv["budgets"])) > 2
    for run in record["runs"]:
        slots = sum(run["kept_lengths"])
        assert run["cache_bytes"] == 2 * slots * KV_HEADS * HEAD_DIM * FLOAT32
        assert run["has_fact"] == ("4829173" in run["answer"])
    # The first token comes from the prefill, before anything is evicted.
    assert len({run["token_ids"][0] for run in record["runs"]}) == 1


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return folder, *run_demo(
        folder, "--tokens", 320, "--compression-ratio", 0.5, "--max-new-tokens", 6, "--json"
    )


def test_three_caches_spend_what_they_say(short_run):
    check_record(short_run[2], 0.5)


def test_stdout_is_the_record_and_stderr_the_story(short_run):
    _, result, record = short_run
    assert json.loads(result.stdout) == record
    for run in record["runs"]:
        assert run["name"] in result.stderr
    rows = [line for line in result.stderr.splitlines() if line.split()[:1] and line.split()[0].isdigit()]
    assert len(rows) == LAYERS
    assert "█" in rows[0]


def test_document_holds_the_fact_once_and_about_in_the_middle(embedded):
    from rankkv.cli.demo import FACT, _build_prompt

    tokenizer = embedded[1]
    ids, account = _build_prompt(tokenizer, 500)
    text = tokenizer.decode(ids[0])
    assert text.count(FACT) == 1
    assert 0.35 < text.index(FACT) / len(text) < 0.65
    assert abs(account["tokens"] - 500) < 40


def test_figures_are_written(short_run):
    names = {path.name for path in (short_run[0] / "figures").iterdir()}
    stems = ("demo_ranks_and_budgets", "demo_cache_comparison")
    assert names == {f"{stem}{ending}" for stem in stems for ending in (".png", "-dark.png", ".pdf")}


def test_document_longer_than_the_context_is_refused(tmp_path):
    result = CliRunner().invoke(app, ["demo", "--tokens", "9000", "--output-dir", str(tmp_path)])
    assert result.exit_code == 2
    assert "8192 positions" in result.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_demo_as_it_ships(tmp_path):
    result, record = run_demo(tmp_path)
    assert result.stdout == ""
    assert record["document"]["tokens"] >= 4000
    check_record(record, 0.3)
    full, *compressed = record["runs"]
    assert full["has_fact"]
    for run in compressed:
        assert 0.3 <= run["cache_bytes"] / full["cache_bytes"] < 0.32
