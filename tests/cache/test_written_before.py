"""Files that earlier code wrote: caches, profiles, query filters and sweeps still load and give the same answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from rankkv import RankKVCache, RankProfile, compress, compute_query_filters, load_model
from rankkv.cli import app
from rankkv.selection import get_selector

FILES = Path(__file__).resolve().parents[1] / "data" / "written_before"
ANSWERS = json.loads((FILES / "answers.json").read_text())
PROMPT = torch.tensor([ANSWERS["prompt"]])
TEXTS = [PROMPT[0], PROMPT[0].flip(0)]
CALIBRATION = {"context_tokens": 64, "continuation_tokens": 16, "ratios": (0.2, 0.5)}
#: The tokens whose logits were recorded.
LATER = (5, 9, 30)


@pytest.fixture(scope="module")
def model():
    return load_model(FILES / "model")[0]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of all files, and the current folder."""
    shutil.copytree(FILES, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def assert_answers(model, cache, recorded):
    assert cache.seen_tokens == recorded["seen_tokens"]
    assert cache.kept_lengths == recorded["kept_lengths"]
    assert cache.kept_per_head == recorded["kept_per_head"]
    assert cache.budgets_per_row == recorded["budgets"]
    assert [cache.cache_bytes(), cache.full_cache_bytes()] == recorded["bytes"]
    for found, expected in (
        (cache.layer_ranks_per_row, recorded["layer_ranks"]),
        (cache.layer_measures_per_row, recorded["layer_measures"]),
    ):
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=1e-9)
    with torch.no_grad():
        logits = [
            model(torch.tensor([[token]]), past_key_values=cache, use_cache=True).logits[0, -1]
            for token in LATER
        ]
    torch.testing.assert_close(torch.stack(logits), torch.tensor(recorded["logits"]), rtol=1e-4, atol=1e-4)


def test_every_saved_cache_has_its_answers():
    assert {path.stem for path in FILES.glob("*.safetensors")} == set(ANSWERS["caches"])


@pytest.mark.parametrize("name", ANSWERS["caches"])
def test_a_saved_cache_answers_as_before(model, name):
    cache = RankKVCache.load(FILES / f"{name}.safetensors", model)
    assert_answers(model, cache, ANSWERS["caches"][name])


def test_a_saved_cache_keeps_what_the_same_prompt_keeps_now(model):
    cache = RankKVCache.load(FILES / "default.safetensors", model)
    again = compress(model, PROMPT, selector="snapkv")
    for index in cache.layer_indices:
        assert torch.equal(cache.layers[index].compute_positions(), again.layers[index].compute_positions())


@pytest.mark.parametrize("name", ANSWERS["caches"])
def test_a_saved_cache_can_be_saved_again(model, name, tmp_path):
    cache = RankKVCache.load(FILES / f"{name}.safetensors", model)
    again = RankKVCache.load(cache.save(tmp_path / "again.safetensors"), model)
    assert_answers(model, again, ANSWERS["caches"][name])


@pytest.mark.parametrize("method", ANSWERS["profiles"])
def test_a_profile_gives_the_same_budgets(model, method):
    profile = RankProfile.load(FILES / f"profile_{method}.json")
    assert_answers(model, compress(model, PROMPT, profile=profile), ANSWERS["profiles"][method])


@pytest.mark.parametrize("method", ANSWERS["profiles"])
def test_an_interrupted_calibration_goes_on(model, method, folder):
    path = folder / f"unfinished_{method}.jsonl"
    lines = path.read_text().splitlines()
    profile = RankProfile.calibrate(model, texts=TEXTS, method=method, resume_path=path, **CALIBRATION)
    # The header and the first text stay as they are; the second text is the only new line.
    assert path.read_text().splitlines()[:-1] == lines
    recorded = RankProfile.load(folder / f"profile_{method}.json")
    torch.testing.assert_close(
        torch.tensor(profile.divergence), torch.tensor(recorded.divergence), rtol=1e-4, atol=1e-4
    )
    assert profile.layer_indices == recorded.layer_indices


def test_query_filters_select_as_before(model):
    selector = get_selector("qfilter", filters=FILES / "query_filters.json")
    cache = compress(model, PROMPT, selector=selector, head_budgets="adaptive")
    assert_answers(model, cache, ANSWERS["query_filters"])


def test_query_filters_are_computed_as_before(model):
    found = compute_query_filters(model, TEXTS)
    recorded = json.loads((FILES / "query_filters.json").read_text())["layers"]
    for layer, directions in found.items():
        torch.testing.assert_close(directions, torch.tensor(recorded[str(layer)]), rtol=1e-4, atol=1e-4)


def run_sweep():
    done = CliRunner().invoke(app, ["sweep", "sweep.yaml", "--output-dir", "sweep", "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def read_rows(folder):
    parquet = pytest.importorskip("pyarrow.parquet")
    return parquet.read_table(folder / "sweep" / "rows.parquet").to_pylist()


def test_a_finished_sweep_is_not_measured_again(folder):
    rows = read_rows(folder)
    assert run_sweep()["measured"] == 0
    assert read_rows(folder) == rows


def test_a_sample_that_is_missing_is_measured_as_before(folder):
    rows = read_rows(folder)
    next((folder / "sweep" / "parts").glob("*-001.parquet")).unlink()
    assert run_sweep()["measured"] == 1
    again = read_rows(folder)
    assert len(again) == len(rows)
    for old, new in zip(rows, again, strict=True):
        # Columns may have come since; none is lost.
        assert old.keys() <= new.keys()
        for name, value in old.items():
            if isinstance(value, float) and "seconds" not in name:
                assert new[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name
            elif not isinstance(value, float):
                assert new[name] == value, name


def test_results_make_a_report(folder):
    pytest.importorskip("plotly")
    done = CliRunner().invoke(app, ["report", "sweep"])
    assert done.exit_code == 0, done.output
    assert "snapkv + default" in (folder / "sweep" / "report.html").read_text()
