"""Effective rank of attention: known values, hard inputs, scopes, and what bad input is told."""

from __future__ import annotations

import json

import numpy as np
import pretend_gpu
import pytest
import scipy.stats
import torch

from rankkv.errors import ConfigError, DegenerateAttentionError, InputError, UnknownNameError
from rankkv.rank import spectrum as rank_kernels
from rankkv.rank_analysis import (
    AGGREGATIONS,
    analyze_attention_ranks,
    compute_aggregated_rank,
    compute_effective_rank,
    compute_effective_ranks,
    compute_gram,
    compute_joint_gram,
    compute_rank_from_gram,
    round_ranks,
)


def causal_attention(scores):
    """Causal softmax over the last axis of square scores."""
    size = scores.shape[-1]
    future = torch.ones(size, size, dtype=torch.bool).triu(1)
    return scores.masked_fill(future, float("-inf")).softmax(-1)


def reference_rank(matrix):
    """Numpy's SVD and scipy's entropy, written without the module under test."""
    singular = np.linalg.svd(np.asarray(matrix, dtype=np.float64), compute_uv=False)
    return float(np.exp(scipy.stats.entropy(singular)))


def attention_layers(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple((torch.randn(shape, generator=generator) * 2).softmax(-1) for shape in shapes)


HARD = {
    "all mass on the first token": torch.eye(1, 64).repeat(64, 1),
    "identity": torch.eye(64),
    "uniform causal": causal_attention(torch.zeros(64, 64)),
    "identical rows": torch.rand(1, 64, generator=torch.Generator().manual_seed(1)).repeat(64, 1),
    "nearly rank 1": torch.ones(64, 64)
    + 1e-7 * torch.rand(64, 64, generator=torch.Generator().manual_seed(2)),
    "ill-conditioned": torch.vander(torch.linspace(0, 1, 64, dtype=torch.float64)),
    "one entry": torch.zeros(64, 64).index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(1e-30)),
    "subnormal": torch.full((64, 64), 1e-310, dtype=torch.float64),
}


@pytest.mark.parametrize("name", HARD)
def test_hard_matrices_have_a_finite_rank_in_bounds(name):
    matrix = HARD[name]
    rank = compute_effective_rank(matrix)
    assert 1.0 <= rank <= 64.0
    ranks, per_head = compute_aggregated_rank(matrix[None, None], "per_head")
    assert float(ranks) == pytest.approx(rank, rel=1e-4)
    assert per_head.shape == (1, 1)


@pytest.mark.parametrize("name", ["all mass on the first token", "identical rows", "one entry", "subnormal"])
def test_matrices_of_rank_one(name):
    matrix = HARD[name]
    assert compute_effective_rank(matrix) == pytest.approx(1.0, abs=1e-6)
    for aggregation in AGGREGATIONS:
        assert float(compute_aggregated_rank(matrix[None, None], aggregation)[0]) == pytest.approx(
            1.0, abs=1e-6
        )


def test_a_wide_rank_one_window_has_rank_one_through_its_gram_matrix():
    generator = torch.Generator().manual_seed(0)
    for rows, columns in ((2, 9000), (32, 9000), (128, 3000)):
        outer = torch.rand(rows, 1, generator=generator) * torch.rand(1, columns, generator=generator) ** 8
        outer = torch.outer(outer[:, 0].double(), outer[0].double())
        assert float(compute_rank_from_gram(compute_gram(outer))) == pytest.approx(1.0, abs=1e-6)


def test_the_zero_matrix_has_rank_zero():
    assert compute_effective_rank(torch.zeros(3, 5)) == 0.0
    assert compute_effective_rank(torch.zeros(3, 5), normalize=True) == 0.0
    assert compute_rank_from_gram(torch.zeros(2, 3, 3)).tolist() == [0.0, 0.0]
    for aggregation in AGGREGATIONS:
        assert compute_aggregated_rank(torch.zeros(2, 3, 4, 5), aggregation)[0].tolist() == [0.0, 0.0]


