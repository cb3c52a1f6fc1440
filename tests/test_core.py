"""The public contract: names, signatures and the quick start.  Also runs as ``python tests/test_core.py``."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rankkv
from rankkv import (
    BudgetAllocator,
    RankKVAnalyzer,
    RankKVCache,
    analyze_attention_ranks,
    compress,
    compute_effective_rank,
    load_model,
    quick_analyze,
)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def signature(function):
    """Return the parameters as ``name``, ``name=default`` or, after a star, keyword-only ones."""
    parts, starred = [], False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            parts.append("*")
            starred = True
        prefix = {parameter.VAR_KEYWORD: "**", parameter.VAR_POSITIONAL: "*"}.get(parameter.kind, "")
        default = "" if parameter.default is parameter.empty else f"={parameter.default!r}"
        parts.append(f"{prefix}{parameter.name}{default}")
    return ", ".join(parts)


SIGNATURES = {
    compute_effective_rank: "matrix, normalize=False",
    analyze_attention_ranks: (
        "attentions, aggregation='mean', normalize=False, show_progress=False, *, "
        "scope='full', window_size=32, sink_size=4"
    ),
    BudgetAllocator: "strategy='proportional', min_budget=4, max_budget=None, **strategy_options",
    BudgetAllocator.allocate: (
        "self, layer_ranks, total_budget=None, *, seq_len=None, compression_ratio=None"
    ),
    RankKVAnalyzer: (
        "model, model_name=None, *, strategy='proportional', scope='evictable', aggregation='concat', "
        "window_size=32, sink_size=4, strategy_options=None"
    ),
    quick_analyze: "model, input_ids, compression_ratio=0.3, strategy='proportional'",
    compress: "model, input_ids, attention_mask=None, **options",
    load_model: "name='embedded', dtype=None, device_map=None",
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__qualname__)
def test_signatures(function):
    assert signature(function) == SIGNATURES[function]


def test_signature_of_analyze_begins_as_promised():
    promised = "self, input_ids, attention_mask=None, compression_ratio=0.3, total_budget=None"
    assert signature(RankKVAnalyzer.analyze).startswith(promised)


def test_signature_of_the_cache_has_what_is_promised():
    promised = {
        "budget": None,
        "selector": "snapkv",
        "strategy": None,
        "scope": "evictable",
        "aggregation": "concat",
        "strategy_options": None,
        "window_size": 32,
        "sink_size": 4,
        "decode": "grow",
        "positions": "original",
        "prefill": "single",
        "min_budget": None,
        "config": None,
    }
    parameters = inspect.signature(RankKVCache).parameters
    assert list(parameters)[:2] == ["model", "compression_ratio"]
    assert parameters["compression_ratio"].default == 0.3
    for name, default in promised.items():
        assert parameters[name].default == default
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY


def test_every_public_name_resolves_and_is_documented():
    for name in rankkv.__all__:
        value = getattr(rankkv, name)
        assert name == "__version__" or inspect.getdoc(value), name
        assert name in dir(rankkv)


def test_importing_loads_no_model_library_and_patches_nothing():
    code = "import sys, rankkv; print('torch' in sys.modules, 'transformers' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert shown.stdout.split() == ["False", "False"]


# -- the quick start of the method, on its own five-token prompt --------------------------------------------


def test_quick_start(model):
    input_ids = torch.tensor([[1, 2, 3, 4, 5]])

    analyzer = RankKVAnalyzer(model, model_name="my-model")
    result = analyzer.analyze(input_ids, compression_ratio=0.3)
    assert len(result.budgets) == len(result.layer_ranks) == 4
    assert sum(result.budgets) == result.total_budget
    assert "my-model" in result.summary()

    budgets, ranks = quick_analyze(model, input_ids, compression_ratio=0.3)
    assert (budgets, ranks) == (result.budgets, result.layer_ranks)


def test_effective_rank():
    assert compute_effective_rank(torch.eye(10)) == pytest.approx(10.0)
    assert compute_effective_rank(torch.ones(10, 10)) == pytest.approx(1.0, abs=1e-6)
    assert compute_effective_rank(torch.zeros(10, 10)) == 0.0
    assert compute_effective_rank(torch.eye(10), normalize=True) == pytest.approx(1.0)
    # Singular values 3 and 1: p = (3/4, 1/4), exp(H) = 4 / 3 ** (3/4).
    assert compute_effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(4 / 3**0.75)


def test_ranks_then_budgets(model):
    input_ids = torch.randint(3, 64, (1, 40), generator=torch.Generator().manual_seed(0))
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            attentions = model(input_ids, output_attentions=True).attentions
    finally:
        model.set_attn_implementation("sdpa")
    analysis = analyze_attention_ranks(attentions)
    assert len(analysis.layer_ranks) == 4
    assert set(analysis.statistics) == {"mean", "std", "min", "max", "min_layer", "max_layer"}
    assert set(analysis.to_dict()) >= {"layer_ranks", "per_head_ranks", "statistics"}

    allocation = BudgetAllocator(strategy="proportional").allocate(analysis.layer_ranks, total_budget=60)
    assert sum(allocation.budgets) == 60
    by_rank = sorted(range(4), key=lambda i: analysis.layer_ranks[i])
    assert [allocation.budgets[i] for i in by_rank] == sorted(allocation.budgets)
    allocation = BudgetAllocator().allocate(analysis.layer_ranks, seq_len=40, compression_ratio=0.3)
    assert sum(allocation.budgets) == 48


def test_result_has_what_is_promised(model, tmp_path):
    result = RankKVAnalyzer(model).analyze(torch.arange(3, 63)[None])
    for name in (
        "budgets",
        "layer_ranks",
        "layer_indices",
        "total_budget",
        "seq_len",
        "compression_ratio",
        "strategy",
    ):
        assert name in result.to_dict()
    assert result.save(tmp_path / "result.json").is_file()
    rows = RankKVAnalyzer(model).compare_with_baselines(torch.arange(3, 63)[None])
    assert {"rankkv", "uniform", "pyramid"} <= set(rows)


# -- the cache in the ordinary generate() -------------------------------------------------------------------


def test_cache_in_generate(model):
    from rankkv.models.compat import cache_argument

    input_ids = torch.randint(3, 64, (1, 90), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    plain = model.generate(input_ids, **options)
    whole = model.generate(input_ids, **cache_argument(RankKVCache(model, compression_ratio=1.0)), **options)
    assert torch.equal(whole, plain)
    cache = RankKVCache(model, compression_ratio=0.3)
    compressed = model.generate(input_ids, **cache_argument(cache), **options)
    assert compressed[0, 90] == plain[0, 90]
    assert sum(cache.budgets) == round(0.3 * 90 * 4)
    assert cache.kept_lengths == [budget + 7 for budget in cache.budgets]
    assert cache.seen_tokens == 97
    assert cache.cache_bytes() < cache.full_cache_bytes()
    assert len(cache.layer_ranks) == len(cache.layer_indices) == 4
    assert cache.budgets_per_row == [cache.budgets]
    assert cache.layer_ranks_per_row == [cache.layer_ranks]
    assert isinstance(cache.summary(), str)
    assert cache.copy().rewind(92).seen_tokens == 92


def test_compress_once(model):
    from rankkv.models.compat import cache_argument

    cache = compress(model, torch.arange(3, 63), compression_ratio=0.5)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[5, 6, 7]]), **cache_argument(cache.copy())).logits
    assert torch.isfinite(logits).all()
    assert cache.seen_tokens == 60
    assert cache.finish() is cache


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__, "-q", *sys.argv[1:]]))
