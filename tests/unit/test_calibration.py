"""Calibration: its cells against caches compressed the ordinary way, and going on after an interruption."""

from __future__ import annotations

import json

import oracles
import pytest
import torch
from typer.testing import CliRunner

from rankkv import RankProfile, calibration, compress
from rankkv.cli import app
from rankkv.compat import cache_argument
from rankkv.errors import ConfigError, InputError

CONTEXT = 100


def make_ids(length=140, seed=0):
    return oracles.random_prompt(length, seed).reshape(1, -1)


def compute_divergence(model, ids, budget):
    """KL(full || compressed) and excess loss in float64, every layer compressed to ``budget`` tokens."""
    rest, targets = ids[:, CONTEXT:], ids[0, CONTEXT + 1 :]
    logs = []
    for kept in (CONTEXT, budget):
        cache = compress(model, ids[:, :CONTEXT], budget=kept, strategy="uniform", min_budget=1)
        with torch.no_grad():
            logits = model(rest, **cache_argument(cache)).logits[0, :-1]
        logs.append(logits.double().log_softmax(-1))
    full, compressed = logs
    divergence = (full.exp() * (full - compressed)).sum(-1).mean()
    loss = (full - compressed).gather(-1, targets[:, None]).mean()
    return float(loss), float(divergence)


def test_cells_of_one_layer_are_those_of_the_whole_cache(tiny_llama):
    model, ids = tiny_llama(1), make_ids()
    record = calibration.measure_text(model, ids, CONTEXT, (0.1, 0.4), base_ratio=0.2)
    for place, budget in enumerate((10, 40)):
        loss, divergence = compute_divergence(model, ids, budget)
        assert record["excess_loss"][0][place] == pytest.approx(loss, abs=1e-4)
        assert record["divergence"][0][place] == pytest.approx(divergence, abs=1e-5)
    loss, divergence = compute_divergence(model, ids, 20)
    assert record["base_divergence"] == pytest.approx(divergence, abs=1e-5)
    # With its full cache back nothing is left of the distance.
    assert record["gain_divergence"][0] == pytest.approx(divergence, abs=1e-5)
    assert record["gain_loss"][0] == pytest.approx(loss, abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "neox"])
def test_replay_changes_no_cell(tiny_llama, tiny_neox, monkeypatch, family):
    model, ids = {"llama": tiny_llama, "neox": tiny_neox}[family](4), make_ids()
    assert len(calibration._find_layers(model)) == 4
    replayed = calibration.measure_text(model, ids, CONTEXT, (0.1, 0.4))
    with monkeypatch.context() as patch:
        patch.setattr(calibration, "_find_layers", lambda model: [])
        plain = calibration.measure_text(model, ids, CONTEXT, (0.1, 0.4))
    for name in ("divergence", "excess_loss", "gain_divergence", "gain_loss"):
        torch.testing.assert_close(
            torch.tensor(replayed[name]), torch.tensor(plain[name]), atol=1e-5, rtol=1e-3
        )
    assert max(max(row) for row in plain["divergence"]) > 1e-3
    assert not any("forward" in vars(module) for module in model.modules())


def test_it_goes_on_after_an_interruption(tiny_llama, tmp_path):
    model = tiny_llama(2)
    texts = [make_ids(seed=seed)[0] for seed in range(3)]
    options = {"context_tokens": CONTEXT, "continuation_tokens": 40, "ratios": (0.1, 0.4), "name": "tiny"}
    whole = RankProfile.calibrate(model, texts=texts, **options)
    path, seen = tmp_path / "unfinished.json", []

    def interrupt(done, total):
        seen.append((done, total))
        if done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        RankProfile.calibrate(model, texts=texts, resume_path=path, on_progress=interrupt, **options)
    assert seen == [(done, 18) for done in range(1, 10)]
    assert len(json.loads(path.read_text())) == 1
    seen.clear()
    resumed = RankProfile.calibrate(
        model, texts=texts, resume_path=path, on_progress=lambda *step: seen.append(step), **options
    )
    # The first piece was there already, the second had begun and starts anew.
    assert seen == [(done, 18) for done in range(7, 19)]
    assert resumed == whole
    other = RankProfile.calibrate(tiny_llama(2, seed=1), texts=texts, resume_path=path, **options)
    assert other.divergence != whole.divergence


def test_ranks_are_those_of_a_cache(tiny_llama):
    model, ids = tiny_llama(3), make_ids()
    options = {"context_tokens": CONTEXT, "continuation_tokens": 40, "ratios": (0.2,)}
    profile = RankProfile.calibrate(model, texts=ids, **options)
    ranks = compress(
        model, ids[:, :CONTEXT], scope="window", aggregation="concat", strategy="power"
    ).layer_ranks
    assert profile.ranks["window/concat"]["mean"] == pytest.approx(ranks, rel=1e-4)
    assert profile.ranks["window/concat"]["std"] == [0.0] * 3


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"texts": ["some text"]}, InputError, "tokenizer is needed"),
        ({"texts": None}, InputError, "no text has"),
        ({"texts": [torch.arange(50)]}, InputError, "no text has 1280 tokens"),
        ({"texts": [torch.arange(50)], "context_tokens": 8}, ConfigError, "context_tokens=8"),
        ({"texts": [torch.arange(50)], "ratios": (0.4, 0.1)}, ConfigError, "ascending"),
        ({"texts": [torch.arange(50)], "base_ratio": 1.0}, ConfigError, "base_ratio"),
    ],
)
def test_bad_input_is_named(tiny_llama, options, error, message):
    with pytest.raises(error, match=message):
        RankProfile.calibrate(tiny_llama(2), **options)


def test_the_command_writes_a_profile_that_its_model_finds(tiny_llama, tmp_path, monkeypatch):
    from rankkv import models
    from rankkv.known_profiles import find_profile

    class Letters:
        def __call__(self, text, **_options):
            return {"input_ids": torch.tensor([[ord(letter) % 128 for letter in text]])}

    monkeypatch.setenv("RANKKV_CACHE", str(tmp_path / "own"))
    monkeypatch.setattr(models, "load_model", lambda *_: (tiny_llama(2), Letters()))
    path = tmp_path / "text.txt"
    path.write_text("All work and no play makes a dull profile. " * 8)
    command = ["calibrate", "--texts", str(path), "--context-tokens", "100", "--continuation-tokens", "30"]
    result = CliRunner().invoke(app, [*command, "--max-texts", "1", "-o", str(tmp_path / "profile.json")])
    assert result.exit_code == 0, result.output
    profile = RankProfile.load(tmp_path / "profile.json")
    assert profile.calibration["texts"] == 1
    assert sorted(item.name for item in tmp_path.iterdir()) == ["profile.json", "text.txt"]
    assert CliRunner().invoke(app, [*command, "--max-texts", "1"]).exit_code == 0
    assert find_profile(tiny_llama(2), [0, 1]) == profile
    assert isinstance(profile, RankProfile)
    assert CliRunner().invoke(app, [*command, "--texts", "absent.txt"]).exit_code == 2
