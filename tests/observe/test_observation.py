"""Attention recomputed from queries and keys equals what the model's eager attention returns."""

from __future__ import annotations

import math

import oracles
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rankkv.errors import InputError
from rankkv.observe import observation as observation_module
from rankkv.observe.call import observe
from rankkv.observe.observation import Observation
from rankkv.rank.observed_layer import compute_layer_ranks
from rankkv.selection import SELECTORS

PROMPTS = (oracles.random_prompt(50, seed=1), oracles.random_prompt(19, seed=2))
SIZES = {"kv_heads": 2, "window_size": 8, "sink_size": 2}


@pytest.fixture(scope="module", params=["llama-sdpa", "llama-eager", "neox-sdpa", "neox-eager"])
def model(request, tiny_llama, tiny_neox):
    family, backend = request.param.split("-")
    return {"llama": tiny_llama, "neox": tiny_neox}[family](attn_implementation=backend)


@pytest.fixture(params=[1, 2], ids=["single", "padded"])
def batch(request):
    return oracles.left_pad(PROMPTS[: request.param])


def make(query_length=20, key_length=20, batch=1, heads=4, key_heads=2, dim=8, seed=0, mask=None, **options):
    """Return an observation of random queries, keys and values."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, query_length, dim, generator=generator)
    key = torch.randn(batch, key_heads, key_length, dim, generator=generator)
    value = torch.randn(batch, key_heads, key_length, dim, generator=generator)
    return observe(0, torch.nn.Module(), query, key, value, mask, options, **SIZES)


def zero_padding(attention, mask):
    """Zero the rows of padding queries, whose weights mean nothing."""
    return attention * mask[:, None, :, None]


# -- against eager ------------------------------------------------------------------------------------------


def test_window_attention_equals_eager(model, batch):
    ids, mask = batch
    expected = oracles.eager_attentions(model, ids, mask)
    for layer, attention in zip(oracles.observe_layers(model, ids, mask), expected, strict=True):
        window = zero_padding(attention, mask)[:, :, -32:]
        assert layer.window_attention.shape == window.shape
        torch.testing.assert_close(layer.window_attention, window, atol=1e-5, rtol=0)


@pytest.mark.parametrize("elements", [1, 50 * 4 * 17 * 2, 1 << 25])
def test_blocks_equal_eager(model, batch, elements, monkeypatch):
    monkeypatch.setattr(observation_module, "CPU_BLOCK_ELEMENTS", elements)
    ids, mask = batch
    expected = oracles.eager_attentions(model, ids, mask)
    for layer, attention in zip(oracles.observe_layers(model, ids, mask), expected, strict=True):
        attention = zero_padding(attention, mask)
        row = 0
        for block in layer.attention_blocks():
            rows, keys = block.shape[2:]
            torch.testing.assert_close(block, attention[:, :, row : row + rows, :keys], atol=1e-5, rtol=0)
            assert not attention[:, :, row : row + rows, keys:].any()
            row += rows
        assert row == ids.shape[1]
        sums = layer.compute_group_mean(attention.sum(-2))
        torch.testing.assert_close(layer.compute_column_sums(), sums, atol=1e-4, rtol=0)


def test_padding_is_exactly_zero(model):
    ids, mask = oracles.left_pad(PROMPTS)
    for layer in oracles.observe_layers(model, ids, mask):
        assert layer.valid.tolist() == mask.bool().tolist()
        assert layer.lengths == [50, 19]
        whole = layer.compute_attention(slice(0, 50))
        assert not whole[1, :, :31].any()
        assert not whole[1, :, :, :31].any()
        assert torch.allclose(whole[1, :, 31:].sum(-1), torch.ones(()), atol=1e-5)


def test_rows_may_be_spread(model):
    layer = oracles.observe_layers(model, PROMPTS[0])[0]
    rows = slice(3, 50, 23)
    whole = layer.compute_attention(slice(0, 50))
    torch.testing.assert_close(layer.compute_attention(rows), whole[:, :, rows])


def test_a_row_taken_out_is_the_row_alone(model):
    ids, mask = oracles.left_pad(PROMPTS)
    for together, alone in zip(
        oracles.observe_layers(model, ids, mask), oracles.observe_layers(model, PROMPTS[1]), strict=True
    ):
        row = together.take_row(1)
        assert (row.query_length, row.key_length, row.lengths) == (19, 19, [19])
        rows = slice(0, 19)
        torch.testing.assert_close(
            row.compute_attention(rows), alone.compute_attention(rows), atol=1e-5, rtol=0
        )


def test_a_head_taken_out_is_the_head(model):
    layer = oracles.observe_layers(model, PROMPTS[0])[0]
    groups = layer.query.shape[1] // layer.keys.shape[1]
    for head in range(layer.query.shape[1]):
        alone = layer.take_head(head, head // groups).window_attention
        torch.testing.assert_close(alone, layer.window_attention[:, head : head + 1])


# -- against a plain formula --------------------------------------------------------------------------------


def plain_attention(layer: Observation, softcap=None, sinks=None, bias=None):
    """Compute the causal attention of every row and head with loops."""
    batch, heads, queries, dim = layer.query.shape
    keys = layer.key_length
    result = torch.zeros(batch, heads, queries, keys)
    for row in range(batch):
        for head in range(heads):
            key = layer.keys[row, head * layer.keys.shape[1] // heads]
            for q in range(queries):
                visible = keys - queries + q + 1
                logits = []
                for k in range(visible):
                    logit = float(layer.query[row, head, q] @ key[k]) / math.sqrt(dim)
                    if softcap is not None:
                        logit = math.tanh(logit / softcap) * softcap
                    if bias is not None:
                        logit += float(bias[0, head, q, k])
                    logits.append(logit)
                extra = [] if sinks is None else [float(sinks[head])]
                total = sum(math.exp(logit) for logit in logits + extra)
                for k, logit in enumerate(logits):
                    result[row, head, q, k] = math.exp(logit) / total
    return result


def test_softcap():
    layer = make(softcap=2.0)
    actual = layer.compute_attention(slice(0, 20))
    torch.testing.assert_close(actual, plain_attention(layer, softcap=2.0), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(actual, make().compute_attention(slice(0, 20)), atol=1e-3)


def test_sink_logits_take_mass():
    sinks = torch.tensor([2.0, -1.0, 0.5, 4.0])
    layer = make(s_aux=sinks)
    actual = layer.compute_attention(slice(0, 20))
    torch.testing.assert_close(actual, plain_attention(layer, sinks=sinks), atol=1e-5, rtol=1e-4)
    assert (actual.sum(-1) < 1).all()


def test_position_bias():
    bias = torch.randn(1, 4, 20, 20, generator=torch.Generator().manual_seed(3))
    layer = make(position_bias=bias)
    actual = layer.compute_attention(slice(5, 20))
    torch.testing.assert_close(actual, plain_attention(layer, bias=bias)[:, :, 5:], atol=1e-5, rtol=1e-4)


def test_fewer_queries_than_keys():
    layer = make(query_length=5, key_length=12, batch=2)
    actual = layer.compute_attention(slice(0, 5))
    torch.testing.assert_close(actual, plain_attention(layer), atol=1e-5, rtol=1e-4)


def test_scaling_comes_from_the_call_then_the_module_then_the_width():
    module = torch.nn.Module()
    tensors = [torch.randn(1, 2, 4, 16) for _ in range(3)]
    assert observe(0, module, *tensors, None, {}, **SIZES).scaling == 0.25
    module.scaling = 0.7
    assert observe(0, module, *tensors, None, {}, **SIZES).scaling == 0.7
    assert observe(0, module, *tensors, None, {"scaling": 0.1}, **SIZES).scaling == 0.1


# -- degenerate rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("additive", [False, True])
def test_a_fully_masked_row_is_zero(additive):
    mask = torch.ones(20, 20, dtype=torch.bool).tril()[None, None].clone()
    mask[..., 7, :] = False
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    attention = make(mask=mask).compute_attention(slice(0, 20))
    assert torch.isfinite(attention).all()
    assert not attention[:, :, 7].any()
    others = [row for row in range(20) if row != 7]
    assert torch.allclose(attention[:, :, others].sum(-1), torch.ones(()), atol=1e-5)


@pytest.mark.parametrize("name", sorted(name for name, known in SELECTORS.items() if not known.required))
def test_padding_that_is_not_a_number_does_not_leak(model, name):
    ids, mask = oracles.left_pad(PROMPTS)
    for clean, call in zip(
        oracles.observe_layers(model, ids, mask), oracles.capture_calls(model, ids, mask), strict=True
    ):
        layer_idx, module, query, key, value, attention_mask, options = call
        query, key, value = query.clone(), key.clone(), value.clone()
        for tensor in (query, key, value):
            tensor[1, :, :31] = float("nan")
        sizes = {"kv_heads": key.shape[1], "window_size": 32, "sink_size": 4}
        broken = observe(layer_idx, module, query, key, value, attention_mask, options, **sizes)
        broken.hidden, broken.gradient = clean.hidden, clean.gradient
        assert torch.equal(broken.compute_attention(slice(0, 50)), clean.compute_attention(slice(0, 50)))
        for scope in ("full", "window", "evictable"):
            assert torch.equal(compute_layer_ranks(broken, scope), compute_layer_ranks(clean, scope))
        scores = [SELECTORS[name].compute_scores(layer)[..., 1, :, 31:] for layer in (broken, clean)]
        assert torch.equal(*scores)


def test_a_row_without_a_real_token_is_refused():
    mask = torch.ones(2, 1, 20, 20, dtype=torch.bool).tril()
    mask[1] = False
    with pytest.raises(InputError, match="row 1 of the batch has no real token"):
        make(batch=2, mask=mask)


# -- dtype and memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_upcast_before_the_softmax(dtype):
    single = make(seed=5)
    half = observe(
        0,
        torch.nn.Module(),
        *(tensor.to(dtype) for tensor in (single.query, single.keys, single.values)),
        None,
        {},
        **SIZES,
    )
    attention = half.window_attention
    assert attention.dtype == torch.float32
    assert torch.allclose(attention.sum(-1), torch.ones(()), atol=1e-6)
    torch.testing.assert_close(attention, single.window_attention, atol=3e-2, rtol=0)


def test_the_lowest_half_precision_mask_does_not_overflow():
    # A dtype's minimum plus a negative score is minus infinity in that dtype, and NaN after a softmax over such a row.
    allowed = torch.ones(20, 20, dtype=torch.bool).tril()[None, None]
    mask = torch.zeros(allowed.shape, dtype=torch.float16).masked_fill(
        ~allowed, torch.finfo(torch.float16).min
    )
    layer = make(mask=mask)
    layer = observe(
        0,
        torch.nn.Module(),
        *(tensor.half() * 20 for tensor in (layer.query, layer.keys, layer.values)),
        mask,
        {},
        **SIZES,
    )
    attention = layer.compute_attention(slice(0, 20))
    assert torch.isfinite(attention).all()
    assert not attention.masked_select(~allowed).any()


class LargestOutput(TorchDispatchMode):
    """Records the most elements of any tensor that an operation allocates."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else [output]:
            if isinstance(tensor, torch.Tensor) and tensor._base is None:
                # A broadcast view names many elements and holds few.
                held = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.elements = max(self.elements, min(tensor.numel(), held))
        return output


@pytest.mark.parametrize("name", sorted(name for name, known in SELECTORS.items() if not known.required))
@pytest.mark.parametrize("scope", ["window", "evictable"])
def test_no_intermediate_grows_with_the_square_of_the_length(monkeypatch, name, scope):
    length, heads = 1500, 4
    monkeypatch.setattr(observation_module, "CPU_BLOCK_ELEMENTS", heads * 64 * length)
    layer = make(query_length=length, key_length=length, heads=heads)
    layer.hidden, layer.gradient = torch.ones(1, length, 8), torch.ones(1, length)
    with LargestOutput() as largest:
        SELECTORS[name].compute_scores(layer)
        compute_layer_ranks(layer, scope)
    assert length <= largest.elements <= heads * 64 * length
