"""Merging: evicted tokens folded into the nearest kept key, against the formulas written down one token at a time."""

from __future__ import annotations

import math

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankkv import RankKVCache, RankKVConfig
from rankkv.budget_allocation import STRATEGIES
from rankkv.cache.merging import fold_evicted
from rankkv.config import MERGING_MODES
from rankkv.errors import ConfigError, UnknownNameError

LONG, SHORT = oracles.random_prompt(70, seed=3), oracles.random_prompt(43, seed=4)
KEEP = {"compression_ratio": 0.3, "min_budget": 3, "window_size": 8}
RANKED = [name for name, strategy in STRATEGIES.items() if strategy.uses_ranks]


def fold_plainly(keys, values, kept, real, mode):
    """Fold one head, ``keys [slot, dim]``: one evicted token after the other, in double precision."""
    keys, values = keys.double(), values.double()
    evicted = [slot for slot in real if slot not in kept]
    cosines = {
        i: [float(keys[i] @ keys[c] / (keys[i].norm() * keys[c].norm()).clamp(min=1e-12)) for c in kept]
        for i in evicted
    }
    threshold = sum(max(cosines[i]) for i in evicted) / max(1, len(evicted))
    folded: dict[int, list[tuple[float, int]]] = {}
    for i in evicted:
        best = max(cosines[i])
        if best >= threshold - 1e-6:
            folded.setdefault(kept[cosines[i].index(best)], []).append((math.exp(best), i))
    new = []
    for tensor, changes in ((keys, mode == "keys_and_values"), (values, True)):
        rows = []
        for c in kept:
            given = folded.get(c, []) if changes else []
            total = math.e + sum(weight for weight, _ in given)
            rows.append((math.e * tensor[c] + sum(weight * tensor[i] for weight, i in given)) / total)
        new.append(torch.stack(rows))
    return new


@st.composite
def layers(draw):
    rows, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    slots, width = draw(st.integers(2, 14)), draw(st.integers(1, 14))
    seed = draw(st.integers(0, 999))
    torch.manual_seed(seed)
    padding = [draw(st.integers(0, slots - 1)) for _ in range(rows)]
    shared = draw(st.booleans())
    kept = torch.full((rows, 1 if shared else heads, min(width, slots)), -1)
    for row, pad in enumerate(padding):
        count = draw(st.integers(1, min(width, slots - pad, kept.shape[-1])))
        for head in range(kept.shape[1]):
            kept[row, head, kept.shape[-1] - count :] = (
                (torch.randperm(slots - pad)[:count] + pad).sort().values
            )
    real = torch.stack([torch.arange(slots) >= pad for pad in padding])[:, None]
    keys, values = torch.randn(rows, heads, slots, 4), torch.randn(rows, heads, slots, 3)
    # What stands in a padding slot must not matter.
    keys[~real.expand(rows, heads, -1)] = values[~real.expand(rows, heads, -1)] = float("nan")
    return keys, values, kept, real


@given(layers(), st.sampled_from(MERGING_MODES))
def test_folding_equals_the_plain_formulas(layer, mode):
    keys, values, kept, real = layer
    new = fold_evicted(keys, values, kept, real, mode)
    for row in range(keys.shape[0]):
        slots = real[row, 0].nonzero().flatten().tolist()
        for head in range(keys.shape[1]):
            places = kept[row, head % kept.shape[1]]
            taken = places[places >= 0].tolist()
            expected = fold_plainly(keys[row, head], values[row, head], taken, slots, mode)
            for ours, theirs in zip(new, expected, strict=True):
                torch.testing.assert_close(
                    ours[row, head][places >= 0].double(), theirs, atol=1e-5, rtol=1e-4
                )


