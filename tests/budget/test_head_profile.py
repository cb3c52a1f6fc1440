"""Heads' budgets, from a profile or from the prompt: each head keeps its own, in every way that a cache is used."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

from rankkv import RankKVCache, RankKVConfig, RankProfile
from rankkv.budget.heads import (
    allocate_by_head_curves,
    allocate_head_budgets,
    compute_head_weights,
    fit_head_curves,
    join_heads,
)
from rankkv.budget.plan import BudgetPlan
from rankkv.cache import masks as step_mask
from rankkv.calibration import calibrate
from rankkv.calibration.calibrate import describe_subject
from rankkv.calibration.settings import CalibrationSettings
from rankkv.errors import ConfigError, ProfileError, UnsupportedModelError
from rankkv.profile.known import describe_shape, sample_weights, save_known_profile
from rankkv.rank.measures import compute_measures
from rankkv.rank.observed_layer import compute_group_concentration

PROMPT, SHORT = oracles.random_prompt(90, seed=1), oracles.random_prompt(33, seed=2)
#: One head of each layer counts for much.
GAINS = ((0.001, 0.2), (0.05, 0.0), (0.01, 0.03))
KEEP = {"compression_ratio": 0.3, "min_budget": 3, "window_size": 8, "head_budgets": "profile"}
HEADS, HEAD_DIM = 2, 16
WAYS = [
    {},
    {"decode": "bounded"},
    {"decode": "periodic", "decode_interval": 3},
    {"recompress_turns": True},
    {"prefill": "streaming"},
]


def make_profile(model, gains=GAINS, layers=3, **changes) -> RankProfile:
    return RankProfile(
        **{
            "model": describe_shape(model),
            "weight_sample": sample_weights(model),
            "layer_indices": range(layers),
            "ratios": (0.1, 0.4),
            "excess_loss": [(0.2, 0.1)] * layers,
            "divergence": [(0.2, 0.1)] * layers,
            "gain_loss": [0.1] * layers,
            "gain_divergence": [0.1] * layers,
            "base_ratio": 0.1,
            "head_gain_divergence": [gains[place % len(gains)] for place in range(layers)],
            **changes,
        }
    )


@pytest.fixture(scope="module")
def model(tiny_llama):
    return tiny_llama()


@pytest.fixture(scope="module")
def keep(model):
    return {**KEEP, "profile": make_profile(model)}


@pytest.fixture(params=["profile", "distortion"])
def spread(request, keep):
    """Options of both: heads by what a profile says of them, and by what evicting costs them in this prompt."""
    return keep if request.param == "profile" else {**KEEP, "head_budgets": "distortion", "profile": None}


@pytest.fixture(params=[1, 2], ids=["single", "padded"])
def batch(request):
    return oracles.left_pad([PROMPT, SHORT][: request.param])


def count_tokens(cache: RankKVCache) -> int:
    return sum(count for layer in cache.kept_per_head for row in layer for count in row)


# -- the allocation ------------------------------------------------------------------------------------------------


@given(
    weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8),
    room=st.integers(1, 400),
    budgets=st.lists(st.integers(0, 400), min_size=2, max_size=2),
    head_floor=st.floats(0.0, 1.0),
)
def test_heads_share_the_budget_and_never_want_more_when_it_shrinks(weights, room, budgets, head_floor):
    smaller, larger = sorted(min(budget, room) for budget in budgets)
    upper = [room] * len(weights)
    final = allocate_head_budgets(weights, smaller, upper, head_floor)
    assert final.sum() == smaller * len(weights)
    assert (final >= int(head_floor * smaller)).all()
    assert (final <= room).all()
    assert (final <= allocate_head_budgets(weights, larger, upper, head_floor, final=False)).all()
    order = np.argsort(weights, kind="stable")
    assert (np.diff(final[order]) >= -1).all()


def test_a_layer_counts_for_its_heads_together(model):
    profile = make_profile(model)
    weights = compute_head_weights(profile)
    floors = [[max(gain, 0.001) ** 0.75 for gain in row] for row in GAINS]
    assert [row.tolist() for row in weights] == [pytest.approx(row) for row in floors]
    assert join_heads(profile).gain_divergence == pytest.approx([sum(row) for row in floors])


# -- what is kept --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("selector", oracles.ONE_PASS)
def test_every_head_keeps_what_its_weight_gives(model, keep, batch, selector):
    cache = oracles.prefill(model, *batch, selector=selector, **keep)
    weights = compute_head_weights(keep["profile"])
    lengths = batch[1].sum(-1).tolist()
    for place, layer in enumerate(cache.kept_per_head):
        for row, heads in enumerate(layer):
            budget, room = cache.budgets_per_row[row][place], [lengths[row]] * HEADS
            assert heads == allocate_head_budgets(weights[place], budget, room, 0.2).tolist()
            assert sum(heads) == HEADS * budget
            assert heads == [len(head) for head in oracles.kept_positions(cache, place)[row]]
    assert cache.kept_per_head[0][0][1] > cache.kept_per_head[0][0][0]
    assert cache.cache_bytes() == 2 * count_tokens(cache) * HEAD_DIM * 4
    assert "its heads now hold" in cache.summary()


CASCADES = [("profile", name) for name in oracles.ONE_PASS] + [
    ("distortion", name) for name in ("snapkv", "h2o", "knorm")
]


@pytest.mark.parametrize(("head_budgets", "selector"), CASCADES)
@pytest.mark.parametrize("head_floor", [0.0, 0.3, 0.95])
@pytest.mark.parametrize(
    "more", [{}, {"strategy": "power"}, {"strategy": "profile"}, {"protect": [(6, 17), (50, 55)]}], ids=str
)
def test_cascade_equals_one_decision(tiny_llama, monkeypatch, head_budgets, selector, head_floor, more):
    model = tiny_llama(6)
    given = {
        "selector": selector,
        "head_floor": head_floor,
        "min_budget": 1,
        "head_budgets": head_budgets,
        **more,
    }
    profile = make_profile(model, layers=6) if "profile" in (head_budgets, more.get("strategy")) else None
    options = {**KEEP, **given, "profile": profile}
    for seed, lengths in enumerate(((100,), (110, 20, 63))):
        ids, mask = oracles.left_pad([oracles.random_prompt(n, seed + n) for n in lengths])
        cascade = oracles.prefill(model, ids, mask, **options)
        with monkeypatch.context() as patch:
            patch.setattr(BudgetPlan, "compute_ceilings", lambda plan: [plan.length] * plan._added)
            once = oracles.prefill(model, ids, mask, **options)
        assert cascade.kept_per_head == once.kept_per_head
        for index in cascade.layer_indices:
            assert oracles.kept_positions(cascade, index) == oracles.kept_positions(once, index)


def test_equal_heads_keep_what_layers_without_head_budgets_keep(model, batch):
    profile = make_profile(model, gains=[(0.1, 0.1)] * 3)
    spread = oracles.prefill(model, *batch, **KEEP, profile=profile)
    plain = oracles.prefill(model, *batch, **{**KEEP, "head_budgets": None}, profile=profile)
    assert spread.budgets_per_row == plain.budgets_per_row
    for index in plain.layer_indices:
        assert oracles.kept_positions(spread, index) == oracles.kept_positions(plain, index)


# -- it equals the full cache with the rest masked -----------------------------------------------------------------


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("selector", ["snapkv", "h2o", "streaming_llm"])
def test_every_step_equals_the_masked_full_cache(model, spread, batch, selector, options):
    cache = RankKVCache(model, selector=selector, **options, **spread)
    assert oracles.assert_every_step_equals_masked(model, cache, *batch)
    if options.get("decode") == "bounded":
        for place, layer in enumerate(cache.kept_per_head):
            for row, heads in enumerate(layer):
                assert sum(heads) <= HEADS * cache.budgets_per_row[row][place]


@pytest.mark.parametrize("decode", ["grow", "bounded"])
@pytest.mark.parametrize("selector", ["snapkv", "h2o"])
def test_protected_tokens_stand_in_every_head(model, spread, batch, selector, decode):
    """A head that counts for little keeps the spans, and its newest tokens besides."""
    span = (6, 27)
    cache = oracles.prefill(model, *batch, selector=selector, decode=decode, protect=[span], **spread)
    for step in (0, 1, 2):
        for place in cache.layer_indices:
            for row, heads in enumerate(oracles.kept_tokens(cache, batch[1])[place]):
                budget, length = cache.budgets_per_row[row][place], int(batch[1][row].sum()) + step
                kept = min(budget, length) if decode == "bounded" else budget + step
                assert sum(map(len, heads)) == HEADS * kept
                for head in heads:
                    assert {*range(*span), length - 1} <= set(head)
        mask = torch.cat([batch[1], batch[1].new_ones(len(batch[1]), step)], dim=-1)
        oracles.feed(model, cache, oracles.next_chunks(len(batch[0]), (1,), seed=step), mask)


def test_spans_are_on_top_of_what_weights_divide(model, keep):
    cache = oracles.prefill(model, PROMPT, protect=[(6, 27)], **keep)
    for weights, budget, (heads,) in zip(
        compute_head_weights(keep["profile"]), cache.budgets, cache.kept_per_head, strict=True
    ):
        left = allocate_head_budgets(weights, budget - 21, [90 - 21] * HEADS, 0.2)
        assert heads == [21 + count for count in left.tolist()]


@pytest.mark.parametrize("decode", ["grow", "bounded", "periodic"])
@pytest.mark.parametrize("positions", ["original", "packed"])
def test_rows_are_treated_as_if_alone(model, spread, decode, positions):
    prompts = [PROMPT, SHORT, oracles.random_prompt(60, 3)]
    oracles.assert_batch_invariant(
        model, prompts, decode=decode, decode_interval=3, positions=positions, **spread
    )


def test_everything_kept_changes_no_token(model, spread, batch):
    oracles.assert_identity(model, *batch, **{**spread, "compression_ratio": 1.0})


@pytest.mark.parametrize("storage", ["full", "int8", "offload"])
def test_saved_and_loaded(model, spread, batch, tmp_path, storage):
    ids, mask = batch
    cache = oracles.prefill(model, ids, mask, storage=storage, decode="bounded", **spread)
    loaded = RankKVCache.load(cache.save(tmp_path / "cache.safetensors"), model)
    assert loaded.kept_per_head == cache.kept_per_head
    chunks = oracles.next_chunks(len(ids), (1, 1, 1), seed=7)
    for ours, theirs in zip(
        oracles.feed(model, loaded, chunks, mask), oracles.feed(model, cache, chunks, mask), strict=True
    ):
        assert torch.equal(ours, theirs)
    assert loaded.kept_per_head == cache.kept_per_head


def test_beams_copies_and_turns(model, spread):
    ids, mask = oracles.left_pad([PROMPT, SHORT])
    text = oracles.generate(model, ids, RankKVCache(model, **spread), mask=mask, num_beams=3)
    for row, prompt in enumerate((PROMPT, SHORT)):
        alone = oracles.generate(model, prompt, RankKVCache(model, **spread), num_beams=3)
        assert torch.equal(text[row], alone[0])
    cache = RankKVCache(model, recompress_turns=True, **spread)
    asked = PROMPT
    for turn in range(3):
        answer = oracles.generate(model, asked, cache, new_tokens=5)
        copied = cache.copy()
        asked = torch.cat([asked, answer, oracles.random_prompt(7, seed=turn)], 1)
        assert torch.equal(
            oracles.generate(model, asked, copied), oracles.generate(model, asked, cache.copy())
        )


# -- measuring, and what is refused --------------------------------------------------------------------------------


def test_calibration_measures_heads_as_the_masked_full_cache_does(tiny_llama):
    """With one head given back, the model predicts what the full cache does with only the others' tokens hidden."""
    model = tiny_llama()
    ids = oracles.random_prompt(96, seed=5)[0]
    sizes = {"context_tokens": 80, "continuation_tokens": 16, "ratios": [0.3], "base_ratio": 0.3}
    profile = calibrate(model, None, [ids], **sizes)
    base = oracles.prefill(model, ids[None, :80], budget=24, min_budget=1, strategy="uniform")
    full = oracles.forward(model, DynamicCache(config=model.config), ids[None])[0, 80:-1].log_softmax(-1)

    def compute_divergence(back: tuple[int, int] | None) -> float:
        copied, cache = copy.deepcopy(model), DynamicCache(config=model.config)
        oracles.forward(copied, cache, ids[None, :80])
        copied.set_attn_implementation(oracles.MASKED_ORACLE)
        for layer_idx, module in oracles.attention_modules(copied).items():
            evicted = torch.ones(1, HEADS, 80, dtype=torch.bool)
            for head, positions in enumerate(oracles.kept_positions(base, layer_idx)[0]):
                evicted[0, head, positions] = False
            if back is not None and back[0] == layer_idx:
                evicted[0, back[1]] = False
            module.oracle_evicted = evicted
        other = oracles.forward(copied, cache, ids[None, 80:])[0, :-1].log_softmax(-1)
        return float((full.exp() * (full - other)).sum(-1).mean())

    whole = compute_divergence(None)
    for layer, gains in enumerate(profile.head_gain_divergence):
        expected = [whole - compute_divergence((layer, head)) for head in range(HEADS)]
        assert gains == pytest.approx(expected, abs=1e-5)


