"""Every selector that kvpress has too keeps the same tokens, or differs exactly as its docstring states."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import oracles
import peers
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from rankkv import compute_query_filters, save_query_filters
from rankkv.selection import get_selector
from rankkv.selection.compactor import build_sketch

WINDOW = 16
SINKS = 4
LAG = 32
NEWEST = "the newest token is always kept"
EMBEDDED_TOKENS = 500
TINY_TOKENS = 160
#: Kept fractions; a layer's budget is the number of tokens that kvpress keeps at one minus this.
KEPT = (0.5, 0.25)


def same(scores: Tensor) -> Tensor:
    return scores


@dataclass(frozen=True)
class Method:
    """One selector and the press it answers to, set to the same options.

    ``expect`` turns kvpress' scores into those the selector should have, and ``newest`` more tokens are protected than
    kvpress protects; where either changes the tokens kept, ``difference`` is what the docstring states.
    """

    build_press: Callable[[Any, float], Any]
    selector: str
    options: Mapping[str, Any] = field(default_factory=dict)
    window_size: int = WINDOW
    sink_size: int = 0
    backend: str = "sdpa"
    expect: Callable[[Tensor], Tensor] = same
    newest: int = 0
    difference: str = ""
    same_scores: bool = True
    atol: float = 1e-6


def divide_out_queries(scores: Tensor) -> Tensor:
    """Turn the mean over the queries that see a key into the sum over them."""
    length = scores.shape[-1]
    return scores * torch.arange(length, 0, -1)


METHODS = {
    "snapkv": Method(
        lambda kvpress, ratio: kvpress.SnapKVPress(ratio, window_size=WINDOW, kernel_size=5),
        "snapkv",
        {"pooling": "avg", "kernel_size": 5},
    ),
    "snapkv, no pooling": Method(
        lambda kvpress, ratio: kvpress.SnapKVPress(ratio, window_size=WINDOW, kernel_size=1),
        "snapkv",
        {"kernel_size": 1},
    ),
    "streaming_llm": Method(
        lambda kvpress, ratio: kvpress.StreamingLLMPress(ratio, n_sink=SINKS),
        "streaming_llm",
        sink_size=SINKS,
        same_scores=False,
    ),
    "tova": Method(
        lambda kvpress, ratio: kvpress.TOVAPress(ratio),
        "tova",
        {"recent_fraction": 0.0},
        window_size=1,
    ),
    "knorm": Method(
        lambda kvpress, ratio: kvpress.KnormPress(ratio),
        "knorm",
        {"recent_fraction": 0.0},
        window_size=1,
        newest=1,
        difference=NEWEST,
    ),
    "keydiff": Method(
        lambda kvpress, ratio: kvpress.KeyDiffPress(ratio),
        "keydiff",
        {"recent_fraction": 0.0},
        window_size=1,
        newest=1,
        difference=NEWEST,
    ),
    "lagkv": Method(
        lambda kvpress, ratio: kvpress.LagKVPress(ratio, n_sink=SINKS, lag_size=LAG),
        "lagkv",
        {"recent_fraction": 0.0, "lag_size": LAG},
        window_size=1,
        sink_size=SINKS,
    ),
    "lagkv, across": Method(
        lambda kvpress, ratio: kvpress.LagKVPress(ratio, n_sink=SINKS, lag_size=LAG, cross_scoring=True),
        "lagkv",
        {"recent_fraction": 0.0, "lag_size": LAG, "across": True},
        window_size=1,
        sink_size=SINKS,
    ),
    "expected_attention": Method(
        lambda kvpress, ratio: kvpress.ExpectedAttentionPress(ratio, n_future_positions=64, n_sink=SINKS),
        "expected_attention",
        {"recent_fraction": 0.0, "future_positions": 64},
        window_size=1,
        sink_size=SINKS,
        newest=1,
        difference=NEWEST,
    ),
    "expected_attention, mean": Method(
        lambda kvpress, ratio: kvpress.ExpectedAttentionPress(
            ratio, n_future_positions=64, n_sink=SINKS, use_covariance=False, use_vnorm=False
        ),
        "expected_attention",
        {"recent_fraction": 0.0, "future_positions": 64, "covariance": False, "value_norms": False},
        window_size=1,
        sink_size=SINKS,
        newest=1,
        difference=NEWEST,
    ),
    "capkv": Method(
        lambda kvpress, ratio: kvpress.CapPress(ratio, n_future_positions=64, n_sink=SINKS),
        "capkv",
        {"recent_fraction": 0.0, "future_positions": 64},
        window_size=1,
        sink_size=SINKS,
        newest=1,
        difference=NEWEST,
    ),
    "cur": Method(
        lambda kvpress, ratio: kvpress.CURPress(compression_ratio=ratio, num_sinks=SINKS),
        "cur",
        {"recent_fraction": 0.0},
        window_size=1,
        sink_size=SINKS,
        newest=1,
        difference=NEWEST,
    ),
    "cur, mean": Method(
        lambda kvpress, ratio: kvpress.CURPress(
            compression_ratio=ratio, num_sinks=SINKS, leverage_type="kv_avg", local_window_size=8
        ),
        "cur",
        {"recent_fraction": 0.0, "leverage": "kv_avg", "local_window": 8},
        window_size=1,
        sink_size=SINKS,
        newest=1,
        difference=NEWEST,
    ),
    "cur, all tokens": Method(
        lambda kvpress, ratio: kvpress.CURPress(
            compression_ratio=ratio, num_sinks=SINKS, use_local_approximation=False
        ),
        "cur",
        {"recent_fraction": 0.0, "local_window": 0},
        window_size=1,
        sink_size=SINKS,
        newest=1,
        difference=NEWEST,
    ),
    "criticalkv": Method(
        lambda kvpress, ratio: kvpress.CriticalKVPress(
            kvpress.SnapKVPress(ratio, window_size=WINDOW, kernel_size=5)
        ),
        "criticalkv",
        {"base": get_selector("snapkv", pooling="avg", kernel_size=5)},
        same_scores=False,
    ),
    "criticalkv, one stage": Method(
        lambda kvpress, ratio: kvpress.CriticalKVPress(
            kvpress.SnapKVPress(ratio, window_size=WINDOW), first_stage_ratio=0.0
        ),
        "criticalkv",
        {"base": get_selector("snapkv", pooling="avg"), "first_stage_ratio": 0.0},
    ),
    "h2o": Method(
        lambda kvpress, ratio: kvpress.ObservedAttentionPress(ratio),
        "h2o",
        window_size=1,
        newest=1,
        backend="eager",
        expect=divide_out_queries,
        difference="column sums, not means over the queries that see a key",
    ),
}


def find_ratio(length: int, kept: int) -> float:
    """Return the fraction removed at which kvpress keeps ``kept`` of ``length`` tokens."""
    return 1.0 - (kept + 0.5) / length


def compare(method: Method, name: str, model: Any, input_ids: Tensor, tally: Any) -> list[str]:
    import kvpress

    length, faults = input_ids.shape[1], []
    for fraction in KEPT:
        kept = int(fraction * length)
        with peers.attention_backend(model, method.backend):
            press = method.build_press(kvpress, find_ratio(length, kept))
            theirs = peers.run_kvpress(model, input_ids, press)
            ours = peers.run_rankkv(
                model,
                input_ids,
                method.selector,
                kept,
                dict(method.options),
                window_size=method.window_size,
                sink_size=method.sink_size,
            )
        assert len(ours) == len(theirs) == model.config.num_hidden_layers
        for layer, (mine, peer) in enumerate(zip(ours, theirs, strict=True)):
            assert [len(row) for row in peer.kept] == [kept] * model.config.num_key_value_heads
            scores = method.expect(peer.scores)
            if method.same_scores:
                free = slice(method.sink_size, length - method.window_size)
                torch.testing.assert_close(mine.scores[:, free], scores[:, free], rtol=1e-3, atol=method.atol)
            ranked = scores.clone()
            ranked[:, length - method.newest :] = float("inf")
            expected = peers.pick_highest(ranked, [kept] * len(scores))
            for head, (own, other) in enumerate(zip(mine.kept, peer.kept, strict=True)):
                verdict = peers.compare_kept(own, other, peer.scores[head])
                if verdict == "different" and method.difference:
                    as_stated = peers.compare_kept(own, expected[head], ranked[head])
                    verdict = "different" if as_stated == "different" else "stated"
                tally(name, verdict, method.difference)
                if verdict == "different":
                    faults.append(
                        f"kept {kept}, layer {layer}, head {head}: {peers.describe_difference(own, other)}"
                    )
    return faults


@pytest.mark.parametrize("name", METHODS)
def test_on_the_embedded_model(name, embedded, python_docs, tally):
    model, tokenizer = embedded
    ids = tokenizer(python_docs[:4000], return_tensors="pt").input_ids[:, :EMBEDDED_TOKENS]
    assert ids.shape[1] == EMBEDDED_TOKENS
    assert compare(METHODS[name], name, model, ids, tally) == []


@pytest.mark.parametrize("family", peers.TINY_FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_on_tiny_models(name, family, tally):
    model = peers.build_tiny(family)
    assert compare(METHODS[name], name, model, oracles.random_prompt(TINY_TOKENS), tally) == []


def build_qfilter(model: Any, calibration: Tensor | None, prompt: Tensor, path: Any) -> Method:
    """Give a press the filters that RankKV computes, where it would load those that were published for the model.

    Published ones point away from the queries, so theirs are RankKV's times -1.  Without ``calibration`` RankKV takes
    the directions of the prompt's own queries, and the press what a calibration on the prompt gives.
    """
    filters = compute_query_filters(model, [prompt if calibration is None else calibration])
    published = -torch.stack([filters[layer] for layer in range(model.config.num_hidden_layers)])

    def build_press(kvpress: Any, ratio: float) -> Any:
        press = kvpress.QFilterPress(ratio)
        press.q_filters = published
        # What a press does on entering a model, and here would look up the model's name on the hub.
        press.post_init_from_model = lambda model: None
        return press

    options: dict[str, Any] = {"recent_fraction": 0.0}
    if calibration is not None:
        options["filters"] = save_query_filters(filters, path)
    return Method(build_press, "qfilter", options, window_size=1, newest=1, difference=NEWEST)


@pytest.mark.parametrize("own", [False, True], ids=["calibrated", "own queries"])
def test_qfilter_on_the_embedded_model(own, embedded, python_docs, tally, tmp_path):
    model, tokenizer = embedded
    ids = tokenizer(python_docs[:8000], return_tensors="pt").input_ids
    prompt, other = ids[:, :EMBEDDED_TOKENS], ids[:, EMBEDDED_TOKENS : 2 * EMBEDDED_TOKENS]
    assert other.shape[1] == EMBEDDED_TOKENS
    method = build_qfilter(model, None if own else other, prompt, tmp_path / "filters.json")
    assert compare(method, "qfilter, own queries" if own else "qfilter", model, prompt, tally) == []


@pytest.mark.parametrize("own", [False, True], ids=["calibrated", "own queries"])
@pytest.mark.parametrize("family", peers.TINY_FAMILIES)
def test_qfilter_on_tiny_models(family, own, tally, tmp_path):
    model, prompt = peers.build_tiny(family), oracles.random_prompt(TINY_TOKENS)
    other = None if own else oracles.random_prompt(2 * TINY_TOKENS, seed=1)
    method = build_qfilter(model, other, prompt, tmp_path / "filters.json")
    assert compare(method, "qfilter, own queries" if own else "qfilter", model, prompt, tally) == []


def build_compactor(monkeypatch: Any, chunk: int, key_dim: int, blending: float | None) -> Method:
    """Give the press RankKV's sketch, where it would draw its own, and chunks that leave no remainder."""
    sketch = build_sketch(key_dim, 48) * 48**0.5
    draw = torch.randn

    def draw_known(*shape: Any, **options: Any) -> Tensor:
        return sketch.expand(*shape) if shape[2:] == sketch.shape else draw(*shape, **options)

    monkeypatch.setattr(torch, "randn", draw_known)

    def build_press(kvpress: Any, ratio: float) -> Any:
        return kvpress.CompactorPress(ratio, chunk_size=chunk, blending=blending)

    options = {"recent_fraction": 0.0, "chunk_size": chunk, "blending": blending}
    # kvpress inverts X^T X in float32, which loses half of the digits.
    return Method(build_press, "compactor", options, window_size=4, sink_size=8, atol=5e-3)


