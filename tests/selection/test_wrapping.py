"""LAVa, CriticalKV, VATP and ChunkKV against slow plain formulas, and what wrapping another method means."""

from __future__ import annotations

import math

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankkv.errors import ConfigError, UnknownNameError
from rankkv.selection import SELECTORS, WrappingSelector, get_selector, select_tokens
from rankkv.selection.criticalkv import _join_orders, compute_value_norms

LENGTH, WINDOW = 64, 16
PROMPTS = (oracles.random_prompt(LENGTH, seed=1), oracles.random_prompt(41, seed=2))
WRAPPERS = [name for name, selector in SELECTORS.items() if isinstance(selector, WrappingSelector)]


@pytest.fixture(scope="module", params=["llama", "neox"])
def model(request, tiny_llama, tiny_neox):
    return {"llama": tiny_llama, "neox": tiny_neox}[request.param]()


@pytest.fixture(scope="module")
def layer(model):
    """A padded batch: row 1 has 23 tokens of padding."""
    return oracles.observe_layers(model, *oracles.left_pad(PROMPTS), window_size=WINDOW)[1]


@pytest.fixture(scope="module")
def attentions(model):
    """Weights ``[head, query, key]`` of layer 1, a row each, without padding."""
    return [oracles.eager_attentions(model, prompt)[1][0] for prompt in PROMPTS]


def real(tensor, row):
    """Return ``[head, key]`` of a row without its padding."""
    return tensor[row, :, LENGTH - PROMPTS[row].shape[1] :]


def list_l1_norms(values):
    return [sum(abs(float(x)) for x in value) for value in values]


# -- each method against a plain formula --------------------------------------------------------------------


@pytest.mark.parametrize("row", [0, 1])
def test_lava_is_the_window_attention_times_the_largest_value(layer, attentions, row):
    attention, values = attentions[row], real(layer.values, row)
    groups, length = attention.shape[0] // values.shape[0], attention.shape[-1]
    split = length - WINDOW
    expected = torch.zeros(values.shape[0], length)
    for kv_head in range(values.shape[0]):
        largest = max(list_l1_norms(values[kv_head, :split]))
        for key in range(length):
            first, last = (0, split) if key < split else (split, length)
            near = range(max(first, key - 3), min(last, key + 4))
            pooled = [
                max(float(attention[head, split:, j].mean()) for j in near)
                for head in range(kv_head * groups, (kv_head + 1) * groups)
            ]
            expected[kv_head, key] = max(pooled) * largest
    scores = get_selector("lava").compute_scores(layer)
    torch.testing.assert_close(real(scores, row), expected, atol=1e-5, rtol=1e-4)


def list_plain_norms(model, layer, row, projected):
    """List ``[kv_head][key]``: the mean over the heads of a group of the L1 norm of ``v_j W_h``."""
    module = oracles.attention_modules(model)[1]
    weight = (module.o_proj if hasattr(module, "o_proj") else module.dense).weight.detach().T
    values = real(layer.values, row)
    kv_heads, length, dim = values.shape
    groups = layer.query.shape[1] // kv_heads
    norms = torch.zeros(kv_heads, length)
    for kv_head in range(kv_heads):
        for head in range(kv_head * groups, (kv_head + 1) * groups):
            outputs = values[kv_head] @ weight[head * dim : (head + 1) * dim]
            norms[kv_head] += torch.tensor(list_l1_norms(outputs if projected else values[kv_head])) / groups
    return norms


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("projection", [True, False])
def test_value_norms_are_those_of_the_projected_values(model, layer, row, projection):
    norms = real(compute_value_norms(layer, projection), row)
    torch.testing.assert_close(norms, list_plain_norms(model, layer, row, projection), atol=1e-4, rtol=1e-4)


