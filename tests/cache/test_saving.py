"""Compressed caches on disk: they go on where they stopped, and only with the model they came from."""

from __future__ import annotations

import copy
import gc
import json
import struct

import oracles
import pytest
import torch
from safetensors.torch import save_file

from rankkv import RankKVCache, compress
from rankkv.cache import saving as cache_files
from rankkv.errors import CacheStateError, InputError
from rankkv.selection import get_selector

PROMPT = oracles.random_prompt(90, seed=1)
SHORT = oracles.random_prompt(33, seed=2)

MODES = [
    {"decode": decode, "positions": positions, "storage": storage, "decode_interval": 8}
    for decode in ("grow", "bounded", "periodic")
    for positions in ("original", "packed")
    for storage in ("full", "int8", "offload")
]


@pytest.fixture(scope="module")
def llama(tiny_llama):
    return tiny_llama()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "some" / "cache.safetensors"


def assert_goes_on_alike(model, cache, loaded, chunks, mask):
    for ours, theirs in zip(
        oracles.feed(model, loaded, chunks, mask), oracles.feed(model, cache, chunks, mask), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert oracles.kept_tokens(loaded) == oracles.kept_tokens(cache)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: "-".join(map(str, mode.values())))
@pytest.mark.parametrize("steps", [0, 5])
def test_a_loaded_cache_goes_on_as_the_saved_one(llama, path, mode, steps):
    # Five steps end between two compressions of the periodic mode, with queries held for the next.
    ids, mask = oracles.left_pad([PROMPT, SHORT])
    cache = oracles.prefill(llama, ids, mask, budget=24, min_budget=5, **mode)
    oracles.feed(llama, cache, oracles.next_chunks(2, (1,) * steps), mask)
    mask = torch.cat([mask, mask.new_ones(2, steps)], dim=-1)
    assert cache.save(path) == path
    loaded = RankKVCache.load(path, llama)
    assert loaded.config.to_dict() == cache.config.to_dict()
    assert loaded.summary() == cache.copy().summary()
    assert loaded.cache_bytes() == cache.copy().cache_bytes()
    assert loaded.budgets_per_row == cache.budgets_per_row
    assert loaded.layer_ranks_per_row == cache.layer_ranks_per_row
    assert oracles.kept_tokens(loaded) == oracles.kept_tokens(cache)
    assert_goes_on_alike(llama, cache, loaded, oracles.next_chunks(2, (*[1] * 12, 4, 1), seed=70), mask)


@pytest.mark.parametrize("strategy", ["cake", "dynamickv", "uniform"])
def test_what_was_measured_is_saved(llama, path, strategy):
    cache = oracles.prefill(llama, PROMPT, budget=24, strategy=strategy)
    loaded = RankKVCache.load(cache.save(path), llama)
    assert loaded.layer_measures_per_row == cache.layer_measures_per_row
    assert loaded.layer_ranks == []
    assert loaded.summary() == cache.copy().summary()


@pytest.mark.parametrize("selector", oracles.ONE_PASS)
@pytest.mark.parametrize("decode", ["bounded", "periodic"])
def test_scores_go_on_with_every_selector(llama, path, selector, decode):
    cache = oracles.prefill(llama, PROMPT, budget=24, selector=selector, decode=decode, decode_interval=8)
    oracles.feed(llama, cache, oracles.next_chunks(1, (1,) * 5))
    loaded = RankKVCache.load(cache.save(path), llama)
    chunks = oracles.next_chunks(1, (1,) * 25, seed=70)
    assert_goes_on_alike(llama, cache, loaded, chunks, torch.ones(1, 95, dtype=torch.long))


def test_generating_from_a_loaded_context(llama, path):
    context = compress(llama, PROMPT, selector="h2o", recompress_turns=True, protect=[(3, 9)])
    question = torch.cat([PROMPT, oracles.random_prompt(40, 5)], dim=-1)
    loaded = RankKVCache.load(context.save(path), llama)
    assert torch.equal(oracles.generate(llama, question, loaded), oracles.generate(llama, question, context))
    assert oracles.kept_tokens(loaded) == oracles.kept_tokens(context)


def test_a_streaming_prefill_goes_on(llama, path):
    cache = RankKVCache(llama, budget=24, prefill="streaming")
    oracles.feed(llama, cache, PROMPT[:, :60].split(20, dim=1))
    loaded = RankKVCache.load(cache.save(path), llama)
    chunks = [PROMPT[:, 60:], *oracles.next_chunks(1)]
    assert_goes_on_alike(llama, cache, loaded, chunks, torch.ones(1, 60, dtype=torch.long))


