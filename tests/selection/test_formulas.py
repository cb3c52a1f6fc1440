"""Each method's score against its formula in plain loops, on 64 tokens of tiny random models, padded and not.

Every row is scored here from its own tokens alone, so that a padded row has to equal the row without padding.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace

import oracles
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from rankkv import RankKVCache, compute_query_filters, save_query_filters
from rankkv.errors import ConfigError, InputError, UnknownNameError
from rankkv.models.compat import cache_argument
from rankkv.observe.queries import compute_query_moments
from rankkv.observe.rotary import find_rotations
from rankkv.selection import SELECTORS, get_selector
from rankkv.selection.qfilter import FORMAT, load_query_filters
from rankkv.selection.scoring import merge_ties

LENGTH, SHORT, WINDOW, SINKS = 64, 41, 16, 4
PROMPTS = (oracles.random_prompt(LENGTH, seed=1), oracles.random_prompt(SHORT, seed=2))


@pytest.fixture(scope="module", params=["llama", "neox"])
def model(request, tiny_llama, tiny_neox):
    return {"llama": tiny_llama, "neox": tiny_neox}[request.param]()


@pytest.fixture(scope="module", params=["alone", "padded"])
def layer(request, model):
    """Layer 1 of one row, or of a batch whose second row is padded."""
    prompts = PROMPTS[:1] if request.param == "alone" else PROMPTS
    return oracles.observe_layers(model, *oracles.left_pad(prompts), window_size=WINDOW, sink_size=SINKS)[1]


def list_rows(layer):
    """List each row's real tokens: ``(row, first, keys [kv_head][token], values, queries [head][token])``."""
    rows = []
    for row, length in enumerate(layer.lengths):
        first = layer.key_length - length
        rows.append(
            (row, first, *(t[row, :, first:].double() for t in (layer.keys, layer.values, layer.query)))
        )
    return rows


def assert_scores(layer, name, formula, **options):
    """Compare all scores of the selector with ``formula(keys, values, queries) -> [kv_head][token]``."""
    scores = get_selector(name, **options).compute_scores(layer)
    assert scores.dtype == torch.float32
    for row, first, keys, values, queries in list_rows(layer):
        expected = torch.tensor(formula(keys, values, queries), dtype=torch.float64)
        torch.testing.assert_close(scores[row, :, first:].double(), expected, atol=2e-5, rtol=1e-4)


def dot(one, other):
    return sum(float(a) * float(b) for a, b in zip(one, other, strict=True))


def norm(vector):
    return math.sqrt(dot(vector, vector))


def softmax(logits):
    top = max(logits)
    weights = [math.exp(logit - top) for logit in logits]
    return [weight / sum(weights) for weight in weights]


# -- attention of the newest query --------------------------------------------------------------------------


