"""Tests that calls do not reach each other: many caches in turn, interruptions, wrong models, and eight threads."""

from __future__ import annotations

import sys
import threading

import families
import mixed_calls
import oracles
import pytest
import torch

from rankkv import RankKVCache, compress
from rankkv.errors import CacheStateError

# The hybrids are promised for the newest transformers.
pytestmark = oracles.needs_newest

HYBRIDS = ["Gemma 3", "gpt-oss", "Qwen3-Next", "Jamba", "LFM2", "Bamba"]
PROMPT, MORE = oracles.random_prompt(90, seed=1), oracles.random_prompt(4, seed=2)
ASKED = torch.cat([PROMPT, MORE], dim=1)


def build(name):
    return families.build(name, families.FAMILIES[name].backends[0])


class Stop(Exception):
    """Raised by the test inside a forward."""


def interrupt(module, call, *, after=False):
    """Run ``call`` and stop it in ``module``."""

    def stop(*arguments):
        raise Stop

    handle = module.register_forward_hook(stop) if after else module.register_forward_pre_hook(stop)
    try:
        with pytest.raises(Stop):
            call()
    finally:
        handle.remove()


# -- mixtures ---------------------------------------------------------------------------------------------------


def test_some_mixed_calls_answer_as_alone():
    report = mixed_calls.run_mixture(24, seed=11, names=["Llama", "Gemma 3", "Qwen3-Next"])
    assert not report.failures, "\n".join(report.failures)
    assert report.ran == 24
    # Each kind of call was made, and an interruption was noticed.
    assert len(report.calls) >= 6
    assert report.outcomes["an interrupted cache says so"] > 0


@pytest.mark.slow
def test_five_hundred_mixed_calls_answer_as_alone():
    report = mixed_calls.run_mixture(500, seed=0)
    print(report)
    assert not report.failures, "\n".join(report.failures)
    assert report.ran == 500
    assert len(report.families) >= 12
    assert min(report.calls.values()) >= 15
    kinds = ("KeyboardInterrupt", "OutOfMemoryError", "HookError")
    assert all(report.outcomes[f"interrupted by {kind}"] >= 15 for kind in kinds)
    assert report.outcomes["an interrupted cache says so"] >= 15


# -- what the mixtures found --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HYBRIDS)
@pytest.mark.parametrize("stage", ["prefill", "later turn"])
def test_a_hybrid_interrupted_before_its_first_full_attention_layer_says_so(name, stage):
    model = build(name)
    cache = RankKVCache(model, 0.3) if stage == "prefill" else compress(model, PROMPT, compression_ratio=0.3)
    interrupt(model.model.layers[1], lambda: oracles.generate(model, ASKED, cache))
    with pytest.raises(CacheStateError, match="earlier forward with this cache was interrupted"):
        oracles.generate(model, ASKED, cache)
    with pytest.raises(CacheStateError, match="earlier forward with this cache was interrupted"):
        cache.copy()


@pytest.mark.parametrize("name", ["Jamba", "LFM2"])
def test_a_linear_layer_interrupted_before_it_changed_its_state_says_so(name):
    """The last layer is linear: nothing behind it would show that it was not reached."""
    family = families.FAMILIES[name]
    options = dict(family.options)
    if name == "LFM2":
        options["layer_types"] = ["full_attention", "conv"] * 2
    else:
        options["attn_layer_offset"] = 0
    model = families.Family(family.model, options).build()
    cache = compress(model, PROMPT, compression_ratio=0.3)
    expected = oracles.generate(model, ASKED, cache.copy())
    oracles.generate(model, ASKED, cache, 2)
    last = model.model.layers[3]
    step = torch.cat([ASKED, expected[:, :2], MORE[:, :1]], dim=1)
    # A norm runs before the layer reads its state; the input projection of Jamba runs after that.
    module = last.operator_norm if name == "LFM2" else last.mamba.in_proj
    oracles.forward(model, cache, expected[:, 1:2])
    interrupt(module, lambda: oracles.forward(model, cache, step[:, -1:]))
    with pytest.raises(CacheStateError, match="interrupted"):
        oracles.forward(model, cache, step[:, -1:])


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_hybrid_cache_is_reset_for_another_number_of_rows(name):
    model = build(name)
    rows = oracles.random_prompt(180, seed=3).view(2, 90)
    cache = RankKVCache(model, 0.3)
    oracles.generate(model, rows, cache)
    cache.reset()
    expected = oracles.generate(model, PROMPT, RankKVCache(model, 0.3))
    assert torch.equal(oracles.generate(model, PROMPT, cache), expected)


