"""RankKVPress in kvpress' own pipeline: what RankKV itself would answer, from what RankKV itself would keep."""

from __future__ import annotations

import copy
import gc
import re
import subprocess
import sys
from pathlib import Path

import oracles
import peers
import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, MistralConfig, StaticCache, pipeline

from rankkv import RankKVCache, compress
from rankkv.errors import ConfigError, InputError, UnknownNameError, UnsupportedModelError

QUESTIONS = ["What is this text about?", "Which statement is it about?", "What is this text about?"]
REMOVED = 0.6
ROOT = Path(__file__).resolve().parents[2]


def build_press(**options):
    from rankkv.integrations.kvpress import RankKVPress

    return RankKVPress(**({"compression_ratio": REMOVED} | options))


def press_prompt(model, ids, press):
    cache = DynamicCache()
    with torch.no_grad(), press(model):
        output = model(input_ids=ids, past_key_values=cache)
    assert output.past_key_values is cache
    return cache, output.logits


def continue_from(model, cache, ids, start):
    positions = torch.arange(start, start + ids.shape[1])[None]
    with torch.no_grad():
        return model(input_ids=ids, past_key_values=cache, position_ids=positions).logits


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_the_pipeline_answers_as_compress_and_generate_do(embedded, python_docs, backend):
    model, tokenizer = embedded
    context = python_docs[:1600]
    with peers.attention_backend(model, backend):
        press = build_press()
        pipe = pipeline("kv-press-text-generation", model=model, tokenizer=tokenizer)
        answers = pipe(context, questions=QUESTIONS, press=press, max_new_tokens=8)["answers"]
        inputs = pipe.preprocess(context, QUESTIONS, answer_prefix="", max_context_length=10_000)
        cache = compress(model, inputs["context_ids"], compression_ratio=1 - REMOVED, head_budgets=None)
        expected = []
        for question in inputs["questions_ids"]:
            ids = torch.cat([inputs["context_ids"], question], dim=1)
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=cache.copy(),
                max_new_tokens=8,
                do_sample=False,
            )
            expected.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    assert answers == expected
    assert press.budgets == cache.budgets
    assert press.layer_ranks == pytest.approx(cache.layer_ranks)
    assert len(set(press.budgets)) > 5


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("family", peers.TINY_FAMILIES)
def test_the_callers_cache_holds_what_a_rankkv_cache_keeps(family, backend):
    model, ids = peers.build_tiny(family), oracles.random_prompt(120)
    model.set_attn_implementation(backend)
    cache, logits = press_prompt(model, ids, build_press(min_budget=8))
    mine = RankKVCache(model, compression_ratio=1 - REMOVED, min_budget=8, head_budgets=None)
    assert oracles.forward(model, mine, ids).equal(logits)
    lengths = [cache.get_seq_length(layer) for layer in range(3)]
    assert lengths == mine.kept_lengths
    assert len(set(lengths)) > 1
    assert sum(lengths) == round((1 - REMOVED) * 120 * 3)
    for layer, own in zip(cache.layers, mine.layers, strict=True):
        assert layer.keys.equal(own.keys)
        assert layer.values.equal(own.values)
        # Nothing of the evicted tokens is held behind the tensors.
        assert layer.keys.untyped_storage().nbytes() == layer.keys.nbytes

    turn, step = oracles.random_prompt(5, seed=1), oracles.random_prompt(1, seed=2)
    first = continue_from(model, cache, turn, 120)
    torch.testing.assert_close(first, continue_from(model, mine, turn, 120))
    torch.testing.assert_close(continue_from(model, cache, step, 125), continue_from(model, mine, step, 125))
    # As the pipeline takes an answer back.
    for layer, length in zip(cache.layers, lengths, strict=True):
        layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
    assert continue_from(model, cache, turn, 120).equal(first)


def test_generate_under_the_press_is_generate_on_a_rankkv_cache():
    model, ids = peers.build_tiny("llama"), oracles.random_prompt(120)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    with build_press()(model):
        text = model.generate(ids, past_key_values=DynamicCache(), **options)
    mine = RankKVCache(model, compression_ratio=1 - REMOVED, head_budgets=None)
    assert text.equal(model.generate(ids, past_key_values=mine, **options))


def test_a_cache_made_by_the_model_is_compressed_and_none_is_made_where_none_is_wanted():
    model, ids, press = peers.build_tiny("llama"), oracles.random_prompt(120), build_press()
    with torch.no_grad(), press(model):
        cache = model(input_ids=ids).past_key_values
        assert model(input_ids=ids, use_cache=False).past_key_values is None
        as_tuple = model.model(input_ids=ids, return_dict=False)
    assert [cache.get_seq_length(layer) for layer in range(3)] == press.budgets
    assert any(isinstance(item, DynamicCache) for item in as_tuple)
    assert not any(isinstance(item, RankKVCache) for item in as_tuple)


def test_outside_the_context_nothing_is_compressed():
    model, ids = peers.build_tiny("llama"), oracles.random_prompt(60)
    with build_press()(model):
        pass
    cache = DynamicCache()
    oracles.forward(model, cache, ids)
    assert [cache.get_seq_length(layer) for layer in range(3)] == [60] * 3


