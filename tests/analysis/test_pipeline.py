"""Analyzing a prompt without compressing anything."""

from __future__ import annotations

import gc
import json

import oracles
import pytest
import torch

from rankkv import RankKVAnalyzer, RankKVCache, RankKVResult, analyze_attention_ranks, quick_analyze
from rankkv.budget_allocation import STRATEGIES
from rankkv.errors import BudgetError, ConfigError, InputError, UnknownNameError

PROMPT = oracles.random_prompt(90, seed=1)


@pytest.fixture(scope="module", params=["llama-sdpa", "neox-eager"])
def model(request, tiny_llama, tiny_neox):
    family, backend = request.param.split("-")
    return {"llama": tiny_llama, "neox": tiny_neox}[family](attn_implementation=backend)


@pytest.fixture(scope="module")
def llama(tiny_llama):
    return tiny_llama()


@pytest.mark.parametrize("aggregation", ["mean", "concat", "per_head"])
@pytest.mark.parametrize("scope", ["full", "window", "evictable"])
def test_ranks_are_those_of_the_models_attention(model, scope, aggregation):
    result = RankKVAnalyzer(model, scope=scope, aggregation=aggregation).analyze(PROMPT)
    expected = analyze_attention_ranks(oracles.eager_attentions(model, PROMPT), aggregation, scope=scope)
    assert result.layer_ranks == pytest.approx(expected.layer_ranks, rel=1e-4)
    assert (result.scope, result.aggregation) == (scope, aggregation)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_budgets_are_those_of_a_cache_with_the_same_options(model, strategy):
    result = RankKVAnalyzer(model, strategy=strategy).analyze(PROMPT, compression_ratio=0.4)
    cache = oracles.prefill(model, PROMPT, compression_ratio=0.4, strategy=strategy, head_budgets=None)
    assert result.budgets == cache.budgets
    assert result.layer_indices == cache.layer_indices
    assert sum(result.budgets) == result.total_budget == round(0.4 * 90 * 3)
    # A cache asks no rank of a strategy that needs none.
    assert cache.layer_ranks in (result.layer_ranks, [])


def test_result_says_what_was_analyzed(model):
    result = RankKVAnalyzer(model, "my model", strategy_options={}).analyze(PROMPT, compression_ratio=0.5)
    assert isinstance(result, RankKVResult)
    assert (result.seq_len, result.compression_ratio, result.strategy) == (90, 0.5, "proportional")
    assert result.model_name == "my model"
    text = result.summary()
    assert "my model: 90 tokens, 3 layers" in text
    for layer_idx, budget in zip(result.layer_indices, result.budgets, strict=True):
        line = next(line for line in text.splitlines() if f"layer {layer_idx:3d}" in line)
        assert str(budget) in line
        assert "#" in line
    longest = max(text.splitlines(), key=lambda line: line.count("#"))
    assert str(max(result.budgets)) in longest


def test_default_name_is_the_models(llama):
    assert RankKVAnalyzer(llama).model_name == "LlamaForCausalLM"


def test_quick_analyze(model):
    budgets, ranks = quick_analyze(model, PROMPT, compression_ratio=0.4, strategy="power")
    result = RankKVAnalyzer(model, strategy="power").analyze(PROMPT, compression_ratio=0.4)
    assert (budgets, ranks) == (result.budgets, result.layer_ranks)
    assert all(type(budget) is int for budget in budgets)
    assert all(type(rank) is float for rank in ranks)


@pytest.mark.parametrize("length", [1, 2, 5, 16])
def test_a_short_prompt_is_kept_whole(model, length):
    result = RankKVAnalyzer(model).analyze(PROMPT[:, :length], compression_ratio=0.3)
    assert result.budgets == [length] * 3
    assert result.layer_ranks == [0.0] * 3
    assert result.seq_len == length
    # Raised to the floor, and said.
    assert result.compression_ratio == 1.0
    assert any("the floor is" in note for note in result.notes)
    assert "the floor is" in result.summary()


def test_padding_is_not_analyzed(model):
    ids, mask = oracles.left_pad([PROMPT, oracles.random_prompt(55, seed=2)])
    padded = RankKVAnalyzer(model).analyze(ids[1:], mask[1:])
    alone = RankKVAnalyzer(model).analyze(oracles.random_prompt(55, seed=2))
    assert padded.seq_len == 55
    assert padded.budgets == alone.budgets
    assert padded.layer_ranks == pytest.approx(alone.layer_ranks, rel=1e-5)


