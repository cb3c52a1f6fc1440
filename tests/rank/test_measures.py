"""Every measure of a layer equals a plain, slow formula; padding never enters it."""

from __future__ import annotations

import math
from dataclasses import replace

import oracles
import pytest
import torch

from rankkv import compute_effective_rank
from rankkv.budget.strategies import STRATEGIES
from rankkv.limits import Limits
from rankkv.rank.measures import MEASURES, compute_measures
from rankkv.rank.measures import distortion as eviction

WINDOW = 16
PROMPT = oracles.random_prompt(64, seed=5)
LIMITS = Limits(total_budget=3 * 20, length=64, window_size=WINDOW)
#: Options that differ from the defaults, so that they are seen to reach the formula.
OPTIONS = {
    "cake": ({}, {"tau1": 1.6, "tau2": 0.4}),
    "lava": ({}, {"kernel_size": 1}),
    "zigzagkv": ({}, {"mass": 0.5}),
    "dynamickv": ({}, {"r_max": 2.0, "kernel_size": 3}),
    "distortion": ({},),
    "head_distortion": ({}, {"rank_exponent": 1.0}),
}


@pytest.fixture(scope="module", params=["llama", "neox"])
def model(request, tiny_llama, tiny_neox):
    return {"llama": tiny_llama, "neox": tiny_neox}[request.param]()


def observe(model, *prompt):
    return oracles.observe_layers(model, *prompt, window_size=WINDOW)


def measure(observation, name, **options):
    limits = [LIMITS] * len(observation.lengths)
    return compute_measures(observation, name, limits=limits, layers=3, **options)