@given(layers())
def test_what_takes_nothing_in_stays_as_it_was_and_nothing_leaves_the_range_of_the_values(layer):
    keys, values, kept, real = layer
    new_keys, new_values = fold_evicted(keys, values, kept, real, "values")
    heads = keys.shape[1]
    index = kept.expand(-1, heads, -1)
    there = index >= 0
    own = values.gather(2, index.clamp(min=0)[..., None].expand(-1, -1, -1, 3))
    assert torch.equal(
        new_keys[there], keys.gather(2, index.clamp(min=0)[..., None].expand(-1, -1, -1, 4))[there]
    )
    evicted = real.sum(-1) - there.sum(-1)
    changed = (new_values != own).any(-1) & there
    assert (changed.sum(-1) <= evicted).all()
    is_real = real.expand(-1, heads, -1)[..., None]
    low = values.masked_fill(~is_real, float("inf")).amin(2, keepdim=True) - 1e-5
    high = values.masked_fill(~is_real, float("-inf")).amax(2, keepdim=True) + 1e-5
    assert ((new_values >= low) & (new_values <= high))[there].all()


# -- in the cache ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["llama", "neox"])
def model(request, tiny_llama, tiny_neox):
    return {"llama": tiny_llama, "neox": tiny_neox}[request.param](4)


@pytest.mark.parametrize("mode", MERGING_MODES)
def test_heads_of_unequal_length_are_each_folded_by_themselves(model, mode):
    full = oracles.prefill(model, LONG, compression_ratio=1.0)
    merged = oracles.prefill(model, LONG, merging=mode, head_budgets="adaptive", **KEEP)
    lengths = set()
    for index in merged.layer_indices:
        ours, whole = merged.layers[index], full.layers[index]
        for head, kept in enumerate(oracles.kept_positions(merged, index)[0]):
            lengths.add((index, len(kept)))
            expected = fold_plainly(whole.keys[0, head], whole.values[0, head], kept, range(70), mode)
            for own, theirs in zip((ours.keys, ours.values), expected, strict=True):
                found = own[0, head, own.shape[2] - len(kept) :].double()
                torch.testing.assert_close(found, theirs, atol=1e-5, rtol=1e-4)
    assert len(lengths) > len(merged.layer_indices)


@pytest.mark.parametrize("mode", MERGING_MODES)
@pytest.mark.parametrize("strategy", ["uniform", *RANKED])
def test_the_outcome_is_one_folding_of_the_whole_cache(model, strategy, mode):
    """Whatever a strategy knows when, every evicted token is folded into the tokens that are kept in the end."""
    options = {**KEEP, "strategy": strategy}
    full = oracles.prefill(model, LONG, compression_ratio=1.0)
    dropped, merged = (oracles.prefill(model, LONG, merging=m, **options) for m in (None, mode))
    assert oracles.kept_tokens(merged) == oracles.kept_tokens(dropped)
    oracles.assert_bytes_match(merged)
    changed = 0
    for index in merged.layer_indices:
        ours, whole = merged.layers[index], full.layers[index]
        for head in range(whole.keys.shape[1]):
            kept = oracles.kept_positions(merged, index)[0][head]
            expected = fold_plainly(whole.keys[0, head], whole.values[0, head], kept, range(70), mode)
            for own, theirs in zip((ours.keys, ours.values), expected, strict=True):
                torch.testing.assert_close(own[0, head].double(), theirs, atol=1e-5, rtol=1e-4)
        changed += int((ours.values != dropped.layers[index].values).any())
        assert torch.equal(ours.keys, dropped.layers[index].keys) == (mode == "values")
    assert changed == len(merged.layer_indices)


