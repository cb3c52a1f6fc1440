"""Calibration to first order: what the gates compute, against caches that were compressed, and their gradient."""

from __future__ import annotations

import families
import oracles
import pytest
import torch

from rankkv import RankProfile, compress
from rankkv.calibration import gradient as calibration_gradient
from rankkv.calibration.gradient import GatedCache, measure_gradients
from rankkv.calibration.single_runs import TextPrefill, measure_text
from rankkv.errors import InputError, ProfileError, UnknownNameError, UnsupportedModelError
from rankkv.models.compat import cache_argument

CONTEXT, RATIOS = 100, (0.1, 0.4)


def make_ids(length=140, seed=0):
    return oracles.random_prompt(length, seed).reshape(1, -1)


def make_gated(model, ids, budget, other):
    """A cache whose heads see ``budget`` tokens, with two alternatives: ``other`` tokens and all."""
    prefill = TextPrefill(model, ids[:, :CONTEXT], "snapkv")
    full = prefill.build_uniform(CONTEXT)
    seen = [
        calibration_gradient._find_seen(full, prefill.build_uniform(kept))
        for kept in (budget, other, CONTEXT)
    ]
    return lambda: GatedCache(model, full.copy(), seen[0], seen[1:])


@torch.no_grad()
def run(model, ids, cache):
    return model(ids[:, CONTEXT:], **cache_argument(cache)).logits[0, :-1]


@torch.no_grad()
def run_compressed(model, ids, budget):
    cache = compress(model, ids[:, :CONTEXT], budget=budget, strategy="uniform", min_budget=1)
    return run(model, ids, cache)


#: One for each way that layers may differ: many kv heads, one, latent, sinks, windows, borrowed keys, linear states.
FAMILIES = [
    "Llama",
    "GPT-NeoX",
    "GPT-BigCode",
    "DeepSeek-V3",
    "gpt-oss",
    "Gemma 3",
    "Gemma 3n",
    "Gemma 4",
    "Qwen3.5",
]


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        (name, backend)
        for name in FAMILIES
        if families.FAMILIES[name].exists and families.FAMILIES[name].is_promised
        for backend in families.FAMILIES[name].backends
        if backend != "flex_attention"
    ],
)
def test_gates_lead_from_one_compressed_cache_to_another(name, backend):
    model, ids = families.build(name, backend), make_ids()
    make = make_gated(model, ids, budget=10, other=40)
    for alternative, budget in ((None, 10), (0, 40), (1, CONTEXT)):
        cache = make()
        if alternative is not None:
            with torch.no_grad():
                for gates in cache.gates.values():
                    gates[alternative] = 1.0
        torch.testing.assert_close(
            run(model, ids, cache), run_compressed(model, ids, budget), atol=2e-5, rtol=1e-3
        )
    both = [measure(model, ids, CONTEXT, RATIOS) for measure in (measure_gradients, measure_text)]
    for distance in ("nll", "base_excess_loss", "base_divergence"):
        assert both[0][distance] == pytest.approx(both[1][distance], rel=1e-3, abs=1e-5)
    assert not torch.allclose(run_compressed(model, ids, 10), run_compressed(model, ids, CONTEXT), atol=1e-3)


def test_a_gate_of_one_head_gives_that_head_its_cache_back(tiny_llama):
    model, ids = tiny_llama(2), make_ids()
    measured = measure_text(model, ids, CONTEXT, RATIOS, base_ratio=0.1)
    full = run_compressed(model, ids, CONTEXT).log_softmax(-1)
    make = make_gated(model, ids, budget=10, other=40)
    for layer in range(2):
        for head in range(2):
            cache = make()
            with torch.no_grad():
                cache.gates[layer][1, head] = 1.0
            back = run(model, ids, cache).log_softmax(-1)
            divergence = float((full.exp() * (full - back)).sum(-1).mean())
            gain = measured["base_divergence"] - divergence
            assert measured["head_gain_divergence"][layer][head] == pytest.approx(gain, abs=1e-5)


def test_what_is_estimated_is_the_slope_at_the_gates(tiny_llama):
    model, ids, step = tiny_llama(2), make_ids(), 0.05
    record = measure_gradients(model, ids, CONTEXT, (0.4,), base_ratio=0.1)
    full = run_compressed(model, ids, CONTEXT).double().log_softmax(-1)
    targets = ids[0, CONTEXT + 1 :]

    def measure(layer, alternative, head, value):
        cache = make()
        with torch.no_grad():
            cache.gates[layer][alternative, head] = value
        other = run(model, ids, cache).double().log_softmax(-1)
        loss = (full - other).gather(-1, targets[:, None]).mean()
        return torch.stack([loss, (full.exp() * (full - other)).sum(-1).mean()])

    make = make_gated(model, ids, budget=10, other=40)
    slopes = torch.zeros(2, 2, 2, 2)
    for layer, alternative, head in torch.cartesian_prod(*[torch.arange(2)] * 3).tolist():
        ends = [measure(layer, alternative, head, value) for value in (step, -step)]
        slopes[layer, alternative, head] = (ends[0] - ends[1]) / (2 * step)
    assert slopes.abs().max() > 1e-3
    some, everything = slopes.unbind(1)
    close = {"atol": 2e-5, "rtol": 0.02}
    torch.testing.assert_close(torch.tensor(record["head_gain_divergence"]), -everything[..., 1], **close)
    torch.testing.assert_close(torch.tensor(record["gain_divergence"]), -everything[..., 1].sum(-1), **close)
    torch.testing.assert_close(torch.tensor(record["gain_loss"]), -everything[..., 0].sum(-1), **close)
    curves = (some - everything).sum(1)
    torch.testing.assert_close(torch.tensor(record["divergence"])[:, 0], curves[:, 1], **close)
    torch.testing.assert_close(torch.tensor(record["excess_loss"])[:, 0], curves[:, 0], **close)


