"""The attention that a cache loses, the loss predicted from it, and the smallest cache below a loss."""

from __future__ import annotations

import oracles
import pretend_gpu
import pytest
import torch

import rankkv
from rankkv import RankKVCache, RankKVConfig, compress
from rankkv.analysis.predicted_loss import predict_losses
from rankkv.cache.quality import TEST_STEP, find_knee, find_longest_gap
from rankkv.errors import ConfigError, InputError
from rankkv.profile.loss_curve import load_default_curves
from rankkv.selection import get_selector

WINDOW = 8
DEFAULTS = {"echo": {"selector": "echo"}, "snapkv": {"selector": "snapkv", "profile": None}}
UNIFORM = {"selector": "snapkv", "strategy": "uniform", "head_budgets": None}


@pytest.fixture(scope="module")
def model(tiny_llama):
    return tiny_llama(4)


def find_lost(model, cache, prompt) -> float:
    """Compute the share lost from whole attention matrices and the tokens that are really kept."""
    shares = []
    for index, attention in zip(cache.layer_indices, oracles.eager_attentions(model, prompt), strict=True):
        tested = attention[0, :, -2 * WINDOW :].flip(1)[:, ::TEST_STEP].mean(dim=1)
        kept = oracles.kept_positions(cache, index)[0]
        group = len(tested) // len(kept)
        shares += [
            float(1 - tested[head * group : (head + 1) * group].mean(0)[positions].sum())
            for head, positions in enumerate(kept)
        ]
    return sum(shares) / len(shares)


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("options", [*DEFAULTS.values(), UNIFORM], ids=str)
def test_the_lost_attention_is_that_of_the_evicted_tokens(model, options, ratio):
    prompt = oracles.random_prompt(120)
    cache = oracles.prefill(model, prompt, window_size=WINDOW, compression_ratio=ratio, **options)
    assert 0 < cache.lost_attention[0] < 1
    # Below a budget of two windows the table takes an unprotected newest token for evicted.
    assert cache.lost_attention[0] == pytest.approx(find_lost(model, cache, prompt), abs=2e-3)


@pytest.mark.parametrize("options", [*DEFAULTS.values(), UNIFORM], ids=str)
def test_protected_spans_are_counted_as_kept(model, options):
    prompt = oracles.random_prompt(120)
    cache = oracles.prefill(
        model, prompt, window_size=WINDOW, compression_ratio=0.6, protect=[(30, 50)], **options
    )
    assert cache.lost_attention[0] == pytest.approx(find_lost(model, cache, prompt), abs=2e-3)


@pytest.mark.parametrize(
    "options", [{"max_loss": 0.1, "profile": None}, {"compression_ratio": 1.0, **UNIFORM}]
)
def test_short_rows_beside_long_ones_are_measured_as_if_alone(model, options):
    prompts = [oracles.random_prompt(length, length) for length in (24, 40, 300)]
    cache = oracles.prefill(model, *oracles.left_pad(prompts), **options)
    for row, prompt in enumerate(prompts):
        alone = oracles.prefill(model, prompt, **options)
        assert cache.budgets_per_row[row] == alone.budgets
        assert cache.lost_attention[row] == pytest.approx(alone.lost_attention[0], abs=1e-5)


@pytest.mark.filterwarnings("ignore:the attention of layer")
def test_attention_that_is_not_finite_promises_nothing(tiny_llama):
    model = tiny_llama(4)
    with torch.no_grad():
        model.get_input_embeddings().weight[5] = float("nan")
    prompt = oracles.random_prompt(300)
    prompt[0, 40] = 5
    cache = oracles.prefill(model, prompt, max_loss=0.1, profile=None)
    assert cache.budgets == [300] * 4
    assert cache.loss_bounds[0] > 0.1


def test_nothing_is_lost_by_a_whole_cache_and_more_by_a_smaller_one(model):
    prompt = oracles.random_prompt(120)
    lost = [
        oracles.prefill(model, prompt, compression_ratio=ratio, **UNIFORM).lost_attention[0]
        for ratio in (1.0, 0.8, 0.5, 0.3)
    ]
    assert lost[0] == pytest.approx(0, abs=1e-6)
    assert lost == sorted(lost)