def attend(layer):
    """Return the attention of one unpadded prompt, ``[head][query][key]`` floats, by the definition."""
    heads, groups = layer.query.shape[1], layer.query.shape[1] // layer.keys.shape[1]
    attention = []
    for head in range(heads):
        rows = []
        for i, query in enumerate(layer.query[0, head].tolist()):
            keys = layer.keys[0, head // groups, : i + 1].tolist()
            logits = [layer.scaling * sum(a * b for a, b in zip(query, key, strict=True)) for key in keys]
            top = max(logits)
            exponentials = [math.exp(logit - top) for logit in logits]
            rows.append([value / sum(exponentials) for value in exponentials] + [0.0] * (63 - i))
        attention.append(rows)
    return attention


def pool(values, width, join):
    side = width // 2
    return [join(values[max(0, j - side) : j + side + 1]) for j in range(len(values))]


def cake(layer, attention, tau1=1.0, tau2=1.0):
    entropy = variance = 0.0
    for rows in attention:
        window = [row[: 64 - WINDOW] for row in rows[-WINDOW:]]
        entropy -= sum(a * math.log(a) for row in window for a in row if a > 0)
        for column in zip(*window, strict=True):
            mean = sum(column) / WINDOW
            variance += sum((a - mean) ** 2 for a in column) / (WINDOW - 1)
    return entropy ** (1 / tau1) * variance ** (1 / tau2)


def lava(layer, attention, kernel_size=7):
    groups = len(attention) // layer.kv_heads
    scores = []
    for kv_head in range(layer.kv_heads):
        norm = max(sum(map(abs, value)) for value in layer.values[0, kv_head, : 64 - WINDOW].tolist())
        pooled = []
        for rows in attention[kv_head * groups : (kv_head + 1) * groups]:
            means = [sum(row[j] for row in rows[-WINDOW:]) / WINDOW for j in range(64 - WINDOW)]
            pooled.append(pool(means, kernel_size, max))
        scores += [norm * max(column) for column in zip(*pooled, strict=True)]
    shares = [score / sum(scores) for score in scores]
    return -sum(p * math.log(p) for p in shares) / math.log(len(shares))


def zigzagkv(layer, attention, mass=0.9):
    needed = []
    for rows in attention:
        means = sorted((sum(row[j] for row in rows[-WINDOW:]) / WINDOW for j in range(64)), reverse=True)
        held, count = 0.0, 0
        while held < mass * sum(means):
            held += means[count]
            count += 1
        needed.append(count)
    return sum(needed) / len(needed) / 64


def dynamickv(layer, attention, r_max=10.0, kernel_size=5):
    best = []
    for rows in attention:
        sums = [sum(row[j] for row in rows[-WINDOW:]) for j in range(64 - WINDOW)]
        pooled = pool(sums, kernel_size, lambda near: sum(near) / kernel_size)
        best.append(sorted(pooled, reverse=True)[: int(r_max * (20 - WINDOW))])
    return best


def find_wrong(layer, attention):
    """Yield the error of each kv head's part of the output, ``[kv_head][row] Tensor``, and the whole output's rows.

    The 16 queries before the window choose, the window's 16 find out what is missing.
    """
    heads, kv_heads, cut = len(attention), layer.keys.shape[1], 48
    groups = heads // kv_heads
    module = layer.module
    joined = (module.o_proj if hasattr(module, "o_proj") else module.dense).weight.detach()

    def output(row, keep, kv_head):
        total = torch.zeros(joined.shape[0], dtype=torch.float64)
        for head in range(kv_head * groups, (kv_head + 1) * groups):
            weights = [
                a if j >= cut or j in keep[head // groups] else 0.0
                for j, a in enumerate(attention[head][row])
            ]
            mass = sum(weights)
            mixed = sum(w / mass * layer.values[0, kv_head, j].double() for j, w in enumerate(weights))
            width = len(mixed)
            total += joined[:, head * width : (head + 1) * width].double() @ mixed
        return total

    votes = []
    for kv_head in range(kv_heads):
        pooled = []
        for head in range(kv_head * groups, (kv_head + 1) * groups):
            mean = [sum(attention[head][i][j] for i in range(32, 48)) / 16 for j in range(cut)]
            pooled.append(pool(mean[:32], 5, max) + mean[32:])
        votes.append([sum(column) / groups for column in zip(*pooled, strict=True)])
    everything = [set(range(64))] * kv_heads
    whole = [[output(i, everything, kv_head) for i in range(48, 64)] for kv_head in range(kv_heads)]
    curve = []
    for budget in (8, 11, 16, 23, 32, 45):
        keep = []
        for scores in votes:
            sure = {*range(cut - min(16, budget // 2), cut), *range(min(layer.sink_size, budget // 4))}
            rest = sorted(set(range(cut)) - sure, key=lambda j: -scores[j])
            keep.append(sure | set(rest[: budget - len(sure)]))
        curve.append(
            [
                [output(i, keep, kv_head) - whole[kv_head][i - 48] for i in range(48, 64)]
                for kv_head in range(kv_heads)
            ]
        )
    return curve, [sum(rows) for rows in zip(*whole, strict=True)]


def distortion(layer, attention):
    curve, whole = find_wrong(layer, attention)
    scale = sum(float(row.pow(2).sum()) for row in whole)
    joined = ([sum(rows) for rows in zip(*heads, strict=True)] for heads in curve)
    return [math.sqrt(sum(float(row.pow(2).sum()) for row in rows) / scale) for rows in joined]


def head_distortion(layer, attention, rank_exponent=2.0):
    curve, whole = find_wrong(layer, attention)
    scale = sum(float(row.pow(2).sum()) for row in whole)
    kv_heads = layer.keys.shape[1]
    groups = len(attention) // kv_heads
    factors = []
    for kv_head in range(kv_heads):
        evictable = [
            [a for head in range(kv_head * groups, (kv_head + 1) * groups) for a in attention[head][i][4:48]]
            for i in range(48, 64)
        ]
        groups_rows = [
            attention[head][i][4:48]
            for head in range(kv_head * groups, (kv_head + 1) * groups)
            for i in range(48, 64)
        ]
        spread = [sum(a * a for a in row) / sum(row) ** 2 for row in groups_rows]
        concentration = math.sqrt(sum(spread) / len(spread))
        factors.append(compute_effective_rank(torch.tensor(evictable)) ** rank_exponent * concentration)
    return [
        [factor * sum(float(row.pow(2).sum()) for row in heads[kv_head]) / scale for heads in curve]
        for kv_head, factor in enumerate(factors)
    ]


SLOW = {
    "cake": cake,
    "lava": lava,
    "zigzagkv": zigzagkv,
    "dynamickv": dynamickv,
    "distortion": distortion,
    "head_distortion": head_distortion,
}


@pytest.mark.parametrize(
    ("name", "options"), [(name, options) for name, both in OPTIONS.items() for options in both]
)
def test_equals_the_formula_written_in_loops(model, name, options):
    for layer in observe(model, PROMPT):
        expected = torch.tensor(SLOW[name](layer, attend(layer), **options), dtype=torch.float64)
        actual = measure(layer, name, **options)[0]
        torch.testing.assert_close(actual, expected, rtol=2e-5, atol=1e-9)


# Rows of two windows and more are measured at once, with padding; with a shorter one each is measured alone.
@pytest.mark.parametrize("shortest", [9, 33])
@pytest.mark.parametrize("name", MEASURES)
def test_a_padded_row_measures_as_the_row_alone(model, name, shortest):
    prompts = (oracles.random_prompt(64, 1), oracles.random_prompt(41, 2), oracles.random_prompt(shortest, 3))
    batch = observe(model, *oracles.left_pad(prompts))
    for row, prompt in enumerate(prompts):
        for together, alone in zip(batch, observe(model, prompt), strict=True):
            expected, actual = measure(alone, name)[0], measure(together, name)[row]
            if actual.dim():
                assert not actual[..., expected.shape[-1] :].any()
                actual = actual[..., : expected.shape[-1]]
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", MEASURES)
def test_what_padding_holds_never_enters(model, name):
    prompts = (oracles.random_prompt(60, 1), oracles.random_prompt(33, 2))
    clean = observe(model, *oracles.left_pad(prompts))[1]
    noise = torch.full((27, clean.keys.shape[-1]), 1e4)
    keys, values, query = clean.keys.clone(), clean.values.clone(), clean.query.clone()
    keys[1, :, :27], values[1, :, :27], query[1, :, :27] = noise, noise, noise
    broken = replace(clean, keys=keys, values=values, query=query)
    assert torch.equal(measure(broken, name), measure(clean, name))


@pytest.mark.parametrize("name", MEASURES)
def test_attention_that_is_not_finite_measures_nan(model, name):
    layer = observe(model, PROMPT)[0]
    broken = torch.full_like(layer.query, math.nan)
    measured = measure(replace(layer, query=broken), name)
    assert not torch.isfinite(measured).all()


@pytest.mark.parametrize("name", ["cake", "lava", "dynamickv"])
def test_a_prompt_inside_the_window_has_nothing_before_it(model, name):
    assert not measure(observe(model, PROMPT[:, :WINDOW])[0], name).any()


def test_every_strategy_measures_what_is_registered():
    wanted = {known.measure for known in STRATEGIES.values()} - {None}
    # One measure is of heads: what budgets of heads are made from, whatever the strategy.
    assert {*wanted, "head_distortion"} == set(MEASURES)


def test_uncertainty_of_known_attention(model):
    layer = observe(model, PROMPT)[0]
    even = replace(layer, query=torch.zeros_like(layer.query))
    # Row i sees i + 1 tokens alike, so that the older of the 64 tokens hold more; all of them hold everything.
    assert measure(even, "zigzagkv", mass=1.0)[0] == 1.0
    assert 0.7 < float(measure(even, "zigzagkv")[0]) < 0.9


def test_a_prompt_below_the_smallest_budget_is_measured_too(model):
    """Nothing can be tried on a few tokens: every layer counts the same."""
    for length in (1, 2, 8):
        layers = observe(model, PROMPT[:, :length])
        assert not any(measure(layer, "distortion").any() for layer in layers)


@pytest.mark.parametrize("name", MEASURES)
def test_a_row_of_nothing_but_padding_does_not_stop_the_others(model, name):
    """A chunk of a prompt may hold no real token of a short row yet."""
    layer = observe(model, PROMPT[:, :20].repeat(2, 1))[0]
    valid = torch.stack([torch.ones(20, dtype=torch.bool), torch.zeros(20, dtype=torch.bool)])
    empty = replace(
        layer, valid=valid, query_valid=valid, row_start=[0, 20], lengths=[20, 0], available=[20, 0]
    )
    alone = measure(observe(model, PROMPT[:, :20])[0], name)[0]
    measured = measure(empty, name)
    torch.testing.assert_close(measured[0], alone, rtol=1e-5, atol=1e-7)


def test_rows_of_different_floors_are_measured_as_alone(model):
    prompts = (oracles.random_prompt(64, 1), oracles.random_prompt(41, 2), oracles.random_prompt(33, 3))
    limits = [
        Limits(400, len(prompt[0]), WINDOW, floor) for prompt, floor in zip(prompts, (30, 8, 16), strict=True)
    ]
    for name in ("distortion", "head_distortion"):
        for row, prompt in enumerate(prompts):
            together = observe(model, *oracles.left_pad(prompts))[1]
            alone = observe(model, prompt)[1]
            expected = compute_measures(alone, name, limits=limits[row : row + 1])[0]
            actual = compute_measures(together, name, limits=limits)[row]
            assert not actual[..., expected.shape[-1] :].any()
            actual = actual[..., : expected.shape[-1]]
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("floor", [8, 20, 45, 60])
def test_what_is_tried_above_a_floor_is_what_is_tried_without_one(model, floor):
    tried = (8, 11, 16, 23, 32, 45)
    # The last one that is not above the floor says where the curve comes from.
    first = max(place for place, budget in enumerate(tried) if budget <= floor)
    for layer in observe(model, PROMPT):
        errors = compute_measures(layer, "distortion", limits=[replace(LIMITS, floor=floor)])[0]
        torch.testing.assert_close(
            errors[first:], measure(layer, "distortion")[0, first:], rtol=1e-5, atol=1e-9
        )
        assert errors[:first].tolist() == [float(errors.max())] * first


def test_errors_are_relative_to_attention_that_learned_sinks_take_from(model):
    """Sinks that take nearly everything leave nearly nothing to lose; the few keys kept are not blown up to all."""
    layer = observe(model, PROMPT)[0]
    heads = layer.query.shape[1]
    plain, sunk = (
        measure(replace(layer, sink_logits=logits), "distortion")[0]
        for logits in (torch.full((heads,), -1e4), torch.full((heads,), 8.0))
    )
    torch.testing.assert_close(plain, measure(layer, "distortion")[0], rtol=1e-5, atol=1e-7)
    # Without the mass that went to the sinks, the error is that of the part that is missing, at most all of it.
    assert (sunk <= 1.0).all()
    assert not torch.allclose(sunk, plain, rtol=0.05)


def test_a_row_that_attends_to_evicted_keys_alone_has_a_finite_error(model):
    layer = observe(model, PROMPT)[0]
    measured = measure(replace(layer, query=layer.query * 1e3), "distortion")[0]
    assert torch.isfinite(measured).all()


class OtherShard:
    """Stand for the process with the other half of the heads: sums add what it added."""

    size = 2

    def __init__(self, added=None):
        self.added, self.seen = added, []

    def sum(self, tensor):
        self.seen.append(tensor)
        return tensor if self.added is None else tensor + self.added[len(self.seen) - 1]


@pytest.mark.parametrize("name", ["distortion", "head_distortion"])
def test_a_process_with_half_of_the_heads_measures_its_part_of_the_whole(model, name):
    """Side by side, without an output projection: squares add up over heads."""
    whole = replace(observe(model, PROMPT)[0], module_ref=None, memory={})
    kv_heads, heads = whole.keys.shape[1], whole.query.shape[1]
    halves = []
    for half in (0, 1):
        own = slice(half * kv_heads // 2, (half + 1) * kv_heads // 2)
        rows = slice(half * heads // 2, (half + 1) * heads // 2)
        halves.append(
            replace(
                whole,
                query=whole.query[:, rows],
                keys=whole.keys[:, own],
                values=whole.values[:, own],
                kv_heads=kv_heads // 2,
                memory={},
            )
        )
    other = OtherShard()
    measure(replace(halves[1], shards=other, memory={}), name)
    first = measure(replace(halves[0], shards=OtherShard(other.seen), memory={}), name)
    expected = measure(whole, name)
    if name == "head_distortion":
        expected = expected[:, : kv_heads // 2]
    torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("name", ["distortion", "head_distortion"])
def test_products_of_bfloat16_give_the_errors_of_float32(tiny_llama, monkeypatch, name):
    """What a GPU multiplies fast: weights as the sum of two numbers, values and the projection as they are."""
    (layer, *_) = observe(tiny_llama().to(torch.bfloat16), PROMPT)
    expected = measure(layer, name)
    multiply = lambda left, right: left.float() @ right.float()  # noqa: E731
    calls = []
    monkeypatch.setattr(eviction, "takes_halves", lambda tensor: tensor.dtype == torch.bfloat16)
    monkeypatch.setattr(eviction, "multiply_halves", lambda *pair: calls.append(pair) or multiply(*pair))
    found = measure(layer, name)
    assert len(calls) > 2
    assert {part.dtype for pair in calls for part in pair} == {torch.bfloat16}
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=1e-6)
