"""A real model and real text: SmolLM2-135M-Instruct and the language reference that every Python carries."""

from __future__ import annotations

import oracles
import pytest
import torch

from rankkv import RankKVAnalyzer, RankKVCache, compress

LAYERS, KV_HEADS, HEAD_DIM = 30, 3, 64


@pytest.fixture(scope="module")
def model(embedded):
    return embedded[0]


@pytest.fixture(scope="module")
def prompts(embedded, python_docs):
    """Two stretches of text, 400 and 230 tokens."""
    ids = embedded[1](python_docs[:12_000], return_tensors="pt")["input_ids"]
    return ids[:, :400], ids[:, 1000:1230]


def test_everything_kept_changes_no_token(model, prompts):
    oracles.assert_identity(model, prompts[0], new_tokens=16, compression_ratio=1.0)


@pytest.mark.parametrize("selector", oracles.ONE_PASS)
def test_budgets_bytes_and_first_token(model, prompts, selector):
    prompt = prompts[0]
    cache = RankKVCache(model, compression_ratio=0.3, selector=selector)
    text = oracles.generate(model, prompt, cache, new_tokens=4)
    assert text[0, 0] == oracles.generate(model, prompt, None, new_tokens=1)[0, 0]
    assert sum(cache.budgets) == round(0.3 * 400 * LAYERS)
    assert len(set(cache.budgets)) > LAYERS // 3
    assert cache.kept_lengths == [budget + 3 for budget in cache.budgets]
    resting = cache.copy()
    oracles.assert_bytes_match(resting)
    assert resting.cache_bytes() == 2 * sum(cache.kept_lengths) * KV_HEADS * HEAD_DIM * 4
    assert cache.full_cache_bytes() == 2 * 403 * LAYERS * KV_HEADS * HEAD_DIM * 4


def test_ranks_differ_by_layer_and_are_those_of_the_analyzer(model, prompts):
    cache = compress(model, prompts[0], selector="snapkv")
    assert all(1.0 <= rank <= 32.0 for rank in cache.layer_ranks)
    assert max(cache.layer_ranks) > 1.2 * min(cache.layer_ranks)
    result = RankKVAnalyzer(model).analyze(prompts[0])
    assert result.layer_ranks == cache.layer_ranks


def test_rows_of_a_padded_batch(model, prompts):
    oracles.assert_batch_invariant(model, prompts, new_tokens=6)


def test_decoding_equals_the_masked_full_cache(model, prompts):
    ids, mask = oracles.left_pad(prompts)
    cache = oracles.prefill(model, ids, mask, compression_ratio=0.3)
    # Logits of a real model are some ten times those of a tiny one.
    oracles.assert_equals_masked_oracle(model, cache, ids, mask, oracles.next_chunks(2, (1, 4)), atol=2e-3)


def test_one_context_two_questions(model, embedded, python_docs):
    tokenizer = embedded[1]
    context = tokenizer(python_docs[:1500], return_tensors="pt")["input_ids"]
    cache = compress(model, context, compression_ratio=0.5)
    answers = []
    for question in ("What is this text about?", "Name one keyword.", "What is this text about?"):
        ids = torch.cat([context, tokenizer(question, return_tensors="pt")["input_ids"]], dim=-1)
        answers.append(oracles.generate(model, ids, cache.copy(), new_tokens=6).tolist())
    assert answers[0] == answers[2]
    assert cache.seen_tokens == context.shape[1]


@pytest.mark.slow
def test_eight_thousand_tokens_in_every_scope(model, embedded, python_docs):
    ids = embedded[1](python_docs, return_tensors="pt", truncation=True, max_length=8192)["input_ids"]
    assert ids.shape[1] == 8192
    for scope in ("evictable", "full"):
        result = RankKVAnalyzer(model, scope=scope).analyze(ids, compression_ratio=0.1)
        assert result.seq_len == 8192
        assert sum(result.budgets) == round(0.1 * 8192 * LAYERS)