def test_options_of_the_selector_and_spans_return(llama, path):
    selector = get_selector("snapkv", pooling="avg", kernel_size=3, recent_fraction=0.25)
    cache = oracles.prefill(
        llama,
        PROMPT,
        selector=selector,
        protect=[(3, 9), (20, 22)],
        strategy="power",
        strategy_options={"exponent": 2.0},
    )
    loaded = RankKVCache.load(cache.save(path), llama)
    assert str(loaded.selector) == str(selector)
    assert loaded.config.protect == ((3, 9), (20, 22))
    assert loaded.config.resolve_strategy() == ("power", {"exponent": 2.0})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(llama, path, dtype):
    model = copy.deepcopy(llama).to(dtype)
    cache = oracles.prefill(model, PROMPT)
    loaded = RankKVCache.load(cache.save(path), model)
    for ours, theirs in zip(loaded.layers, cache.layers, strict=True):
        assert ours.keys.dtype == dtype
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)


# -- only the model it came from ------------------------------------------------------------------------------


def change_one_weight(model):
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.mul_(1.1)
    return model


def test_another_model_is_refused(llama, tiny_llama, tiny_neox, path):
    oracles.prefill(llama, PROMPT).save(path)
    others = {
        "other weights": tiny_llama(seed=1),
        "other shape": tiny_llama(num_layers=2),
        "other family": tiny_neox(),
        "other dtype": tiny_llama().bfloat16(),
        # An adapter or a fine-tune changes what is in the middle, not the embeddings.
        "fine-tuned": change_one_weight(tiny_llama()),
        "other positions": tiny_llama(
            rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
        ),
    }
    for name, other in others.items():
        with pytest.raises(InputError, match="was saved from another model"):
            print(name, RankKVCache.load(path, other))
    # The same weights on another backend, or another object, are the same model.
    for same in (tiny_llama(), tiny_llama(attn_implementation="eager")):
        assert RankKVCache.load(path, same).seen_tokens == 90


# -- files that are none ------------------------------------------------------------------------------------


def test_a_missing_file(llama, path):
    with pytest.raises(InputError, match="is not a file"):
        RankKVCache.load(path, llama)
    path.mkdir(parents=True)
    with pytest.raises(InputError, match="is not a file"):
        RankKVCache.load(path, llama)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_a_truncated_file(llama, path, keep):
    oracles.prefill(llama, PROMPT).save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match="is not a safetensors file"):
        RankKVCache.load(path, llama)


def test_other_files(llama, tmp_path):
    text = tmp_path / "text"
    text.write_text("no tensors here, " * 10)
    with pytest.raises(InputError, match="is not a safetensors file"):
        RankKVCache.load(text, llama)
    weights = tmp_path / "weights"
    save_file({"a": torch.zeros(2)}, weights)
    with pytest.raises(InputError, match="holds no RankKV cache"):
        RankKVCache.load(weights, llama)
    for record in ('{"format": "rankkv-cache-0"}', "[]", "null", "{", '{"format": "rankkv-cache-1"}'):
        save_file({"a": torch.zeros(2)}, weights, metadata={"rankkv": record})
        with pytest.raises(InputError):
            RankKVCache.load(weights, llama)


def edit(path, change):
    """Rewrite the description in a saved file."""
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    record = json.loads(header["__metadata__"]["rankkv"])
    change(record)
    header["__metadata__"]["rankkv"] = json.dumps(record)
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + raw[8 + size :])


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record["options"].update(unknown_option=1),
        lambda record: record["options"].update(decode="sideways"),
        lambda record: record.pop("plans"),
        lambda record: record["layers"].pop(),
    ],
    ids=["new option", "unknown mode", "no plans", "a layer less"],
)
def test_a_description_that_does_not_fit(llama, path, change):
    oracles.prefill(llama, PROMPT).save(path)
    edit(path, change)
    with pytest.raises(InputError, match=r"cache\.safetensors"):
        RankKVCache.load(path, llama)


# -- writing --------------------------------------------------------------------------------------------------


def test_nothing_but_safetensors_is_written(llama, path):
    oracles.prefill(llama, PROMPT, positions="packed", selector="h2o", decode="bounded").save(path)
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    stored = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    assert len(raw) == 8 + size + stored
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_write_that_fails_leaves_the_old_file(llama, path, monkeypatch):
    oracles.prefill(llama, PROMPT).save(path)
    before = path.read_bytes()

    def fail(tensors, target, metadata):
        with open(target, "wb") as file:
            file.write(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(cache_files, "save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        oracles.prefill(llama, SHORT).save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_an_unfinished_cache_is_not_saved(llama, path):
    empty = RankKVCache(llama)
    chunked = RankKVCache(llama, prefill="chunked")
    oracles.forward(llama, chunked, PROMPT)
    drafted = RankKVCache(llama)
    drafted.activate_past_recording()
    oracles.forward(llama, drafted, PROMPT)
    for cache in (empty, chunked, drafted):
        with pytest.raises(CacheStateError, match=r"not compressed yet: call finish\(\)"):
            cache.save(path)
    assert not path.exists()
    assert RankKVCache.load(chunked.finish().save(path), llama).budgets == chunked.budgets


def test_a_cache_outlives_its_model_only_in_memory(tiny_llama, path):
    cache = oracles.prefill(tiny_llama(), PROMPT)
    gc.collect()
    with pytest.raises(CacheStateError, match="the model of this cache is gone"):
        cache.save(path)
