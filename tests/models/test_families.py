"""Every model family, on every attention backend, in every way of generating: it passes, or is refused by name."""

from __future__ import annotations

import re
import warnings

import conformance
import families
import oracles
import pytest
import torch
import transformers

from rankkv import RankKVAnalyzer, RankKVCache
from rankkv.errors import UnsupportedModelError

# One row a family in the quick suite: its usual backend, in the ways that find most.
QUICK_WAYS = ("compressed", "padded", "chunked", "second turn")


def list_rows():
    for name, family in families.FAMILIES.items():
        if not family.exists:
            yield pytest.param(name, "", "", id=name, marks=pytest.mark.skip("not in this transformers"))
            continue
        for backend, way in conformance.list_rows(name):
            quick = backend == family.backends[0] and way in QUICK_WAYS
            marks = [] if quick else [pytest.mark.slow]
            yield pytest.param(name, backend, way, id=f"{name}-{backend}-{way}", marks=marks)


@pytest.mark.parametrize(("name", "backend", "way"), list(list_rows()))
def test_conformance(name, backend, way):
    family = families.FAMILIES[name]
    if not family.is_promised:
        pytest.skip(f"promised from transformers {family.since} on")
    if way == "chunked" and families.IS_OLD and family.compressible is not None:
        pytest.skip("older transformers gives sliding layers other states in chunks")
    result = conformance.run_way(name, backend, way)
    if family.outcome == families.REFUSED:
        assert re.match(f"refused: .*{family.says}", result)
    elif way == "chunked" and family.latent:
        assert re.match(r"refused: layer \d+ attends to other keys than it caches", result)
    elif way == "chunked" and families.IS_OLD:
        # transformers' own chunks were wrong once.
        assert result == "pass" or result.startswith("not offered: ")
    elif way == "chunked" and not family.chunks:
        assert result.startswith("not offered: ")
    else:
        assert result == "pass"


def list_families(outcome):
    return [
        name
        for name, family in families.FAMILIES.items()
        if family.outcome == outcome and family.exists and family.is_promised
    ]


@pytest.mark.parametrize("name", list_families(families.REFUSED))
def test_a_refused_family_is_refused_before_any_token_and_left_as_it_was(name):
    family = families.FAMILIES[name]
    model = families.build(name, family.backends[0])
    before = oracles.generate(model, conformance.SHORT, None)
    with pytest.raises(UnsupportedModelError, match=family.says):
        oracles.forward(model, RankKVCache(model), conformance.SHORT)
    assert torch.equal(oracles.generate(model, conformance.SHORT, None), before)


@pytest.mark.parametrize("name", list_families(families.UNCHANGED))
def test_a_family_without_a_full_attention_layer_warns(name):
    family = families.FAMILIES[name]
    with pytest.warns(UserWarning, match=family.says):
        RankKVCache(families.build(name, family.backends[0]))


