"""A needle that the full cache finds, and what happens when the cache cannot hold it."""

from __future__ import annotations

import pytest
from forced_needle import evaluate_needle

from rankkv import load_texts
from rankkv.errors import ConfigError, InputError

#: A code right before the end is inside the newest tokens that every layer keeps; at 0.3 it is not.
CELLS = {
    "all": {"compression_ratio": 1.0},
    "newest": {"selector": "streaming_llm", "strategy": "uniform", "budget": 100, "profile": None},
}


@pytest.fixture(scope="module")
def haystack():
    return "\n\n".join(load_texts("python-docs"))[:6000]


@pytest.fixture(scope="module", params=[False, True], ids=["agnostic", "aware"])
def scores(request, embedded, haystack):
    found = evaluate_needle(
        *embedded, haystack, CELLS, lengths=[400], depths=[0.3, 1.0], question_aware=request.param
    )
    return {(score.depth, score.setting): score for score in found}


def test_full_cache_finds_what_a_blank_haystack_does_not_hold(scores):
    for depth in (0.3, 1.0):
        assert scores[depth, "full"].exact
        assert not scores[depth, "blank"].exact
        assert scores[depth, "full"].answer_loss < scores[depth, "blank"].answer_loss - 1.0


def test_everything_kept_is_the_full_cache(scores):
    for depth in (0.3, 1.0):
        assert scores[depth, "all"].exact
        assert scores[depth, "all"].answer_loss == pytest.approx(scores[depth, "full"].answer_loss, abs=1e-3)


def test_a_fact_is_found_where_it_is_kept_and_lost_where_it_is_not(scores):
    """The newest 100 tokens hold the needle at the end; that at 0.3 is gone, and guessing is what is left."""
    assert scores[1.0, "newest"].exact
    assert not scores[0.3, "newest"].exact
    assert scores[0.3, "newest"].answer_loss > scores[0.3, "full"].answer_loss + 1.0


def test_same_seed_same_needle(embedded, haystack):
    once, again = (
        list(evaluate_needle(*embedded, haystack, {}, lengths=[120], depths=[0.5])) for _ in range(2)
    )
    assert once == again
    assert [score.setting for score in once] == ["full", "blank"]


def test_refusals(embedded, haystack):
    with pytest.raises(ConfigError, match=r"depths \[1.5\]"):
        next(evaluate_needle(*embedded, haystack, {}, depths=[1.5]))
    with pytest.raises(ConfigError, match="digits=1"):
        next(evaluate_needle(*embedded, haystack, {}, digits=1))
    with pytest.raises(InputError, match="haystack of at least 9000"):
        next(evaluate_needle(*embedded, haystack, {}, lengths=[9000]))
