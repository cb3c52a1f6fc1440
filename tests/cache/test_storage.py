"""How kept keys and values wait between two forwards: error, bytes, and that waiting twice changes nothing."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from rankkv.cache.storage import STORAGES, Int8Storage, OffloadStorage, PlainStorage

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(seed: int, dtype: torch.dtype = torch.float32, spread: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(2, 3, 200, 16, generator=generator)
    # Tokens differ in size by orders of magnitude, as the first tokens of a prompt do.
    sizes = 10.0 ** (spread * torch.randn(2, 3, 200, 1, generator=generator))
    return (states * sizes).clamp(-6e4, 6e4).to(dtype)


@pytest.mark.parametrize("name", STORAGES)
def test_a_tensor_is_given_back_as_it_was_until_it_rests(name):
    states, storage = draw(0), STORAGES[name]()
    assert storage.get() is None
    assert storage.held() == []
    storage.rest()
    assert storage.get() is None
    storage.put(states)
    assert storage.get() is states
    storage.rest()
    assert storage.get().shape == states.shape
    assert storage.get().dtype == states.dtype
    storage.put(None)
    assert storage.get() is None
    assert storage.held() == []


@pytest.mark.parametrize("storage", [PlainStorage(), OffloadStorage()], ids=["full", "offload"])
def test_nothing_is_lost(storage):
    states = draw(1)
    storage.put(states)
    storage.rest()
    assert torch.equal(storage.get(), states)
    assert [tensor.device.type for tensor in storage.held()] == ["cpu"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(5))
def test_int8_is_off_by_half_a_step_at_most(dtype, seed):
    states, storage = draw(seed, dtype), Int8Storage()
    storage.put(states)
    storage.rest()
    quantized, scale = storage.held()
    assert quantized.dtype == torch.int8
    assert quantized.shape == states.shape
    assert scale.shape == (*states.shape[:-1], 1)
    # Ties are common in half precision, and the quotient itself is rounded.
    error = (states.double() - quantized.double() * scale.double()).abs()
    assert (error <= scale.double() / 2 * (1 + 1e-4)).all()
    # The step is as small as it can be: the largest entry of a token takes the last number.
    assert (quantized.abs().amax(dim=-1) == 127).all()
    largest = states.double().abs().amax(dim=-1, keepdim=True)
    torch.testing.assert_close(scale.double(), largest / 127, rtol=1e-4, atol=0)
    # What attention sees has the model's dtype.
    assert torch.equal(storage.get(), (quantized * scale).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=st.integers(0, 10_000))
def test_int8_resting_again_changes_nothing(dtype, seed):
    storage = Int8Storage()
    storage.put(draw(seed, dtype))
    storage.rest()
    first, held = storage.get(), [tensor.clone() for tensor in storage.held()]
    for _ in range(3):
        # As every decode step does: all kept tokens in full, one more, and back to rest.
        storage.put(torch.cat([storage.get(), draw(seed + 1, dtype)[:, :, :1]], dim=2))
        storage.rest()
        assert torch.equal(storage.get()[:, :, :200], first)
        for now, before in zip(storage.held(), held, strict=True):
            assert torch.equal(now[:, :, :200], before)


def test_int8_of_zeros_and_of_tiny_numbers():
    storage = Int8Storage()
    states = torch.zeros(1, 1, 3, 4)
    states[0, 0, 1, 2] = 1e-38
    states[0, 0, 2] = torch.tensor([1e-44, 0.0, 0.0, -1e-44])
    storage.put(states)
    storage.rest()
    assert torch.isfinite(storage.get()).all()
    torch.testing.assert_close(storage.get(), states, atol=1e-37, rtol=0)
    assert (storage.get()[0, 0, 0] == 0).all()


def test_int8_takes_a_byte_a_number_and_a_scale_a_token():
    storage = Int8Storage()
    storage.put(draw(2))
    assert sum(tensor.nbytes for tensor in storage.held()) == 2 * 3 * 200 * 16 * 4
    storage.rest()
    assert sum(tensor.nbytes for tensor in storage.held()) == 2 * 3 * 200 * (16 + 4)
    # The tensor in full is gone.
    assert {tensor.untyped_storage().nbytes() for tensor in storage.held()} == {
        2 * 3 * 200 * 16,
        2 * 3 * 200 * 4,
    }


def test_offload_gives_back_on_the_device_it_came_from():
    # The meta device stands for an accelerator: a tensor cannot come back from it, but its device is remembered.
    storage = OffloadStorage()
    storage.put(torch.empty(1, 1, 2, 4, device="meta"))
    assert storage.get().device.type == "meta"
    keys = torch.ones(1, 1, 2, 4)
    storage.put(keys)
    storage.rest()
    assert storage.get().device == keys.device