def test_calibration_without_heads_is_refused_where_heads_are_wanted(model, keep, tmp_path):
    with pytest.raises(ProfileError, match=r"needs a profile whose heads were measured.*rankkv calibrate"):
        RankKVCache(model, **{**keep, "profile": make_profile(model, head_gain_divergence=())})
    path = keep["profile"].save(tmp_path / "profile.json")
    assert RankProfile.load(path) == keep["profile"]
    assert RankKVCache(model, **{**keep, "profile": path}).config.profile == keep["profile"]


def test_heads_without_a_profile_are_refused(model, monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match="head_budgets='profile' needs a profile, but profile=None"):
        RankKVConfig(head_budgets="profile", profile=None)
    monkeypatch.setenv("RANKKV_CACHE", str(tmp_path))
    with pytest.raises(ProfileError, match="head_budgets='profile' needs a profile, and none is known"):
        RankKVCache(model, head_budgets="profile")


def test_any_strategy_may_spread_layers_by_heads(model, keep):
    cache = oracles.prefill(model, PROMPT, strategy="uniform", **keep)
    assert len(set(cache.budgets)) == 1
    assert all(len(set(layer[0])) > 1 for layer in cache.kept_per_head)


@pytest.mark.parametrize("counts", [1, 3])
def test_a_profile_of_other_heads_is_refused(model, keep, counts):
    profile = make_profile(model, gains=[(0.1,) * counts])
    with pytest.raises(ProfileError, match=f"has {counts} heads for a layer with 2 key/value heads"):
        oracles.prefill(model, PROMPT, **{**keep, "profile": profile})
    with pytest.raises(ProfileError, match="it is damaged"):
        make_profile(model, gains=[()])