def test_without_a_projection_the_norms_are_those_of_the_values(layer):
    from dataclasses import replace

    nowhere = replace(layer, module_ref=None)
    assert torch.equal(compute_value_norms(nowhere, True), compute_value_norms(layer, False))


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("first_stage_ratio", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("base", ["snapkv", "h2o"])
def test_criticalkv_selects_in_two_stages(model, layer, row, first_stage_ratio, base):
    """For every budget that holds the window in its first stage: algorithm 1 of the paper, as it stands."""
    selector = get_selector("criticalkv", base=base, first_stage_ratio=first_stage_ratio)
    scores = real(selector.compute_scores(layer), row)
    plain = real(get_selector(base).compute_scores(layer), row)
    norms = list_plain_norms(model, layer, row, projected=True)
    length = PROMPTS[row].shape[1]
    index = torch.arange(length).view(1, 1, -1)
    for budget in range(math.ceil(WINDOW / first_stage_ratio), length):
        kept = select_tokens(scores[None], index, [length], [budget], selector, WINDOW, sink_size=0)[0]
        for head in range(scores.shape[0]):
            by_attention = sorted(range(length - WINDOW), key=lambda j: -float(plain[head, j]))
            chosen = list(range(length - WINDOW, length))
            chosen += by_attention[: int(first_stage_ratio * budget) - WINDOW]
            weighed = {j: float((plain[head, j] + 1e-4) * norms[head, j]) for j in range(length)}
            rest = sorted(set(range(length)) - set(chosen), key=lambda j: -weighed[j])
            expected = set(chosen + rest[: budget - len(chosen)])
            found = set(kept[head].tolist())
            # Two keys may be as good as equal.
            odd = [weighed[j] for j in found ^ expected]
            assert len(found) == budget
            assert not odd or max(odd) - min(odd) < 1e-5 * max(odd), (budget, head)


@pytest.mark.parametrize("row", [0, 1])
def test_vatp_is_attention_times_the_norm_of_the_value(model, layer, row):
    vatp = {"base": "h2o", "projection": False, "first_stage_ratio": 0.0, "epsilon": 0.0}
    scores = real(get_selector("criticalkv", **vatp).compute_scores(layer), row)
    expected = real(get_selector("h2o").compute_scores(layer), row)
    expected = expected * list_plain_norms(model, layer, row, projected=False)
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)


@given(st.data(), st.integers(1, 30), st.floats(0.0, 1.0))
def test_two_orders_join_to_one_that_holds_for_every_budget(data, count, ratio):
    first = data.draw(st.permutations(range(count)))
    second = data.draw(st.permutations(range(count)))
    ranks = _join_orders(first, second, ratio)
    assert sorted(ranks) == list(range(count))
    for budget in range(count + 1):
        chosen = first[: int(ratio * budget)]
        rest = [key for key in second if key not in chosen]
        expected = set(chosen) | set(rest[: budget - len(chosen)])
        assert {key for key in range(count) if ranks[key] < budget} == expected


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("chunk_length", [1, 7, 20, 100])
def test_chunkkv_gives_every_token_the_mean_of_its_chunk(layer, row, chunk_length):
    plain = real(get_selector("h2o").compute_scores(layer), row)
    length = plain.shape[-1]
    scores = get_selector("chunkkv", base="h2o", chunk_length=chunk_length).compute_scores(layer)
    assert scores.shape[1] == 1
    for key in range(length):
        start = key // chunk_length * chunk_length
        chunk = [float(x) for head in plain for x in head[start : min(start + chunk_length, length)]]
        assert float(real(scores, row)[0, key]) == pytest.approx(sum(chunk) / len(chunk), rel=1e-5)