@pytest.mark.parametrize("selector", ["h2o", "streaming_llm"])
def test_a_padded_row_is_folded_as_if_it_were_alone(model, selector):
    options = {**KEEP, "merging": "keys_and_values", "selector": selector, "head_budgets": None}
    oracles.assert_batch_invariant(model, [LONG, SHORT], **options)
    together = oracles.prefill(model, *oracles.left_pad([LONG, SHORT]), **options)
    alone = oracles.prefill(model, SHORT, **options)
    for index in alone.layer_indices:
        count = alone.kept_lengths[index]
        for ours, theirs in (
            (together.layers[index].values, alone.layers[index].values),
            (together.layers[index].keys, alone.layers[index].keys),
        ):
            torch.testing.assert_close(ours[1:, :, ours.shape[2] - count :], theirs, atol=1e-5, rtol=1e-4)


def test_a_prompt_in_chunks_is_folded_like_one_in_one_piece(model):
    options = {**KEEP, "merging": "values"}
    single = oracles.prefill(model, LONG, **options)
    chunked = RankKVCache(model, prefill="chunked", **options)
    for chunk in LONG.split(24, dim=1):
        oracles.forward(model, chunked, chunk)
    chunked.finish()
    assert oracles.kept_tokens(chunked) == oracles.kept_tokens(single)
    for ours, theirs in zip(chunked.layers, single.layers, strict=True):
        torch.testing.assert_close(ours.values, theirs.values, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("storage", ["int8", "offload"])
def test_what_is_stored_is_what_was_folded(model, storage):
    plain = oracles.prefill(model, LONG, merging="keys_and_values", **KEEP)
    stored = oracles.prefill(model, LONG, merging="keys_and_values", storage=storage, **KEEP)
    for ours, theirs in zip(stored.layers, plain.layers, strict=True):
        for own, other in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            error = other.abs().amax(-1, keepdim=True) / 127 if storage == "int8" else torch.zeros(1)
            assert ((own - other).abs() <= error * 0.51 + 1e-7).all()


def test_each_round_of_periodic_compression_folds_what_it_evicts(model):
    options = {**KEEP, "merging": "values", "decode": "periodic", "head_budgets": None}
    folded, whole = (oracles.prefill(model, LONG, decode_interval=n, **options) for n in (4, 100))
    for cache in (folded, whole):
        oracles.feed(model, cache, oracles.next_chunks(1, (1,) * 4))
    assert sum(folded.kept_lengths) < sum(whole.kept_lengths)
    for index in folded.layer_indices:
        ours, theirs = folded.layers[index], whole.layers[index]
        for head in range(ours.keys.shape[1]):
            slots = oracles.kept_positions(whole, index)[0][head]
            kept = [slots.index(position) for position in oracles.kept_positions(folded, index)[0][head]]
            pair = theirs.keys[0, head], theirs.values[0, head]
            _, expected = fold_plainly(*pair, kept, range(len(slots)), "values")
            torch.testing.assert_close(ours.values[0, head].double(), expected, atol=1e-5, rtol=1e-4)


def test_everything_kept_changes_nothing(model):
    for mode in MERGING_MODES:
        oracles.assert_identity(model, LONG, compression_ratio=1.0, merging=mode)
        cache = oracles.prefill(model, LONG, merging=mode, **KEEP)
        # The first token does not see the compressed cache.
        assert torch.equal(
            oracles.generate(model, LONG, RankKVCache(model, merging=mode, **KEEP), 1),
            oracles.generate(model, LONG, None, 1),
        )
        assert "merging" in cache.summary()


def test_a_saved_cache_goes_on_merging(model, tmp_path):
    cache = oracles.prefill(model, LONG, merging="values", **KEEP)
    restored = RankKVCache.load(cache.save(tmp_path / "cache.safetensors"), model)
    assert restored.config.merging == "values"
    assert torch.equal(restored.layers[0].values, cache.layers[0].values)


def test_what_cannot_be_merged_is_refused():
    with pytest.raises(ConfigError, match=r"merging='values' .* decode='bounded' evicts a single one"):
        RankKVConfig(merging="values", decode="bounded")
    with pytest.raises(UnknownNameError, match="unknown merging mode 'value'; did you mean 'values'"):
        RankKVConfig(merging="value")
