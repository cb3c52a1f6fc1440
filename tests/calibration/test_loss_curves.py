"""Loss curves of a model, and the profile that carries them."""

from __future__ import annotations

import json
from dataclasses import replace

import oracles
import pytest
import torch

from rankkv import RankKVCache, RankProfile
from rankkv.calibration import measure_loss_curves
from rankkv.calibration.loss_curves import SCORED_TOKENS, cut_contexts
from rankkv.errors import InputError, ProfileError
from rankkv.evaluation import evaluate_continuation, record_prefill
from rankkv.profile.loss_curve import fit_loss_curve

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7)


@pytest.fixture(scope="module")
def model(tiny_llama):
    return tiny_llama(2)


@pytest.fixture(scope="module")
def texts():
    return [oracles.random_prompt(280 + 9 * seed, seed=seed) for seed in range(5)]


def test_a_curve_is_fitted_to_the_losses_that_an_evaluation_measures(model, texts):
    curves = measure_loss_curves(model, texts, ratios=RATIOS, name="tiny")
    rows = []
    for number, ids in enumerate(texts):
        record = record_prefill(model, ids[:, :-SCORED_TOKENS])
        cells = {str(ratio): {"selector": "echo", "compression_ratio": ratio} for ratio in RATIOS}
        scores = dict(evaluate_continuation(record, ids[:, -SCORED_TOKENS:], cells))
        for name, options in cells.items():
            lost = record.build_cache(**options).lost_attention[0]
            rows.append((lost, scores[name].divergence, number))
    expected = fit_loss_curve(*zip(*rows, strict=True))
    assert curves["echo"].lost == pytest.approx(expected.lost, rel=1e-3)
    assert curves["echo"].loss == pytest.approx(expected.loss, rel=2e-2)
    assert curves["echo"].measured == {
        "prompts": 5, "measurements": 30, "models": ["tiny"], "strategy": "global"
    }  # fmt: skip
    assert curves["snapkv"].measured["strategy"] == "distortion"


def test_contexts_have_two_lengths_and_do_not_overlap():
    ids = torch.arange(5000)
    found = cut_contexts(None, [ids], context_tokens=600, max_texts=2)
    assert [len(one) for one in found] == [600 + SCORED_TOKENS] * 2 + [300 + SCORED_TOKENS] * 2
    assert not set(found[0].tolist()) & set(found[1].tolist())


def test_short_texts_are_refused(model):
    with pytest.raises(InputError, match="needs texts of 258"):
        measure_loss_curves(model, [torch.arange(3, 100)])


@pytest.fixture
def profile(model):
    from rankkv.profile.known import describe_shape, sample_weights

    gains = [0.1, 0.2]
    curves = [[0.2, 0.1], [0.3, 0.1]]
    return RankProfile(
        describe_shape(model), sample_weights(model), [0, 1], [0.1, 0.4], curves, curves, gains, gains, 0.1
    )


def test_a_cache_predicts_by_the_curve_of_its_profile(model, profile, tmp_path):
    curve = {"lost": [0.1, 0.5], "loss": [1.0, 2.0], "margin": 1.5, "measured": {"models": ["own"]}}
    profile = replace(profile, loss_curves={"snapkv": curve})
    loaded = RankProfile.load(profile.save(tmp_path / "profile.json"))
    assert loaded == profile
    prompt = oracles.random_prompt(300)
    cache = oracles.prefill(model, prompt, profile=loaded, compression_ratio=0.5)
    assert cache.find_loss_curve() == (cache.find_loss_curve()[0], True)
    assert cache.find_loss_curve()[0].margin == 1.5
    assert "the loss curve is that of" not in cache.summary()
    bounded = RankKVCache(model, max_loss=1.6, profile=loaded)
    oracles.forward(model, bounded, prompt)
    assert 1.0 < bounded.loss_bounds[0] <= 1.6


def test_a_profile_without_curves_does_not_mention_them(profile):
    assert "loss_curves" not in profile.to_dict()


@pytest.mark.parametrize("curves", [["snapkv"], {"snapkv": {"lost": [0.1, 0.2]}}, {"snapkv": None}])
def test_a_profile_with_damaged_curves_is_refused(profile, curves, tmp_path):
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({**profile.to_dict(), "loss_curves": curves}))
    with pytest.raises(ProfileError):
        RankProfile.load(path)