def test_two_singular_values_give_the_closed_form():
    # p = (3/4, 1/4): exp(H) = (4/3)^(3/4) * 4^(1/4).
    rank = compute_effective_rank(torch.diag(torch.tensor([3.0, 1.0])))
    assert rank == pytest.approx((4 / 3) ** 0.75 * 4**0.25, rel=1e-12)


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int32, torch.uint8, torch.bool],
)
def test_every_real_dtype_is_taken(dtype):
    matrix = torch.tensor([[1, 0, 1], [0, 1, 1]], dtype=dtype)
    assert compute_effective_rank(matrix) == pytest.approx(reference_rank(matrix.double()), rel=1e-12)


def test_arrays_are_taken_read_only_reversed_and_with_gradients():
    array = np.arange(12.0).reshape(3, 4)
    array.setflags(write=False)
    expected = reference_rank(array)
    assert compute_effective_rank(array) == pytest.approx(expected, rel=1e-12)
    assert compute_effective_rank(array[::-1]) == pytest.approx(expected, rel=1e-12)
    assert compute_effective_rank(torch.tensor(array, requires_grad=True)) == pytest.approx(
        expected, rel=1e-12
    )


@pytest.mark.parametrize(
    ("matrix", "said"),
    [
        (torch.ones(3), r"\[m, n\].*\(3,\)"),
        (torch.ones(2, 3, 4), r"\(2, 3, 4\).*compute_effective_ranks"),
        (torch.ones(0, 4), r"\(0, 4\)"),
        (torch.ones(2, 2, dtype=torch.complex64), "real"),
        ("attention", "str"),
        (None, "NoneType"),
        (np.array([["a"]]), "ndarray"),
    ],
)
def test_what_is_no_matrix_is_refused(matrix, said):
    with pytest.raises(InputError, match=said):
        compute_effective_rank(matrix)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_entries_are_counted_in_the_error(bad):
    matrix = torch.ones(3, 3)
    matrix[0, 1] = matrix[2, 2] = bad
    with pytest.raises(DegenerateAttentionError, match="2 of 9 entries"):
        compute_effective_rank(matrix)
    both = compute_effective_ranks(torch.stack([matrix, torch.eye(3)]))
    assert torch.isnan(both[0])
    assert float(both[1]) == pytest.approx(3.0, rel=1e-12)


def test_an_empty_batch_has_no_ranks():
    assert compute_effective_ranks(torch.ones(0, 3, 4)).shape == (0,)
    assert compute_rank_from_gram(torch.ones(0, 3, 3)).shape == (0,)


def test_gram_matrices_are_the_same_in_blocks(monkeypatch):
    (attention,) = attention_layers((2, 3, 40, 700))
    whole = attention.double() @ attention.double().mT
    torch.testing.assert_close(compute_gram(attention), whole, rtol=1e-12, atol=0)
    monkeypatch.setattr(rank_kernels, "_CPU_BLOCK_ELEMENTS", 1000)
    monkeypatch.setattr(rank_kernels, "_MIN_BLOCK_KEYS", 16)
    torch.testing.assert_close(compute_gram(attention), whole, rtol=1e-12, atol=0)


def test_a_gpu_adds_up_the_gram_matrix_of_many_products():
    attention = torch.rand(2, 3, 5, 1500, generator=torch.Generator().manual_seed(0)).softmax(-1)
    for keys in (512, 513, 1024, 1500):
        cut = attention[..., :keys]
        with pretend_gpu.pretend():
            found = compute_gram(pretend_gpu.put_on_gpu(cut)).cpu()
        torch.testing.assert_close(found, cut.double() @ cut.double().mT, rtol=1e-12, atol=0)


