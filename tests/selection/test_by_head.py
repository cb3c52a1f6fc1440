"""Scores of heads that hold different tokens: each head is scored with its own part of whatever the layer has."""

from __future__ import annotations

import oracles
import pytest
import torch

from rankkv import RankKVCache
from rankkv.calibration import (
    compute_query_centres,
    compute_query_filters,
    save_query_centres,
    save_query_filters,
)
from rankkv.selection import get_selector

PROMPTS = [oracles.random_prompt(90, seed=1), oracles.random_prompt(50, seed=2)]
#: Selectors that read the output projection, or a file with an entry for each head.
SELECTORS = ("echo", "criticalkv", "defensivekv", "qfilter", "triattention")


@pytest.fixture(scope="module")
def model(tiny_llama):
    return tiny_llama(3, eos_token_id=None)


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrated")
    text = [oracles.random_prompt(200, seed=3)]
    save_query_filters(compute_query_filters(model, text), folder / "filters.json")
    save_query_centres(compute_query_centres(model, text), folder / "centres.json")
    return {
        "qfilter": {"filters": folder / "filters.json"},
        "triattention": {"centres": folder / "centres.json"},
    }


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize("decode", ["bounded", "periodic"])
def test_rows_whose_heads_differ_keep_what_they_keep_alone(model, files, name, decode):
    options = {
        "selector": get_selector(name, **files.get(name, {})),
        "budget": 40,
        "head_budgets": "adaptive",
        "decode": decode,
        "decode_interval": 8,
    }
    ids, mask = oracles.left_pad(PROMPTS)
    cache = RankKVCache(model, **options)
    text = oracles.generate(model, ids, cache, 30, mask)
    kept = oracles.kept_tokens(cache, mask)
    # Otherwise no head was scored apart from the others.
    assert any(len({len(head) for head in row}) > 1 for layer in kept for row in layer)
    for row, prompt in enumerate(PROMPTS):
        alone = RankKVCache(model, **options)
        assert torch.equal(text[row], oracles.generate(model, prompt, alone, 30)[0])
        assert [layer[row] for layer in kept] == [layer[0] for layer in oracles.kept_tokens(alone)]