def test_compactor_on_the_embedded_model(embedded, python_docs, tally, monkeypatch):
    model, tokenizer = embedded
    ids = tokenizer(python_docs[:4000], return_tensors="pt").input_ids[:, :EMBEDDED_TOKENS]
    method = build_compactor(monkeypatch, 122, model.config.head_dim, 0.5)
    assert compare(method, "compactor", model, ids, tally) == []


@pytest.mark.parametrize("blending", [0.0, 0.75])
@pytest.mark.parametrize("family", peers.TINY_FAMILIES)
def test_compactor_on_tiny_models(family, blending, tally, monkeypatch):
    model = peers.build_tiny(family)
    method = build_compactor(monkeypatch, 37, 16, blending)
    assert compare(method, "compactor", model, oracles.random_prompt(TINY_TOKENS), tally) == []


def test_compactor_s_last_chunk_has_no_padding_where_that_of_kvpress_takes_part():
    """Each empty query of kvpress gives every key an equal share, and empty keys take attention."""
    from kvpress.presses.non_causal_attention_press import NonCausalAttnPress

    chunk, rest = 20, 7
    query, key = (torch.randn(1, 1, rest, 8, generator=torch.Generator().manual_seed(n)) for n in (1, 2))
    theirs = NonCausalAttnPress.non_causal_chunked_attn(query, key, chunk)[0, 0]
    logits = (query @ key.mT)[0, 0].exp()
    empty = chunk - rest
    padded = (logits / (logits.sum(-1, keepdim=True) + empty)).sum(0) + empty / chunk
    torch.testing.assert_close(theirs, padded)
    assert not torch.allclose(theirs, logits.div(logits.sum(-1, keepdim=True)).sum(0), rtol=0.05)