def test_a_profile_of_layers_only_does_not_hide_one_with_heads(model, keep, monkeypatch, tmp_path):
    monkeypatch.setenv("RANKKV_CACHE", str(tmp_path))
    folder = save_known_profile(keep["profile"]).parent
    layers_only = make_profile(model, head_gain_divergence=())
    layers_only.save(folder / f"0-{layers_only.key}.json")
    assert RankKVCache(model, head_budgets="profile").config.profile == keep["profile"]
    assert RankKVCache(model, head_budgets=None).config.profile == layers_only
    # By itself the cache takes what measured best: heads.
    used = RankKVCache(model).config
    assert (used.profile, used.head_budgets) == (keep["profile"], "profile")


def test_options_are_those_of_the_strategy_that_runs(model, keep):
    cache = RankKVCache(model, strategy_options={"profile_exponent": 0.5}, **keep)
    assert cache.config.resolve_strategy() == ("blend", {"profile_exponent": 0.5})
    with pytest.raises(ConfigError, match="strategy 'blend' has no option 'exponent'"):
        RankKVCache(model, head_budgets="profile", strategy_options={"exponent": 2})


def test_heads_that_no_mask_tells_apart_are_not_measured(tiny_llama):
    model = tiny_llama()
    settings = CalibrationSettings(heads=True)
    assert settings.count_steps(describe_subject(model)) == 7 * 3
    model.config._attn_implementation = "flash_attention_2"
    assert settings.count_steps(describe_subject(model)) == 6 * 3