def test_a_copy_outlives_the_cache_it_was_made_from():
    model, ids = peers.build_tiny("llama"), oracles.random_prompt(120)
    cache, _ = press_prompt(model, ids, build_press(min_budget=8))
    turn = oracles.random_prompt(5, seed=1)
    copied = copy.deepcopy(cache)
    expected = continue_from(model, cache, turn, 120)
    del cache
    gc.collect()
    assert continue_from(model, copied, turn, 120).equal(expected)


def test_the_ratio_is_the_fraction_removed_and_may_change_between_runs():
    """Evaluation programs build a press once and then set its ratio."""
    model, ids, press = peers.build_tiny("llama"), oracles.random_prompt(120), build_press()
    for removed in (0.0, 0.25, 0.75):
        press.compression_ratio = removed
        press_prompt(model, ids, press)
        assert sum(press.budgets) == round((1 - removed) * 120 * 3)
    for value in (1.0, -0.1, True, "0.5"):
        press.compression_ratio = value
        with pytest.raises(ConfigError, match="fraction of the cache that is removed"):
            press_prompt(model, ids, press)


@pytest.mark.parametrize("selector", ["streaming_llm", "h2o", "knorm"])
def test_any_selector_and_strategy(selector):
    model, ids = peers.build_tiny("llama"), oracles.random_prompt(120)
    press = build_press(selector=selector, strategy="pyramid", min_budget=8)
    cache, _ = press_prompt(model, ids, press)
    mine = RankKVCache(model, 1 - REMOVED, selector=selector, strategy="pyramid", min_budget=8)
    oracles.forward(model, mine, ids)
    for layer, own in zip(cache.layers, mine.layers, strict=True):
        assert layer.keys.equal(own.keys)


def test_a_wrong_name_is_told_before_any_model_runs():
    model = peers.build_tiny("llama")
    with pytest.raises(UnknownNameError, match="did you mean 'snapkv'"):
        press_prompt(model, oracles.random_prompt(60), build_press(selector="snapvk"))


def test_what_cannot_be_right_is_refused_by_name():
    import kvpress

    model, ids, press = peers.build_tiny("llama"), oracles.random_prompt(120), build_press()
    padded = torch.ones_like(ids).index_fill(1, torch.tensor([0]), 0)
    with press(model), torch.no_grad():
        with pytest.raises(InputError, match="without padding"):
            model(input_ids=ids, attention_mask=padded, past_key_values=DynamicCache())
        with pytest.raises(InputError, match="got StaticCache"):
            model(input_ids=ids, past_key_values=StaticCache(model.config, max_cache_len=200))
        with pytest.raises(InputError, match="needs no press"):
            model(input_ids=ids, past_key_values=RankKVCache(model))
    with pytest.raises(ConfigError, match="all layers together"):
        press_prompt(model, ids, kvpress.ComposedPress([build_press()]))
    config = MistralConfig(**peers.TINY_SHAPE, sliding_window=32)
    sliding = AutoModelForCausalLM.from_config(config)
    with (
        pytest.warns(UserWarning, match="no layer"),
        pytest.raises(UnsupportedModelError, match="full-attention"),
    ):
        press_prompt(sliding, ids, press)
    # And after any of it, a good prompt goes through.
    assert press_prompt(model, ids, press)[0].get_seq_length() == press.budgets[0]


def test_rows_that_keep_different_numbers_are_refused_and_equal_ones_kept():
    model = peers.build_tiny("llama")
    ids = torch.cat([oracles.random_prompt(120), oracles.random_prompt(120, seed=5)])
    with pytest.raises(InputError, match="one prompt at a time"):
        press_prompt(model, ids, build_press(min_budget=8))
    cache, _ = press_prompt(model, ids, build_press(strategy="uniform"))
    turn = torch.cat([oracles.random_prompt(5, seed=1)] * 2)
    both = continue_from(model, cache, turn, 120)
    for row in range(2):
        alone, _ = press_prompt(model, ids[row : row + 1], build_press(strategy="uniform"))
        torch.testing.assert_close(both[row : row + 1], continue_from(model, alone, turn[:1], 120))


def test_it_is_a_press_and_importing_the_module_alone_imports_nothing_of_kvpress():
    import kvpress

    assert isinstance(build_press(), kvpress.BasePress)
    program = "import sys, rankkv.integrations.kvpress; sys.exit('kvpress' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_the_example_of_the_docs_runs(embedded, python_docs, capsys):
    name = "docs/kvpress.md"
    (program,) = re.findall(r"^```py\n(.*?)^```$", (ROOT / name).read_text(encoding="utf-8"), re.M | re.S)
    model, tokenizer = embedded
    namespace = {"model": model, "tokenizer": tokenizer, "text": python_docs[:1200]}
    exec(compile(program, name, "exec"), namespace)
    assert capsys.readouterr().out.strip()
    assert len(set(namespace["press"].budgets)) > 5
