"""A shared prefill gives the caches that separate prefills give, and a continuation's loss reads the cache."""

from __future__ import annotations

import oracles
import pytest
import torch

from rankkv import compress
from rankkv.budget_allocation import STRATEGIES
from rankkv.errors import ConfigError, InputError
from rankkv.evaluation import compute_continuation_loss, evaluate_continuation, record_prefill
from rankkv.models.compat import cache_argument
from rankkv.selection import get_selector

PROMPT, CONTINUATION = oracles.random_prompt(90, seed=5), oracles.random_prompt(12, seed=6)
OPTIONS = [
    *({"selector": name, "compression_ratio": 0.3} for name in oracles.ONE_PASS),
    *({"strategy": name, "compression_ratio": 0.4} for name in STRATEGIES if name != "profile"),
    {"scope": "full", "aggregation": "mean"},
    {"scope": "window", "window_size": 8, "sink_size": 0},
    {"budget": 30, "min_budget": 5, "storage": "int8"},
    {"decode": "bounded", "budget": 30},
    {"protect": [(10, 20)], "budget": 40},
]


@pytest.fixture(scope="module")
def model(tiny_llama):
    return tiny_llama()


@pytest.fixture(scope="module")
def record(model):
    return record_prefill(model, PROMPT)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_cut_cache_is_the_compressed_one(model, record, options):
    options = {"min_budget": 4, **options}
    alone, cut = compress(model, PROMPT, **options), record.build_cache(**options)
    assert cut.budgets == alone.budgets
    assert cut.cache_bytes() == alone.cache_bytes()
    assert oracles.kept_tokens(cut) == oracles.kept_tokens(alone)
    for expected, given in zip(
        oracles.feed(model, alone, [CONTINUATION], torch.ones_like(PROMPT)),
        oracles.feed(model, cut, [CONTINUATION], torch.ones_like(PROMPT)),
        strict=True,
    ):
        assert torch.allclose(given, expected, atol=1e-5)


def test_recalled_scores_are_those_of_the_same_options(model, record):
    """One record serves selectors that differ in an option alone, each with its own scores."""
    caches = []
    for kernel_size in (1, 21):
        options = {
            "selector": get_selector("snapkv", kernel_size=kernel_size),
            "compression_ratio": 0.3,
            "min_budget": 4,
        }
        caches.append(record.build_cache(**options))
        assert oracles.kept_tokens(caches[-1]) == oracles.kept_tokens(compress(model, PROMPT, **options))
    assert oracles.kept_tokens(caches[0]) != oracles.kept_tokens(caches[1])


def test_padded_rows_are_recorded_too(model):
    ids, mask = oracles.left_pad([PROMPT, oracles.random_prompt(50, seed=7)])
    options = {"compression_ratio": 0.4, "min_budget": 4}
    cut = record_prefill(model, ids, mask).build_cache(**options)
    assert cut.budgets_per_row == compress(model, ids, mask, **options).budgets_per_row


def test_loss_is_the_models_own_on_the_whole_text(model, record):
    """With everything kept, the loss is that of one forward over context and continuation."""
    whole = torch.cat([PROMPT, CONTINUATION], dim=-1)
    with torch.no_grad():
        logits = model(whole).logits[0, PROMPT.shape[1] : -1]
    expected = torch.nn.functional.cross_entropy(logits, CONTINUATION[0, 1:], reduction="none")
    loss = compute_continuation_loss(model, record.build_cache(compression_ratio=1.0), CONTINUATION)
    assert torch.allclose(loss, expected, atol=1e-4)


def test_a_small_cache_changes_the_score(record):
    cells = {"all": {"compression_ratio": 1.0}, "few": {"budget": 8, "min_budget": 4}}
    scores = dict(evaluate_continuation(record, CONTINUATION, cells))
    assert list(scores) == ["full", "all", "few"]
    assert scores["all"].loss == pytest.approx(scores["full"].loss, abs=1e-5)
    assert scores["all"].cache_bytes == scores["full"].cache_bytes
    assert abs(scores["all"].divergence) < 1e-5 < scores["few"].divergence
    assert scores["few"].kept_tokens == 8 * len(record.observe(32, 4))
    assert scores["few"].loss != pytest.approx(scores["full"].loss, abs=1e-5)


def test_divergence_by_hand(model, record):
    """KL(p || q) = sum p (log p - log q), averaged over the tokens that are scored."""
    options = {"budget": 12, "min_budget": 4}
    score = dict(evaluate_continuation(record, CONTINUATION, {"cell": options}))["cell"]
    with torch.no_grad():
        full = model(CONTINUATION, **cache_argument(record.build_full_cache())).logits[0].double()
        few = model(CONTINUATION, **cache_argument(record.build_cache(**options))).logits[0].double()
    expected = [
        float(sum(p * (p / q).log() for p, q in zip(a.softmax(-1), b.softmax(-1), strict=True)))
        for a, b in zip(full[:-1], few[:-1], strict=True)
    ]
    assert score.divergence == pytest.approx(sum(expected) / len(expected), rel=1e-3)


def test_refusals(model, record):
    with pytest.raises(ConfigError, match="prefill='single'"):
        record.build_cache(prefill="chunked")
    with pytest.raises(InputError, match="at least 2 tokens"):
        compute_continuation_loss(model, record.build_cache(), torch.tensor([[1]]))
