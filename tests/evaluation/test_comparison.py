"""Paired differences, the floor under them, and outputs that should differ and do not."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from rankkv.errors import FloorError, InputError
from rankkv.evaluation.comparison import (
    IdenticalOutputsWarning,
    check_floor,
    compare_settings,
    find_identical,
)
from rankkv.evaluation.settings import build_settings
from rankkv.evaluation.statistics import compute_mean


def make_rows(scores, higher=True, task="toy", **extra):
    return [
        {
            "task": task, "sample": f"100-{index}", "index": index, "length": 100, "seed": 0, "setting": setting,
            "metric": "recall" if higher else "loss", "higher_is_better": higher, "score": score,
            "answer_loss": 1.0 - score, "kept_tokens": 20, "full_tokens": 100, "output": str(score), **extra,
        }
        for setting, values in scores.items()
        for index, score in enumerate(values)
    ]  # fmt: skip


def test_differences_are_paired_over_contexts():
    rng = np.random.default_rng(0)
    full = rng.normal(size=30)
    uniform, own = full - 0.3 + rng.normal(0, 0.1, 30), full - 0.1 + rng.normal(0, 0.1, 30)
    rows = make_rows({"full": full, "u": uniform, "own": own})
    found = {one.setting: one for one in compare_settings(rng.permutation(rows), {"own": "u", "u": "u"})}
    assert found["own"].to_full.mean == pytest.approx((own - full).mean())
    assert found["own"].to_uniform.mean == pytest.approx((own - uniform).mean())
    assert found["own"].to_uniform.low == pytest.approx(compute_mean(own - uniform).low, abs=0.02)
    assert found["own"].to_full.high < 0.0 < found["own"].to_uniform.low
    assert (found["u"].to_uniform, found["full"].to_full) == (None, None)
    assert found["own"].kept_share == 0.2
    assert found["own"].score.samples == 30


def test_questions_of_one_context_count_as_one():
    """Two questions a context, compressed with it one by one: the interval is over contexts."""
    rows = make_rows({"full": [1.0, 0.0, 1.0]}) + make_rows({"full": [0.0, 0.0, 1.0]})
    (found,) = compare_settings(rows)
    assert found.score == compute_mean([0.5, 0.0, 1.0])


def test_other_contexts_cannot_be_paired():
    with pytest.raises(InputError, match="3 and 2 contexts, 2 of them the same"):
        compare_settings(make_rows({"x": [1, 1, 1], "full": [1, 1]}))


@pytest.mark.parametrize("higher", [True, False])
def test_floor_is_where_the_full_cache_is_no_better_than_guessing(higher):
    sign = 1.0 if higher else -1.0
    good, guess = sign * np.array([0.9, 1.0, 0.8, 1.0]), sign * np.array([0.1, 0.3, 0.2, 0.1])
    margins = check_floor(make_rows({"full": good, "blank": guess, "x": guess}, higher))
    assert margins["toy"].mean == pytest.approx(abs(good - guess).mean())
    for full, blank in ((guess, good), (guess, guess), (sign * np.array([0.5, 0.1, 0.3, 0.0]), guess)):
        with pytest.raises(FloorError, match="'toy' cannot tell"):
            check_floor(make_rows({"full": full, "blank": blank}, higher))


def test_without_a_guess_rate_something_must_be_right():
    assert check_floor(make_rows({"full": [0.0, 1.0]})) == {}
    with pytest.raises(FloorError, match="no answer at all is right"):
        check_floor(make_rows({"full": [0.0, 0.0]}))
    assert check_floor(make_rows({"full": [0.0, 0.0]}, higher=False)) == {}


def test_same_outputs_at_two_ratios_are_warned_of():
    settings, _ = build_settings([0.1, 0.2], ["snapkv"], ["default"])
    same = {name: [0.5, 0.25] for name in settings}
    rows = make_rows({"full": [0.5, 0.3], **same})
    with pytest.warns(IdenticalOutputsWarning, match="same outputs"):
        found = find_identical(rows, settings)
    assert found == [
        ("toy", f"snapkv|{strategy}|0.1", f"snapkv|{strategy}|0.2") for strategy in ("uniform", "default")
    ]
    same["snapkv|default|0.2"] = [0.5, 0.2500001]
    assert len(find_identical(make_rows(same), settings, warn=False)) == 1


def test_settings_that_never_differ_from_the_full_cache_are_warned_of():
    settings = {"half": {"compression_ratio": 0.5}, "all": {"compression_ratio": 1.0}}
    rows = make_rows({"full": [0.5], "half": [0.5], "all": [0.5]})
    assert find_identical(rows, settings, warn=False) == [("toy", "full", "half"), ("toy", "half", "all")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find_identical(make_rows({"full": [0.5], "half": [0.4]}), settings)


def test_uniform_budgets_are_always_among_the_settings():
    settings, uniform_of = build_settings([0.1, 0.3], ["snapkv", "h2o"], ["power"])
    assert set(uniform_of.values()) <= set(settings)
    assert settings["h2o|power|0.3"] == {"compression_ratio": 0.3, "selector": "h2o", "strategy": "power"}
    assert uniform_of["h2o|power|0.3"] == "h2o|uniform|0.3"
    assert len(settings) == 8