# -- heads by their errors in the prompt, and what is taken where nothing is said ----------------------------------


def test_heads_keep_what_least_error_gives_them(model, batch):
    """One division of the total over all heads of all layers, from the errors that the measure says."""
    options = {**KEEP, "head_budgets": "distortion", "profile": None}
    cache = oracles.prefill(model, *batch, **options)
    observations = oracles.observe_layers(model, *batch, window_size=KEEP["window_size"])
    for row, plan in enumerate(cache.plans):
        errors = [
            compute_measures(layer, "head_distortion", limits=[one.head_limits for one in cache.plans])[row]
            for layer in observations
        ]
        curves = [fit_head_curves(table, plan.length, plan.head_limits.floor) for table in errors]
        bounds = np.full(3, plan.floor), np.full(3, plan.length)
        shares = allocate_by_head_curves(curves, plan.total_budget, *bounds)
        assert np.abs(shares - plan.budgets).max() < 1.0
        for place, curve in enumerate(curves):
            heads = curve.split(plan.budgets[place], [plan.length] * HEADS).tolist()
            assert cache.kept_per_head[place][row] == heads
            assert sum(heads) == HEADS * plan.budgets[place]
    assert any(len(set(heads[0])) > 1 for heads in cache.kept_per_head)
    assert all(len(plan.layer_ranks) == 3 for plan in cache.plans)


