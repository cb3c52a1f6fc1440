"""TriAttention: its formula in complex numbers, its calibration, the files it reads, and what it refuses."""

from __future__ import annotations

import cmath
import json
from dataclasses import replace

import oracles
import pytest
import torch
from selector_conformance import CHECKS

from rankkv import RankKVCache, RankProfile
from rankkv.calibration.query_centres import (
    compute_query_centres,
    describe_query_centres,
    save_query_centres,
)
from rankkv.errors import ConfigError, InputError
from rankkv.observe.rotary import find_rotations
from rankkv.profile.known import describe_shape, sample_weights
from rankkv.selection import SELECTORS, get_selector
from rankkv.selection.triattention import load_query_centres

LENGTH, SHORT = 64, 41
PROMPTS = (oracles.random_prompt(LENGTH, seed=1), oracles.random_prompt(SHORT, seed=2))
TEXTS = [oracles.random_prompt(n, seed=n) for n in (50, 70)]


@pytest.fixture(scope="module", params=["llama", "neox"])
def model(request, tiny_llama, tiny_neox):
    return {"llama": tiny_llama, "neox": tiny_neox}[request.param]()


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    return save_query_centres(
        compute_query_centres(model, TEXTS), tmp_path_factory.mktemp("centres") / "c.json"
    )


def list_queries(model, prompt):
    """Return the queries ``[head][token][channel]`` of layer 1 before rotary embedding, from its projection."""
    kept = []
    is_llama = hasattr(model, "model")
    block = (model.model if is_llama else model.gpt_neox).layers[1]
    projection = block.self_attn.q_proj if is_llama else block.attention.query_key_value
    hook = projection.register_forward_hook(lambda module, inputs, output: kept.append(output[0]))
    try:
        oracles.forward(model, None, prompt)
    finally:
        hook.remove()
    heads = model.config.num_attention_heads
    width = model.config.hidden_size // heads
    return kept[0].unflatten(-1, (heads, -1))[..., :width].transpose(0, 1).double()


