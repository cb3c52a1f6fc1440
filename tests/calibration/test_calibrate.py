"""Calibration: what a profile holds, going on after an interruption, and the command."""

from __future__ import annotations

import oracles
import pytest
import torch
from typer.testing import CliRunner

from rankkv import RankProfile, compress
from rankkv.cli import app
from rankkv.errors import ConfigError, InputError

CONTEXT = 100


def make_ids(length=140, seed=0):
    return oracles.random_prompt(length, seed).reshape(1, -1)


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
    assert seen == [(done, 24) for done in range(1, 10)]
    assert len(path.read_text().splitlines()) == 2
    seen.clear()
    resumed = RankProfile.calibrate(
        model, texts=texts, resume_path=path, on_progress=lambda *step: seen.append(step), **options
    )
    # The first piece was there already, the second had begun and starts anew.
    assert seen == [(done, 24) for done in range(9, 25)]
    assert resumed == whole
    with pytest.raises(InputError, match=r"of another calibration \(other weights\)"):
        RankProfile.calibrate(tiny_llama(2, seed=1), texts=texts, resume_path=path, **options)


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
    from rankkv.models import loading as models
    from rankkv.profile.known import find_profile

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