def test_tova_is_the_newest_query_s_attention_averaged_over_all_heads(layer):
    def formula(keys, values, queries):
        groups = len(queries) // len(keys)
        total = [0.0] * keys.shape[1]
        for head in range(len(queries)):
            logits = [dot(queries[head][-1], key) / math.sqrt(keys.shape[-1]) for key in keys[head // groups]]
            total = [a + b / len(queries) for a, b in zip(total, softmax(logits), strict=True)]
        return [total]

    assert_scores(layer, "tova", formula)


def test_tova_drops_the_token_that_the_newest_query_attends_to_least(tiny_llama):
    model = tiny_llama(attn_implementation="eager")
    selector = get_selector("tova", recent_fraction=0.0)
    options = {"budget": 20, "strategy": "uniform", "sink_size": 0, "decode": "bounded"}
    cache = oracles.prefill(model, PROMPTS[0], selector=selector, **options)
    for step in oracles.next_chunks(1, (1,) * 10):
        before = oracles.kept_tokens(cache)
        with torch.no_grad():
            output = model(step, output_attentions=True, use_cache=True, **cache_argument(cache))
        for kept, now, weights in zip(before, oracles.kept_tokens(cache), output.attentions, strict=True):
            held = [*kept[0][0], cache.seen_tokens - 1]
            least = min(range(20), key=lambda slot, weights=weights: float(weights[0, :, 0, slot].mean()))
            assert now[0][0] == now[0][1] == [token for token in held if token != held[least]]


# -- keys only ----------------------------------------------------------------------------------------------


def test_knorm_is_the_negative_norm(layer):
    assert_scores(
        layer, "knorm", lambda keys, values, queries: [[-norm(key) for key in head] for head in keys]
    )


def test_keydiff_is_the_negative_cosine_to_the_mean_direction(layer):
    def formula(keys, values, queries):
        scores = []
        for head in keys:
            directions = [[float(x) / norm(key) for x in key] for key in head]
            anchor = [sum(column) / len(head) for column in zip(*directions, strict=True)]
            scores.append([-dot(direction, anchor) / norm(anchor) for direction in directions])
        return scores

    assert_scores(layer, "keydiff", formula)


def test_keys_of_one_token_tie_in_the_first_layer(model):
    # Rotation turns them and leaves their norms equal, but for rounding: the earlier one is kept.
    prompt = PROMPTS[0].clone()
    prompt[0, 10::3] = prompt[0, 10]
    for name in ("knorm", "cur"):
        options = {"local_window": 0} if name == "cur" else {}
        first = oracles.observe_layers(model, prompt, window_size=WINDOW, sink_size=SINKS)[0]
        for head in get_selector(name, **options).compute_scores(first)[0]:
            assert len(set(head[10::3].tolist())) == 1


def test_ties_are_merged_and_nothing_else_moves():
    scores = torch.tensor([[5.0, 1.0, 1.0 + 5e-7, -2.0, -2.0 - 1e-6, 1.0 - 5e-7, 0.0, 1.1]])
    merged = merge_ties(scores)
    assert len(set(merged[0, [1, 2, 5]].tolist())) == len(set(merged[0, [3, 4]].tolist())) == 1
    assert merged[0, [0, 6, 7]].tolist() == scores[0, [0, 6, 7]].tolist()
    torch.testing.assert_close(merged, scores, rtol=2e-6, atol=0)
    apart = torch.randn(3, 2, 50, generator=torch.Generator().manual_seed(0)).round(decimals=3)
    assert torch.equal(merge_ties(apart), apart)


# -- keys and values ----------------------------------------------------------------------------------------


def plain_lagkv(keys, values, lag, across):
    scores = []
    for head_keys, head_values in zip(keys, values, strict=True):
        tokens = len(head_keys)
        parts = (tokens - SINKS) // lag
        if parts < 2:
            scores.append([1.0] * SINKS + [index / (tokens - SINKS) for index in range(tokens - SINKS)])
            continue
        row = [1.0] * tokens
        for part in range(parts - 1):
            start = SINKS + part * lag
            joined = [0.0] * lag
            for states in (head_keys, head_values):
                after = states[start + lag : start + 2 * lag]
                spreads = []
                for token in range(start, start + lag):
                    relative = []
                    for channel in range(states.shape[-1]):
                        column = [float(state[channel]) for state in after]
                        low, high = min(column), max(column)
                        relative.append((float(states[token][channel]) - low) / (high - low))
                    mean = sum(relative) / len(relative)
                    spreads.append(math.sqrt(sum((x - mean) ** 2 for x in relative) / (len(relative) - 1)))
                joined = [a + b / 2 for a, b in zip(joined, softmax(spreads), strict=True)]
            for index in range(lag):
                lower = sum(other < joined[index] for other in joined)
                row[start + index] = joined[index] if across else lower / lag
        scores.append(row)
    return scores


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("lag", [7, 16, 25])
def test_lagkv_is_the_spread_relative_to_the_next_partition(layer, lag, across):
    # With 25, 64 tokens are two partitions and the short row has none to compare.
    formula = lambda keys, values, queries: plain_lagkv(keys, values, lag, across)  # noqa: E731
    assert_scores(layer, "lagkv", formula, lag_size=lag, across=across)


def test_lagkv_of_a_channel_that_does_not_vary():
    constant = oracles.observe_random(tokens=40)
    constant.keys[..., 3] = 0.5
    constant.values[:] = 1.0
    assert torch.isfinite(get_selector("lagkv", lag_size=8, across=True).compute_scores(constant)).all()


def plain_cur(keys, values, leverage, window):
    scores = []
    for head_keys, head_values in zip(keys, values, strict=True):
        tokens = len(head_keys)
        size = window or tokens
        shares = []
        for states in (head_keys, head_values):
            squares = [dot(state, state) for state in states]
            local = [squares[index // size * size : index // size * size + size] for index in range(tokens)]
            shares.append([square / sum(near) for square, near in zip(squares, local, strict=True)])
        join = {
            "kv_product": lambda k, v: k * v,
            "kv_avg": lambda k, v: (k + v) / 2,
            "key": lambda k, v: k,
            "value": lambda k, v: v,
        }[leverage]
        joined = [join(k, v) for k, v in zip(*shares, strict=True)]
        scores.append([1.0] * SINKS + [share / sum(joined) for share in joined[SINKS:]])
    return scores


@pytest.mark.parametrize("window", [16, 7, 0])
@pytest.mark.parametrize("leverage", ["kv_product", "kv_avg", "key", "value"])
def test_cur_is_the_share_of_the_local_norms(layer, leverage, window):
    formula = lambda keys, values, queries: plain_cur(keys, values, leverage, window)  # noqa: E731
    assert_scores(layer, "cur", formula, leverage=leverage, local_window=window)


# -- statistics of queries ----------------------------------------------------------------------------------

FUTURE = 20


def unturned_queries(model, prompt, layer_idx=1):
    """Return the queries ``[head][token][channel]`` of a layer before rotary embedding, from its projection."""
    kept = []
    is_llama = hasattr(model, "model")
    block = (model.model if is_llama else model.gpt_neox).layers[layer_idx]
    projection = block.self_attn.q_proj if is_llama else block.attention.query_key_value
    hook = projection.register_forward_hook(lambda module, inputs, output: kept.append(output[0]))
    try:
        oracles.forward(model, None, prompt)
    finally:
        hook.remove()
    heads = model.config.num_attention_heads
    return (
        kept[0].unflatten(-1, (heads, -1))[..., : model.config.hidden_size // heads].transpose(0, 1).double()
    )


def mean_rotation(model, dim, start):
    """Return the mean rotary matrix of ``FUTURE`` positions from ``start`` on, pair by pair."""
    turned = dim if hasattr(model, "model") else dim // 4
    matrix = torch.eye(dim, dtype=torch.float64)
    for pair in range(turned // 2):
        other = pair + turned // 2
        frequency = 10000.0 ** (-2 * pair / turned)
        cos = sum(math.cos(frequency * position) for position in range(start, start + FUTURE)) / FUTURE
        sin = sum(math.sin(frequency * position) for position in range(start, start + FUTURE)) / FUTURE
        matrix[pair, pair], matrix[pair, other] = cos, -sin
        matrix[other, pair], matrix[other, other] = sin, cos
    return matrix


def plain_expected_attention(keys, values, queries, rotation, covariance, value_norms, epsilon):
    scaling, groups = keys.shape[-1] ** -0.5, len(queries) // len(keys)
    per_head = []
    for head in range(len(queries)):
        past = queries[head][SINKS:]
        mean = sum(past) / len(past)
        spread = sum(torch.outer(query - mean, query - mean) for query in past) / len(past)
        mean, spread = rotation @ mean, rotation @ spread @ rotation.T
        logits = []
        for key in keys[head // groups][SINKS:]:
            logit = scaling * float(key @ mean)
            logits.append(logit + covariance * scaling**2 / 2 * float(key @ spread @ key))
        per_head.append(softmax(logits))
    scores = []
    for head, head_values in enumerate(values):
        group = per_head[head * groups : (head + 1) * groups]
        own = [sum(column) / groups for column in zip(*group, strict=True)]
        if value_norms:
            own = [(x + epsilon) * norm(value) for x, value in zip(own, head_values[SINKS:], strict=True)]
        scores.append([max(own)] * SINKS + own)
    return scores


@pytest.mark.parametrize(
    "options",
    [{}, {"covariance": False}, {"value_norms": False}, {"epsilon": 0.5}],
    ids=["default", "mean alone", "no values", "epsilon"],
)
def test_expected_attention_is_that_of_normal_queries_at_later_positions(model, layer, options):
    layer = replace(layer, rotation=find_rotations(model, [1])[1])
    scores = get_selector("expected_attention", future_positions=FUTURE, **options).compute_scores(layer)
    options = {"covariance": True, "value_norms": True, "epsilon": 0.0, **options}
    for row, first, keys, values, _ in list_rows(layer):
        queries = unturned_queries(model, PROMPTS[row])
        rotation = mean_rotation(model, keys.shape[-1], layer.lengths[row])
        expected = plain_expected_attention(keys, values, queries, rotation, **options)
        expected = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(scores[row, :, first:].double(), expected, atol=1e-5, rtol=1e-3)


def test_expected_attention_of_a_row_of_sinks_alone():
    scores = get_selector("expected_attention").compute_scores(oracles.observe_random(tokens=3))
    assert torch.equal(scores, torch.zeros(1, 2, 3))


def test_expected_attention_gives_a_learned_sink_its_part():
    plain = oracles.observe_random(tokens=30)
    sunk = replace(plain, sink_logits=torch.full((4,), 50.0))
    selector = get_selector("expected_attention", value_norms=False)
    assert float(selector.compute_scores(plain)[..., SINKS:].sum()) == pytest.approx(2.0)
    assert float(selector.compute_scores(sunk)[..., SINKS:].sum()) < 1e-6


def plain_filters(queries, key_heads):
    """Return ``[key_head][channel]``: the first right singular vector of each head's queries, averaged over a group."""
    directions = []
    for head in queries:
        left, _, right = torch.linalg.svd(head.double(), full_matrices=False)
        directions.append(right[0] * (1 if float(left[:, 0].sum()) > 0 else -1))
    groups = len(directions) // key_heads
    return [sum(directions[i : i + groups]) / groups for i in range(0, len(directions), groups)]


def test_qfilter_without_filters_projects_on_the_prompt_s_own_queries(layer):
    def formula(keys, values, queries):
        filters = plain_filters(queries, len(keys))
        return [[dot(key, own) for key in head] for head, own in zip(keys, filters, strict=True)]

    assert_scores(layer, "qfilter", formula)


def test_qfilter_projects_on_the_filters_of_a_file(model, layer, tmp_path):
    texts = [oracles.random_prompt(n, seed=n) for n in (50, 70)]
    filters = compute_query_filters(model, [texts[0], texts[1][0]])
    assert sorted(filters) == [0, 1, 2]
    path = save_query_filters(filters, tmp_path / "filters.json")
    queries = torch.cat([oracles.observe_layers(model, text)[1].query[0] for text in texts], dim=-2)
    own = plain_filters(queries, layer.keys.shape[1])
    torch.testing.assert_close(filters[1].double(), torch.stack(own), atol=1e-4, rtol=1e-3)

    def formula(keys, values, queries):
        return [
            [dot(key, direction) for key in head] for head, direction in zip(keys, filters[1], strict=True)
        ]

    assert_scores(layer, "qfilter", formula, filters=str(path))


def test_filters_may_stand_inside_another_record_and_follow_a_cache_to_its_file(model, tmp_path):
    filters = compute_query_filters(model, PROMPTS)
    plain = save_query_filters(filters, tmp_path / "filters.json")
    inside = tmp_path / "profile.json"
    inside.write_text(json.dumps({"other": 1, "query_filters": json.loads(plain.read_text())}))
    caches = []
    for path in (plain, inside):
        selector = get_selector("qfilter", filters=path)
        cache = oracles.prefill(model, PROMPTS[0], selector=selector, budget=20)
        assert "stand in for calibration" not in cache.summary()
        caches.append(RankKVCache.load(cache.save(tmp_path / "cache.safetensors"), model))
        assert caches[-1].selector.options["filters"] == str(path)
    assert oracles.kept_tokens(caches[0]) == oracles.kept_tokens(caches[1])
    bare = oracles.prefill(model, PROMPTS[0], selector="qfilter", budget=20)
    assert "no filters given: the prompt's own queries stand in for calibration" in bare.summary()


def test_filters_that_do_not_fit_are_named(tiny_llama, tmp_path):
    filters = compute_query_filters(tiny_llama(2), PROMPTS[:1])
    fits = save_query_filters(filters, tmp_path / "two layers.json")
    wide = save_query_filters({0: torch.zeros(4, 16)}, tmp_path / "wide.json")
    empty = tmp_path / "empty.json"
    empty.write_text("[]")
    for path, message in (
        (fits, "no filter for layer 2: it was computed for another model"),
        (wide, r"layer 0 .* is \(4, 16\), but the layer's keys are \(2, 16\)"),
        (empty, "holds no query filters of format"),
        (tmp_path / "none.json", r"no query filters at .*none.json.*compute_query_filters\(\)"),
        (3, "3 is no path of a file of query filters: .* give filters="),
    ):
        selector = get_selector("qfilter", filters=path)
        with pytest.raises(InputError, match=message):
            oracles.prefill(tiny_llama(), PROMPTS[0], selector=selector)


def test_calibration_names_what_it_lacks(tiny_llama):
    model = tiny_llama()
    with pytest.raises(ConfigError, match="need tokenizer="):
        compute_query_filters(model, ["a text"])
    with pytest.raises(ConfigError, match="max_tokens=0 "):
        compute_query_filters(model, PROMPTS, max_tokens=0)
    with pytest.raises(InputError, match="no text"):
        compute_query_filters(model, [])
    with pytest.raises(InputError, match=r"of one text .* \(2, 5\)"):
        compute_query_filters(model, [torch.ones(2, 5, dtype=torch.long)])


def test_moments_of_parts_join_to_those_of_the_whole():
    whole = oracles.observe_random(tokens=40)
    expected = compute_query_moments(whole, "turned")
    first = replace(whole, query=whole.query[:, :, :17], query_valid=whole.query_valid[:, :17])
    rest = replace(
        whole,
        query=whole.query[:, :, 17:],
        query_valid=whole.query_valid[:, 17:],
        query_start=17,
        past_moments=compute_query_moments(first, "turned"),
    )
    torch.testing.assert_close(compute_query_moments(rest, "turned"), expected, atol=1e-5, rtol=1e-5)
    queries = whole.query[0].double()
    torch.testing.assert_close(expected[0, :, -1, :-1].double(), queries.mean(1))
    covariance = torch.stack([torch.cov(head.T, correction=0) for head in queries])
    torch.testing.assert_close(expected[0, :, :-1, :-1].double() / 40, covariance, atol=1e-5, rtol=1e-4)


WAYS = {
    "bounded": {"decode": "bounded"},
    "periodic": {"decode": "periodic", "decode_interval": 5, "window_size": 3},
    "packed": {"decode": "bounded", "positions": "packed"},
    "packed, periodic": {"decode": "periodic", "decode_interval": 5, "window_size": 3, "positions": "packed"},
    "chunked": {"decode": "bounded", "prefill": "chunked"},
    "streaming": {"decode": "bounded", "prefill": "streaming"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("padded", [False, True])
def test_queries_that_are_gone_still_count(model, way, padded):
    # The first layer's queries do not depend on what was evicted, so that one long forward has the same.
    ids, mask = oracles.left_pad(PROMPTS[: 1 + padded])
    steps = oracles.next_chunks(len(ids), (1,) * 20)
    cache = RankKVCache(model, budget=24, selector="expected_attention", **WAYS[way])
    chunks = [ids] if "prefill" not in WAYS[way] else ids.split(23, dim=1)
    seen = 0
    for chunk in chunks:
        seen += chunk.shape[1]
        oracles.forward(model, cache, chunk, mask[:, :seen])
    oracles.feed(model, cache, steps, mask)
    assert cache.layers[0].width < 64
    ours = cache.layers[0].query_moments
    for row, prompt in enumerate(PROMPTS[: 1 + padded]):
        whole = torch.cat([prompt, *(step[row : row + 1] for step in steps)], dim=1)
        queries = unturned_queries(model, whole, layer_idx=0)[:, SINKS:]
        expected = compute_query_moments(
            replace(oracles.observe_random(tokens=queries.shape[1]), query=queries[None].float()), "turned"
        )[0]
        torch.testing.assert_close(ours[row], expected, atol=2e-3, rtol=1e-3)


def test_nothing_of_past_queries_is_held_that_is_not_needed(tiny_llama):
    model = tiny_llama()
    for options in ({}, {"prefill": "chunked"}, {"selector": "snapkv", "decode": "bounded"}):
        cache = RankKVCache(model, 0.3, **{"selector": "expected_attention", **options})
        chunks = [PROMPTS[0]] if "prefill" not in options else PROMPTS[0].split(16, dim=1)
        oracles.feed(model, cache, [*chunks, *oracles.next_chunks(1, (1, 1))])
        assert all(layer.query_moments is None for layer in cache.layers)


def test_a_model_of_learned_positions_is_scored_as_it_is_and_told():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4)).eval()
    with pytest.warns(UserWarning, match="how GPT2LMHeadModel applies positions .* not known.*unchanged"):
        cache = RankKVCache(model, 0.3, selector="expected_attention")
    oracles.forward(model, cache, PROMPTS[0])
    assert sum(cache.budgets) == round(0.3 * LENGTH * 2)


# -- keys of other widths and heads -------------------------------------------------------------------------


KEY_SCORES = [
    name
    for name, known in SELECTORS.items()
    if known.needs in ("keys only", "keys and values") and not known.required
]


@pytest.mark.parametrize("name", KEY_SCORES)
def test_key_heads_that_share_a_cached_head_are_averaged(name):
    # Latent attention: four key heads, values of another width, one head in the cache.
    latent = oracles.observe_random(tokens=30, heads=4, key_heads=4, kv_heads=1, value_dim=6)
    # Options with which a score is linear in what is averaged.
    options = {"lagkv": {"lag_size": 6, "across": True}, "cur": {"leverage": "kv_avg"}}.get(name, {})
    selector = get_selector(name, **options)
    scores = selector.compute_scores(latent)
    assert scores.shape == (1, 1, 30)
    own = oracles.observe_random(tokens=30, heads=4, key_heads=4, kv_heads=4, value_dim=6)
    expected = selector.compute_scores(own).mean(dim=1, keepdim=True)
    torch.testing.assert_close(scores, expected)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("lagkv", {"lag_size": 1}, ConfigError, "lag_size=1 .* at least 2"),
        ("lagkv", {"lag_size": 2.5}, ConfigError, "lag_size=2.5 .* at least 2"),
        ("cur", {"local_window": -1}, ConfigError, "local_window=-1 .* at least 0"),
        ("expected_attention", {"future_positions": 0}, ConfigError, "future_positions=0 .* at least 1"),
        ("expected_attention", {"epsilon": -0.1}, ConfigError, "epsilon=-0.1 .* 0 or more"),
        ("cur", {"leverage": "keys"}, UnknownNameError, "'keys'; did you mean 'key'"),
    ],
)
def test_wrong_values_are_named(name, options, error, message):
    with pytest.raises(error, match=message):
        get_selector(name, **options).compute_scores(oracles.observe_random(tokens=20))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[1.0, 2.0], 5], "layer 0 has no table"),
        ([[1.0, 2.0], []], "layer 0 has no table"),
        ([[1.0, True]], "something other than finite numbers"),
        ([[1.0, "x"]], "something other than finite numbers"),
        ([[1.0, 1e300]], "beyond float32"),
    ],
)
def test_filters_that_are_not_tables_of_numbers_are_named(rows, message, tmp_path):
    path = tmp_path / "filters.json"
    path.write_text(json.dumps({"format": FORMAT, "layers": {"0": rows}}))
    with pytest.raises(InputError, match=message):
        load_query_filters(path)


def test_filters_of_a_large_model_are_read(tmp_path):
    """128 heads of 256 numbers, at full precision: 0.7 MB for each layer."""
    path, numbers = (
        tmp_path / "filters.json",
        torch.rand(128, 256, generator=torch.Generator().manual_seed(0)),
    )
    path.write_text(json.dumps({"format": FORMAT, "layers": {"0": numbers.tolist(), "1": numbers.tolist()}}))
    assert path.stat().st_size > 1_000_000
    assert torch.equal(load_query_filters(path)[1], numbers)
