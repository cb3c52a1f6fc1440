"""Tests of saved caches from outside: each loads right or is refused in one sentence, before anything is built."""

from __future__ import annotations

import contextlib
import json
import os
import random
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rankkv import RankKVCache, compress
from rankkv.errors import CacheStateError, InputError, OutputError, RankKVError
from rankkv.models.compat import cache_argument

PROMPT = torch.randint(3, 128, (1, 90), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model(tiny_llama):
    return tiny_llama(3, eos_token_id=None)


@pytest.fixture(
    scope="module",
    params=[{}, {"head_budgets": None}, {"decode": "bounded"}, {"positions": "packed"}],
    ids=str,
)
def saved(request, model, tmp_path_factory):
    """A cache, its file, and what the file holds."""
    cache = compress(model, PROMPT, compression_ratio=0.4, **request.param)
    path = cache.save(tmp_path_factory.mktemp("caches") / "cache.safetensors")
    with safe_open(str(path), framework="pt") as file:
        header = json.loads(file.metadata()["rankkv"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return cache, header, tensors


def write(path, header, tensors):
    save_file(tensors, str(path), metadata={"rankkv": json.dumps(header)})
    return path


def score(model, cache):
    with torch.no_grad():
        return model(input_ids=torch.tensor([[7]]), **cache_argument(cache.copy())).logits


def test_a_file_as_it_was_written_loads(model, saved, tmp_path):
    cache, header, tensors = saved
    loaded = RankKVCache.load(write(tmp_path / "same", header, tensors), model)
    assert torch.equal(score(model, loaded), score(model, cache))


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (
            lambda header, tensors: tensors.update({"1.keys": tensors["1.keys"].to(torch.int32)}),
            "'1.keys' is int32",
        ),
        (
            lambda header, tensors: tensors["1.keys"].flatten()[:1].fill_(float("nan")),
            "'1.keys' holds NaN",
        ),
        (
            lambda header, tensors: tensors["2.values"].flatten()[:1].fill_(float("inf")),
            "'2.values' holds NaN or infinite",
        ),
        (lambda header, tensors: tensors.update({"9.keys": tensors["1.keys"].clone()}), "a tensor '9.keys'"),
        (
            lambda header, tensors: tensors.update({"-1.keys": tensors["1.keys"].clone()}),
            "a tensor '-1.keys'",
        ),
        (lambda header, tensors: tensors.update({"0.update": torch.zeros(1)}), "a tensor '0.update'"),
        (lambda header, tensors: tensors.pop("0.values"), "the tensor '0.values' is missing"),
        (
            lambda header, tensors: tensors.update({"0.keys": tensors["0.keys"][..., :-1].clone()}),
            "'0.keys' is",
        ),
        (
            lambda header, tensors: tensors.update({"0.keys": tensors["0.keys"][:, :, 1:].clone()}),
            "'0.values' is",
        ),
        (
            lambda header, tensors: [record.update(seen=300_000_000) for record in header["layers"]],
            "but has seen 300000000",
        ),
        (lambda header, tensors: header["layers"][0].update(seen=91), "layer 1 has seen 90 tokens"),
        (
            lambda header, tensors: header["layers"][0].update(update=1),
            "layer 0 has the unknown entry 'update'",
        ),
        (
            lambda header, tensors: header["layers"].pop(),
            "it has 2 compressed of 2 layers, the model has 3 of 3",
        ),
        (
            lambda header, tensors: header["flow"].update(row_start=[-1]),
            "row_start is -1, it must be an integer from 0",
        ),
        (
            lambda header, tensors: header["flow"].update(compressed=False),
            "its flow has the unknown entry 'compressed'",
        ),
        (
            lambda header, tensors: header["plans"][0].update(budgets=[1]),
            "budgets is [1], it must be a list of 3 entries",
        ),
        (
            lambda header, tensors: header["plans"][0].update(length="x"),
            "the length of a plan is 'x', it must be an integer",
        ),
        (lambda header, tensors: header.update(format="rankkv-cache-9"), "holds no RankKV cache of format"),
        (lambda header, tensors: header.pop("options"), "options is None"),
        (lambda header, tensors: header["options"].update(merging="values"), "an option that is gone"),
    ],
)
def test_what_is_wrong_is_named(model, saved, tmp_path, change, fragment):
    _, header, tensors = saved
    header, tensors = (
        json.loads(json.dumps(header)),
        {name: tensor.clone() for name, tensor in tensors.items()},
    )
    change(header, tensors)
    with pytest.raises(InputError) as caught:
        RankKVCache.load(write(tmp_path / "broken", header, tensors), model)
    assert fragment in str(caught.value)


def test_a_layer_that_differs_from_the_first_is_named_where_projections_are_fused(tmp_path):
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": None}
    model = Phi3ForCausalLM(Phi3Config(**sizes, **heads)).eval()
    cache = compress(model, PROMPT, compression_ratio=0.4, head_budgets=None)
    path = cache.save(tmp_path / "cache.safetensors")
    with safe_open(str(path), framework="pt") as file:
        header = json.loads(file.metadata()["rankkv"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert RankKVCache.load(write(tmp_path / "same", header, tensors), model).seen_tokens == 90
    tensors["2.keys"] = tensors["2.keys"][..., :-2].clone()
    with pytest.raises(InputError, match=r"'2.keys' is"):
        RankKVCache.load(write(tmp_path / "broken", header, tensors), model)


def damage(draw, content, header, tensors):
    """Return the bytes of a file with one random damage."""
    kind = draw.choice(["cut", "flip", "header", "rename", "drop"])
    if kind == "cut":
        return content[: draw.randrange(len(content))]
    if kind == "flip":
        place = draw.randrange(min(len(content), draw.choice([64, 4096, len(content)])))
        return content[:place] + bytes([content[place] ^ (1 << draw.randrange(8))]) + content[place + 1 :]
    header = json.loads(json.dumps(header))
    if kind == "header":
        spot = header
        while True:
            keys = list(spot) if isinstance(spot, dict) else list(range(len(spot)))
            key = draw.choice(keys)
            if isinstance(spot[key], dict | list) and spot[key] and draw.random() < 0.8:
                spot = spot[key]
                continue
            spot[key] = draw.choice([None, -1, 10**12, "x", [], {}, 0.5, True, [[[]]]])
            break
    tensors = dict(tensors)
    name = draw.choice(sorted(tensors))
    if kind == "rename":
        tensors[draw.choice(["0.crop", "7.keys", name + "x", "keys"])] = tensors.pop(name).clone()
    if kind == "drop":
        del tensors[name]
    from safetensors.torch import save

    return save(tensors, metadata={"rankkv": json.dumps(header)})


@pytest.mark.parametrize("count", [25, pytest.param(500, marks=pytest.mark.slow)])
def test_a_damaged_file_is_refused_or_loads_right(model, saved, tmp_path, count):
    _, header, tensors = saved
    path = write(tmp_path / "whole", header, tensors)
    content, draw = path.read_bytes(), random.Random(5)
    for number in range(count):
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(damage(draw, content, header, tensors))
        # Anything but an error of this library, or a right answer, fails here.
        with contextlib.suppress(RankKVError):
            assert torch.isfinite(score(model, RankKVCache.load(path, model))).all()
        path.unlink()


def test_a_cache_knows_the_adapter_it_was_made_with(tiny_llama, tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny_llama(3, eos_token_id=None)
    options = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, "r": 4}
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**options), adapter_name="a")
    wrapped.add_adapter("b", peft.LoraConfig(**options))
    wrapped.set_adapter("a")
    path = compress(wrapped, PROMPT, compression_ratio=0.4).save(tmp_path / "cache.safetensors")
    assert RankKVCache.load(path, wrapped).seen_tokens == 90
    wrapped.set_adapter("b")
    with pytest.raises(
        InputError, match=r"saved with adapter 'a' of LlamaForCausalLM .*, loaded with adapter 'b'"
    ):
        RankKVCache.load(path, wrapped)
    wrapped.set_adapter("a")
    with (
        wrapped.disable_adapter(),
        pytest.raises(InputError, match=r"with adapter 'a' of .*, loaded with no adapter"),
    ):
        RankKVCache.load(path, wrapped)
    wrapped.add_adapter("idle", peft.LoraConfig(**options))
    wrapped.set_adapter("a")
    assert RankKVCache.load(path, wrapped).seen_tokens == 90
    wrapped.merge_adapter()
    with pytest.raises(InputError, match=r"with adapter 'a' of .*, loaded with merged adapter 'a'"):
        RankKVCache.load(path, wrapped)


def test_another_dtype_and_another_rope_are_named(tiny_llama, tmp_path):
    model = tiny_llama(3, eos_token_id=None)
    path = compress(model, PROMPT, compression_ratio=0.4).save(tmp_path / "cache.safetensors")
    with pytest.raises(InputError, match=r"float32\), loaded with .*bfloat16\)"):
        RankKVCache.load(path, tiny_llama(3, eos_token_id=None).to(torch.bfloat16))
    other = tiny_llama(
        3, eos_token_id=None, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    )
    with pytest.raises(InputError, match=r"saved with rope default .*, loaded with rope linear"):
        RankKVCache.load(path, other)


def test_saving_follows_a_link_and_keeps_the_usual_mode(model, tmp_path):
    cache = compress(model, PROMPT, compression_ratio=0.4)
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.safetensors"
    link.symlink_to(tmp_path / "real" / "cache.safetensors")
    cache.save(link)
    assert link.is_symlink()
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((tmp_path / "real" / "cache.safetensors").stat().st_mode) == 0o666 & ~umask


def test_a_place_that_cannot_be_written_is_one_sentence(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        compress(model, PROMPT, compression_ratio=0.4).save(tmp_path / "file" / "cache.safetensors")


def test_a_changed_bit_in_a_key_is_noticed(model, tmp_path):
    path = compress(model, PROMPT, compression_ratio=0.4).save(tmp_path / "cache.safetensors")
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="its digest differs"):
        RankKVCache.load(path, model)


def test_a_cache_that_holds_nan_is_not_saved(model, tmp_path):
    cache = compress(model, PROMPT, compression_ratio=0.4, head_budgets=None)
    cache.layers[1].keys[0, 0, 0, 0] = float("nan")
    with pytest.raises(CacheStateError, match=r"cannot be saved: '1\.keys' holds NaN"):
        cache.save(tmp_path / "cache.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("offset", [[[-3], [5]], [[-3]]], ids=["one per row", "one for all rows"])
def test_offset_holes_and_prompt_return(model, tmp_path, offset):
    cache = compress(model, PROMPT.repeat(2, 1), compression_ratio=0.4)
    cache._schedule.position_offset, cache._schedule.holes = torch.tensor(offset), [0, 2]
    loaded = RankKVCache.load(cache.save(tmp_path / "cache.safetensors"), model)
    assert loaded._schedule.position_offset.tolist() == offset
    assert loaded._schedule.holes == [0, 2]
    assert torch.equal(loaded.prompt_ids, cache.prompt_ids)


@pytest.mark.parametrize("offset", [[[1], [2], [3]], [1, 2], [[1, 2], [3, 4]]], ids=str)
def test_an_offset_that_does_not_fit_the_rows_is_refused(model, tmp_path, offset):
    cache = compress(model, PROMPT.repeat(2, 1), compression_ratio=0.4)
    cache._schedule.position_offset = torch.tensor(offset)
    with pytest.raises(CacheStateError, match=r"position_offset is .* must be a list of"):
        cache.save(tmp_path / "cache.safetensors")


def test_a_file_of_the_first_format_is_refused_where_adapters_are(tmp_path):
    from rankkv import load_model

    peft = pytest.importorskip("peft")
    folder = Path(__file__).resolve().parents[1] / "data" / "written_before"
    wrapped = peft.get_peft_model(load_model(folder / "model")[0], peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(InputError, match="did not note the adapters in use"):
        RankKVCache.load(folder / "default.safetensors", wrapped)
