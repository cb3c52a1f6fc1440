"""Intervals over texts, and the share of the cache at which a method is as good as a reference."""

from __future__ import annotations

import numpy as np
import pytest

from rankkv.errors import InputError
from rankkv.evaluation.statistics import compute_iso_quality_ratio, compute_mean, compute_ratio


def test_interval_covers_the_true_mean_as_often_as_it_says():
    """Of 200 samples of 30 normal numbers, about 95% of the intervals hold the true mean."""
    rng = np.random.default_rng(0)
    estimates = [compute_mean(rng.normal(1.0, 2.0, 30), seed=i) for i in range(200)]
    covered = sum(estimate.low <= 1.0 <= estimate.high for estimate in estimates)
    assert 178 <= covered <= 198


def test_pairing_narrows_the_interval():
    """Texts differ much more than methods do: the difference of pairs is known far better than each mean."""
    rng = np.random.default_rng(1)
    texts = rng.normal(3.0, 1.0, 40)
    a, b = texts + rng.normal(0.1, 0.02, 40), texts
    paired, single = compute_mean(a - b), compute_mean(a)
    assert paired.low > 0.0
    assert paired.high - paired.low < (single.high - single.low) / 5
    assert compute_ratio(a, b).low > 1.0


def test_same_seed_same_interval():
    values = np.random.default_rng(2).normal(size=20)
    assert compute_mean(values, seed=3) == compute_mean(values, seed=3)
    assert compute_mean(values, seed=3) != compute_mean(values, seed=4)


def test_iso_quality_on_a_curve_with_a_known_answer():
    """Excess a - b log(share) reaches the reference's excess where it is solved for."""
    shares = [0.05, 0.1, 0.2, 0.4]
    curve = {share: [-0.2 * np.log(share)] * 5 for share in shares}
    wanted = 0.13
    found = compute_iso_quality_ratio(curve, [-0.2 * np.log(wanted)] * 5)
    assert found.mean == pytest.approx(wanted)
    assert found.low == pytest.approx(wanted) == found.high


def test_iso_quality_pairs_the_texts():
    """Texts differ tenfold, but on each the method loses what the reference does at the same share: no spread."""
    difficulty = np.geomspace(0.3, 3.0, 12)
    curve = {share: -difficulty * np.log(share) for share in (0.05, 0.1, 0.2, 0.4)}
    found = compute_iso_quality_ratio(curve, -difficulty * np.log(0.13))
    assert [found.low, found.mean, found.high] == pytest.approx([0.13] * 3)


@pytest.mark.parametrize("confidence", [0.6, 0.95])
def test_all_intervals_have_the_confidence_that_they_say(confidence):
    """A ratio to 1, and the logarithm of a share on a straight curve, are means: they have a mean's interval."""
    values = np.random.default_rng(5).uniform(0.1, 0.9, 30)
    expected = compute_mean(values, confidence)
    width = expected.high - expected.low
    ratio = compute_ratio(values, np.ones(30), confidence)
    assert [ratio.low, ratio.high] == pytest.approx([expected.low, expected.high], abs=0.04 * width)
    found = compute_iso_quality_ratio({0.01: [1.0] * 30, 1.0: [0.0] * 30}, values, confidence)
    low, high = np.log([found.high, found.low]) / np.log(0.01)
    assert [low, high] == pytest.approx([expected.low, expected.high], abs=0.04 * width)


def test_iso_quality_stays_within_what_was_measured():
    curve = {0.1: [0.3, 0.31], 0.2: [0.1, 0.12]}
    assert compute_iso_quality_ratio(curve, [1.0, 1.0]).mean == pytest.approx(0.1)
    assert compute_iso_quality_ratio(curve, [0.0, 0.0]).mean == pytest.approx(0.2)


def test_refusals():
    with pytest.raises(InputError, match="no values to average"):
        compute_mean([])
    with pytest.raises(InputError, match="value 1 is not finite"):
        compute_mean([1.0, float("nan")])
    with pytest.raises(InputError, match="not positive"):
        compute_ratio([1.0], [0.0])
    with pytest.raises(InputError, match="at least two shares"):
        compute_iso_quality_ratio({0.1: [1.0]}, [1.0])