def test_chunkkv_keeps_whole_chunks_and_cuts_the_last_one_at_its_end(model):
    layer = oracles.observe_layers(model, PROMPTS[0], window_size=1, sink_size=0)[1]
    selector = get_selector("chunkkv", base="h2o", chunk_length=8)
    scores = selector.compute_scores(layer)
    best = sorted(range(LENGTH // 8), key=lambda chunk: -float(scores[0, 0, chunk * 8]))
    index = torch.arange(LENGTH).view(1, 1, -1)
    for budget in range(2, LENGTH + 1):
        kept = select_tokens(scores, index, [LENGTH], [budget], selector, window_size=1, sink_size=0)
        tokens = [token for chunk in best for token in range(chunk * 8, chunk * 8 + 8)]
        expected = {LENGTH - 1, *[token for token in tokens if token != LENGTH - 1][: budget - 1]}
        assert set(kept[0, 0].tolist()) == expected


@pytest.mark.parametrize("row", [0, 1])
def test_the_windows_column_sums_are_snapkv_without_pooling(layer, attentions, row):
    """Why there is no windowed H2O: every budget keeps the same tokens by either."""
    attention = attentions[row]
    sums = attention[:, -WINDOW:].sum(1).view(layer.keys.shape[1], -1, attention.shape[-1]).mean(1)
    scores = real(get_selector("snapkv", kernel_size=1).compute_scores(layer), row)
    torch.testing.assert_close(scores * WINDOW, sums, atol=1e-5, rtol=1e-4)


# -- wrapping -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_is_what_its_base_is(name):
    wrapper = get_selector(name, base="h2o")
    assert (wrapper.needs, wrapper.step) == ("whole attention", "sum")
    assert str(wrapper) == f"{name}(base='h2o')"
    half = get_selector(name, base=get_selector("h2o", recent_fraction=0.5))
    assert half.recent_fraction == 0.5
    assert half.with_options(recent_fraction=0.25).recent_fraction == 0.25
    with pytest.raises(UnknownNameError, match="unknown selector 'h20'; did you mean 'h2o'"):
        get_selector(name, base="h20")


def test_wrappers_wrap_each_other(layer):
    inner = get_selector("criticalkv", base="h2o", first_stage_ratio=0.0)
    chunks = get_selector("chunkkv", base=inner, chunk_length=4)
    weighed = inner.compute_scores(layer)[0].mean(0).view(-1, 4).mean(-1)
    torch.testing.assert_close(chunks.compute_scores(layer)[0, 0, ::4], weighed)


def test_criticalkv_refuses_what_is_no_attention():
    with pytest.raises(ConfigError, match="base='random' of selector 'criticalkv' reads 'nothing'"):
        get_selector("criticalkv", base="random")
    get_selector("chunkkv", base="random")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("criticalkv", {"epsilon": -1.0}, r"epsilon=-1.0 .* \[0, 1e\+06\]"),
        ("criticalkv", {"first_stage_ratio": 1.5}, r"first_stage_ratio=1.5 .* \[0, 1\]"),
        ("criticalkv", {"projection": 1}, "projection=1 .* True or False"),
        ("chunkkv", {"chunk_length": 0}, "chunk_length=0 .* at least 1"),
        ("lava", {"kernel_size": 4}, "kernel_size=4 of selector 'lava' .* odd"),
    ],
)
def test_wrong_values_are_named(layer, name, options, message):
    with pytest.raises(ConfigError, match=message):
        get_selector(name, **options).compute_scores(layer)


@pytest.mark.parametrize("base", ["snapkv", "h2o"])
@pytest.mark.parametrize("decode", ["bounded", "periodic"])
def test_while_decoding_the_scores_of_the_base_go_on(tiny_llama, base, decode):
    """A refinement that changes no order keeps what the base keeps, many evictions later."""
    model = tiny_llama()
    options = {"budget": 40, "window_size": 8, "sink_size": 0, "strategy": "uniform", "decode": decode}
    options |= {"decode_interval": 6, "min_budget": 1}
    kept = []
    for selector in (get_selector(base), get_selector("criticalkv", base=base, first_stage_ratio=1.0)):
        cache = oracles.prefill(model, PROMPTS[0], selector=selector, **options)
        oracles.feed(model, cache, oracles.next_chunks(1, (1,) * 20))
        kept.append(oracles.kept_tokens(cache))
    assert kept[0] == kept[1]


def test_chunks_go_one_after_the_other_while_decoding(tiny_llama):
    """A chunk that is being evicted loses its last token first, and is gone before the next is touched."""
    model = tiny_llama()
    selector = get_selector("chunkkv", base="h2o", chunk_length=8)
    cache = oracles.prefill(
        model,
        PROMPTS[0],
        selector=selector,
        budget=40,
        window_size=4,
        sink_size=0,
        strategy="uniform",
        decode="bounded",
    )
    for chunk in oracles.next_chunks(1, (1,) * 12):
        before = oracles.kept_tokens(cache)
        oracles.forward(model, cache, chunk)
        for old, new in zip(before, oracles.kept_tokens(cache), strict=True):
            (gone,) = set(old[0][0]) - set(new[0][0])
            free = range(cache.seen_tokens - 4)
            rest = [token for token in old[0][0] if token // 8 == gone // 8 and token in free]
            assert gone == max(rest)


def test_a_saved_cache_knows_the_base_of_its_selector(tiny_llama, tmp_path):
    from rankkv import RankKVCache

    model = tiny_llama()
    inner = get_selector("criticalkv", base="h2o", epsilon=0.5)
    selector = get_selector("chunkkv", base=inner, chunk_length=8)
    cache = oracles.prefill(model, PROMPTS[0], selector=selector)
    restored = RankKVCache.load(cache.save(tmp_path / "cache.safetensors"), model)
    assert restored.selector == cache.selector
    assert str(restored.selector) == str(selector)
