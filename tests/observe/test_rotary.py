"""Turning keys: the rotation found for a layer is the one the model's own code applies."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as rotate_interleaved
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as rotate_halves

from rankkv.errors import UnsupportedModelError
from rankkv.observe.rotary import LayerRotation, PackedPositions, find_rotations

SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}


def rotary(frequencies: torch.Tensor, **options: bool) -> LayerRotation:
    module = nn.Module()
    module.register_buffer("inv_freq", frequencies)
    return LayerRotation(module, "inv_freq", **{"interleaved": False, "from_end": False, **options})


@pytest.mark.parametrize(("interleaved", "apply"), [(False, rotate_halves), (True, rotate_interleaved)])
def test_turning_equals_transformers_own_rotation(interleaved, apply):
    states = torch.randn(2, 3, 7, 16, generator=torch.Generator().manual_seed(0))
    frequencies = 10.0 ** -torch.linspace(0, 4, 8)
    positions = torch.tensor([[0, 1, 2, 5, 9, 100, 1000]]).expand(2, -1)
    angles = positions[..., None] * frequencies
    wide = angles.repeat_interleave(2, -1) if interleaved else torch.cat([angles, angles], -1)
    expected, _ = apply(states, states, wide.cos(), wide.sin())
    turned = rotary(frequencies, interleaved=interleaved).turn(states, angles[:, None])
    torch.testing.assert_close(turned, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("from_end", [False, True])
def test_turning_back_and_forth_gives_the_states(interleaved, from_end):
    states = torch.randn(1, 2, 5, 12, generator=torch.Generator().manual_seed(1))
    rotation = rotary(torch.tensor([1.0, 0.1, 0.01]), interleaved=interleaved, from_end=from_end)
    angles = torch.randn(1, 2, 5, 3, generator=torch.Generator().manual_seed(2)) * 100
    turned = rotation.turn(states, angles)
    torch.testing.assert_close(rotation.turn(turned, -angles), states, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(turned.norm(dim=-1), states.norm(dim=-1))
    # What is not turned stays bit by bit.
    rest = slice(0, 6) if from_end else slice(6, None)
    assert torch.equal(turned[..., rest], states[..., rest])
    assert not torch.equal(turned, states)


def test_half_precision_is_turned_in_single():
    states = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    angles = torch.tensor([1000.0, 10.0]).expand(1, 1, 4, 2)
    rotation = rotary(torch.tensor([1.0, 0.1]))
    half = rotation.turn(states.bfloat16(), angles)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, rotation.turn(states.bfloat16().float(), angles).bfloat16())


def test_what_is_found_for_each_kind(tiny_llama, tiny_neox):
    llama = find_rotations(tiny_llama(), [0, 1, 2])
    assert {(found.interleaved, found.from_end, len(found.frequencies)) for found in llama.values()} == {
        (False, False, 8)
    }
    neox = find_rotations(tiny_neox(), [0, 2])
    assert list(neox) == [0, 2]
    assert all(len(found.frequencies) == 2 for found in neox.values())
    cohere = find_rotations(CohereForCausalLM(CohereConfig(**SMALL)).eval(), [0, 1, 2])
    assert all(found.interleaved for found in cohere.values())
    smol = find_rotations(
        SmolLM3ForCausalLM(SmolLM3Config(**SMALL, no_rope_layers=[1, 0, 1])).eval(), [0, 1, 2]
    )
    assert smol[1] is None
    assert smol[0] is not None
    assert smol[2] is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_in_a_deep_model_of_half_precision_hides_no_rotation(tiny_llama, dtype):
    model = tiny_llama(num_hidden_layers=40).to(dtype)
    found = find_rotations(model, list(range(40)))
    assert all(rotation is not None and not rotation.interleaved for rotation in found.values())


def test_other_positions_are_refused_by_name():
    options = {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4}
    gpt2 = GPT2LMHeadModel(GPT2Config(**options, initializer_range=0.2)).eval()
    with pytest.raises(
        UnsupportedModelError, match=r"of GPT2LMHeadModel does not turn .* positions='original'"
    ):
        find_rotations(gpt2, [0, 1])
    # GPT-J turns by a table of sines that is no module's frequencies.
    gptj = GPTJForCausalLM(GPTJConfig(**options, rotary_dim=8)).eval()
    with pytest.raises(UnsupportedModelError, match=r"of GPTJForCausalLM does not turn"):
        find_rotations(gptj, [0, 1])


def test_the_model_is_left_as_it_was(tiny_llama):
    model = tiny_llama(rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4})
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    find_rotations(model, [0, 1])
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert not model.training


# -- frequencies that change while tokens come in ------------------------------------------------------------


def test_each_token_is_turned_back_by_the_frequencies_it_was_turned_with():
    buffer = torch.tensor([1.0, 0.5])
    packer = PackedPositions(rotary(buffer))
    module = packer.rotation.module
    raw = torch.randn(1, 1, 9, 4, generator=torch.Generator().manual_seed(4))
    stored, used = [], []
    for position in range(9):
        if position in (3, 4, 7):
            module.inv_freq = module.inv_freq * 0.7
        packer.note_frequencies(position)
        used.append(module.inv_freq.clone())
        stored.append(
            packer.rotation.turn(raw[:, :, position : position + 1], position * used[-1].view(1, 1, 1, 2))
        )
    assert [start for start, _ in packer.epochs] == [0, 3, 4, 7]
    kept = torch.tensor([0, 2, 3, 5, 6, 8])
    keys = torch.cat(stored, dim=2)[:, :, kept]
    query, turned = packer.pack(keys[:, :, -1:], keys, kept.view(1, 1, -1), None, [0])
    packed = torch.arange(6).view(1, 1, 6, 1) * used[-1]
    expected = packer.rotation.turn(raw[:, :, kept], packed)
    torch.testing.assert_close(turned, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(query, expected[:, :, -1:], atol=1e-5, rtol=1e-5)


def test_rows_and_empty_slots():
    packer = PackedPositions(rotary(torch.tensor([1.0, math.pi / 7])))
    packer.note_frequencies(0)
    raw = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(5))
    # Row 1 has 3 tokens of padding before it and holds one slot less.
    positions = torch.tensor([[[0, 2, 5, 9]], [[0, 4, 5, 9]]])
    real = positions - torch.tensor([0, 3]).view(2, 1, 1)
    stored = packer.rotation.turn(raw, real[..., None] * packer.rotation.frequencies)
    valid = torch.tensor([[True] * 4, [False, True, True, True]])
    _, turned = packer.pack(stored[:, :, -1:], stored, positions, valid, [0, 3])
    for row, (slots, count) in enumerate([(slice(0, 4), 4), (slice(1, 4), 3)]):
        angles = torch.arange(count).view(1, 1, count, 1) * packer.rotation.frequencies
        expected = packer.rotation.turn(raw[row : row + 1, :, slots], angles)
        torch.testing.assert_close(turned[row : row + 1, :, slots], expected, atol=1e-5, rtol=1e-5)


def test_a_copy_goes_its_own_way():
    packer = PackedPositions(rotary(torch.tensor([1.0])))
    packer.note_frequencies(0)
    copied = packer.copy()
    packer.rotation.module.inv_freq = torch.tensor([0.5])
    packer.note_frequencies(4)
    assert [start for start, _ in copied.epochs] == [0]
    packer.reset()
    assert packer.epochs == []
