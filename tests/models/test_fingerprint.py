"""Identity of a model: adapters in use, merged, disabled and scaled, rope and dtype, and words for what differs."""

from __future__ import annotations

import pytest
import torch

from rankkv.models.fingerprint import (
    compute_fingerprint,
    describe_difference,
    describe_model,
    find_adapters,
    find_state_shapes,
)

peft = pytest.importorskip("peft")
OPTIONS = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, "r": 4}


@pytest.fixture
def adapted(tiny_llama):
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_llama(2), peft.LoraConfig(**OPTIONS), adapter_name="a")
    model.add_adapter("b", peft.LoraConfig(**OPTIONS))
    return model.eval()


def test_every_state_of_adapters_has_its_own_fingerprint(adapted):
    found = {"a": compute_fingerprint(adapted)}
    adapted.set_adapter("b")
    found["b"] = compute_fingerprint(adapted)
    adapted.base_model.set_adapter(["a", "b"])
    found["both"] = compute_fingerprint(adapted)
    assert find_adapters(adapted).active == ["a", "b"]
    adapted.set_adapter("a")
    with adapted.disable_adapter():
        found["none"] = compute_fingerprint(adapted)
    for module in adapted.modules():
        if hasattr(module, "lora_A"):
            module.scaling["a"] *= 2
    found["scaled"] = compute_fingerprint(adapted)
    adapted.merge_adapter()
    found["merged"] = compute_fingerprint(adapted)
    assert find_adapters(adapted).merged == ["a"]
    assert len(set(found.values())) == len(found)


def test_adapters_not_in_use_change_nothing(adapted, tiny_llama):
    with adapted.disable_adapter():
        assert compute_fingerprint(adapted) == compute_fingerprint(tiny_llama(2))
    before = compute_fingerprint(adapted)
    adapted.add_adapter("idle", peft.LoraConfig(**OPTIONS))
    adapted.set_adapter("a")
    assert compute_fingerprint(adapted) == before


def test_a_difference_is_one_clause_that_names_both(adapted, tiny_llama):
    saved = describe_model(adapted)
    plain = describe_model(tiny_llama(2))
    assert describe_difference(saved, plain) == (
        "saved with adapter 'a' of LlamaForCausalLM 'llama' (2 layers, float32), loaded with no adapter"
    )
    other = describe_model(tiny_llama(3).bfloat16())
    assert describe_difference(plain, other) == (
        "saved with LlamaForCausalLM 'llama' (2 layers, float32), "
        "loaded with LlamaForCausalLM 'llama' (3 layers, bfloat16)"
    )


def test_shapes_of_keys_are_those_of_the_projections(adapted, tiny_neox):
    assert find_state_shapes(adapted) == {0: (2, 16, 16), 1: (2, 16, 16)}
    # Fused projections tell nothing.
    assert find_state_shapes(tiny_neox(2)) == {}
