"""``model.generate(custom_generate=...)``: a function, and a folder that RankKV wrote."""

from __future__ import annotations

import dataclasses
import inspect
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, TextStreamer
from typer.testing import CliRunner

from rankkv import RankKVCache, RankKVConfig
from rankkv.cli import app
from rankkv.errors import CacheStateError, ConfigError, InputError, UnknownNameError
from rankkv.integrations.generate import custom_generate, export_generate, generate
from rankkv.models.compat import cache_argument
from rankkv.selection import get_selector

IDS = torch.randint(3, 128, (2, 90), generator=torch.Generator().manual_seed(5))
GREEDY = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0}
WAYS = {
    "greedy": GREEDY,
    "sampled": {**GREEDY, "do_sample": True, "temperature": 2.0},
    "beams": {**GREEDY, "num_beams": 3},
    "several": {**GREEDY, "do_sample": True, "num_return_sequences": 2},
}


@pytest.fixture(scope="module")
def model(tiny_llama):
    return tiny_llama()


@pytest.fixture(autouse=True)
def modules_of_transformers(tmp_path, monkeypatch):
    """transformers copies a folder's code before it runs it: here into a place of the test's own."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))


def mask_of(ids):
    mask = torch.ones_like(ids)
    mask[1, :17] = 0
    return mask


def run(model, cache=None, **options):
    torch.manual_seed(3)
    cache = {} if cache is None else cache_argument(cache)
    return model.generate(IDS, attention_mask=mask_of(IDS), **options, **cache)


@pytest.mark.parametrize("way", WAYS)
def test_the_function_gives_what_the_cache_gives(model, way):
    options = {"compression_ratio": 0.3, "selector": "h2o"}
    expected = run(model, RankKVCache(model, **options), **WAYS[way])
    assert run(model, custom_generate=custom_generate, **options, **WAYS[way]).equal(expected)
    config = RankKVConfig(**options)
    assert run(model, custom_generate=custom_generate, config=config, **WAYS[way]).equal(expected)


@pytest.mark.parametrize("way", WAYS)
def test_the_folder_gives_what_the_cache_gives(model, way, tmp_path):
    folder = export_generate(tmp_path / "out", compression_ratio=0.3, selector=get_selector("h2o"))
    expected = run(model, RankKVCache(model, 0.3, selector="h2o"), **WAYS[way])
    found = run(model, custom_generate=str(folder), trust_remote_code=True, **WAYS[way])
    assert found.equal(expected)


@pytest.mark.parametrize("way", ["greedy", "beams"])
def test_everything_kept_is_plain_generate(model, way, tmp_path):
    plain = run(model, **WAYS[way])
    folder = str(export_generate(tmp_path / "out"))
    assert run(model, custom_generate=custom_generate, compression_ratio=1.0, **WAYS[way]).equal(plain)
    given = {"custom_generate": folder, "trust_remote_code": True, "compression_ratio": 1.0}
    assert run(model, **given, **WAYS[way]).equal(plain)


def test_what_is_returned_holds_the_compressed_cache(model, tmp_path):
    folder = str(export_generate(tmp_path / "out", budget=32))
    given = {"return_dict_in_generate": True, **GREEDY}
    for output in (
        run(model, custom_generate=custom_generate, budget=32, **given),
        run(model, custom_generate=folder, trust_remote_code=True, **given),
    ):
        cache = output.get("cache") if output.get("cache") is not None else output["past_key_values"]
        assert isinstance(cache, RankKVCache)
        assert sum(cache.budgets) == 32 * len(cache.budgets)


def test_options_of_a_call_go_before_those_of_the_folder(model, tmp_path):
    folder = str(
        export_generate(
            tmp_path / "out",
            budget=32,
            selector="h2o",
            strategy="power",
            strategy_options={"exponent": 2},
            protect=[(0, 3)],
        )
    )
    given = {
        "custom_generate": folder, "trust_remote_code": True, "return_dict_in_generate": True, **GREEDY,
    }  # fmt: skip

    def config_of(**options):
        output = run(model, **given, **options)
        return (output.get("cache") if output.get("cache") is not None else output["past_key_values"]).config

    own = config_of()
    assert (own.budget, str(own.selector), own.protect) == (32, "h2o", ((0, 3),))
    assert own.resolve_strategy() == ("power", {"exponent": 2})
    assert (config_of(compression_ratio=0.5).budget, config_of(compression_ratio=0.5).compression_ratio) == (
        None,
        0.5,
    )
    assert config_of(strategy="uniform").resolve_strategy() == ("uniform", {})
    assert str(config_of(selector="tova").selector) == "tova"


def test_a_selector_s_options_are_written(model, tmp_path):
    selector = get_selector("criticalkv", base=get_selector("snapkv", kernel_size=3), epsilon=0.01)
    folder = str(export_generate(tmp_path / "out", compression_ratio=0.3, selector=selector))
    expected = run(model, RankKVCache(model, 0.3, selector=selector), **GREEDY)
    assert run(model, custom_generate=folder, trust_remote_code=True, **GREEDY).equal(expected)


def test_a_folder_with_weights_compresses_by_itself(model, tmp_path):
    model.save_pretrained(tmp_path / "out")
    export_generate(tmp_path / "out", compression_ratio=0.3)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    expected = run(model, RankKVCache(model, 0.3), **GREEDY)
    assert run(loaded, **GREEDY).equal(expected)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert run(plain, **GREEDY).equal(run(model, **GREEDY))


def test_the_whole_call_works_as_a_function_too(model, capsys):
    expected = run(model, RankKVCache(model, 0.3), **GREEDY)
    options = {"attention_mask": mask_of(IDS), "compression_ratio": 0.3, **GREEDY}
    assert generate(model, IDS, **options).equal(expected)
    assert generate(model, input_ids=IDS, **options).equal(expected)


def test_a_cache_that_is_given_is_used(model, tmp_path):
    expected = run(model, RankKVCache(model, 0.3), **GREEDY)
    folder = str(export_generate(tmp_path / "out", compression_ratio=1.0))
    for given in (
        {"custom_generate": custom_generate},
        {"custom_generate": folder, "trust_remote_code": True},
    ):
        cache = RankKVCache(model, 0.3)
        assert run(model, cache, **given, **GREEDY).equal(expected)
        assert cache.seen_tokens == IDS.shape[1] + 4
        with pytest.raises(ConfigError, match="a cache is given, but budget can"):
            run(model, RankKVCache(model), budget=8, **given, **GREEDY)


def test_tokens_that_rankkv_has_not_seen_are_refused(model):
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS[:, :40], **cache_argument(cache))
    with pytest.raises(CacheStateError, match="has not seen"):
        run(model, cache, custom_generate=custom_generate, **GREEDY)


def test_another_kind_of_cache_is_refused(model):
    with pytest.raises(ConfigError, match="requests a StaticCache"):
        run(model, custom_generate=custom_generate, cache_implementation="static", **GREEDY)


def test_other_ways_of_decoding_are_refused(model):
    with pytest.raises(ConfigError, match="does not decode by assisted generation"):
        model.generate(IDS[:1], custom_generate=custom_generate, prompt_lookup_num_tokens=3, **GREEDY)


def test_the_signature_names_every_option():
    """transformers hands on what a function's signature names, and refuses the rest."""
    parameters = inspect.signature(custom_generate).parameters
    for item in dataclasses.fields(RankKVConfig):
        assert parameters[item.name].default == item.default