def test_a_whole_cache_has_no_predicted_loss(model):
    cache = oracles.prefill(model, oracles.random_prompt(60), compression_ratio=1.0)
    assert cache.predicted_loss == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("options", DEFAULTS.values(), ids=DEFAULTS)
@pytest.mark.parametrize("max_loss", [0.02, 0.1, 0.4])
def test_a_cache_by_loss_is_the_cache_of_its_own_ratio(model, options, max_loss):
    prompt = oracles.random_prompt(200)
    cache = oracles.prefill(model, prompt, max_loss=max_loss, **options)
    assert cache.loss_bounds[0] <= max_loss
    ratio = sum(cache.budgets) / (200 * len(cache.budgets))
    assert ratio < 1
    same = oracles.prefill(model, prompt, compression_ratio=ratio, **options)
    assert same.budgets == cache.budgets
    for index in cache.layer_indices:
        assert oracles.kept_positions(same, index) == oracles.kept_positions(cache, index)
    assert same.lost_attention == cache.lost_attention


@pytest.mark.parametrize("options", DEFAULTS.values(), ids=DEFAULTS)
def test_a_larger_loss_keeps_less_and_the_bound_is_nearly_met(model, options):
    prompt = oracles.random_prompt(300)
    caches = [oracles.prefill(model, prompt, max_loss=loss, **options) for loss in (0.02, 0.05, 0.2)]
    totals = [sum(cache.budgets) for cache in caches]
    assert totals == sorted(totals, reverse=True)
    assert totals[-1] < totals[0]
    for cache, loss in zip(caches, (0.02, 0.05, 0.2), strict=True):
        assert 0.6 * loss < cache.loss_bounds[0] <= loss


def test_ratio_and_budget_beside_a_loss_are_upper_bounds(model):
    prompt = oracles.random_prompt(200)
    for bound in ({"compression_ratio": 0.3}, {"budget": 60}):
        cache = oracles.prefill(model, prompt, max_loss=1e-3, **bound)
        assert sum(cache.budgets) == 60 * len(cache.budgets)
        assert "max_loss=0.001 is not reached" in cache.summary()
    assert sum(oracles.prefill(model, prompt, max_loss=5.0, compression_ratio=0.9).budgets) < 60 * 4


@pytest.mark.parametrize("options", DEFAULTS.values(), ids=DEFAULTS)
def test_rows_of_a_batch_are_sized_as_if_alone(model, options):
    prompts = [oracles.random_prompt(length, seed=length) for length in (90, 140)]
    cache = oracles.prefill(model, *oracles.left_pad(prompts), max_loss=0.1, **options)
    for row, prompt in enumerate(prompts):
        alone = oracles.prefill(model, prompt, max_loss=0.1, **options)
        assert cache.budgets_per_row[row] == alone.budgets
        assert cache.lost_attention[row] == pytest.approx(alone.lost_attention[0], rel=1e-4)


@pytest.mark.parametrize("options", DEFAULTS.values(), ids=DEFAULTS)
def test_a_prompt_in_chunks_is_sized_as_in_one_forward(model, options):
    prompt = oracles.random_prompt(150)
    whole = oracles.prefill(model, prompt, max_loss=0.1, **options)
    cache = RankKVCache(model, max_loss=0.1, prefill="chunked", **options)
    for chunk in prompt.split(40, dim=1):
        oracles.forward(model, cache, chunk)
    cache.finish()
    assert cache.budgets == whole.budgets
    assert cache.lost_attention[0] == pytest.approx(whole.lost_attention[0], rel=1e-4)


def test_a_recorded_prefill_takes_a_loss_too(model):
    from rankkv.evaluation import record_prefill

    prompt = oracles.random_prompt(150)
    built = record_prefill(model, prompt).build_cache(max_loss=0.1)
    assert built.budgets == compress(model, prompt, max_loss=0.1).budgets


def test_options_may_change_before_the_compression(model):
    prompt = oracles.random_prompt(150)
    waiting = RankKVCache(model, prefill="chunked", profile=None)
    oracles.forward(model, waiting, prompt)
    # Nobody gave a ratio, so the default of the waiting cache is no bound.
    by_loss = waiting.copy_with(max_loss=0.1).finish()
    assert by_loss.budgets == oracles.prefill(model, prompt, max_loss=0.1).budgets