def test_distances_and_ranks_are_those_that_are_measured(tiny_llama):
    model, ids = tiny_llama(3), make_ids()
    estimated = measure_gradients(model, ids, CONTEXT, RATIOS, base_ratio=0.2)
    measured = measure_text(model, ids, CONTEXT, RATIOS, base_ratio=0.2)
    assert estimated.keys() == measured.keys()
    for name in ("nll", "base_excess_loss", "base_divergence"):
        assert estimated[name] == pytest.approx(measured[name], abs=1e-5)
    assert estimated["ranks"] == measured["ranks"]
    for name in ("excess_loss", "divergence", "head_gain_divergence"):
        assert torch.tensor(estimated[name]).shape == torch.tensor(measured[name]).shape


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_weights_stay_as_they_are_whatever_the_caller_turned_off(tiny_llama, guard):
    model, ids = tiny_llama(2), make_ids()
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    with guard():
        record = measure_gradients(model, ids, CONTEXT, RATIOS)
    assert record == measure_gradients(model, ids, CONTEXT, RATIOS)
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    model.requires_grad_(False)
    assert measure_gradients(model, ids, CONTEXT, RATIOS) == record
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_model_in_training_is_measured_as_it_answers(tiny_llama):
    model, ids = tiny_llama(2, attention_dropout=0.3), make_ids()
    record = measure_gradients(model, ids, CONTEXT, RATIOS)
    model.train()
    model.gradient_checkpointing_enable()
    assert measure_gradients(model, ids, CONTEXT, RATIOS) == record
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_loses_digits_and_no_more(tiny_llama, dtype):
    model, ids = tiny_llama(2), make_ids()
    expected = torch.tensor(measure_gradients(model, ids, CONTEXT, RATIOS)["head_gain_divergence"])
    found = torch.tensor(measure_gradients(model.to(dtype), ids, CONTEXT, RATIOS)["head_gain_divergence"])
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1 * float(expected.abs().max()))


def test_a_profile_of_gradients_says_so_and_serves_every_use_of_one(tiny_llama, tmp_path):
    model, ids = tiny_llama(3), [make_ids(seed=seed)[0] for seed in range(2)]
    seen = []
    profile = RankProfile.calibrate(
        model,
        texts=ids,
        context_tokens=CONTEXT,
        continuation_tokens=40,
        method="gradient",
        on_progress=lambda *step: seen.append(step),
    )
    assert seen == [(1, 2), (2, 2)]
    assert profile.calibration["method"] == "gradient"
    profile = RankProfile.load(profile.save(tmp_path / "profile.json"))
    uses = {"strategy": "profile"}, {"strategy": "blend"}, {"head_budgets": "profile"}, {}
    for options in uses:
        cache = compress(model, ids[0][None], compression_ratio=0.3, profile=profile, **options)
        assert sum(cache.budgets) == round(0.3 * 140 * 3)


def test_what_cannot_be_differentiated_is_refused_by_name(tiny_llama):
    texts = [make_ids()[0]]
    options = {"context_tokens": CONTEXT, "continuation_tokens": 40}
    model = tiny_llama(2, attn_implementation="flex_attention")
    with pytest.raises(UnsupportedModelError, match="through flex_attention"):
        RankProfile.calibrate(model, texts=texts, method="gradient", **options)
    with torch.inference_mode():
        model = tiny_llama(2)
    with pytest.raises(UnsupportedModelError, match=r"not created in torch.inference_mode\(\)"):
        RankProfile.calibrate(model, texts=texts, method="gradient", **options)
    model = families.build("Mistral, sliding window")
    with (
        pytest.warns(UserWarning, match="nothing is compressed"),
        pytest.raises(ProfileError, match="0 layers"),
    ):
        RankProfile.calibrate(model, texts=texts, method="gradient", **options)
    with pytest.raises(UnknownNameError, match="gradient"):
        RankProfile.calibrate(tiny_llama(2), texts=texts, method="gradients", **options)


def test_a_calibration_does_not_go_on_with_pieces_of_the_other_method(tiny_llama, tmp_path):
    options = {"context_tokens": CONTEXT, "continuation_tokens": 40, "resume_path": tmp_path / "pieces.jsonl"}
    model, texts = tiny_llama(2), [make_ids()[0]]
    profile = RankProfile.calibrate(model, texts=texts, method="gradient", **options)
    assert RankProfile.calibrate(model, texts=texts, method="gradient", **options) == profile
    with pytest.raises(InputError, match="method: file 'gradient', now 'measured'"):
        RankProfile.calibrate(model, texts=texts, **options)
