"""The rank of an observed layer equals that of the attention matrices the model's eager attention returns."""

from __future__ import annotations

from dataclasses import replace

import oracles
import pytest
import torch

from rankkv import analyze_attention_ranks
from rankkv.observe.call import observe
from rankkv.rank import observed_layer as full_rank
from rankkv.rank.observed_layer import compute_head_ranks, compute_layer_ranks
from rankkv.rank_analysis import AGGREGATIONS, SCOPES

PROMPTS = (oracles.random_prompt(70, seed=1), oracles.random_prompt(52, seed=2))
SIZES = {"window_size": 16, "sink_size": 4}


@pytest.fixture(scope="module", params=["llama-sdpa", "neox-eager"])
def model(request, tiny_llama, tiny_neox):
    family, backend = request.param.split("-")
    return {"llama": tiny_llama, "neox": tiny_neox}[family](attn_implementation=backend)


def ranks_of(layers, *args):
    return torch.stack([compute_layer_ranks(layer, *args) for layer in layers], dim=-1)


def close(actual, expected):
    torch.testing.assert_close(
        actual.double(), torch.as_tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-9
    )


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("scope", SCOPES)
def test_equals_the_rank_of_eager_attention(model, scope, aggregation, normalize):
    expected = analyze_attention_ranks(
        oracles.eager_attentions(model, PROMPTS[0]), aggregation, normalize, scope=scope, **SIZES
    )
    actual = ranks_of(oracles.observe_layers(model, PROMPTS[0], **SIZES), scope, aggregation, normalize)
    close(actual[0], expected.layer_ranks)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("scope", SCOPES)