@pytest.mark.parametrize("name", ["Qwen3-Next", "Jamba", "LFM2"])
def test_a_hybrid_given_to_another_model_is_refused_by_name_or_says_so_later(name):
    cache = compress(build(name), PROMPT, compression_ratio=0.3)
    expected = oracles.generate(build(name), ASKED, cache.copy())
    with pytest.raises(CacheStateError, match="another model uses it: layer 0"):
        oracles.generate(build("Llama"), ASKED, cache)
    assert torch.equal(oracles.generate(build(name), ASKED, cache), expected)


@pytest.mark.parametrize(
    "options", [{"head_budgets": None}, {"storage": "int8"}, {"selector": "h2o"}], ids=str
)
def test_a_refused_model_leaves_the_queries_of_a_cache_as_they_were(options):
    model, other = build("Llama"), build("Qwen2")
    cache = compress(model, PROMPT, compression_ratio=0.3, decode="periodic", decode_interval=40, **options)
    # From here on queries are stored for the next round.
    oracles.forward(model, cache, MORE)
    later = oracles.random_prompt(20, seed=5)
    expected = cache.copy()
    with pytest.raises(CacheStateError, match="another model uses it"):
        oracles.forward(other, cache, later)
    for one in (expected, cache):
        oracles.feed(model, one, [later, later, MORE])
    assert oracles.kept_tokens(cache) == oracles.kept_tokens(expected)


def test_ids_that_came_again_leave_the_cache_as_it_was():
    model = build("Llama")
    cache = compress(model, PROMPT, compression_ratio=0.3)
    expected = oracles.generate(model, ASKED, cache.copy())
    with pytest.raises(CacheStateError, match="all ids came again: an interrupted generate"):
        oracles.generate(model, PROMPT, cache)
    assert torch.equal(oracles.generate(model, ASKED, cache), expected)


def test_keys_of_other_models_are_refused_before_anything_changes():
    model = build("Llama")
    other = families.Family("LlamaForCausalLM", {**families.USUAL, "num_key_value_heads": 4}).build()
    cache = compress(model, PROMPT, compression_ratio=0.3)
    expected = oracles.generate(model, ASKED, cache.copy())
    with pytest.raises(CacheStateError, match=r"layer 0 \(HeadBudgetLayer\) cannot take new keys of shape"):
        oracles.generate(other, ASKED, cache)
    assert torch.equal(oracles.generate(model, ASKED, cache), expected)


def test_rotary_positions_of_a_call_with_more_rows_are_refused():
    model = build("Qwen2-VL")
    # Other tests share the model, which keeps the positions of its last call.
    model.model.rope_deltas = None
    cache = compress(model, PROMPT, compression_ratio=0.3)
    expected = oracles.generate(model, ASKED, cache.copy())
    oracles.generate(model, oracles.random_prompt(180, seed=3).view(2, 90), None)
    with pytest.raises(CacheStateError, match="new keys have 2 rows and the new values 1"):
        oracles.generate(model, ASKED, cache)
    assert torch.equal(oracles.generate(model, ASKED, cache.copy()), expected)


def test_a_plain_call_does_not_take_what_an_interrupted_one_announced(monkeypatch):
    model = build("Llama")
    plain = oracles.generate(model, PROMPT, None)
    cache = RankKVCache(model, 0.3)
    update = RankKVCache.update

    def stop(self, keys, values, layer_idx, *args, **kwargs):
        states = update(self, keys, values, layer_idx, *args, **kwargs)
        if layer_idx == 1:
            raise Stop
        return states

    with monkeypatch.context() as patched:
        patched.setattr(RankKVCache, "update", stop)
        with pytest.raises(Stop):
            oracles.generate(model, PROMPT, cache)
    held = [layer.seen for layer in cache.layers]
    assert torch.equal(oracles.generate(model, PROMPT, None), plain)
    assert [layer.seen for layer in cache.layers] == held
    with pytest.raises(CacheStateError, match="interrupted"):
        cache.copy()


