"""Questions that come after the compression: what makes echo find facts, and the program that measures it."""

from __future__ import annotations

import asked_later
import pytest
import torch
from allocation_ablation import main

from rankkv import RankKVCache, load_model
from rankkv.evaluation import record_prefill
from rankkv.evaluation.results import read_rows
from rankkv.evaluation.tasks import get_task, make_samples
from rankkv.models.texts import python_docs_text
from rankkv.selection import get_selector

#: Loss of the codes, nats per token, at 10 % of the cache.  Every part of the method is needed to stay below it.
MOST = 0.45
#: Parts that are left out, one at a time.
PARTS = ("turn", "own keys", "value norms", "global")


@pytest.fixture(scope="module")
def losses():
    """Loss of hidden codes, asked for after the compression, for the method and with each part left out."""
    model, tokenizer = load_model("embedded")
    samples = make_samples(
        get_task("multi_question"),
        tokenizer,
        python_docs_text(),
        lengths=[960],
        count=3,
        seed=4,
        keys=4,
        queries=4,
    )
    found = dict.fromkeys(("whole", "mixed", *PARTS), 0.0)
    for sample in samples:
        record = record_prefill(model, torch.tensor(sample.context_ids)[None])
        for name in found:
            options = {"own keys": {"own_keys": False}, "value norms": {"value_norms": False}}.get(name, {})
            selector = get_selector("echo", **({} if name == "mixed" else {"expected": 0, **options}))
            given = {"strategy": "uniform"} if name == "global" else {}
            cache = build(record, name, selector, given)
            for prompt in sample.prompts:
                loss, _ = asked_later.score_answer(model, cache.copy(), prompt)
                found[name] += loss / (len(samples) * len(sample.prompts))
    return found


def build(record, name, selector, given):
    if name != "turn":
        return record.build_cache(selector=selector, compression_ratio=0.1, **given)
    # Without a turn the queries look back from their own positions.
    cache = RankKVCache(record.model, selector=selector, compression_ratio=0.1)
    cache._schedule.rotations = {}
    return cache.take_prefill(record.observe(32, 4), record._plain.layers)


@pytest.mark.slow
def test_every_part_of_the_method_is_needed_to_find_facts(losses):
    assert losses["whole"] < MOST
    assert losses["mixed"] < MOST + 0.1
    for part in PARTS:
        assert losses[part] > MOST, part


@pytest.mark.slow
def test_the_program_measures_both_ways_and_goes_on_where_it_stopped(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(python_docs_text()[:60_000])
    given = [
        "--texts", f"text={text}", "--samples", "1", "--context", "320", "--continuation", "16", "--ratios", "0.3",
        "--methods", "snapkv uniform", "echo:chunk_size=64", "--output_dir", str(tmp_path / "out"),
    ]  # fmt: skip
    for _ in range(2):
        assert main(given, asked_later.parse_arguments, asked_later.run) == 0
        told = capsys.readouterr().out
        assert "### continuation" in told
        assert "### multi_question" in told
        assert "| echo:chunk_size=64 | " in told
    rows = read_rows([tmp_path / "out" / "rows.parquet"])
    assert {row["method"] for row in rows} == {"full", "snapkv uniform", "echo:chunk_size=64"}
    # Four questions and a continuation for each method.
    assert len(rows) == 3 * 5
