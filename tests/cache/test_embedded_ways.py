"""A real model and real text: turns, batches, beams, drafts, and two thousand tokens in constant memory."""

from __future__ import annotations

import copy
import itertools

import oracles
import pytest
import torch
from transformers import pipeline

from rankkv import RankKVCache
from rankkv.models.compat import cache_argument

QUESTIONS = (
    "What is a lambda expression?",
    "And what does a generator function return?",
    "Which of the two would you use to sort a list by its second entry?",
)


@pytest.fixture(scope="module")
def model(embedded):
    return embedded[0]


@pytest.fixture(scope="module")
def tokenizer(embedded):
    return embedded[1]


@pytest.fixture(scope="module")
def prompts(tokenizer, python_docs):
    """Four pieces of the language reference, 200 to 40 tokens."""
    pieces = []
    for start, tokens in ((1000, 200), (9000, 120), (17000, 80), (25000, 40)):
        ids = tokenizer(python_docs[start : start + 3000], return_tensors="pt").input_ids
        pieces.append(ids[:, :tokens])
    return pieces


def assert_in_order(cache):
    for layer_idx in cache.layer_indices:
        for heads in oracles.kept_positions(cache, layer_idx):
            for head in heads:
                assert all(a < b for a, b in itertools.pairwise(head))
                assert head[-1] == cache.seen_tokens - 1


@pytest.mark.parametrize(
    "options",
    [{}, {"recompress_turns": True}, {"decode": "bounded", "selector": "h2o"}],
    ids=["grow", "recompress", "bounded"],
)
def test_a_chat_of_three_turns(model, tokenizer, python_docs, options):
    cache = RankKVCache(model, budget=64, **options)
    messages = [{"role": "system", "content": "You answer from this text:\n" + python_docs[1000:1700]}]
    kept = []
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question + " " + python_docs[3000:3400]})
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = ids["input_ids"]
        assert ids.shape[1] > cache.seen_tokens + 64
        answer = oracles.generate(model, ids, cache, 8)
        if not kept:
            assert answer[0, 0] == oracles.generate(model, ids, None, 1)[0, 0]
        assert cache.seen_tokens == ids.shape[1] + 7
        assert_in_order(cache)
        kept.append(sum(cache.kept_lengths))
        messages.append(
            {"role": "assistant", "content": tokenizer.decode(answer[0], skip_special_tokens=True)}
        )
    logits = oracles.feed(model, cache, [answer[:, -1:]])[0]
    assert torch.isfinite(logits).all()
    layers = len(cache.layers)
    if options.get("decode") == "bounded":
        assert kept == [64 * layers] * 3
    elif options:
        assert kept[2] < 0.6 * cache.seen_tokens * layers


def test_rows_of_a_batch_equal_the_rows_alone(model, prompts):
    oracles.assert_batch_invariant(model, prompts, new_tokens=4, compression_ratio=0.3)


def test_beams(model, prompts):
    ids, mask = oracles.left_pad(prompts[1:3])
    cache = RankKVCache(model, compression_ratio=0.3)
    text = oracles.generate(model, ids, cache, 8, mask, num_beams=4)
    assert text.shape == (2, 8)
    # Four beams of each row, all with the budgets of their row.
    assert len(cache.budgets_per_row) == 8
    assert cache.budgets_per_row[0] == cache.budgets_per_row[3] != cache.budgets_per_row[4]
    plain = oracles.generate(model, prompts[2], None, 8, num_beams=4)
    assert torch.equal(oracles.generate(model, prompts[2], RankKVCache(model, 1.0), 8, num_beams=4), plain)


def test_assisted_by_itself(model, prompts):
    prompt = prompts[1]
    plain = oracles.generate(model, prompt, None, 16)
    assistant = {"assistant_model": copy.copy(model)}
    assert torch.equal(oracles.generate(model, prompt, RankKVCache(model, 1.0), 16, **assistant), plain)
    cache = RankKVCache(model, compression_ratio=0.3)
    text = oracles.generate(model, prompt, cache, 16, **assistant)
    assert text[0, 0] == plain[0, 0]
    # What follows the first judged draft is what the full cache gives with the evicted tokens masked.
    ids, at = torch.cat([prompt, text], dim=-1), cache.layers[0].compressed_at
    copied, full = oracles.masked_oracle(model, cache, ids[:, :at])
    expected = oracles.feed(copied, full, [ids[:, at:-1]])[0].argmax(-1)
    assert torch.equal(ids[:, at + 1 :], expected)
    assert_in_order(cache)


@pytest.mark.parametrize(
    "options", [{"compression_ratio": 1.0}, {"budget": 40, "decode": "bounded"}], ids=str
)
def test_text_generation_pipeline(model, tokenizer, options):
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    settings = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    prompt = "A list of words: " + "apple, pear, plum, " * 12
    cache = RankKVCache(model, **options)
    text = pipe(prompt, **settings, **cache_argument(cache))[0]["generated_text"]
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    direct = oracles.generate(model, ids, RankKVCache(model, **options), 6)
    assert text == tokenizer.decode(direct[0], skip_special_tokens=True)
    assert cache.seen_tokens == ids.shape[1] + 5


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"selector": "h2o"}, {"selector": "streaming_llm", "positions": "packed"}], ids=str
)
def test_two_thousand_tokens_in_constant_memory(model, prompts, options):
    cache = RankKVCache(model, budget=128, decode="bounded", **options)
    token = oracles.forward(model, cache, prompts[0])[:, -1:].argmax(-1)
    budgets, slot_bytes = cache.budgets, cache.cache_bytes() // sum(cache.kept_lengths)
    assert sum(budgets) == 128 * len(cache.layers)
    for step in range(2000):
        logits = oracles.forward(model, cache, token)
        token = logits[:, -1:].argmax(-1)
        if step % 100 == 99:
            assert torch.isfinite(logits).all()
            # A layer whose budget is larger than the prompt grows to it, and then stays there.
            assert cache.kept_lengths == [min(budget, cache.seen_tokens) for budget in budgets]
            assert cache.kept_bytes() == slot_bytes * sum(cache.kept_lengths)
    assert cache.kept_lengths == budgets
    assert cache.kept_bytes() == slot_bytes * 128 * len(cache.layers)
    # Room for tokens to come: at most 64 a layer.
    assert cache.cache_bytes() <= slot_bytes * (128 + 64) * len(cache.layers)
    assert cache.seen_tokens == 2200
    assert_in_order(cache)
    oracles.assert_bytes_match(cache)