def test_a_changed_loss_is_refused_where_it_cannot_be_predicted(model):
    waiting = RankKVCache(model, prefill="chunked", selector="h2o", profile=None)
    oracles.forward(model, waiting, oracles.random_prompt(100))
    with pytest.raises(ConfigError, match="'h2o' was not measured"):
        waiting.copy_with(max_loss=0.1)


def test_what_a_prediction_leaves_out_is_said(model):
    prompt = oracles.random_prompt(300)
    told = oracles.prefill(model, prompt, storage="int8", decode="bounded", profile=None).summary()
    assert "weak: decode='bounded' evicts more" in told
    assert "weak: the rounding of storage='int8'" in told
    plain, other = (
        oracles.prefill(model, prompt, selector=name, profile=None)
        for name in ("echo", get_selector("echo", gap=64))
    )
    assert plain.doubts == []
    assert "the plain selector 'echo'" in other.doubts[0]


def test_a_bound_that_one_row_misses_is_said(model):
    rows = oracles.left_pad([oracles.random_prompt(300, seed) for seed in range(4)])
    cache = oracles.prefill(model, *rows, max_loss=0.05, compression_ratio=0.8, **UNIFORM)
    above = [row for row, bound in enumerate(cache.loss_bounds) if bound > 0.05]
    assert above
    assert ("is not reached" in cache.summary()) == bool(above)
    assert all(str(row) in cache.summary().split("allowed in rows")[-1] for row in above if row)


def test_every_compression_of_a_long_answer_adds_to_the_loss(model):
    cache = oracles.prefill(
        model,
        oracles.random_prompt(100),
        compression_ratio=0.5,
        decode="periodic",
        decode_interval=16,
        profile=None,
    )
    lost = [cache.lost_attention[0]]
    for step in range(40):
        oracles.forward(model, cache, oracles.random_prompt(1, seed=step))
        lost.append(cache.lost_attention[0])
    assert lost == sorted(lost)
    assert lost[-1] > lost[0]


def test_a_doubtful_prompt_keeps_more_if_asked(model):
    prompt = oracles.random_prompt(120)
    plain = oracles.prefill(model, prompt, max_loss=0.2, profile=None)
    careful = oracles.prefill(model, prompt, max_loss=0.2, on_doubt="keep", profile=None)
    assert "120 tokens is shorter" in plain.doubts[0]
    assert careful.loss_bounds[0] <= 0.1 < plain.loss_bounds[0]
    assert "the prediction is weak" in plain.summary()
    long = oracles.random_prompt(300)
    sizes = {
        doubt: oracles.prefill(model, long, max_loss=0.2, on_doubt=doubt, profile=None).budgets
        for doubt in ("say", "keep")
    }
    assert sizes["say"] == sizes["keep"]


@pytest.mark.parametrize("options", [*DEFAULTS.values(), UNIFORM], ids=str)
def test_the_longest_gap_is_kept_by_no_head(model, options):
    prompts = [oracles.random_prompt(length, seed=length) for length in (150, 300)]
    cache = oracles.prefill(model, *oracles.left_pad(prompts), compression_ratio=0.06, **options)
    for row, prompt in enumerate(prompts):
        kept = {
            position - cache.row_start[row]
            for index in cache.layer_indices
            for positions in oracles.kept_positions(cache, index)[row]
            for position in positions
        }
        first, stop = find_longest_gap(cache.layers, cache.row_start[row], prompt.shape[1], row)
        assert not kept & set(range(first, stop))
        gaps = "".join("x" if place in kept else " " for place in range(prompt.shape[1])).split("x")
        assert stop - first == max(map(len, gaps))


def test_a_long_gap_is_a_doubt(model):
    cache = oracles.prefill(model, oracles.random_prompt(600), budget=20, **UNIFORM)
    assert any("kept by no head of any layer" in doubt for doubt in cache.doubts)


@pytest.mark.parametrize("option", [{"prefill": "streaming"}, {"recompress_turns": True}], ids=str)
def test_no_loss_is_told_of_a_prompt_that_is_evicted_in_parts(model, option):
    cache = oracles.prefill(model, oracles.random_prompt(120), **option)
    assert cache.predicted_loss is None
    assert cache.doubts == []