@pytest.mark.parametrize("aggregation", sorted(AGGREGATIONS))
def test_large_maps_are_ranked_head_by_head_with_the_same_result(aggregation):
    (attention,) = attention_layers((1, 2, 300, 310))
    heads = attention[0].double().numpy()
    masses = heads.sum((1, 2), keepdims=True)
    expected = {
        "mean": reference_rank(heads.mean(0)),
        "per_head": np.mean([reference_rank(head) for head in heads]),
        "median": np.median([reference_rank(head) for head in heads]),
        "max": max(reference_rank(head) for head in heads),
        "min": min(reference_rank(head) for head in heads),
        "concat": reference_rank(np.concatenate(list(heads), axis=1)),
        "mass_normalized": reference_rank((heads / masses).mean(0)),
    }
    ranks, _ = compute_aggregated_rank(attention, aggregation)
    assert float(ranks) == pytest.approx(expected[aggregation], rel=1e-5)


def test_the_median_of_an_even_number_of_heads_lies_between_the_middle_two():
    heads = torch.zeros(1, 4, 4, 4)
    for head, rank in enumerate((1, 2, 4, 4)):
        heads[0, head] = torch.diag(torch.arange(4) < rank).float()
    ranks, per_head = compute_aggregated_rank(heads, "median")
    assert per_head[0].tolist() == pytest.approx([1, 2, 4, 4])
    assert float(ranks) == pytest.approx(3.0)


def test_mass_normalized_leaves_massless_heads_out():
    (attention,) = attention_layers((1, 2, 6, 9))
    with_empty = torch.cat([attention, torch.zeros(1, 1, 6, 9)], dim=1)
    ranks, _ = compute_aggregated_rank(with_empty, "mass_normalized")
    assert float(ranks) == pytest.approx(
        float(compute_aggregated_rank(attention, "mass_normalized")[0]), rel=1e-9
    )


def test_normalize_divides_by_the_smaller_side_of_the_matrix_ranked():
    (attention,) = attention_layers((2, 3, 8, 5))
    for aggregation in AGGREGATIONS:
        plain, plain_heads = compute_aggregated_rank(attention, aggregation)
        shares, share_heads = compute_aggregated_rank(attention, aggregation, normalize=True)
        # Heads side by side are 15 columns wide, so the 8 rows are the smaller side.
        torch.testing.assert_close(shares, plain / (8 if aggregation == "concat" else 5))
        if plain_heads is not None:
            torch.testing.assert_close(share_heads, plain_heads / 5)
    counted, _ = compute_aggregated_rank(
        attention, "mean", normalize=True, columns=torch.tensor([2, 5]), rows=4
    )
    plain, _ = compute_aggregated_rank(attention, "mean")
    torch.testing.assert_close(counted, plain / torch.tensor([2, 4]))


def test_extreme_float64_attention_does_not_overflow():
    (attention,) = attention_layers((1, 2, 6, 30))
    for aggregation in AGGREGATIONS:
        expected = float(compute_aggregated_rank(attention.double(), aggregation)[0])
        for scale in (1e-200, 1e200):
            got = float(compute_aggregated_rank(attention.double() * scale, aggregation)[0])
            assert got == pytest.approx(expected, rel=1e-9)


def test_no_evictable_columns_means_rank_zero():
    for aggregation in AGGREGATIONS:
        ranks, _ = compute_aggregated_rank(torch.ones(2, 3, 4, 0), aggregation, normalize=True)
        assert ranks.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    "attention", [torch.ones(2, 3, 4), torch.ones(0, 1, 2, 2), torch.ones(1, 1, 0, 2), [[1.0]]]
)
def test_attention_of_the_wrong_shape_is_refused(attention):
    with pytest.raises(InputError, match="batch, head, query, key"):
        compute_aggregated_rank(attention)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(UnknownNameError, match=r"did you mean 'concat'.*mass_normalized"):
        compute_aggregated_rank(torch.ones(1, 1, 2, 2), "concta")
    with pytest.raises(UnknownNameError, match="Known: concat, mass_normalized, mean"):
        compute_joint_gram(torch.ones(1, 1, 2, 2), "median")
    with pytest.raises(UnknownNameError, match="did you mean 'evictable'"):
        analyze_attention_ranks(attention_layers((1, 1, 4, 4)), scope="evictible")