def test_any_strategy_may_split_its_layers_by_the_heads_errors(model):
    options = {**KEEP, "head_budgets": "distortion", "profile": None, "strategy": "uniform"}
    cache = oracles.prefill(model, PROMPT, head_floor=0.1, **options)
    assert len(set(cache.budgets)) == 1
    assert any(len(set(layer[0])) > 1 for layer in cache.kept_per_head)


def test_a_prompt_in_chunks_keeps_what_one_in_one_piece_keeps(model, batch):
    options = {**KEEP, "head_budgets": "distortion", "profile": None}
    whole = oracles.prefill(model, *batch, **options)
    cache = RankKVCache(model, prefill="chunked", **options)
    ids, mask = batch
    for start in range(0, ids.shape[1], 20):
        oracles.forward(model, cache, ids[:, start : start + 20], mask[:, : start + 20])
    cache.finish()
    assert cache.kept_per_head == whole.kept_per_head
    assert oracles.kept_tokens(cache, mask) == oracles.kept_tokens(whole, mask)


@pytest.mark.parametrize(
    ("options", "way"),
    [
        ({}, "distortion"),
        ({"profile": None, "decode": "bounded", "storage": "int8"}, "distortion"),
        ({"strategy_options": {"rank_exponent": 1.0}}, "distortion"),
        ({"strategy": "distortion"}, None),
        ({"scope": "window"}, None),
        ({"aggregation": "mean"}, None),
        ({"strategy": "pyramid"}, None),
        ({"compression_ratio": 1.0}, None),
        ({"compression_ratio": 1.0, "budget": 40}, "distortion"),
        ({"head_budgets": "adaptive"}, "adaptive"),
        ({"head_budgets": None}, None),
        ({"selector": "echo"}, "adaptive"),
        ({"selector": "echo", "compression_ratio": 1.0}, None),
        ({"selector": "echo", "compression_ratio": 1.0, "budget": 40}, "adaptive"),
    ],
    ids=str,
)
def test_what_is_taken_where_no_strategy_is_given(model, options, way):
    assert RankKVCache(model, **options).config.head_budgets == way