def test_a_padded_row_has_the_rank_of_the_row_alone(model, scope, aggregation):
    together = ranks_of(
        oracles.observe_layers(model, *oracles.left_pad(PROMPTS), **SIZES), scope, aggregation
    )
    for row, prompt in enumerate(PROMPTS):
        alone = ranks_of(oracles.observe_layers(model, prompt, **SIZES), scope, aggregation)
        torch.testing.assert_close(together[row], alone[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("scope", SCOPES)
def test_ranks_lie_between_one_and_the_smaller_side(model, scope):
    ranks = ranks_of(oracles.observe_layers(model, PROMPTS[0], **SIZES), scope)
    assert ((ranks >= 1) & (ranks <= (70 if scope == "full" else 16))).all()


def test_scopes_differ(model):
    layers = oracles.observe_layers(model, PROMPTS[0], **SIZES)
    full, window, evictable = (ranks_of(layers, scope) for scope in ("full", "window", "evictable"))
    assert (full > window).all()
    assert not torch.allclose(window, evictable, rtol=1e-3)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_long_prompts_are_ranked_by_spread_rows_and_stretches(model, monkeypatch, aggregation):
    for name, value in {"EXACT_TOKENS": 64, "SAMPLED_ROWS": 20, "STRETCHES": 2, "STRETCH_SAMPLES": 5}.items():
        monkeypatch.setattr(full_rank, name, value)
    attentions = oracles.eager_attentions(model, PROMPTS[0])

    def rank(rows):
        layers = [layer[:, :, list(rows)] for layer in attentions]
        return torch.tensor(analyze_attention_ranks(layers, aggregation).layer_ranks)

    # Every fourth of 70 rows, and 20 rows around the middle of each half: 7 to 26 and 42 to 61.
    growth = [rank(range(a, a + 20)) / rank(range(a + 2, a + 20, 4)) for a in (7, 42)]
    expected = rank(range(2, 70, 4)) * (growth[0] + growth[1]) / 2
    actual = ranks_of(oracles.observe_layers(model, PROMPTS[0], **SIZES), "full", aggregation)
    close(actual[0], expected.clamp(max=70))
    # A prompt up to the stated length stays exact.
    short = PROMPTS[0][:, :64]
    exact = analyze_attention_ranks(oracles.eager_attentions(model, short), aggregation).layer_ranks
    close(ranks_of(oracles.observe_layers(model, short, **SIZES), "full", aggregation)[0], exact)


@pytest.mark.parametrize("length", [1, 2, 5, 20])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_nothing_evictable_has_rank_zero(model, aggregation, length):
    # 16 recent tokens and 4 sinks.
    ranks = ranks_of(oracles.observe_layers(model, PROMPTS[0][:, :length], **SIZES), "evictable", aggregation)
    assert ranks.tolist() == [[0.0, 0.0, 0.0]]


def test_heads_have_the_ranks_of_their_own_attention(model):
    layers = oracles.observe_layers(model, PROMPTS[0], **SIZES)
    expected = analyze_attention_ranks(
        oracles.eager_attentions(model, PROMPTS[0]), "per_head", scope="evictable", **SIZES
    )
    ranks = torch.stack([compute_head_ranks(layer)[0] for layer in layers])
    close(ranks, expected.per_head_ranks)
    for layer in oracles.observe_layers(model, PROMPTS[0][:, :12], **SIZES):
        assert compute_head_ranks(layer).tolist() == [[0.0] * 4]


def test_a_short_row_beside_a_long_one_has_nothing_evictable(model):
    ids, mask = oracles.left_pad([PROMPTS[0], PROMPTS[1][:, :12]])
    ranks = ranks_of(oracles.observe_layers(model, ids, mask, **SIZES), "evictable")
    assert (ranks[0] >= 1).all()
    assert ranks[1].tolist() == [0.0, 0.0, 0.0]


def make(query, key):
    tensors = (query[None, None], key[None, None], key[None, None])
    return observe(0, torch.nn.Module(), *tensors, None, {"scaling": 1.0}, kv_heads=1, **SIZES)


def test_known_matrices():
    eye = torch.eye(40)
    # All mass on the first token.
    first = make(torch.ones(40, 1), 60.0 * (torch.arange(40) == 0)[:, None])
    close(compute_layer_ranks(first, "full"), [1.0])
    # Each token attends to itself.
    close(compute_layer_ranks(make(200 * eye, eye), "full"), [40.0])
    # Uniform causal attention: the singular values of a known matrix.
    uniform = torch.ones(40, 40).tril() / torch.arange(1, 41)[:, None]
    share = torch.linalg.svdvals(uniform.double())
    share = share / share.sum()
    close(
        compute_layer_ranks(make(torch.zeros(40, 1), torch.zeros(40, 1)), "full"),
        [float(torch.exp(-(share * share.log()).sum()))],
    )


def test_ranks_are_rounded_so_that_float_noise_does_not_move_a_token(model):
    for rank in ranks_of(oracles.observe_layers(model, PROMPTS[0], **SIZES))[0].tolist():
        assert rank == float(f"{rank:.5e}")


def test_attention_that_is_not_finite_has_no_rank(model):
    call = oracles.capture_calls(model, torch.cat([PROMPTS[0], PROMPTS[0]]))[0]
    layer_idx, module, query, *rest = call
    query = query.clone()
    query[0, 0, -1, 0] = float("nan")
    layer = observe(layer_idx, module, query, *rest, kv_heads=call[3].shape[1], **SIZES)
    for scope in SCOPES:
        ranks = compute_layer_ranks(layer, scope)
        assert ranks.isnan().tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_ranked_as_its_upcast(model, dtype):
    # No mask means causal, which is what the model's own mask says.
    layer_idx, module, query, key, value, _, options = oracles.capture_calls(model, PROMPTS[0])[0]
    mask = None
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    sizes = {"kv_heads": key.shape[1], **SIZES}
    half = observe(layer_idx, module, query, key, value, mask, options, **sizes)
    ranks = compute_layer_ranks(half)
    upcast = observe(layer_idx, module, query.float(), key.float(), value.float(), mask, options, **sizes)
    assert 1 <= float(ranks) <= 16
    torch.testing.assert_close(ranks, compute_layer_ranks(upcast), rtol=2e-2, atol=0)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_spectrum_in_single_precision_is_within_half_a_percent_of_double(model, monkeypatch, aggregation):
    layers = oracles.observe_layers(model, PROMPTS[0], **SIZES)
    double = ranks_of(layers, "full", aggregation)
    monkeypatch.setattr(full_rank, "DOUBLE_ROWS", 8)
    monkeypatch.setattr(full_rank, "_BLOCK_ROWS", 16)
    single = ranks_of(layers, "full", aggregation)
    torch.testing.assert_close(single, double, rtol=full_rank.SINGLE_TOLERANCE, atol=0)


def test_single_precision_gives_way_to_double_where_its_noise_is_the_rank(monkeypatch):
    # One large singular value: what float32 adds to the others would count as rank.
    first = make(torch.ones(40, 1), 60.0 * (torch.arange(40) == 0)[:, None])
    monkeypatch.setattr(full_rank, "DOUBLE_ROWS", 8)
    close(compute_layer_ranks(first, "full"), [1.0])
    noise = torch.full((40, 40), 4.0) + 1e-5 * torch.eye(40)
    assert full_rank._compute_rank_in_single(noise) is None


@pytest.mark.parametrize("scope", ["full", "window", "evictable"])
def test_a_short_row_whose_queries_waited_ranks_as_alone(scope):
    """Observed without a mask, as after a deferred prefill, the row keeps positions that start after its padding."""
    alone = oracles.observe_random(20)
    padded = replace(
        alone,
        query=torch.nn.functional.pad(alone.query, (0, 0, 13, 0)),
        keys=torch.nn.functional.pad(alone.keys, (0, 0, 13, 0)),
        values=torch.nn.functional.pad(alone.values, (0, 0, 13, 0)),
        positions=torch.arange(33).view(1, 1, -1),
        valid=torch.arange(33)[None] >= 13,
        query_valid=torch.arange(33)[None] >= 13,
        row_start=[13],
    )
    taken = padded.take_row(0)
    torch.testing.assert_close(taken.compute_attention(slice(0, 20)), alone.compute_attention(slice(0, 20)))
    ranks = [compute_layer_ranks(observed, scope) for observed in (alone, padded, taken)]
    torch.testing.assert_close(ranks[1], ranks[0])
    torch.testing.assert_close(ranks[2], ranks[0])