def fail_first(monkeypatch, name, failures):
    """Make a solver of torch fail its first calls and count them all."""
    real, calls = getattr(torch.linalg, name), []

    def solver(matrices):
        calls.append(matrices.clone())
        if len(calls) <= failures:
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return real(matrices)

    monkeypatch.setattr(torch.linalg, name, solver)
    return calls


@pytest.mark.parametrize(
    ("name", "failures"), [("eigvalsh", 1), ("eigvalsh", 2), ("svdvals", 1), ("svdvals", 2)]
)
def test_a_solver_that_fails_is_tried_again_and_the_rank_does_not_move(monkeypatch, name, failures):
    (attention,) = attention_layers((1, 1, 12, 40))
    expected = reference_rank(attention[0, 0])
    calls = fail_first(monkeypatch, name, failures)
    if name == "svdvals":
        rank = compute_effective_rank(attention[0, 0])
    else:
        rank = float(compute_aggregated_rank(attention)[0])
    assert rank == pytest.approx(expected, rel=1e-6)
    assert len(calls) == failures + 1


def test_a_jitter_keeps_an_exact_rank_of_one(monkeypatch):
    fail_first(monkeypatch, "eigvalsh", 2)
    assert float(compute_aggregated_rank(torch.ones(1, 2, 32, 50))[0]) == pytest.approx(1.0, abs=1e-6)


def test_a_solver_that_never_converges_is_named(monkeypatch):
    fail_first(monkeypatch, "eigvalsh", 9)
    with pytest.raises(DegenerateAttentionError, match=r"does not converge.*uniform"):
        compute_aggregated_rank(torch.ones(1, 1, 4, 4))


def test_layer_ranks_are_the_reference_of_each_layer():
    layers = attention_layers((1, 3, 20, 20), (1, 2, 6, 24), seed=3)
    analysis = analyze_attention_ranks(layers)
    expected = [reference_rank(layer[0].double().mean(0)) for layer in layers]
    assert analysis.layer_ranks == pytest.approx(expected, rel=1e-5)
    heads = [[reference_rank(head) for head in layer[0]] for layer in layers]
    assert [len(ranks) for ranks in analysis.per_head_ranks] == [3, 2]
    for ranks, wanted in zip(analysis.per_head_ranks, heads, strict=True):
        assert ranks == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("aggregation", sorted(AGGREGATIONS))
def test_every_aggregation_agrees_with_the_rank_of_the_scope_cut_by_hand(aggregation):
    (layer,) = attention_layers((2, 3, 30, 40))
    cuts = {"full": layer, "window": layer[:, :, -8:], "evictable": layer[:, :, -8:, 2 : 40 - 8]}
    for scope, cut in cuts.items():
        analysis = analyze_attention_ranks([layer], aggregation, scope=scope, window_size=8, sink_size=2)
        ranks, _ = compute_aggregated_rank(cut, aggregation)
        assert analysis.layer_ranks == pytest.approx([float(ranks.mean())], rel=1e-9)
        heads = [np.mean([reference_rank(cut[row, head]) for row in range(2)]) for head in range(3)]
        assert analysis.per_head_ranks[0] == pytest.approx(heads, rel=1e-5)


def test_what_is_evictable_ranks_as_the_matrix_with_all_else_zero():
    (layer,) = attention_layers((1, 2, 16, 50))
    evictable = torch.zeros(50)
    evictable[4 : 50 - 16] = 1
    ranks, _ = compute_aggregated_rank(layer * evictable, "concat")
    analysis = analyze_attention_ranks([layer], "concat", scope="evictable", window_size=16, sink_size=4)
    assert analysis.layer_ranks == pytest.approx(ranks.tolist(), rel=1e-7)


def test_a_prompt_without_evictable_keys_has_rank_zero():
    analysis = analyze_attention_ranks(attention_layers((1, 2, 20, 20)), scope="evictable")
    assert analysis.layer_ranks == [0.0]
    assert analysis.per_head_ranks == [[0.0, 0.0]]