def test_a_gpu_measures_what_is_lost_only_if_asked(tiny_llama):
    model = pretend_gpu.put_on_gpu(tiny_llama(2))
    prompt = pretend_gpu.put_on_gpu(oracles.random_prompt(120))
    with pretend_gpu.pretend():
        caches = [RankKVCache(model, profile=None), RankKVCache(model, profile=None).measure_lost_attention()]
        caches.append(RankKVCache(model, max_loss=0.1))
        for cache in caches:
            oracles.forward(model, cache, prompt)
        plain, asked, bounded = caches
        assert plain.predicted_loss is None
        assert "not predicted on a GPU" in plain.summary()
        assert asked.predicted_loss > 0
        assert 0 < bounded.loss_bounds[0] <= 0.1


def test_the_summary_tells_the_prediction_and_whose_curve_it_is(model):
    cache = oracles.prefill(model, oracles.random_prompt(300), max_loss=0.1, profile=None)
    told = cache.summary()
    assert f"predicted loss {cache.predicted_loss:.2g} nats per token" in told
    assert "max_loss 0.1" in told
    assert "the loss curve is that of" in told
    other = oracles.prefill(model, oracles.random_prompt(300), selector="h2o")
    assert other.predicted_loss is None
    assert other.loss_bounds == [None]
    assert "predicted loss" not in other.summary()


def test_a_saved_cache_still_tells_its_loss(model, tmp_path):
    cache = oracles.prefill(model, oracles.random_prompt(120), max_loss=0.1, profile=None)
    loaded = RankKVCache.load(cache.save(tmp_path / "cache.safetensors"), model)
    assert loaded.predicted_loss == cache.predicted_loss
    assert loaded.config.max_loss == 0.1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"selector": "h2o"}, "'h2o' was not measured"),
        ({"prefill": "streaming"}, "settled once"),
        ({"recompress_turns": True}, "settled once"),
        ({"decode": "bounded"}, "settled once"),
        ({"strategy": "threshold", "selector": "echo"}, "both set the size"),
    ],
)
def test_what_cannot_be_bounded_is_refused_by_name(model, options, said):
    with pytest.raises(ConfigError, match=said):
        RankKVCache(model, max_loss=0.1, **options)


@pytest.mark.parametrize("value", [0, -0.1, 11, True, "0.1", float("nan")])
def test_a_loss_outside_its_range_is_refused(value):
    with pytest.raises(ConfigError, match="max_loss="):
        RankKVConfig(max_loss=value)


def test_keeping_more_on_doubt_needs_a_loss():
    with pytest.raises(ConfigError, match="give max_loss"):
        RankKVConfig(on_doubt="keep")


def test_a_ratio_that_is_not_given_sets_no_bound():
    assert RankKVConfig().compression_ratio == 0.3
    assert RankKVConfig(max_loss=0.1).compression_ratio == 1.0
    assert RankKVConfig(0.3, max_loss=0.1).compression_ratio == 0.3


def test_generate_and_the_pipeline_take_a_loss(model):
    from rankkv.integrations.generate import generate

    prompt = oracles.random_prompt(100)
    output = generate(
        model, prompt, max_loss=0.2, max_new_tokens=2, eos_token_id=None, return_dict_in_generate=True
    )
    cache = output.past_key_values
    assert 0 < cache.loss_bounds[0] <= 0.2
    assert cache.budgets == oracles.prefill(model, prompt, max_loss=0.2).budgets
    preset = rankkv.config.complete_options({"max_loss": 0.1})
    assert RankKVConfig(**{"compression_ratio": 0.2, **preset}).compression_ratio == 1.0


def test_default_curves_serve_both_defaults():
    curves = load_default_curves()
    assert set(curves) == {"snapkv", "echo"}
    assert all(0 < curve.predict(0.1)[0] <= curve.predict(0.1)[1] for curve in curves.values())


def test_the_knee_is_where_a_broken_line_bends():
    shares = [0.1, 0.2, 0.3, 0.4, 0.8]
    assert find_knee(shares, [torch.e**-value for value in (0, 3, 6, 6.1, 6.2)]) == 2


def test_no_share_is_refused_before_the_prefill(model):
    with pytest.raises(InputError, match="shares is empty"):
        predict_losses(model, oracles.random_prompt(60), [])
