"""Tests that the rows of a batch do not reach each other: a row with a NaN stays alone with it."""

from __future__ import annotations

import pytest
import torch

from rankkv import RankKVCache, compress
from rankkv.models.compat import cache_argument

OPTIONS = [
    {},
    {"head_budgets": None},
    {"head_budgets": "adaptive"},
    {"storage": "int8"},
    {"storage": "offload"},
    {"storage": "int8", "head_budgets": None},
    {"decode": "bounded"},
    {"decode": "periodic", "decode_interval": 3},
    {"positions": "packed"},
    {"prefill": "streaming"},
    {"selector": "h2o"},
    {"selector": "keydiff"},
    {"strategy": "uniform"},
]


def run(model, cache, **inputs):
    with torch.no_grad():
        return model(**inputs, **cache_argument(cache)).logits[:, -1]


@pytest.mark.filterwarnings("ignore:the attention of layer")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("way", ["as it is", "copied", "repeated", "reordered"])
def test_a_row_with_a_nan_leaves_the_other_rows_as_they_are_alone(tiny_llama, options, way):
    model = tiny_llama()
    embeddings = model.get_input_embeddings()(torch.randint(3, 128, (2, 90))).detach()
    embeddings[0, 40] = float("nan")
    cache, alone = RankKVCache(model, 0.3, **options), RankKVCache(model, 0.3, **options)
    run(model, cache, inputs_embeds=embeddings)
    run(model, alone, inputs_embeds=embeddings[1:])
    sick, healthy = [0], [1]
    if way == "copied":
        cache = cache.copy()
    elif way == "repeated":
        cache.batch_repeat_interleave(2)
        sick, healthy = [0, 1], [2, 3]
    elif way == "reordered":
        cache.reorder_cache(torch.tensor([1, 0]))
        sick, healthy = [1], [0]
    for token in range(5, 13):
        ids = torch.full((len(sick) + len(healthy), 1), token)
        logits = run(model, cache, input_ids=ids)
        wanted = run(model, alone, input_ids=ids[:1])
        assert logits[sick].isnan().any()
        torch.testing.assert_close(logits[healthy], wanted.expand(len(healthy), -1), atol=2e-4, rtol=1e-3)


def test_a_head_without_a_token_reads_nothing_of_another(tiny_llama):
    from rankkv.cache.storage import SlotLayout

    valid = torch.tensor([[[True, True], [False, False]], [[False, True], [False, False]]])
    tensor = torch.arange(8.0).view(2, 2, 2, 1) + 1
    layout = SlotLayout.of(valid)
    padded = layout.pad(layout.unpad(tensor))
    assert padded[..., 0].tolist() == [[[1.0, 2.0], [0.0, 0.0]], [[6.0, 6.0], [0.0, 0.0]]]


def test_the_rows_of_a_compressed_batch_keep_what_they_keep_alone(tiny_llama):
    model = tiny_llama()
    ids = torch.randint(3, 128, (3, 80))
    together = compress(model, ids, compression_ratio=0.3)
    for row in range(3):
        assert together.budgets_per_row[row] == compress(model, ids[row], compression_ratio=0.3).budgets