def test_a_profile_decides_where_one_is_used(model, keep):
    profile = keep["profile"]
    assert RankKVCache(model, profile=profile).config.head_budgets == "profile"
    layers_only = make_profile(model, head_gain_divergence=())
    assert RankKVCache(model, profile=layers_only).config.head_budgets is None


def test_heads_stay_equal_where_they_cannot_differ(tiny_llama):
    assert RankKVCache(tiny_llama(num_key_value_heads=1)).config.head_budgets is None
    model = tiny_llama()
    model.config._attn_implementation = "flash_attention_2"
    assert RankKVCache(model).config.head_budgets is None
    with pytest.raises(UnsupportedModelError, match="head_budgets needs a mask for each head"):
        RankKVCache(model, head_budgets="distortion")


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("options", [{}, {"decode": "periodic", "decode_interval": 5}], ids=str)
def test_masks_made_for_steps_to_come_are_those_of_each_step(
    tiny_llama, monkeypatch, batch, backend, options
):
    """More steps than masks are made for at once, and slots that move in between."""
    monkeypatch.setattr(step_mask, "_AHEAD", 3)
    model = tiny_llama(attn_implementation=backend)
    cache = RankKVCache(model, **{**KEEP, "head_budgets": "distortion", "profile": None, **options})
    assert oracles.assert_every_step_equals_masked(model, cache, *batch)
    copied = cache.copy()
    chunks = oracles.next_chunks(len(batch[0]), (1,) * 8, seed=3)
    mask = torch.ones(len(batch[0]), cache.seen_tokens, dtype=torch.long)
    mask[:, : batch[1].shape[1]] = batch[1]
    for ours, theirs in zip(
        oracles.feed(model, copied, chunks, mask), oracles.feed(model, cache, chunks, mask), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_a_cache_of_the_prompts_heads_is_saved_where_a_profile_is_known(model, keep, monkeypatch, tmp_path):
    monkeypatch.setenv("RANKKV_CACHE", str(tmp_path))
    save_known_profile(keep["profile"])
    options = {key: value for key, value in KEEP.items() if key != "head_budgets"}
    cache = oracles.prefill(model, PROMPT, head_budgets="distortion", **options)
    loaded = RankKVCache.load(cache.save(tmp_path / "cache.safetensors"), model)
    assert loaded.kept_per_head == cache.kept_per_head
    assert not isinstance(cache.config.profile, RankProfile)
    with pytest.raises(
        ConfigError, match="head_budgets='distortion' measures the prompt and uses no profile"
    ):
        RankKVCache(model, head_budgets="distortion", profile=keep["profile"])


@pytest.mark.parametrize("more", [{}, {"strategy": "power"}, {"min_budget": 2}], ids=str)
def test_a_floor_of_one_leaves_the_heads_of_a_layer_equal(model, batch, more):
    options = {**KEEP, "head_budgets": "distortion", "profile": None, "head_floor": 1.0, **more}
    cache = oracles.prefill(model, *batch, **options)
    assert all(len(set(heads)) == 1 for layer in cache.kept_per_head for heads in layer)


def test_a_query_with_next_to_nothing_to_evict_is_no_number_too_many():
    """The square of its mass is no float32, and its attention counts as that of any other query."""
    layer = oracles.observe_random(60)
    window = layer.evictable_attention.clone()
    tiny = replace(layer)
    tiny.__dict__["window_attention"] = layer.window_attention * torch.where(
        torch.arange(window.shape[-2]) == 3, 1e-30, 1.0
    ).view(1, 1, -1, 1)
    torch.testing.assert_close(compute_group_concentration(tiny), compute_group_concentration(layer))
