"""Profiles: least distortion against brute force, files, whose profile it is, when it is used."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankkv import RankKVAnalyzer, RankKVCache, RankKVConfig, RankProfile, compress
from rankkv.budget.apportion import allocate_integers, allocate_shares
from rankkv.budget.calibrated import SENSITIVITY_FLOOR, compute_curve, compute_sensitivities
from rankkv.budget.distortion import allocate_by_distortion, compute_hull, fit_decreasing
from rankkv.budget.plan import BudgetPlan
from rankkv.budget.strategies import PROFILE_STRATEGIES, compute_weights
from rankkv.config import PROFILE_USERS
from rankkv.errors import ConfigError, InputError, ProfileError, SourceUnavailableError
from rankkv.profile.known import describe_shape, find_profile, sample_weights, save_known_profile

DISTORTION = st.floats(0.0, 4.0)


def make_profile(model=None, layers=3, seed=0, **changes):
    generator = np.random.default_rng(seed)
    curves = np.sort(generator.uniform(0.0, 0.5, (layers, 3)), axis=1)[:, ::-1].tolist()
    record = {
        "model": describe_shape(model) if model is not None else {"num_hidden_layers": layers},
        "weight_sample": sample_weights(model) if model is not None else [0.1],
        "layer_indices": range(layers),
        "ratios": (0.05, 0.1, 0.4),
        "excess_loss": curves,
        "divergence": curves,
        "gain_loss": generator.uniform(0.0, 0.2, layers),
        "gain_divergence": generator.uniform(0.0, 0.2, layers),
        "base_ratio": 0.1,
    }
    return RankProfile(**{**record, **changes})


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("RANKKV_CACHE", str(tmp_path))
    return tmp_path


# -- least distortion ---------------------------------------------------------------------------------------------


@st.composite
def problems(draw):
    upper = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    curves = [
        (list(range(top + 1)), draw(st.lists(DISTORTION, min_size=top + 1, max_size=top + 1)))
        for top in upper
    ]
    return curves, draw(st.integers(0, sum(upper))), upper


def convexify(budgets, values):
    """Return the lower convex envelope at every budget, from all chords over it."""
    return [
        min(
            values[a] if a == c else values[a] + (values[c] - values[a]) * (b - a) / (c - a)
            for a in budgets
            for c in budgets
            if a <= b <= c and (a != c or a == b)
        )
        for b in budgets
    ]


@given(problems())
def test_least_distortion_equals_brute_force(problem):
    curves, total, upper = problem
    hulls = [convexify(*curve) for curve in curves]
    best = min(
        sum(hull[b] for hull, b in zip(hulls, budgets, strict=True))
        for budgets in itertools.product(*(range(top + 1) for top in upper))
        if sum(budgets) == total
    )
    found = allocate_by_distortion(curves, total, [0] * len(upper), upper)
    assert found.sum() == total
    assert sum(hull[b] for hull, b in zip(hulls, found, strict=True)) == pytest.approx(best, abs=1e-9)


@given(problems())
def test_more_tokens_never_take_any_from_a_layer(problem):
    curves, total, upper = problem
    less = allocate_by_distortion(curves, total, [0] * len(upper), upper)
    more = allocate_by_distortion(curves, min(total + 1, sum(upper)), [0] * len(upper), upper)
    assert (more >= less).all()


@given(problems())
def test_a_layer_that_is_added_never_raises_another(problem):
    curves, total, upper = problem
    before = allocate_by_distortion(curves[:-1], total, [0] * (len(upper) - 1), upper[:-1])
    after = allocate_by_distortion(curves, total, [0] * len(upper), upper)[:-1]
    assert (after <= before).all()


@given(st.lists(DISTORTION, min_size=1, max_size=8))
def test_the_fitted_curve_falls_and_keeps_what_already_falls(values):
    fitted = fit_decreasing(values)
    assert (np.diff(fitted) <= 1e-12).all()
    assert math.isclose(fitted.sum(), sum(values), abs_tol=1e-9)
    falling = sorted(values, reverse=True)
    assert fit_decreasing(falling).tolist() == falling


@given(st.lists(DISTORTION, min_size=2, max_size=8))
def test_no_point_lies_below_the_hull(values):
    budgets = list(range(len(values)))
    hull = compute_hull(budgets, values)
    slopes = np.diff(np.array(values)[hull]) / np.diff(hull)
    assert (np.diff(slopes) >= -1e-9).all()
    assert (np.interp(budgets, hull, np.array(values)[hull]) <= np.array(values) + 1e-9).all()


def test_the_curve_meets_the_measured_points():
    profile = make_profile()
    budgets, distortion = compute_curve(profile, 1, 1000, 50, 1000)
    added = SENSITIVITY_FLOOR * np.log(budgets / 1000) / math.log(0.05)
    measured = dict(zip(budgets.tolist(), distortion - added, strict=True))
    assert measured[50] == pytest.approx(profile.divergence[1][0])
    assert measured[1000] == pytest.approx(0.0)
    assert (budgets[0], budgets[-1]) == (50, 1000)
    assert (np.diff(distortion) < 0).all()


@given(
    st.integers(0, 20), st.integers(20, 5000), st.floats(0.02, 1.0), st.sampled_from([None, 0.0, 0.5, 2.0])
)
def test_plans_sum_exactly_and_stay_within_bounds(seed, length, ratio, exponent):
    options = {} if exponent is None else {"exponent": exponent}
    config = RankKVConfig(
        ratio, strategy="profile", strategy_options=options, profile=make_profile(seed=seed)
    )
    plan = BudgetPlan(config, length, [0, 1, 2])
    ceilings = []
    for _ in range(3):
        plan.add_layer(None)
        ceilings.append(plan.compute_ceilings())
    budgets = plan.finish()
    assert sum(budgets) == plan.total_budget
    assert all(plan.floor <= budget <= length for budget in budgets)
    for earlier in ceilings:
        assert all(early >= late for early, late in zip(earlier, budgets, strict=False))
    assert plan.layer_ranks == []


def test_a_layer_that_costs_more_gets_more():
    curves = [[0.01, 0.01, 0.005], [0.4, 0.3, 0.1], [0.05, 0.04, 0.02]]
    profile = make_profile(divergence=curves, gain_divergence=[0.01, 0.3, 0.04])
    for options in ({}, {"exponent": 1.0}):
        config = RankKVConfig(0.2, strategy="profile", strategy_options=options, profile=profile)
        plan = BudgetPlan(config, 1000, [0, 1, 2])
        first, second, third = plan.finish()
        assert second > third >= first


def test_curves_give_budgets_directly_and_exponents_give_weights():
    profile, ranks = make_profile(seed=3), [8.0, 16.0, 4.0]

    def plan(strategy, **options):
        config = RankKVConfig(
            0.2, strategy=strategy, strategy_options=options, profile=profile, min_budget=20
        )
        plan = BudgetPlan(config, 1000, [0, 1, 2])
        for rank in ranks:
            plan.add_layer(rank if plan.measure else None)
        return plan.finish()

    curves = [compute_curve(profile, layer, 1000, 20, 1000) for layer in range(3)]
    expected = allocate_by_distortion(curves, 600, [20] * 3, [1000] * 3).tolist()
    assert plan("profile") == expected
    for strategy, options in (("profile", {"exponent": 1.0}), ("blend", {})):
        weights = compute_weights(ranks, strategy, profile=profile, **options)
        shares = allocate_shares(weights, 600, 20, 1000)
        assert plan(strategy, **options) == allocate_integers(shares, 600, 20, 1000, weights).tolist()
        assert plan(strategy, **options) != expected


def test_weights_are_powers_of_sensitivity_and_rank():
    profile = make_profile(gain_divergence=[0.1, -1.0, 0.4])
    sensitivities = np.array([0.1, SENSITIVITY_FLOOR, 0.4])
    assert compute_sensitivities(profile).tolist() == sensitivities.tolist()
    ranks = np.array([8.0, 16.0, 4.0])
    weights = compute_weights(ranks, "blend", profile=profile, profile_exponent=0.5, rank_exponent=2.0)
    expected = sensitivities**0.5 * ranks**2
    np.testing.assert_allclose(weights / weights.max(), expected / expected.max(), rtol=1e-12)
    with pytest.raises(ProfileError, match="needs a profile"):
        compute_weights(ranks, "blend")


# -- files and owners ---------------------------------------------------------------------------------------------


def test_a_profile_survives_its_file(tmp_path):
    profile = make_profile(
        name="a model", ranks={"evictable/concat": {"mean": [1.0, 2.0, 3.0], "std": [0.0] * 3}}
    )
    path = profile.save(tmp_path / "new" / "profile.json")
    assert RankProfile.load(path) == profile
    assert RankKVConfig(profile=str(path)).profile == profile
    config = RankKVConfig(profile=profile)
    assert RankKVConfig(**json.loads(json.dumps(config.to_dict()))).profile == profile


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "not a RankKV profile"),
        ('{"format": "rankkv-profile", "version": 99}', "version 99"),
        ('{"format": "rankkv-profile", "version": 1, "surplus": 1}', "not well-formed"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, text, message):
    path = tmp_path / "profile.json"
    path.write_text(text)
    with pytest.raises(ProfileError, match=message):
        RankProfile.load(path)
    with pytest.raises(SourceUnavailableError, match="absent"):
        RankProfile.load(tmp_path / "absent.json")
    with pytest.raises(InputError, match="profile=7"):
        RankKVConfig(profile=7)


@pytest.mark.parametrize(
    "changes",
    [
        {"gain_loss": [0.1]},
        {"divergence": [[0.1]] * 3},
        {"ratios": (0.4, 0.1, 0.05)},
        {"gain_divergence": [0.1, math.nan, 0.2]},
        {"layer_indices": "abc"},
    ],
)
def test_a_profile_that_contradicts_itself_is_refused(changes):
    with pytest.raises(ProfileError, match="calibrate again"):
        make_profile(**changes)


def test_a_profile_of_another_model_is_refused_with_the_difference(tiny_llama):
    model = tiny_llama(3)
    profile = make_profile(model)
    assert RankKVCache(model, profile=profile).config.profile == profile
    half = tiny_llama(3).to(torch.bfloat16)
    assert RankKVCache(half, profile=profile).config.profile == profile
    with pytest.raises(ProfileError, match="the weights differ"):
        RankKVCache(tiny_llama(3, seed=1), profile=profile)
    with pytest.raises(ProfileError, match="num_hidden_layers: profile 3, model 4"):
        RankKVCache(tiny_llama(4), profile=profile)
    with pytest.raises(ProfileError, match="compressible layers"):
        RankKVCache(model, profile=make_profile(model, layers=2))


# -- when it is used ----------------------------------------------------------------------------------------------


def test_the_two_lists_of_strategies_agree():
    assert set(PROFILE_USERS) == set(PROFILE_STRATEGIES)


def test_the_known_profile_is_used_unless_told_otherwise(tiny_llama, own_folder):
    model = tiny_llama(3)
    uncalibrated = ("distortion", {})
    assert RankKVCache(model).config.resolve_strategy() == uncalibrated
    with pytest.raises(ProfileError, match="none is known"):
        RankKVCache(model, strategy="profile")
    profile = make_profile(model)
    save_known_profile(profile)
    assert RankKVCache(model).config.profile == profile
    assert RankKVCache(model).config.resolve_strategy()[0] in PROFILE_USERS
    assert RankKVCache(model, strategy="profile").config.profile == profile
    assert RankKVCache(model, profile=None).config.resolve_strategy() == uncalibrated
    assert RankKVCache(model, strategy="uniform").config.resolve_strategy() == ("uniform", {})
    assert RankKVCache(model, strategy="power").config.resolve_strategy() == ("power", {})
    # A model of the same shape with other weights has another profile, or none.
    assert RankKVCache(tiny_llama(3, seed=1)).config.resolve_strategy() == uncalibrated
    result = RankKVAnalyzer(model, strategy="profile").analyze(torch.arange(90))
    assert sum(result.budgets) == result.total_budget


def test_the_shipped_profile_belongs_to_the_embedded_model_alone(embedded):
    model, _ = embedded
    profile = RankKVCache(model).config.profile
    assert isinstance(profile, RankProfile)
    assert profile.model == describe_shape(model)
    assert len(profile.ratios) >= 4
    assert {len(row) for row in profile.head_gain_divergence} == {model.config.num_key_value_heads}
    assert RankKVCache(model, profile=None).config.profile is None
    with torch.random.fork_rng():
        stranger = type(model)._from_config(model.config, dtype=torch.bfloat16)
    assert describe_shape(stranger) == profile.model
    assert RankKVCache(stranger).config.resolve_strategy() == ("distortion", {})
    with pytest.raises(ProfileError, match="weights differ"):
        RankKVCache(stranger, profile=profile)


def test_a_damaged_known_profile_is_passed_over(tiny_llama, own_folder):
    model = tiny_llama(3)
    path = save_known_profile(make_profile(model))
    path.write_text("{")
    assert find_profile(model, [0, 1, 2]) is None


def test_contradictions_are_refused():
    with pytest.raises(ConfigError, match="profile=None forbids"):
        RankKVConfig(strategy="profile", profile=None)
    with pytest.raises(ConfigError, match="uses no profile"):
        RankKVConfig(strategy="uniform", profile=make_profile())
    with pytest.raises(ProfileError, match="none is known"):
        BudgetPlan(RankKVConfig(strategy="blend"), 100, [0, 1])


def test_a_saved_cache_keeps_its_profile(tiny_llama, tmp_path):
    model = tiny_llama(3)
    cache = compress(model, oracles.random_prompt(90, 0), profile=make_profile(model))
    again = RankKVCache.load(cache.save(tmp_path / "cache.safetensors"), model)
    assert again.config.profile == cache.config.profile
    assert again.config.resolve_strategy() == cache.config.resolve_strategy()
    assert again.budgets == cache.budgets


@pytest.mark.parametrize("selector", ["snapkv", "h2o"])
@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "profile"},
        {"strategy": "profile", "strategy_options": {"exponent": 0.7}},
        {"strategy": "blend"},
        {"strategy": "blend", "strategy_options": {"profile_exponent": 3.0, "rank_exponent": 4.0}},
    ],
)
def test_cascade_equals_one_shot(tiny_llama, monkeypatch, options, selector):
    model = tiny_llama(6)
    for seed in range(3):
        profile = make_profile(model, layers=6, seed=seed)
        prompt = oracles.random_prompt(90 + 17 * seed, seed)
        given = {
            **options,
            "selector": selector,
            "profile": profile,
            "compression_ratio": 0.2,
            "min_budget": 3,
        }
        cascade = oracles.prefill(model, prompt, **given)
        with monkeypatch.context() as patch:
            patch.setattr(BudgetPlan, "compute_ceilings", lambda plan: [plan.length] * plan._added)
            one_shot = oracles.prefill(model, prompt, **given)
        assert cascade.budgets == one_shot.budgets
        for layer_idx in cascade.layer_indices:
            assert oracles.kept_positions(cascade, layer_idx) == oracles.kept_positions(one_shot, layer_idx)


def test_budgets_of_a_later_round_keep_to_what_is_left(tiny_llama):
    model = tiny_llama(3)
    profile = make_profile(model)
    for strategy in PROFILE_STRATEGIES:
        cache = RankKVCache(
            model, 0.3, strategy=strategy, profile=profile, decode="periodic", decode_interval=8, min_budget=4
        )
        oracles.forward(model, cache, oracles.random_prompt(60, 1))
        for step in range(20):
            oracles.forward(model, cache, oracles.random_prompt(1, step))
        assert sum(cache.budgets) == cache.plans[0].total_budget


def test_replace_keeps_the_law_of_the_profile():
    profile = make_profile()
    assert replace(profile, name="other").key == profile.key
    assert replace(profile, model={"num_hidden_layers": 4}).key != profile.key
