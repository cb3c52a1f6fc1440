"""DropKV, DefensiveKV, CapKV, Compactor and R-KV against their formulas in plain loops, one row after the other."""

from __future__ import annotations

import math
from dataclasses import replace

import oracles
import pytest
import torch

from rankkv import RankKVCache
from rankkv.errors import ConfigError
from rankkv.observe.rotary import find_rotations
from rankkv.selection import get_selector
from rankkv.selection.compactor import build_sketch

LENGTH, SHORT, WINDOW, SINKS = 64, 41, 16, 4
PROMPTS = (oracles.random_prompt(LENGTH, seed=1), oracles.random_prompt(SHORT, seed=2))


@pytest.fixture(scope="module", params=["llama", "neox"])
def model(request, tiny_llama, tiny_neox):
    return {"llama": tiny_llama, "neox": tiny_neox}[request.param]()


@pytest.fixture(scope="module", params=["alone", "padded"])
def layer(request, model):
    prompts = PROMPTS[:1] if request.param == "alone" else PROMPTS
    found = oracles.observe_layers(model, *oracles.left_pad(prompts), window_size=WINDOW, sink_size=SINKS)[1]
    return replace(found, rotation=find_rotations(model, [1])[1])


def assert_scores(layer, name, formula, **options):
    """Compare all scores of the selector with ``formula(row) -> [kv_head][token]``, in float64."""
    scores = get_selector(name, **options).compute_scores(layer)
    assert scores.dtype == torch.float32
    for row, length in enumerate(layer.lengths):
        first = layer.key_length - length
        states = (t[row, :, first:].double() for t in (layer.keys, layer.values, layer.query))
        expected = torch.as_tensor(formula(*states), dtype=torch.float64)
        torch.testing.assert_close(scores[row, :, first:].double(), expected, atol=2e-5, rtol=1e-3)


def attend(query, keys):
    """Return the causal attention of one query head, ``[query][key]``."""
    logits = query @ keys.T / math.sqrt(keys.shape[-1])
    return logits.masked_fill(torch.ones_like(logits).triu(1).bool(), float("-inf")).softmax(-1)