def test_a_misspelt_option_is_refused_by_transformers(model):
    with pytest.raises(ValueError, match="compresion_ratio"):
        run(model, custom_generate=custom_generate, compresion_ratio=0.3, **GREEDY)


def test_the_command_writes_the_same_folder(tmp_path):
    arguments = ["--compression-ratio", "0.2", "--selector", "h2o", "--strategy", "power"]
    arguments += ["--strategy-option", "exponent=2", "--option", "window_size=16"]
    result = CliRunner().invoke(app, ["export-generate", str(tmp_path / "a"), *arguments])
    assert result.exit_code == 0, result.output
    options = {"strategy_options": {"exponent": 2}, "window_size": 16}
    export_generate(tmp_path / "b", compression_ratio=0.2, selector="h2o", strategy="power", **options)
    names = ("custom_generate/generate.py", "custom_generate/requirements.txt", "README.md")
    for name in names:
        assert (tmp_path / "a" / name).read_text() == (tmp_path / "b" / name).read_text()
    card = (tmp_path / "a" / "README.md").read_text()
    assert "custom_generate" in card.split("---")[1]
    assert json.loads(card.split("```json")[1].split("```")[0])["compression_ratio"] == 0.2


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"compresion_ratio": 0.3}, ConfigError),
        ({"budget": 0}, ConfigError),
        ({"selector": "h20"}, UnknownNameError),
    ],
)
def test_a_wrong_option_is_found_before_anything_is_written(tmp_path, options, error):
    with pytest.raises(error):
        export_generate(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write to"):
        export_generate(tmp_path / "file")


def test_streaming_works_from_the_folder(embedded, tiny_llama, tmp_path, capsys):
    tokenizer = embedded[1]
    model = tiny_llama(vocab_size=len(tokenizer))
    folder = str(export_generate(tmp_path / "out", compression_ratio=0.3))
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    options = {"custom_generate": folder, "trust_remote_code": True, "streamer": streamer}
    output = model.generate(IDS[:1], **options, **GREEDY)
    assert capsys.readouterr().out.strip() == tokenizer.decode(output[0, IDS.shape[1] :]).strip()