def test_a_diagonal_layer_outranks_a_uniform_one_as_a_whole_but_not_in_what_is_evictable():
    size = 64
    diagonal = causal_attention(torch.eye(size) * 20)[None, None]
    broad = causal_attention(torch.randn(size, size, generator=torch.Generator().manual_seed(0)))[None, None]
    options = {"window_size": 8, "sink_size": 2}
    whole = analyze_attention_ranks([diagonal, broad], scope="full", **options).layer_ranks
    evictable = analyze_attention_ranks([diagonal, broad], scope="evictable", **options).layer_ranks
    assert whole[0] > whole[1]
    assert evictable[0] < evictable[1]


def test_statistics_and_json():
    layers = attention_layers((1, 2, 9, 9), (1, 2, 12, 12), (1, 2, 5, 5))
    analysis = analyze_attention_ranks(
        iter(layers), "concat", normalize=True, show_progress=True, scope="window"
    )
    ranks = np.array(analysis.layer_ranks)
    assert analysis.statistics == pytest.approx(
        {
            "mean": ranks.mean(),
            "std": ranks.std(),
            "min": ranks.min(),
            "max": ranks.max(),
            "min_layer": int(ranks.argmin()),
            "max_layer": int(ranks.argmax()),
        }
    )
    assert ((ranks > 0) & (ranks <= 1)).all()
    record = json.loads(json.dumps(analysis.to_dict()))
    assert record["layer_ranks"] == analysis.layer_ranks
    assert (record["scope"], record["aggregation"], record["normalize"]) == ("window", "concat", True)


def test_half_precision_layers_have_exactly_the_ranks_of_their_upcast():
    layers = tuple(layer.bfloat16() for layer in attention_layers((1, 3, 40, 40)))
    upcast = tuple(layer.float() for layer in layers)
    for aggregation in AGGREGATIONS:
        assert analyze_attention_ranks(layers, aggregation) == analyze_attention_ranks(upcast, aggregation)


@pytest.mark.parametrize(
    ("second", "error", "said"),
    [
        (None, InputError, "layer 1: attention is None.*eager"),
        (torch.ones(2, 4, 4), InputError, r"layer 1: .*\(2, 4, 4\)"),
        ("attention", InputError, "layer 1: .*str"),
        (torch.ones(1, 2, 4, 0), InputError, "layer 1: attention must have keys"),
        (torch.full((1, 2, 4, 4), float("nan")), DegenerateAttentionError, "layer 1: .*NaN"),
        (torch.full((1, 2, 4, 4), float("inf")), DegenerateAttentionError, "layer 1: .*inf"),
        (-torch.eye(4).expand(1, 2, 4, 4), DegenerateAttentionError, "layer 1: .*from -1 to"),
    ],
)
def test_a_bad_layer_is_named(second, error, said):
    with pytest.raises(error, match=said):
        analyze_attention_ranks((torch.eye(4)[None, None], second))


@pytest.mark.parametrize(("attentions", "said"), [((), "empty"), (None, "NoneType"), (3, "int")])
def test_no_layers_are_refused(attentions, said):
    with pytest.raises(InputError, match=said):
        analyze_attention_ranks(attentions)


@pytest.mark.parametrize(
    "options", [{"window_size": 0}, {"window_size": 2.5}, {"sink_size": -1}, {"sink_size": True}]
)
def test_sizes_out_of_range_are_named(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        analyze_attention_ranks(attention_layers((1, 1, 4, 4)), **options)


def test_rounding_hides_float_noise_and_keeps_the_container():
    assert round_ranks([12.3456781, 12.3456784]) == [12.3457, 12.3457]
    assert round_ranks(123456.7) == 123457.0
    assert round_ranks([[0.0, float("inf")], [1e-9]]) == [[0.0, float("inf")], [1e-9]]
    assert np.isnan(round_ranks(float("nan")))
    assert round_ranks(np.array([1.23456789])) == [1.23457]
    rounded = round_ranks(torch.tensor([[1.23456789]]))
    assert rounded.dtype == torch.float64
    assert rounded.tolist() == [[1.23457]]
    with pytest.raises(ConfigError, match="digits"):
        round_ranks([1.0], 0)