@pytest.mark.parametrize("name", list_families(families.COMPRESSED))
def test_a_compressed_family_does_not_warn(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Phi-3 and its relatives drop any cache at a length of their own, which is said.
        warnings.filterwarnings("ignore", "generate.. of .* drops any cache when the text passes")
        RankKVCache(families.build(name, families.FAMILIES[name].backends[0]))


@pytest.mark.parametrize("name", list_families(families.COMPRESSED))
def test_the_analyzer_finds_the_ranks_that_the_cache_goes_by(name):
    model = families.build(name, families.FAMILIES[name].backends[0])
    result = RankKVAnalyzer(model).analyze(conformance.LONG)
    cache = RankKVCache(model)
    oracles.forward(model, cache, conformance.LONG)
    assert result.layer_indices == cache.layer_indices
    assert result.layer_ranks == pytest.approx(cache.layer_ranks, rel=1e-5)


def list_hybrids_with_caches_of_their_own():
    return [
        name
        for name, family in families.FAMILIES.items()
        if family.exists and not getattr(transformers, family.model)._supports_default_dynamic_cache()
    ]


@pytest.mark.parametrize("name", list_hybrids_with_caches_of_their_own())
def test_a_hybrid_with_a_cache_of_its_own_is_refused(name):
    # Older transformers had many.
    model = families.build(name, families.FAMILIES[name].backends[0])
    with pytest.raises(UnsupportedModelError, match=r"a cache of its own|attention interface"):
        RankKVCache(model)


def test_a_model_that_wants_another_cache_is_refused(monkeypatch):
    model = families.build("Llama")
    monkeypatch.setattr(type(model), "_supports_default_dynamic_cache", classmethod(lambda cls: False))
    with pytest.raises(UnsupportedModelError, match=r"gives LlamaForCausalLM a cache of its own"):
        RankKVCache(model)


# -- kinds of models that no family above shows ----------------------------------------------------------


@pytest.mark.parametrize("way", [way for way in conformance.WAYS if way != "chunked"])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_a_sliding_mask_on_a_full_cache(backend, way):
    # What the newest token does not see is hidden, not padding.
    family = families.Family(
        "MistralForCausalLM",
        {**families.USUAL, "sliding_window": families.WINDOW, "layer_types": ["full_attention"] * 2},
    )
    conformance.WAYS[way](family, family.build(backend))


@pytest.mark.skipif(families.IS_OLD, reason="transformers' own chunks were wrong once")
def test_a_sliding_mask_on_a_full_cache_is_not_computed_after_the_forward():
    family = families.Family(
        "MistralForCausalLM",
        {**families.USUAL, "sliding_window": families.WINDOW, "layer_types": ["full_attention"] * 2},
    )
    with pytest.raises(UnsupportedModelError, match=r"hides more than padding .*prefill='single'"):
        conformance.check_chunked(family, family.build())


def test_attention_that_bypasses_the_interface_on_one_backend_only():
    family = families.Family(
        "GPT2LMHeadModel", {**families.FAMILIES["GPT-2"].options, "reorder_and_upcast_attn": True}
    )
    model = family.build("eager")
    with pytest.raises(UnsupportedModelError, match="layer 0 was not observed"):
        oracles.forward(model, RankKVCache(model), conformance.SHORT)
    conformance.check_compressed(family, family.build("sdpa"))


# -- packed positions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list_families(families.COMPRESSED))
def test_packed_positions_change_nothing_or_are_refused(name):
    family = families.FAMILIES[name]
    model = families.build(name, family.backends[0])
    if name in families.NOT_PACKED or family.latent:
        with pytest.raises(UnsupportedModelError, match="positions='packed' cannot work"):
            RankKVCache(model, positions="packed")
        return
    everything = RankKVCache(model, compression_ratio=1.0, positions="packed")
    plain = oracles.generate(model, conformance.LONG, None)
    assert torch.equal(oracles.generate(model, conformance.LONG, everything), plain)
    some = RankKVCache(model, positions="packed", **conformance.KEEP)
    assert oracles.generate(model, conformance.LONG, some).shape == plain.shape


# -- layers that attend to another layer's keys --------------------------------------------------------------


@pytest.mark.parametrize("options", [{"decode": "bounded"}, {"decode": "periodic", "decode_interval": 4}])
@pytest.mark.parametrize("name", ["Gemma 3n", "Gemma 4"])
def test_borrowed_keys_stay_right_while_the_lender_evicts(name, options):
    if not families.FAMILIES[name].exists:
        pytest.skip("not in this transformers")
    model = families.build(name, "sdpa")
    ids, mask = oracles.left_pad([conformance.LONG, conformance.SHORT])
    together = oracles.generate(model, ids, RankKVCache(model, **options, **conformance.KEEP), 12, mask)
    for row, prompt in enumerate((conformance.LONG, conformance.SHORT)):
        alone = oracles.generate(model, prompt, RankKVCache(model, **options, **conformance.KEEP), 12)
        assert torch.equal(together[row], alone[0])