@pytest.mark.parametrize("step", ["finish", "crop", "reorder_cache"])
def test_an_interrupted_change_of_all_layers_is_noticed(step, monkeypatch):
    model = build("Llama")
    cache = RankKVCache(model, 0.3, prefill="chunked")
    oracles.forward(model, cache, PROMPT)
    if step != "finish":
        cache.finish()
        oracles.forward(model, cache, MORE)

    def stop(*arguments, **options):
        raise Stop

    name = {"finish": "shrink", "crop": "withdraw", "reorder_cache": "reorder_cache"}[step]
    with monkeypatch.context() as patched:
        patched.setattr(type(cache.layers[1]), name, stop)
        with pytest.raises(Stop):
            getattr(cache, step)(*{"finish": (), "crop": (-2,), "reorder_cache": (torch.tensor([0]),)}[step])
    with pytest.raises(CacheStateError, match="interrupted"):
        oracles.forward(model, cache, MORE)


# -- threads --------------------------------------------------------------------------------------------------------

THREADS = 8
THREAD_OPTIONS = [
    {},
    {"head_budgets": None},
    {"decode": "bounded"},
    {"decode": "periodic", "decode_interval": 3},
    {"storage": "int8"},
    {"positions": "packed"},
    {"selector": "h2o"},
    {"prefill": "chunked"},
]


def work(model, number, rounds):
    """Return all answers of one user: a prompt, a copy with a later turn, a batch, and a call without a cache."""
    answers = []
    for turn in range(rounds):
        prompt = oracles.random_prompt(60 + 7 * number + turn, seed=100 * number + turn)
        cache = RankKVCache(model, 0.3, **THREAD_OPTIONS[(number + turn) % len(THREAD_OPTIONS)])
        first = oracles.generate(model, prompt, cache, 4)
        longer = torch.cat([prompt, first, MORE], dim=1)
        answers += [
            first,
            oracles.generate(model, longer, cache.copy(), 3),
            oracles.generate(model, longer, cache, 3),
        ]
        answers.append(oracles.generate(model, prompt, None, 3))
        ids, mask = oracles.left_pad([prompt, prompt[:, : 30 + number]])
        answers.append(oracles.generate(model, ids, RankKVCache(model, 0.3), 3, mask))
    return [answer.tolist() for answer in answers]


def run_threads(name, rounds):
    """Let eight users share a model, each in a thread, while a ninth one is interrupted again and again."""
    model = build(name)
    expected = [work(model, number, rounds) for number in range(THREADS)]
    results, barrier = {}, threading.Barrier(THREADS + 1)
    done, interrupted = threading.Event(), []
    target: list[int] = []

    def stop(*arguments):
        if target == [threading.get_ident()]:
            raise Stop

    def run(number):
        barrier.wait()
        results[number] = work(model, number, rounds)

    def run_interrupted():
        target.append(threading.get_ident())
        barrier.wait()
        while not (done.is_set() and interrupted):
            cache = RankKVCache(model, 0.3)
            try:
                oracles.generate(model, PROMPT, cache, 2)
            except Stop:
                interrupted.append(cache)

    handle = model.model.layers[1].mlp.register_forward_hook(stop)
    interval = sys.getswitchinterval()
    try:
        # Threads change as often as they can.
        sys.setswitchinterval(1e-5)
        threads = [threading.Thread(target=run, args=(number,)) for number in range(THREADS)]
        ninth = threading.Thread(target=run_interrupted)
        for thread in [*threads, ninth]:
            thread.start()
        for thread in threads:
            thread.join()
        done.set()
        ninth.join()
    finally:
        sys.setswitchinterval(interval)
        handle.remove()
    return results, expected, interrupted


def check_threads(name, rounds):
    results, expected, interrupted = run_threads(name, rounds)
    assert len(results) == THREADS
    for number, answers in enumerate(expected):
        assert results[number] == answers, number
    assert interrupted


def test_eight_threads_on_one_model_answer_as_in_turn():
    check_threads("Llama", 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama", "Gemma 3", "Qwen3-Next", "Mixtral"])
def test_eight_threads_with_many_calls_answer_as_in_turn(name):
    check_threads(name, 6)
