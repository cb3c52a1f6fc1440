"""Score weights: what they are, what they do to strategy "global", and whose profile has them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import oracles
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rankkv import RankKVCache, RankProfile, compress
from rankkv.calibration import compute_score_weights
from rankkv.errors import ConfigError, InputError, ProfileError
from rankkv.profile.known import describe_shape, sample_weights, save_known_profile

LAYERS, HEADS = 3, 2


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=HEADS, head_dim=8,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("RANKKV_CACHE", str(tmp_path / "own"))


def make_profile(model, weights, selector="echo"):
    return RankProfile(
        model=describe_shape(model), weight_sample=sample_weights(model), layer_indices=range(LAYERS),
        ratios=(0.1, 0.4), excess_loss=[(0.2, 0.1)] * LAYERS, divergence=[(0.2, 0.1)] * LAYERS,
        gain_loss=[0.1] * LAYERS, gain_divergence=[0.1] * LAYERS, base_ratio=0.1,
        score_weights={"selector": selector, "weights": weights},
    )  # fmt: skip


def count_kept(model, ids, **options):
    cache = compress(model, ids, **options)
    return np.array([rows[0] for rows in cache.kept_per_head])


def test_weights_are_the_ratio_of_the_mean_shares(model):
    texts = [oracles.random_prompt(length, seed) for seed, length in ((1, 160), (2, 220))]
    found = compute_score_weights(model, texts, None, reference="snapkv", compression_ratio=0.4)
    options = {"strategy": "global", "compression_ratio": 0.4}
    wanted = sum(count_kept(model, text, selector="snapkv", **options) for text in texts)
    own = sum(count_kept(model, text, selector="echo", **options) for text in texts)
    assert np.allclose(found["weights"], wanted / own, rtol=1e-3)
    assert (found["texts"], found["reference"]) == (2, "snapkv")


def test_a_head_of_weight_two_competes_with_twice_its_scores(model):
    ids = oracles.random_prompt(150, 3)
    weights = np.ones((LAYERS, HEADS))
    weights[1] = 2.0, 0.25
    plain = compress(model, ids, compression_ratio=0.4, selector="echo", profile=None)
    weighed = compress(
        model, ids, compression_ratio=0.4, selector="echo", profile=make_profile(model, weights.tolist())
    )
    assert sum(plain.budgets) == sum(weighed.budgets) == round(0.4 * 150 * LAYERS)

    taken = []
    cache = RankKVCache(model, selector="echo", profile=None, compression_ratio=0.4)
    compute = cache._schedule.compressor._compute_lasting_scores
    cache._schedule.compressor._compute_lasting_scores = lambda *given: (
        taken.append(compute(*given)) or taken[-1]
    )
    with torch.no_grad():
        model(ids, past_key_values=cache)
    # The floor of 20 tokens is the 4 sinks and the 16 newest; all others compete.
    scores = torch.stack([layer[0] for layer in taken])[..., 4:-16]
    places = (round(0.4 * 150) - 20) * LAYERS * HEADS

    def count(factors):
        weighted = scores * torch.tensor(factors).float()[..., None]
        return 20 + (weighted >= weighted.flatten().topk(places).values[-1]).sum(dim=-1).numpy()

    # A layer's budget is a whole number for each head, so a layer may miss by less than one token a head.
    assert np.abs(np.array([rows[0] for rows in weighed.kept_per_head]) - count(weights)).max() <= HEADS
    assert (
        np.abs(np.array([rows[0] for rows in plain.kept_per_head]) - count(np.ones((LAYERS, HEADS)))).max()
        <= HEADS
    )


def test_compress_uses_the_known_weights_unless_told_otherwise(model):
    ids = oracles.random_prompt(150, 3)
    weights = [[3.0, 0.3], [0.3, 3.0], [1.0, 1.0]]
    before = count_kept(model, ids, compression_ratio=0.3)
    profile = make_profile(model, weights)
    given = count_kept(model, ids, compression_ratio=0.3, selector="echo", profile=profile)
    save_known_profile(profile)
    assert np.array_equal(count_kept(model, ids, compression_ratio=0.3), given)
    assert not np.array_equal(before, given)
    assert np.array_equal(
        count_kept(model, ids, compression_ratio=0.3, selector="echo", profile=None), before
    )
    assert "the profile weighs each head's scores" in compress(model, ids, compression_ratio=0.3).summary()
    # The weights are those of one selector with one set of options.
    assert not isinstance(
        RankKVCache(model, selector="snapkv", strategy="global").config.profile, RankProfile
    )


def test_a_profile_that_weighs_other_scores_is_refused_by_name(model):
    profile = make_profile(model, [[1.0, 2.0]] * LAYERS, "kvzip")
    with pytest.raises(ProfileError, match=r"'echo', but the profile weighs those of 'kvzip'.*--replay"):
        RankKVCache(model, selector="echo", profile=profile)
    with pytest.raises(ProfileError, match="the profile weighs none"):
        RankKVCache(model, selector="echo", strategy="global", profile=replace(profile, score_weights={}))
    with pytest.raises(ConfigError, match="reference='echo' is the selector itself"):
        compute_score_weights(model, [oracles.random_prompt(60, 0)], None, reference="echo")
    with pytest.raises(InputError, match="no text to compress"):
        compute_score_weights(model, [], None, reference="snapkv")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([[1.0, 2.0]], "3 lists"),
        ([[1.0, 2.0], [], [1.0, 1.0]], "3 lists"),
        ([[1.0, 0.0]] * 3, "from 1e-6"),
        ([[1.0, float("nan")]] * 3, "from 1e-6"),
        ([[1.0, "2"]] * 3, "not a number"),
    ],
)
def test_damaged_weights_are_refused(model, weights, message):
    with pytest.raises(ProfileError, match=message):
        make_profile(model, weights)


def test_weights_of_other_heads_are_refused(model):
    profile = make_profile(model, [[1.0]] * LAYERS)
    with pytest.raises(ProfileError, match=r"scores of 1 heads, but layer 0 has 2"):
        compress(model, oracles.random_prompt(100, 1), selector="echo", profile=profile)


def test_a_waiting_prefill_takes_another_strategy_without_the_weights(model):
    ids = oracles.random_prompt(100, 1)
    save_known_profile(make_profile(model, [[3.0, 0.3]] * LAYERS))
    waiting = oracles.prefill(model, ids, selector="echo", prefill="chunked", compression_ratio=0.4)
    assert isinstance(waiting.config.profile, RankProfile)
    changed = waiting.copy_with(strategy="uniform").finish()
    plain = compress(
        model, ids, selector="echo", strategy="uniform", head_budgets="adaptive", compression_ratio=0.4
    )
    assert changed.kept_per_head == plain.kept_per_head
    weighed = waiting.copy_with(compression_ratio=0.3).finish()
    assert weighed.kept_per_head == compress(model, ids, compression_ratio=0.3).kept_per_head


def test_a_waiting_prefill_takes_no_profile_that_a_new_cache_refuses(model, tiny_llama):
    ids = oracles.random_prompt(100, 1)
    waiting = oracles.prefill(model, ids, selector="echo", prefill="chunked", compression_ratio=0.4)
    weights = [[3.0, 0.3]] * LAYERS
    profile = make_profile(model, weights)
    with pytest.raises(ProfileError, match="weighs those of 'kvzip'"):
        waiting.copy_with(profile=make_profile(model, weights, "kvzip"))
    with pytest.raises(ProfileError, match="belongs to another model"):
        waiting.copy_with(profile=replace(profile, weight_sample=[9.0] * len(profile.weight_sample)))
    save_known_profile(profile)
    weighed = waiting.copy_with(profile="auto").finish()
    assert weighed.kept_per_head == compress(model, ids, compression_ratio=0.4).kept_per_head


def test_a_threshold_is_in_the_units_of_the_selector(model):
    """A profile that splits the heads of a layer does not weigh their scores."""
    ids = oracles.random_prompt(100, 1)
    options = {"selector": "echo", "strategy": "threshold", "head_budgets": "profile"}
    gains = [(0.1, 0.1)] * LAYERS
    budgets = [
        compress(model, ids, profile=replace(one, head_gain_divergence=gains), **options).budgets
        for one in (make_profile(model, [[0.01, 0.01]] * LAYERS), make_profile(model, [[1.0, 1.0]] * LAYERS))
    ]
    assert budgets[0] == budgets[1]


def test_files_keep_the_weights(model, tmp_path):
    profile = make_profile(model, [[0.5, 2.0]] * LAYERS)
    again = RankProfile.load(profile.save(tmp_path / "profile.json"))
    assert again == profile
    assert "score_weights" not in json.loads(json.dumps(replace(profile, score_weights={}).to_dict()))
    ids = oracles.random_prompt(100, 1)
    cache = compress(model, ids, selector="echo", profile=profile)
    loaded = RankKVCache.load(cache.save(tmp_path / "cache.safetensors"), model)
    assert loaded.kept_per_head == cache.kept_per_head
    assert loaded.config.profile == profile