def list_pairs(model, vector):
    """Return a vector as complex numbers, each with its frequency; those that are not turned have frequency 0."""
    dim = len(vector)
    turned = dim if hasattr(model, "model") else dim // 4
    pairs = [
        (complex(vector[i], vector[i + turned // 2]), 10000.0 ** (-2 * i / turned))
        for i in range(turned // 2)
    ]
    half = (dim - turned) // 2
    return pairs + [(complex(vector[turned + i], vector[turned + half + i]), 0.0) for i in range(half)]


def test_centres_are_means_over_the_queries_of_the_texts(model, path):
    found = load_query_centres(path)
    assert sorted(found) == list(range(model.config.num_hidden_layers))
    queries = torch.cat([list_queries(model, text)[:, 4:] for text in TEXTS], dim=1)
    for head, rows in enumerate(queries):
        numbers = [[number for number, _ in list_pairs(model, row)] for row in rows]
        for pair, column in enumerate(zip(*numbers, strict=True)):
            centre, size = sum(column) / len(column), sum(map(abs, column)) / len(column)
            expected = torch.tensor([centre.real, centre.imag, size])
            torch.testing.assert_close(found[1][head, :, pair], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("padded", [False, True])
def test_the_score_is_the_largest_standardized_logit_of_the_group(model, path, padded):
    longest = 64
    prompts = PROMPTS if padded else PROMPTS[:1]
    layer = oracles.observe_layers(model, *oracles.left_pad(prompts))[1]
    layer = replace(layer, rotation=find_rotations(model, [1])[1])
    scores = get_selector("triattention", centres=path, longest=longest).compute_scores(layer)
    table = load_query_centres(path)[1].double()
    groups = layer.query.shape[1] // layer.keys.shape[1]
    for row, length in enumerate(layer.lengths):
        first = layer.key_length - length
        for head, keys in enumerate(layer.keys[row, :, first:].double()):
            own = []
            for query_head in range(head * groups, (head + 1) * groups):
                real, imaginary, sizes = table[query_head]
                logits = []
                for key in keys:
                    total = 0.0
                    for pair, (number, frequency) in enumerate(list_pairs(model, key)):
                        centre = complex(real[pair], imaginary[pair])
                        # The stored key is turned to its own position already, so the query goes to the later one.
                        later = [length - 1 + 2**power for power in range(7)]
                        turns = [
                            (centre * cmath.exp(1j * frequency * at) * number.conjugate()).real
                            for at in later
                        ]
                        total += sum(turns) / len(turns) + (float(sizes[pair]) - abs(centre)) * abs(number)
                    logits.append(total)
                logits = torch.tensor(logits)
                own.append((logits - logits.mean()) / logits.std(correction=0))
            expected = torch.stack(own).amax(dim=0)
            torch.testing.assert_close(scores[row, head, first:], expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("check", [name for name in CHECKS if name not in ("entry", "one token")])
def test_it_conforms_with_centres(model, path, check, monkeypatch):
    monkeypatch.setitem(SELECTORS, "triattention", get_selector("triattention", centres=path))
    CHECKS[check]("triattention", model)


@pytest.mark.parametrize("decode", ["bounded", "periodic"])
@pytest.mark.parametrize("positions", ["original", "packed"])
def test_generation_stays_at_its_budget(model, path, decode, positions):
    selector = get_selector("triattention", centres=path)
    options = {"budget": 30, "decode": decode, "decode_interval": 8, "positions": positions}
    cache = RankKVCache(model, selector=selector, strategy="uniform", **options)
    oracles.generate(model, PROMPTS[0], cache, new_tokens=33)
    assert all(30 <= kept <= (30 if decode == "bounded" else 38) for kept in cache.kept_lengths)


def test_head_budgets_and_bounded_decoding_take_each_head_s_own_centre(model, path):
    selector = get_selector("triattention", centres=path)
    options = {"head_budgets": "distortion", "budget": 30, "decode": "bounded"}
    oracles.assert_batch_invariant(model, PROMPTS, selector=selector, min_budget=3, **options)


def test_a_profile_holds_them_too(tiny_llama, tmp_path):
    model = tiny_llama()
    layers = list(range(model.config.num_hidden_layers))
    row = [[0.2]] * len(layers)
    profile = RankProfile(
        model=describe_shape(model), weight_sample=sample_weights(model), layer_indices=layers, ratios=[0.1],
        excess_loss=row, divergence=row, gain_loss=[0.1] * len(layers), gain_divergence=[0.1] * len(layers),
        base_ratio=0.1, query_centres=describe_query_centres(compute_query_centres(model, TEXTS)),
    )  # fmt: skip
    path = profile.save(tmp_path / "profile.json")
    assert RankProfile.load(path) == profile
    cache = oracles.prefill(model, PROMPTS[0], selector=get_selector("triattention", centres=path), budget=20)
    again = RankKVCache.load(cache.save(tmp_path / "cache.safetensors"), model)
    assert oracles.kept_tokens(again) == oracles.kept_tokens(cache)


def test_missing_and_foreign_centres_are_named(tiny_llama, tmp_path):
    with pytest.raises(ConfigError, match=r"needs centres.* rankkv calibrate --queries"):
        RankKVCache(tiny_llama(), selector="triattention")
    with pytest.raises(InputError, match="none are given"):
        get_selector("triattention").compute_scores(oracles.observe_random(tokens=20))
    fits = save_query_centres(compute_query_centres(tiny_llama(2), TEXTS), tmp_path / "two layers.json")
    wide = save_query_centres({0: torch.zeros(2, 3, 8)}, tmp_path / "wide.json")
    empty = tmp_path / "empty.json"
    empty.write_text("[]")
    numbers = tmp_path / "numbers.json"
    numbers.write_text(json.dumps({"format": "rankkv.query_centres/1", "layers": {"0": [[[1.0], [2.0]]]}}))
    for path, message in (
        (fits, "layer 2 .* are None"),
        (wide, r"are \(2, 3, 8\), but the layer needs \(4, 3, 8\)"),
        (empty, "holds no query centres of format"),
        (numbers, "has no table"),
        (tmp_path / "none.json", "no query centres at"),
        (3, "3 is no path of a file of query centres: .* centres=path"),
    ):
        with pytest.raises(InputError, match=message):
            oracles.prefill(tiny_llama(), PROMPTS[0], selector=get_selector("triattention", centres=path))


def test_calibration_names_what_it_lacks(tiny_llama):
    with pytest.raises(ConfigError, match="need tokenizer="):
        compute_query_centres(tiny_llama(), ["a text"])
    with pytest.raises(ConfigError, match="max_tokens=0 "):
        compute_query_centres(tiny_llama(), PROMPTS, max_tokens=0)
    with pytest.raises(InputError, match="no text"):
        compute_query_centres(tiny_llama(), [])