def test_total_budget_overrides_the_ratio(llama):
    analyzer = RankKVAnalyzer(llama)
    result = analyzer.analyze(PROMPT, total_budget=100)
    assert sum(result.budgets) == result.total_budget == 100
    assert result.compression_ratio == pytest.approx(100 / 270)
    with pytest.raises(BudgetError, match=r"total_budget=47 .*floor of 16 .*total_budget=48"):
        analyzer.analyze(PROMPT, total_budget=47)


def test_a_batch_an_empty_prompt_and_wrong_options_are_named(llama):
    analyzer = RankKVAnalyzer(llama)
    with pytest.raises(InputError, match="one prompt, got a batch of 2"):
        analyzer.analyze(torch.cat([PROMPT, PROMPT]))
    with pytest.raises(InputError, match="the prompt is empty"):
        analyzer.analyze(PROMPT[:, :0])
    with pytest.raises(ConfigError, match=r"compression_ratio=0 is outside"):
        analyzer.analyze(PROMPT, compression_ratio=0)
    with pytest.raises(UnknownNameError, match="did you mean 'proportional'"):
        RankKVAnalyzer(llama, strategy="proportionate")
    with pytest.raises(UnknownNameError, match="did you mean 'concat'"):
        RankKVAnalyzer(llama, aggregation="concatenate")


def test_compare_with_baselines(model):
    analyzer = RankKVAnalyzer(model, strategy="power", strategy_options={"exponent": 3})
    rows = analyzer.compare_with_baselines(PROMPT, compression_ratio=0.4)
    assert list(rows) == ["rankkv", "uniform", "pyramid"]
    assert {sum(row.budgets) for row in rows.values()} == {108}
    assert rows["rankkv"].budgets == analyzer.analyze(PROMPT, compression_ratio=0.4).budgets
    assert rows["uniform"].budgets == [36, 36, 36]
    assert rows["pyramid"].budgets == sorted(rows["pyramid"].budgets, reverse=True)
    assert rows["pyramid"].budgets[0] > rows["pyramid"].budgets[-1]
    more = analyzer.compare_with_baselines(PROMPT, total_budget=120, baselines=("inverse", "random"))
    assert list(more) == ["rankkv", "inverse", "random"]
    assert {sum(row.budgets) for row in more.values()} == {120}
    with pytest.raises(UnknownNameError):
        analyzer.compare_with_baselines(PROMPT, baselines=("piramid",))


def test_saving(llama, tmp_path):
    result = RankKVAnalyzer(llama).analyze(PROMPT)
    path = result.save(tmp_path / "deep" / "result.json")
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record == json.loads(json.dumps(result.to_dict()))
    assert RankKVResult(**record).summary() == result.summary()
    assert [entry.name for entry in path.parent.iterdir()] == ["result.json"]


def test_layers_are_reported_as_they_come(llama):
    reported = []
    RankKVAnalyzer(llama).analyze(PROMPT, on_layer=lambda done, total: reported.append((done, total)))
    assert reported == [(1, 3), (2, 3), (3, 3)]


def test_no_layers_keys_or_attention_outlive_it(tiny_llama):
    # One layer at a time: after layer 1 nothing of layer 0 is left.
    model = tiny_llama(6)
    length = 301  # A length that no weight has.
    held = []

    def count(done, total):
        gc.collect()
        held.append(
            sum(
                tensor.numel()
                for tensor in gc.get_objects()
                if type(tensor) is torch.Tensor and tensor.dim() == 4 and length in tensor.shape
            )
        )

    RankKVAnalyzer(model).analyze(oracles.random_prompt(length), on_layer=count)
    assert len(held) == 6
    assert max(held) <= held[0]


def test_analyzing_leaves_the_model_and_later_caches_alone(model):
    expected = oracles.generate(model, PROMPT, RankKVCache(model))
    first = RankKVAnalyzer(model).analyze(PROMPT)
    assert torch.equal(oracles.generate(model, PROMPT, RankKVCache(model)), expected)
    RankKVAnalyzer(model).analyze(oracles.random_prompt(40, seed=5))
    assert RankKVAnalyzer(model).analyze(PROMPT) == first
