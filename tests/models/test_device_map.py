"""Models over several devices, or whose weights wait elsewhere: they keep and say what they do on one device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import oracles
import pytest
import sharded_program
import torch
from calibrating import write_model_and_text
from generation_cases import VOCAB_SIZE, make_cases
from pretend_gpu import pretend_events
from split_devices import SplitDevices, dispatch
from transformers import DynamicCache

import rankkv
from rankkv import RankKVAnalyzer, RankKVCache, load_model
from rankkv.cache import compressor
from rankkv.models.fingerprint import compute_fingerprint
from rankkv.models.placement import find_input_device, find_layer_devices, list_weights, read_weight
from rankkv.profile.known import sample_weights

accelerate = pytest.importorskip("accelerate")

CASES = make_cases()
QUICK = [
    *(f"selector {name}" for name in ("snapkv", "h2o", "criticalkv", "expected_attention", "lava")),
    *(f"strategy {name}" for name in ("distortion", "cake")),
    *("padded", "beams", "sampling", "packed", "offload", "chunked", "bounded", "lookup", "head budgets"),
]
PROMPT = oracles.random_prompt(90, seed=4, vocab_size=VOCAB_SIZE)


@pytest.fixture(autouse=True)
def _shrinks_while_a_prompt_comes_in(monkeypatch):
    """Let a tiny model on GPUs shrink its layers again and again, as a large one does."""
    monkeypatch.setattr(compressor, "_SMALL_BYTES", 0)


@pytest.fixture(scope="module")
def build(tiny_llama: Callable[..., Any]) -> Callable[..., Any]:
    """Build the same model anew; tied embeddings, as small models have."""
    return functools.partial(
        tiny_llama, 4, vocab_size=VOCAB_SIZE, eos_token_id=None, tie_word_embeddings=True
    )


@pytest.fixture(scope="module")
def whole(build: Callable[..., Any]) -> Any:
    return build()


@pytest.fixture(scope="module")
def folder(whole: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    whole.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def alone(whole: Any) -> Callable[[str], dict[str, Any]]:
    """What the model keeps and says on one device, by case."""
    return functools.cache(lambda name: sharded_program.run(whole, CASES[name]))


# -- weights that wait on the disk or in CPU memory, fetched by accelerate for each forward ---------------------------


def make_map(*offloaded: str) -> dict[str, str]:
    names = ["model.embed_tokens", *(f"model.layers.{index}" for index in range(4)), "model.norm"]
    return {name: "disk" if name in offloaded else "cpu" for name in [*names, "model.rotary_emb", "lm_head"]}


@pytest.fixture(
    scope="module",
    params=[
        "all",
        pytest.param("some layers", marks=pytest.mark.slow),
        pytest.param("all, fetched from memory", marks=pytest.mark.slow),
    ],
)
def offloaded(request: pytest.FixtureRequest, folder: Path, build: Callable[..., Any]) -> Any:
    if request.param == "all, fetched from memory":
        return accelerate.cpu_offload(build(), execution_device=torch.device("cpu"))
    names = ["model.layers.1", "model.layers.3"]
    if request.param == "all":
        names = [name for name in make_map() if name != "model.rotary_emb"]
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map=make_map(*names)
    ).eval()


def skip_if_it_cannot_run(model: Any) -> None:
    try:
        oracles.forward(model, DynamicCache(config=model.config), PROMPT)
    except KeyError:
        if oracles.IS_NEWEST:
            raise
        pytest.skip("older transformers lose a tied weight that is offloaded: the plain forward fails too")


@pytest.fixture(scope="module")
def running(offloaded: Any) -> Any:
    skip_if_it_cannot_run(offloaded)
    return offloaded


# Where the embeddings are offloaded, transformers' own prompt lookup sends the ids to the meta device.
@pytest.mark.parametrize("name", [name for name in QUICK if name != "lookup"])
def test_offloaded_weights_change_nothing(running: Any, alone: Any, name: str) -> None:
    assert any(parameter.is_meta for parameter in running.parameters())
    assert sharded_program.run(running, CASES[name]) == alone(name)


def test_offloaded_weights_are_known(offloaded: Any, whole: Any) -> None:
    """A profile finds its model, and a saved cache too, wherever the weights are."""
    assert list(list_weights(offloaded)) == list(list_weights(whole))
    for name, weight in list_weights(whole).items():
        found = read_weight(offloaded, name)
        assert found is not None
        assert torch.equal(found, weight)
    assert sample_weights(offloaded) == sample_weights(whole)
    assert compute_fingerprint(offloaded) == compute_fingerprint(whole)
    assert find_input_device(offloaded) == torch.device("cpu")
    assert find_layer_devices(offloaded) == dict.fromkeys(range(4), torch.device("cpu"))


@pytest.mark.parametrize("positions", ["original", "packed"])
def test_a_cache_saved_from_the_whole_model_goes_on(
    running: Any, whole: Any, tmp_path: Path, positions: str
) -> None:
    cache = rankkv.compress(whole, PROMPT, compression_ratio=0.4, positions=positions)
    loaded = RankKVCache.load(cache.save(tmp_path / "cache.safetensors"), running)
    more = torch.cat([PROMPT, PROMPT[:, :5]], dim=1)
    assert oracles.generate(running, more, loaded).equal(oracles.generate(whole, more, cache))


def test_a_prompt_is_analyzed_and_measured_alike(running: Any, whole: Any) -> None:
    from rankkv.evaluation import record_prefill

    one, other = (RankKVAnalyzer(model, "it").analyze(PROMPT) for model in (whole, running))
    assert other == one
    caches = [record_prefill(model, PROMPT).build_cache(compression_ratio=0.4) for model in (whole, running)]
    assert oracles.kept_tokens(caches[0]) == oracles.kept_tokens(caches[1])


def test_load_model_takes_a_map_by_hand(whole: Any, alone: Any, tmp_path: Path) -> None:
    folder, _ = write_model_and_text(tmp_path, whole)
    model, _ = load_model(folder, device_map=make_map("model.embed_tokens", "model.layers.2", "lm_head"))
    skip_if_it_cannot_run(model)
    assert sharded_program.run(model, CASES["strategy distortion"]) == alone("strategy distortion")


# -- layers on several devices -----------------------------------------------------------------------------------------

MAPS = {
    "halves": ["cuda:0", "cuda:0", "cuda:1", "cuda:1", "cuda:1"],
    "to and fro": ["cuda:1", "cpu", "cuda:0", "cuda:1", "cuda:0"],
}


def make_split(kind: str) -> dict[str, str]:
    """Return a map whose first entry is where prompts go; the embeddings and the head they are tied to stay there."""
    *layers, norm = MAPS[kind]
    return {
        "model.embed_tokens": "cuda:0",
        "model.rotary_emb": "cuda:0",
        **{f"model.layers.{index}": device for index, device in enumerate(layers)},
        "model.norm": norm,
        "lm_head": "cuda:0",
    }


@pytest.fixture
def two_gpus() -> Iterator[None]:
    with SplitDevices(), pretend_events():
        yield


@pytest.fixture(scope="module", params=["to and fro", pytest.param("halves", marks=pytest.mark.slow)])
def split(request: pytest.FixtureRequest, build: Callable[..., Any]) -> Any:
    return dispatch(build(), make_split(request.param))


def check_places(cache: RankKVCache, devices: dict[int, torch.device]) -> None:
    """Check that all that a layer holds is where its weights are, and that budgets are plain numbers."""
    held = (
        "keys",
        "values",
        "kept_positions",
        "kept_valid",
        "running_scores",
        "query_moments",
    )
    for index in cache.layer_indices:
        for name in held:
            tensor = getattr(cache.layers[index], name)
            assert tensor is None or tensor.device == devices[index], (index, name)
    assert all(type(budget) is int for row in cache.budgets_per_row for budget in row)
    assert all(type(number) is float for row in cache.layer_measures_per_row for number in row)


def test_mixing_devices_is_noticed(two_gpus: None) -> None:
    first, second = torch.ones(3, device="cuda:0"), torch.ones(3, device="cuda:1")
    for mix in (
        lambda: first + second,
        lambda: torch.stack([first, second]),
        lambda: first + torch.ones(3),
        lambda: torch.equal(first, second),
        lambda: first[second.long()],
        lambda: torch.ones(3)[second.long()],
        lambda: first.index_select(0, torch.zeros(1, dtype=torch.long)),
    ):
        with pytest.raises(RuntimeError, match="same device"):
            mix()
    with pytest.raises(TypeError, match="cuda:0"):
        first.numpy()
    assert (first[1:].flip(0) + second.to("cuda:0")[:2]).device == torch.device("cuda:0")
    assert (first * torch.tensor(2.0)).device == torch.zeros_like(first).device == torch.device("cuda:0")
    assert first[torch.tensor([0])].to(second).device == second.argsort().device == torch.device("cuda:1")
    assert first.cpu().numpy().tolist() == second.tolist()
    moved = first.to("cuda:1")
    moved.zero_()
    assert first.sum() == 3


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CASES]
)
def test_split_layers_keep_and_say_the_same(split: Any, alone: Any, two_gpus: None, name: str) -> None:
    if name == "lookup" and not oracles.IS_NEWEST:
        pytest.skip("older transformers' prompt lookup fails by itself where there is no end token")
    assert sharded_program.run(split, CASES[name]) == alone(name)


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("strategy", [None, "lava"])
@pytest.mark.parametrize("decode", ["grow", "bounded"])
def test_what_a_layer_holds_stays_with_it(
    split: Any, two_gpus: None, num_beams: int, strategy: str | None, decode: str
) -> None:
    devices = find_layer_devices(split)
    assert len(set(devices.values())) > 1
    cache = RankKVCache(split, 0.4, strategy=strategy, decode=decode, selector="h2o", window_size=16)
    oracles.generate(split, PROMPT, cache, num_beams=num_beams)
    check_places(cache, devices)


@pytest.mark.parametrize("positions", ["original", "packed"])
def test_a_saved_cache_goes_back_to_the_layers_devices(
    split: Any, whole: Any, two_gpus: None, tmp_path: Path, positions: str
) -> None:
    cache = rankkv.compress(split, PROMPT, compression_ratio=0.4, positions=positions)
    loaded = RankKVCache.load(cache.save(tmp_path / "cache.safetensors"), split)
    check_places(loaded, find_layer_devices(split))
    more = torch.cat([PROMPT, PROMPT[:, :5]], dim=1)
    expected = oracles.generate(
        whole, more, rankkv.compress(whole, PROMPT, compression_ratio=0.4, positions=positions)
    )
    for one in (cache.copy(), loaded):
        assert oracles.generate(split, more, one).tolist() == expected.tolist()


def test_split_layers_are_analyzed_and_measured_alike(split: Any, whole: Any, two_gpus: None) -> None:
    from rankkv.cache.kept_tokens import analyze_kept_tokens
    from rankkv.evaluation import record_prefill

    for strategy in ("proportional", "lava"):
        one, other = (
            RankKVAnalyzer(model, "it", strategy=strategy).analyze(PROMPT) for model in (whole, split)
        )
        assert other == one
    caches = [record_prefill(model, PROMPT).build_cache(compression_ratio=0.4) for model in (whole, split)]
    assert oracles.kept_tokens(caches[0]) == oracles.kept_tokens(caches[1])
    counts = [analyze_kept_tokens(cache).counts.tolist() for cache in caches]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("method", ["measured", "gradient"])
def test_a_profile_is_measured_alike(split: Any, whole: Any, two_gpus: None, method: str) -> None:
    from rankkv.calibration import calibrate

    options = {
        "context_tokens": 64,
        "continuation_tokens": 16,
        "max_texts": 1,
        "name": "it",
        "method": method,
    }
    texts = [oracles.random_prompt(80, vocab_size=VOCAB_SIZE)]
    assert calibrate(split, None, texts, **options) == calibrate(whole, None, texts, **options)


# -- a GPU -------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: a map over cuda:0 and the CPU")
@pytest.mark.parametrize("last", ["cpu", "disk"])
@pytest.mark.parametrize("name", QUICK)
def test_a_gpu_and_what_does_not_fit_on_it(folder: Path, alone: Any, name: str, last: str) -> None:
    from transformers import AutoModelForCausalLM

    places = dict.fromkeys(make_map(), "cuda:0") | {"model.layers.2": last, "model.layers.3": last}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map=places).eval()
    found, expected = sharded_program.run(model, CASES[name]), alone(name)
    assert (found["text"], found["budgets"], found["kept"]) == tuple(
        expected[key] for key in ("text", "budgets", "kept")
    )
    cache = RankKVCache(model, 0.4)
    oracles.generate(model, PROMPT.to("cuda:0"), cache, num_beams=3)
    check_places(cache, find_layer_devices(model))
