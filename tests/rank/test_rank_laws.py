"""Laws of the effective rank: what must not change it, and what it is where the answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankkv.rank_analysis import (
    AGGREGATIONS,
    compute_aggregated_rank,
    compute_effective_rank,
    compute_effective_ranks,
    compute_gram,
    compute_joint_gram,
    compute_rank_from_gram,
    round_ranks,
)

SIDES = st.integers(1, 24)
SEEDS = st.integers(0, 2**32 - 1)


def random_matrix(seed, rows, columns, decay=1.0):
    """Gaussian factors around singular values that fall off like ``i ** -decay``."""
    generator = torch.Generator().manual_seed(seed)
    inner = min(rows, columns)
    values = torch.arange(1, inner + 1, dtype=torch.float64) ** -decay
    left = torch.randn(rows, inner, generator=generator, dtype=torch.float64)
    return (left * values) @ torch.randn(inner, columns, generator=generator, dtype=torch.float64)


def random_attention(seed, batch, heads, queries, keys, sharpness=2.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, heads, queries, keys, generator=generator) * sharpness).softmax(-1)


def reference_rank(matrix):
    """Numpy's SVD and scipy's entropy, written without the module under test."""
    singular = np.linalg.svd(np.asarray(matrix, dtype=np.float64), compute_uv=False)
    return float(np.exp(scipy.stats.entropy(singular)))


matrices = st.builds(random_matrix, SEEDS, SIDES, SIDES, st.floats(0.0, 4.0))
attentions = st.builds(
    random_attention,
    SEEDS,
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 12),
    st.integers(12, 60),
    st.floats(0.1, 6.0),
)


@given(matrices)
def test_rank_equals_numpy_svd_and_scipy_entropy(matrix):
    assert compute_effective_rank(matrix) == pytest.approx(reference_rank(matrix), rel=1e-9)


@given(matrices)
def test_rank_lies_between_one_and_the_smaller_side(matrix):
    rank = compute_effective_rank(matrix)
    assert 1.0 <= rank <= min(matrix.shape)
    assert compute_effective_rank(matrix, normalize=True) == pytest.approx(
        rank / min(matrix.shape), rel=1e-12
    )


@given(matrices, st.floats(-280, 280), st.sampled_from([-1.0, 1.0]))
def test_rank_ignores_scale(matrix, exponent, sign):
    scaled = matrix * (sign * 10.0**exponent)
    assert compute_effective_rank(scaled) == pytest.approx(compute_effective_rank(matrix), rel=1e-9)


@given(matrices, SEEDS)
def test_rank_ignores_rotation(matrix, seed):
    generator = torch.Generator().manual_seed(seed)
    rows, columns = matrix.shape
    left, _ = torch.linalg.qr(torch.randn(rows, rows, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(columns, columns, generator=generator, dtype=torch.float64))
    assert compute_effective_rank(left @ matrix @ right) == pytest.approx(
        compute_effective_rank(matrix), rel=1e-9
    )


@given(matrices, SEEDS)
def test_rank_ignores_transposition_and_permutation(matrix, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(matrix.shape[0], generator=generator)
    columns = torch.randperm(matrix.shape[1], generator=generator)
    expected = pytest.approx(compute_effective_rank(matrix), rel=1e-9)
    assert compute_effective_rank(matrix.T) == expected
    assert compute_effective_rank(matrix[rows][:, columns]) == expected


@given(matrices, st.integers(1, 10), st.integers(1, 10))
def test_zero_rows_and_columns_add_nothing(matrix, rows, columns):
    padded = torch.nn.functional.pad(matrix, (0, columns, rows, 0))
    assert compute_effective_rank(padded) == pytest.approx(compute_effective_rank(matrix), rel=1e-9)


@given(st.integers(1, 64))
def test_identity_has_full_rank(side):
    assert compute_effective_rank(torch.eye(side)) == pytest.approx(side, rel=1e-12)
    assert 1.0 <= compute_effective_rank(torch.eye(side)) <= side
    assert compute_effective_rank(torch.eye(side), normalize=True) == pytest.approx(1.0, rel=1e-12)


@given(SEEDS, SIDES, SIDES)
def test_an_outer_product_has_rank_one(seed, rows, columns):
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, generator=generator, dtype=torch.float64)
    right = torch.randn(columns, generator=generator, dtype=torch.float64)
    matrix = torch.outer(left, right)
    assert compute_effective_rank(matrix) == pytest.approx(1.0, abs=1e-9)
    assert float(compute_rank_from_gram(compute_gram(matrix))) == pytest.approx(1.0, abs=1e-6)


@given(matrices, st.sampled_from([torch.bfloat16, torch.float16]))
def test_half_precision_has_exactly_the_rank_of_its_upcast(matrix, dtype):
    half = matrix.to(dtype)
    assert compute_effective_rank(half) == compute_effective_rank(half.float())
    window = half[None, None]
    for aggregation in AGGREGATIONS:
        ranks, _ = compute_aggregated_rank(window.abs(), aggregation)
        upcast, _ = compute_aggregated_rank(window.abs().float(), aggregation)
        assert ranks.tolist() == upcast.tolist()


@given(st.lists(SEEDS, min_size=1, max_size=4), SIDES, SIDES)
def test_a_batch_has_the_ranks_of_its_matrices(seeds, rows, columns):
    alone = [random_matrix(seed, rows, columns) for seed in seeds]
    ranks = compute_effective_ranks(torch.stack(alone)[None])
    assert ranks.shape == (1, len(seeds))
    assert ranks[0].tolist() == pytest.approx([compute_effective_rank(matrix) for matrix in alone], rel=1e-12)


@given(st.builds(random_matrix, SEEDS, SIDES, SIDES, st.floats(0.0, 3.0)))
def test_the_gram_matrix_has_the_rank_of_the_matrix(matrix):
    rank = float(compute_rank_from_gram(compute_gram(matrix)))
    assert rank == pytest.approx(reference_rank(matrix), rel=1e-5)


@given(attentions)
def test_concat_is_the_rank_of_the_heads_side_by_side(attention):
    ranks, per_head = compute_aggregated_rank(attention, "concat")
    assert per_head is None
    for row, rank in zip(attention, ranks.tolist(), strict=True):
        assert rank == pytest.approx(reference_rank(np.concatenate(list(row.numpy()), axis=1)), rel=1e-5)


@given(attentions)
def test_mean_and_mass_normalized_rank_the_averaged_map(attention):
    # Scaling the heads apart tells the two averages from each other.
    gains = torch.linspace(0.1, 1.0, attention.shape[1])[:, None, None]
    unequal = (attention * gains)[..., 3:-2]
    mean, _ = compute_aggregated_rank(unequal, "mean")
    normalized, _ = compute_aggregated_rank(unequal, "mass_normalized")
    for i, row in enumerate(unequal.numpy().astype(np.float64)):
        assert float(mean[i]) == pytest.approx(reference_rank(row.mean(0)), rel=1e-5)
        masses = row.sum((1, 2), keepdims=True)
        assert float(normalized[i]) == pytest.approx(reference_rank((row / masses).mean(0)), rel=1e-5)


@given(attentions)
def test_reductions_over_heads_agree_with_each_head_alone(attention):
    reductions = {"per_head": np.mean, "median": np.median, "max": np.max, "min": np.min}
    for aggregation, reduce in reductions.items():
        ranks, per_head = compute_aggregated_rank(attention, aggregation)
        alone = np.array([[reference_rank(head) for head in row] for row in attention.numpy()])
        np.testing.assert_allclose(per_head.numpy(), alone, rtol=1e-5)
        np.testing.assert_allclose(ranks.numpy(), reduce(alone, axis=1), rtol=1e-5)


@given(attentions, st.data())
def test_the_joint_gram_is_additive_over_heads_and_keys(attention, data):
    whole = compute_joint_gram(attention, "concat")
    key = data.draw(st.integers(0, attention.shape[-1]))
    by_keys = compute_joint_gram(attention[..., :key]) + compute_joint_gram(attention[..., key:])
    by_heads = sum(compute_joint_gram(attention[:, h : h + 1]) for h in range(attention.shape[1]))
    torch.testing.assert_close(by_keys, whole, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(by_heads, whole, rtol=1e-12, atol=1e-14)


@given(attentions, st.integers(1, 20), st.sampled_from(sorted(AGGREGATIONS)))
def test_zeroed_padding_columns_change_nothing(attention, padding, aggregation):
    padded = torch.nn.functional.pad(attention, (padding, 0))
    ranks, _ = compute_aggregated_rank(attention, aggregation)
    with_padding, _ = compute_aggregated_rank(padded, aggregation)
    torch.testing.assert_close(with_padding, ranks, rtol=1e-6, atol=0)


@given(attentions, st.sampled_from(sorted(AGGREGATIONS)), st.sampled_from([float("nan"), float("inf")]))
def test_a_spoilt_row_leaves_the_other_rows_alone(attention, aggregation, bad):
    attention = torch.cat([attention, attention[:1].flip(-1)])
    ranks, _ = compute_aggregated_rank(attention, aggregation)
    spoilt = attention.clone()
    spoilt[0, -1, -1, 5] = bad
    got, _ = compute_aggregated_rank(spoilt, aggregation)
    assert torch.isnan(got[0])
    torch.testing.assert_close(got[1:], ranks[1:], rtol=1e-9, atol=0)


@given(st.lists(st.floats(1e-3, 1e5), min_size=1, max_size=8), st.integers(1, 10))
def test_rounding_keeps_the_digits_and_is_idempotent(ranks, digits):
    rounded = round_ranks(ranks, digits)
    assert rounded == pytest.approx(ranks, rel=0.5001 * 10.0 ** (1 - digits))
    assert round_ranks(rounded, digits) == rounded
    assert round_ranks(torch.tensor(ranks, dtype=torch.float64), digits).tolist() == rounded