def pool_mean(row, width):
    """Return the mean over ``width`` neighbours; what lies outside counts as 0."""
    return [
        sum(float(row[i]) for i in range(j - width // 2, j + width // 2 + 1) if 0 <= i < len(row)) / width
        for j in range(len(row))
    ]


def pool_past(row, width):
    split = len(row) - WINDOW
    return pool_mean(row[:split], width) + [float(x) for x in row[split:]]


# -- DropKV ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 5])
def test_dropkv_is_the_change_of_the_output_without_the_key(layer, width):
    def formula(keys, values, queries):
        groups = len(queries) // len(keys)
        scores = []
        for head in range(len(keys)):
            errors = torch.zeros(keys.shape[1], dtype=torch.float64)
            for query in queries[head * groups : (head + 1) * groups]:
                weights = attend(query, keys[head])[-WINDOW:]
                whole = weights @ values[head]
                for j in range(keys.shape[1]):
                    # Without the key, the other weights are attention again.
                    rest = weights.clone()
                    rest[:, j] = 0
                    without = rest / rest.sum(-1, keepdim=True) @ values[head]
                    errors[j] += (without - whole).square().sum(-1).mean() / groups
            scores.append(pool_past(errors, width))
        return scores

    assert_scores(layer, "dropkv", formula, kernel_size=width)


def test_dropkv_of_a_key_with_all_attention_is_finite():
    sure = oracles.observe_random(tokens=30)
    sure = replace(sure, query=sure.query * 1e4)
    scores = get_selector("dropkv").compute_scores(sure)
    assert torch.isfinite(scores).all()
    assert (scores >= 0).all()


# -- DefensiveKV ----------------------------------------------------------------------------------------------


def test_defensivekv_is_the_largest_attention_but_no_less_than_the_mean(layer):
    def formula(keys, values, queries):
        groups, split = len(queries) // len(keys), keys.shape[1] - WINDOW
        scores = []
        for head in range(len(keys)):
            most = [0.0] * keys.shape[1]
            for query in queries[head * groups : (head + 1) * groups]:
                for row in attend(query, keys[head])[-WINDOW:]:
                    past = pool_mean(row[:split], 5)
                    scale = float(row[:split].sum()) / sum(past)
                    pooled = [x * scale for x in past] + [float(x) for x in row[split:]]
                    most = [max(pair) for pair in zip(most, pooled, strict=True)]
            mean = sum(most[:split]) / split
            scores.append(
                [max(x, mean) * float(v.abs().sum()) for x, v in zip(most, values[head], strict=True)]
            )
        return scores

    assert_scores(layer, "defensivekv", formula, projection=False)


def test_defensivekv_weighs_by_the_projected_value(tiny_llama):
    model = tiny_llama()
    layer = oracles.observe_layers(model, PROMPTS[0], window_size=WINDOW)[1]
    scores = [get_selector("defensivekv", projection=on).compute_scores(layer) for on in (True, False)]
    groups, dim = layer.query.shape[1] // layer.keys.shape[1], layer.values.shape[-1]
    matrix = model.model.layers[1].self_attn.o_proj.weight.detach()
    for head, value in enumerate(layer.values[0]):
        own = [matrix[:, g * dim : (g + 1) * dim] for g in range(head * groups, (head + 1) * groups)]
        norms = sum((value @ part.T).abs().sum(-1) for part in own) / groups
        ratio = scores[0][0, head] / scores[1][0, head]
        torch.testing.assert_close(ratio, norms / value.abs().sum(-1), atol=1e-5, rtol=1e-3)


# -- CapKV ----------------------------------------------------------------------------------------------------


def test_capkv_is_the_derivative_of_the_log_determinant(model, layer):
    future = 20
    dim = layer.keys.shape[-1]
    turned = dim if hasattr(model, "model") else dim // 4

    def rotate(vector, position):
        out = vector.clone()
        for pair in range(turned // 2):
            angle = position * 10000.0 ** (-2 * pair / turned)
            a, b = vector[pair], vector[pair + turned // 2]
            out[pair] = a * math.cos(angle) - b * math.sin(angle)
            out[pair + turned // 2] = b * math.cos(angle) + a * math.sin(angle)
        return out

    def formula(keys, values, queries):
        groups, length = len(queries) // len(keys), keys.shape[1]
        scores = []
        for head in range(len(keys)):
            own = torch.zeros(length - SINKS, dtype=torch.float64)
            for query in queries[head * groups : (head + 1) * groups]:
                anchor = torch.zeros(dim, dtype=torch.float64)
                for step in range(future):
                    for position in range(SINKS, length):
                        anchor += rotate(query[position], length + step - position)
                cosines = torch.nn.functional.cosine_similarity(keys[head][SINKS:], anchor[None])
                weights = (3.0 * (cosines - cosines.max())).exp().requires_grad_()
                matrix = torch.eye(values.shape[-1], dtype=torch.float64)
                for weight, value in zip(weights, values[head][SINKS:], strict=True):
                    matrix = matrix + (weight + 1e-6) * torch.outer(value, value)
                (gradient,) = torch.autograd.grad(torch.logdet(matrix), weights)
                own += (weights * gradient).detach() / groups
            scores.append([float(own.max())] * SINKS + own.tolist())
        return scores

    assert_scores(layer, "capkv", formula, tau=3.0, future_positions=future)


def test_capkv_of_a_row_of_sinks_alone():
    scores = get_selector("capkv").compute_scores(oracles.observe_random(tokens=3))
    assert torch.equal(scores, torch.zeros(1, 2, 3))


# -- Compactor ------------------------------------------------------------------------------------------------


def test_compactor_joins_leverage_and_the_attention_of_chunks(model, layer):
    chunk, sketch, blending = 20, 5, 0.7
    frequencies = None if layer.rotation is None else layer.rotation.frequencies.double()

    def standardize(table):
        table = torch.as_tensor(table, dtype=torch.float64)
        return (table - table.mean()) / table.std()

    def formula(keys, values, queries):
        groups, length = len(queries) // len(keys), keys.shape[1]
        middle = range(8, length - 4)
        leverage, attended = [], []
        for head in range(len(keys)):
            plain = keys[head].clone()
            if frequencies is not None:
                half = len(frequencies)
                for position in range(length):
                    for pair in range(half):
                        angle = -position * float(frequencies[pair])
                        a, b = keys[head][position][pair], keys[head][position][pair + half]
                        plain[position][pair] = a * math.cos(angle) - b * math.sin(angle)
                        plain[position][pair + half] = b * math.cos(angle) + a * math.sin(angle)
            rows = plain[8 : length - 4]
            rows = (rows - rows.mean(0)) @ build_sketch(rows.shape[-1], sketch).double()
            inverse = torch.linalg.inv(rows.T @ rows + 0.01 * torch.eye(sketch, dtype=torch.float64))
            leverage.append([float(row @ inverse @ row) for row in rows])
            sums = dict.fromkeys(middle, 0.0)
            for query in queries[head * groups : (head + 1) * groups]:
                for start in range(8, length - 4, chunk):
                    own = range(start, min(start + chunk, length - 4))
                    for i in own:
                        weights = torch.stack([query[i] @ keys[head][j] for j in own]).softmax(0)
                        for j, weight in zip(own, weights, strict=True):
                            sums[j] += float(weight) / groups
            attended.append(pool_mean([sums[j] * float(values[head][j].norm()) for j in middle], 3))
        scores = blending * standardize(leverage) + standardize(attended)
        ends = scores.max(dim=-1, keepdim=True).values
        return torch.cat([ends.expand(-1, 8), scores, ends.expand(-1, 4)], dim=-1)

    assert_scores(layer, "compactor", formula, chunk_size=chunk, sketch_size=sketch, blending=blending)


def test_compactor_of_a_prompt_without_a_middle_keeps_all():
    scores = get_selector("compactor").compute_scores(oracles.observe_random(tokens=12))
    assert torch.equal(scores, torch.zeros(1, 2, 12))


def test_compactor_scores_keys_whose_queries_are_gone_by_plain_attention():
    whole = oracles.observe_random(tokens=40)
    late = replace(whole, query=whole.query[:, :, 30:], query_start=30, query_valid=whole.query_valid[:, 30:])
    scores = get_selector("compactor", blending=0.0).compute_scores(late)[0]
    attention = whole.compute_attention(slice(30, 40))[0].sum(dim=1).unflatten(0, (2, 2)).mean(dim=1)
    expected = attention * 4.0 * whole.values[0].norm(dim=-1)
    inner = slice(10, 28)
    pooled = (expected[:, 9:27] + expected[:, 10:28] + expected[:, 11:29]) / 3
    # Standardizing is monotone: a line maps one to the other.
    left, right = scores[:, inner].flatten(), pooled.flatten()
    assert torch.corrcoef(torch.stack([left, right]))[0, 1] > 0.999999


# -- R-KV -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("weight", "threshold"), [(0.07, 0.5), (0.5, 0.1)])
def test_r_kv_takes_away_what_other_keys_say_too(layer, weight, threshold):
    attention = get_selector("snapkv").compute_scores(layer)
    scores = get_selector("r_kv", weight=weight, threshold=threshold).compute_scores(layer)
    for row, length in enumerate(layer.lengths):
        first = layer.key_length - length
        for head, keys in enumerate(layer.keys[row, :, first:].double()):
            means = [0.0] * length
            for i in range(length):
                cosines = [float(torch.nn.functional.cosine_similarity(keys[i], key, dim=0)) for key in keys]
                cosines[i] = 0.0
                similar = [j for j in range(length) if cosines[j] > threshold]
                if similar:
                    cosines[similar[-1]] = 0.0
                means = [a + b / length for a, b in zip(means, cosines, strict=True)]
            redundancy = torch.tensor(means).softmax(0)
            expected = weight * attention[row, head, first:] - (1 - weight) * redundancy
            torch.testing.assert_close(scores[row, head, first:], expected, atol=1e-6, rtol=1e-4)


def test_r_kv_drops_all_but_the_newest_of_equal_keys():
    layer = oracles.observe_random(tokens=40)
    keys = layer.keys.clone()
    keys[:, :, 10:20] = keys[:, :, 10:11]
    scores = get_selector("r_kv", weight=0.0).compute_scores(replace(layer, keys=keys))[0]
    assert (scores[:, 10:19] < scores[:, 19:20]).all()


# -- while decoding, and what is refused ----------------------------------------------------------------------


@pytest.mark.parametrize("decode", ["bounded", "periodic"])
@pytest.mark.parametrize("name", ["dropkv", "defensivekv", "capkv", "compactor", "r_kv"])
def test_generation_stays_at_its_budget(tiny_llama, name, decode):
    model = tiny_llama()
    cache = RankKVCache(model, selector=name, strategy="uniform", budget=30, decode=decode, decode_interval=8)
    oracles.generate(model, PROMPTS[0], cache, new_tokens=33)
    most = 30 if decode == "bounded" else 30 + 8
    assert all(30 <= kept <= most for kept in cache.kept_lengths)


def test_new_queries_join_the_mean_of_scores(tiny_llama):
    """One step of decoding: 15/16 of the old scores and 1/16 of those that the newest query gives."""
    model = tiny_llama()
    options = {"selector": "dropkv", "strategy": "uniform", "budget": 80, "decode": "bounded"}
    cache = oracles.prefill(model, PROMPTS[0], window_size=WINDOW, **options)
    before = cache.layers[1].running_scores.clone()
    step = oracles.next_chunks(1, (1,))[0]
    noted = []
    compute = cache._schedule.selector.compute_lasting_scores
    object.__setattr__(
        cache._schedule.compressor,
        "selector",
        _Noting(
            cache._schedule.selector, lambda observation: noted.append(compute(observation)) or noted[-1]
        ),
    )
    oracles.forward(model, cache, step)
    expected = noted[1] / WINDOW
    expected[..., : before.shape[-1]] += before * (1 - 1 / WINDOW)
    torch.testing.assert_close(cache.layers[1].running_scores, expected)


class _Noting:
    """A selector whose lasting scores are noted."""

    def __init__(self, selector, compute_lasting_scores):
        self._selector = selector
        self.compute_lasting_scores = compute_lasting_scores

    def __getattr__(self, name):
        return getattr(self._selector, name)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dropkv", {"kernel_size": 4}, "kernel_size=4 .* odd"),
        ("defensivekv", {"kernel_size": 0}, "kernel_size=0 .* odd"),
        ("defensivekv", {"projection": 1}, "projection=1 .* True or False"),
        ("capkv", {"tau": -1}, "tau=-1 .* in "),
        ("capkv", {"future_positions": 0}, "future_positions=0 .* at least 1"),
        ("compactor", {"chunk_size": 0}, "chunk_size=0 .* at least 1"),
        ("compactor", {"sketch_size": 0}, "sketch_size=0 .* at least 1"),
        ("compactor", {"blending": -0.5}, "blending=-0.5 .* in "),
        ("r_kv", {"weight": 1.5}, "weight=1.5 .* in "),
        ("r_kv", {"threshold": -2}, "threshold=-2 .* in "),
    ],
)
def test_wrong_values_are_named(name, options, message):
    with pytest.raises(ConfigError, match=message):
        get_selector(name, **options).compute_scores(oracles.observe_random(tokens=20))
