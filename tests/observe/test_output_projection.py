"""The output projection is found in every family's attention, and its matrix is what it applies."""

from __future__ import annotations

import families
import oracles
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from rankkv.observe.output_projection import compute_projection_matrix, find_output_projection

OBSERVED = [name for name, family in families.FAMILIES.items() if family.outcome != families.REFUSED]


@pytest.mark.parametrize("name", OBSERVED)
def test_what_is_found_gets_the_attention_output(name):
    family = families.FAMILIES[name]
    if not (family.exists and family.is_promised):
        pytest.skip("nothing is promised of it with this transformers")
    model = families.build(name, family.backends[0])
    calls = oracles.capture_calls(model, oracles.random_prompt(6))
    assert calls
    for _, module, query, _, value, *_ in calls:
        heads, dim = query.shape[1], value.shape[-1]
        projection = find_output_projection(module, heads * dim)
        assert projection is not None
        got = []
        hook = projection.register_forward_pre_hook(lambda _, args, got=got: got.append(args[0]))
        oracles.forward(model, None, oracles.random_prompt(6))
        hook.remove()
        # The first token sees itself alone: each head's output is its value, gated or scaled where the model does so.
        first = got[0].reshape(6, heads, dim)[0]
        own = value[0, :, 0].repeat_interleave(heads // value.shape[1], dim=0)
        clear = own.abs() > 1e-3
        assert clear.any()
        assert torch.equal(first[clear].sign(), own[clear].sign())


def test_nothing_is_found_where_it_is_not_clear():
    attention = nn.Module()
    attention.q_proj, attention.wqkv, attention.gate_proj = nn.Linear(8, 8), nn.Linear(8, 24), nn.Linear(8, 8)
    assert find_output_projection(attention, 8) is None
    attention.dense = nn.Linear(8, 6)
    assert find_output_projection(attention, 8) is attention.dense
    assert find_output_projection(attention, 16) is None
    attention.other = nn.Linear(8, 8)
    assert find_output_projection(attention, 8) is None
    assert find_output_projection(None, 8) is None


class Packed(nn.Module):
    """Stands for a layer that stores its matrix in a form of its own."""

    in_features = 8

    def __init__(self):
        super().__init__()
        self.stored = nn.Parameter(torch.randn(6, 8) / 2)
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x):
        return x @ self.stored.T * 2 + self.bias


@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(8, 6), lambda: nn.Linear(8, 6, bias=False), lambda: Conv1D(6, 8), Packed]
)
def test_the_matrix_is_what_the_module_applies(make):
    torch.manual_seed(0)
    projection, x = make(), torch.randn(5, 8)
    for parameter in projection.parameters():
        nn.init.normal_(parameter)
    attention = nn.Module()
    attention.dense = projection
    assert find_output_projection(attention, 8) is projection
    matrix = compute_projection_matrix(projection, 8, x)
    assert matrix.shape == (8, 6)
    assert not matrix.requires_grad
    expected = projection(x) - projection(torch.zeros_like(x))
    torch.testing.assert_close(x @ matrix, expected, atol=1e-5, rtol=1e-5)