def compare_chunks(model: Any, input_ids: Tensor, base: str, chunks: int, tally: Any) -> None:
    """Keep ``chunks`` of the prompt's whole chunks of ``WINDOW`` tokens, so that the newest of them is the window."""
    import kvpress

    length, window = input_ids.shape[1], WINDOW if base == "snapkv" else 1
    # kvpress rounds the number of chunks down.
    ratio = 1.0 - (chunks + 0.5) / (length // WINDOW)
    presses = {"snapkv": kvpress.SnapKVPress(ratio, window_size=WINDOW), "knorm": kvpress.KnormPress(ratio)}
    press = kvpress.ChunkKVPress(presses[base], chunk_length=WINDOW)
    theirs = peers.run_kvpress(model, input_ids, press, presses[base])
    options = {"pooling": "avg"} if base == "snapkv" else {}
    ours = peers.run_rankkv(
        model,
        input_ids,
        "chunkkv",
        chunks * WINDOW,
        {"base": get_selector(base, **options), "chunk_length": WINDOW},
        window_size=window,
        sink_size=0,
    )
    for mine, peer in zip(ours, theirs, strict=True):
        means = peer.scores.double().mean(0).view(-1, WINDOW).mean(-1)
        for own, other in zip(mine.kept, peer.kept, strict=True):
            assert len(own) == len(other) == chunks * WINDOW
            difference = ""
            if not own.equal(other) and base == "knorm":
                difference = "the newest token is protected, and the last chunk cut for it"
                assert own[-1] == length - 1
                own = own[:-1]
            # With one token less, a chunk is still one of those kept.
            touched = [kept.div(WINDOW, rounding_mode="floor").unique() for kept in (own, other)]
            verdict = peers.compare_kept(*touched, means)
            tally(
                f"chunkkv of {base}", "stated" if difference and verdict == "equal" else verdict, difference
            )
            assert verdict != "different", peers.describe_difference(own, other)


@pytest.mark.parametrize("base", ["snapkv", "knorm"])
def test_chunks_on_the_embedded_model(base, embedded, python_docs, tally):
    model, tokenizer = embedded
    ids = tokenizer(python_docs[:4000], return_tensors="pt").input_ids[
        :, : EMBEDDED_TOKENS // WINDOW * WINDOW
    ]
    for chunks in (8, 16):
        compare_chunks(model, ids, base, chunks, tally)


@pytest.mark.parametrize("base", ["snapkv", "knorm"])
@pytest.mark.parametrize("family", peers.TINY_FAMILIES)
def test_chunks_on_tiny_models(base, family, tally):
    ids = oracles.random_prompt(TINY_TOKENS)
    for chunks in (3, 5, 8):
        compare_chunks(peers.build_tiny(family), ids, base, chunks, tally)


def compare_head_budgets(model: Any, input_ids: Tensor, floor: float, tally: Any) -> None:
    import kvpress

    length = input_ids.shape[1]
    for fraction in KEPT:
        kept = int(fraction * length)
        scorer = kvpress.SnapKVPress(find_ratio(length, kept), window_size=WINDOW)
        press = kvpress.AdaKVPress(scorer, alpha_safeguard=floor)
        theirs = peers.run_kvpress(model, input_ids, press, scorer)
        ours = peers.run_rankkv(
            model,
            input_ids,
            "snapkv",
            kept,
            {"pooling": "avg"},
            window_size=WINDOW,
            sink_size=0,
            head_budgets="adaptive",
            head_floor=floor,
        )
        for mine, peer in zip(ours, theirs, strict=True):
            heads = len(peer.kept)
            assert sum(map(len, mine.kept)) == sum(map(len, peer.kept)) == kept * heads
            joined = [peers.join_heads(run.kept, length) for run in (mine, peer)]
            verdict = peers.compare_kept(*joined, peer.scores.flatten())
            for own, other in zip(mine.kept, peer.kept, strict=True):
                tally("head budgets (AdaKV)", "equal" if own.equal(other) else verdict)
            assert verdict != "different", peers.describe_difference(*joined)


def test_head_budgets_on_the_embedded_model(embedded, python_docs, tally):
    model, tokenizer = embedded
    ids = tokenizer(python_docs[:4000], return_tensors="pt").input_ids[:, :EMBEDDED_TOKENS]
    compare_head_budgets(model, ids, 0.2, tally)


@pytest.mark.parametrize("floor", [0.0, 0.2, 0.7])
@pytest.mark.parametrize("family", peers.TINY_FAMILIES)
def test_head_budgets_on_tiny_models(family, floor, tally):
    compare_head_budgets(peers.build_tiny(family), oracles.random_prompt(TINY_TOKENS), floor, tally)


@pytest.mark.parametrize("kept", [WINDOW + 1, WINDOW + 4, 2 * WINDOW - 1])
def test_snapkv_below_two_windows_keeps_half_a_budget_of_its_window(kept):
    """kvpress keeps the whole window whatever the budget; here it fills no more than half of it unless it scores."""
    import kvpress

    model, ids = peers.build_tiny("llama"), oracles.random_prompt(TINY_TOKENS)
    press = kvpress.SnapKVPress(find_ratio(TINY_TOKENS, kept), window_size=WINDOW, kernel_size=5)
    theirs = peers.run_kvpress(model, ids, press)
    options = {"pooling": "avg", "kernel_size": 5}
    ours = peers.run_rankkv(model, ids, "snapkv", kept, options, window_size=WINDOW, sink_size=0)
    split, protected = TINY_TOKENS - WINDOW, TINY_TOKENS - kept // 2
    differing = 0
    for mine, peer in zip(ours, theirs, strict=True):
        for head, (own, other) in enumerate(zip(mine.kept, peer.kept, strict=True)):
            assert len(own) == len(other) == kept
            assert set(range(split, TINY_TOKENS)) <= set(other.tolist())
            assert set(range(protected, TINY_TOKENS)) <= set(own.tolist())
            # What each adds before the window are the first of the same list.
            (best,) = peers.pick_highest(peer.scores[head : head + 1, :split], [int((own < split).sum())])
            assert peers.compare_kept(own[own < split], best, peer.scores[head]) != "different"
            differing += not own.equal(other)
    assert differing


def test_cur_divides_each_leverage_by_its_sum_where_kvpress_averages_the_squares():
    """The mean of keys' and values' leverage over all tokens of the row, as the docstring states."""
    import kvpress

    model, ids, kept = peers.build_tiny("llama"), oracles.random_prompt(TINY_TOKENS), 40
    press = kvpress.CURPress(
        compression_ratio=find_ratio(TINY_TOKENS, kept),
        num_sinks=SINKS,
        leverage_type="kv_avg",
        use_local_approximation=False,
    )
    theirs = peers.run_kvpress(model, ids, press)
    options = {"recent_fraction": 0.0, "leverage": "kv_avg", "local_window": 0}
    ours = peers.run_rankkv(model, ids, "cur", kept, options, window_size=1, sink_size=SINKS)
    cache = DynamicCache()
    oracles.forward(model, cache, ids)
    for mine, peer, layer in zip(ours, theirs, cache.layers, strict=True):
        keys, values = (states[0].square().sum(dim=-1) for states in (layer.keys, layer.values))
        sums = keys.sum(dim=-1, keepdim=True), values.sum(dim=-1, keepdim=True)
        torch.testing.assert_close(peer.scores[:, SINKS:], ((keys + values) / (sums[0] + sums[1]))[:, SINKS:])
        torch.testing.assert_close(
            mine.scores[:, SINKS:], ((keys / sums[0] + values / sums[1]) / 2)[:, SINKS:], rtol=1e-3, atol=1e-6
        )
