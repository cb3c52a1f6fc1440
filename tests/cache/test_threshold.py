"""Strategy `threshold`: every score that reaches it stays, and the size follows from the prompt."""

from __future__ import annotations

import oracles
import pytest

from rankkv import RankKVCache
from rankkv.errors import ConfigError
from rankkv.evaluation import record_prefill

FLOOR = 20


@pytest.fixture(scope="module")
def model(tiny_llama):
    return tiny_llama(4)


def keep(model, prompt, threshold, **options):
    options = {"selector": "echo", "strategy": "threshold", **options}
    return oracles.prefill(model, prompt, strategy_options={"threshold": threshold}, **options)


def list_scores(model, prompt):
    """Return the scores of each layer, ``[kv_head, token]``."""
    record = record_prefill(model, prompt)
    record.build_cache(compression_ratio=0.5, selector="echo")
    return [scores[0] for (stage, *_), scores in record._scores.items() if stage == "refined"]


@pytest.mark.parametrize("quantile", [0.3, 0.6, 0.9])
def test_every_score_above_the_threshold_stays_and_hardly_another(model, quantile):
    prompt = oracles.random_prompt(200)
    layers = list_scores(model, prompt)
    threshold = float(layers[1].flatten().quantile(quantile))
    cache = keep(model, prompt, threshold)
    for layer, scores in zip(cache.layer_indices, layers, strict=True):
        kept = oracles.kept_positions(cache, layer)[0]
        extra = 0
        for head, positions in enumerate(kept):
            above = set((scores[head] >= threshold).nonzero().flatten().tolist())
            assert above <= set(positions)
            assert {0, 1, 2, 3, *range(184, 200)} <= set(positions)
            extra += len(positions) - max(FLOOR, len(above | {0, 1, 2, 3, *range(184, 200)}))
        # A layer's budget is whole tokens of each head.
        assert 0 <= extra < len(kept)


def test_prompts_decide_the_size_and_a_higher_threshold_keeps_less(model):
    prompts = [oracles.random_prompt(200, seed=seed) for seed in range(3)]
    threshold = float(list_scores(model, prompts[0])[0].median())
    totals = [sum(keep(model, prompt, threshold).budgets) for prompt in prompts]
    assert len(set(totals)) > 1
    by_threshold = [
        sum(keep(model, prompts[0], factor * threshold).budgets) for factor in (0.0, 0.5, 1.0, 2.0, 1e4)
    ]
    assert by_threshold == sorted(by_threshold, reverse=True)
    assert by_threshold[0] == 200 * 4
    assert by_threshold[-1] == FLOOR * 4


def test_a_ratio_beside_a_threshold_is_an_upper_bound(model):
    prompt = oracles.random_prompt(200)
    threshold = float(list_scores(model, prompt)[0].median())
    assert sum(keep(model, prompt, threshold).budgets) > 0.25 * 200 * 4
    bounded = keep(model, prompt, threshold, compression_ratio=0.25)
    assert sum(bounded.budgets) == 50 * 4


def test_a_row_of_a_batch_keeps_what_it_keeps_alone(model):
    prompts = [oracles.random_prompt(length, seed=length) for length in (90, 140)]
    threshold = float(list_scores(model, prompts[0])[0].median())
    cache = keep(model, *oracles.left_pad(prompts)[:1], threshold, mask=oracles.left_pad(prompts)[1])
    for row, prompt in enumerate(prompts):
        assert cache.budgets_per_row[row] == keep(model, prompt, threshold).budgets


def test_equal_heads_compare_their_mean_scores(model):
    prompt = oracles.random_prompt(200)
    threshold = float(list_scores(model, prompt)[0].median())
    cache = keep(model, prompt, threshold, head_budgets=None)
    assert all(len(set(counts[0])) == 1 for counts in cache.kept_per_head)
    assert FLOOR * 4 < sum(cache.budgets) < 200 * 4


def test_wrong_thresholds_and_scores_are_refused(model):
    with pytest.raises(ConfigError, match="threshold must be a number"):
        keep(model, oracles.random_prompt(30), -1.0)
    with pytest.raises(ConfigError, match="only order the tokens of one head"):
        RankKVCache(model, selector="streaming_llm", strategy="threshold")
