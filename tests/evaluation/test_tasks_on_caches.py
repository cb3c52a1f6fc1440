"""Tasks on real weights: a fact is found where it is kept, lost where it is not, and answers are generate()'s."""

from __future__ import annotations

import pytest
import torch

from rankkv import compress
from rankkv.errors import ConfigError
from rankkv.evaluation import evaluate_task, get_task, make_samples
from rankkv.evaluation.comparison import check_floor
from rankkv.models.compat import cache_argument

#: A code right before the end is inside the newest tokens that every layer keeps; at 0.3 it is not.
SETTINGS = {
    "all": {"compression_ratio": 1.0},
    "newest": {"selector": "streaming_llm", "strategy": "uniform", "budget": 100, "profile": None},
}


def run(embedded, python_docs, name, settings, **options):
    samples = make_samples(get_task(name), embedded[1], python_docs[:60_000], **options)
    return samples, list(evaluate_task(*embedded, samples, settings))


@pytest.fixture(scope="module", params=[False, True], ids=["agnostic", "aware"])
def needles(request, embedded, python_docs):
    _, rows = run(
        embedded, python_docs, "needle", SETTINGS,
        lengths=(350,), count=2, depths=(0.3, 1.0), question_aware=request.param,
    )  # fmt: skip
    return rows


def by_place(rows):
    return {(row["depth"], row["setting"]): row for row in rows}


def test_full_cache_finds_what_a_blank_haystack_does_not_hold(needles):
    found = by_place(needles)
    for depth in (0.3, 1.0):
        assert (found[depth, "full"]["score"], found[depth, "blank"]["score"]) == (1.0, 0.0)
        assert found[depth, "full"]["answer_loss"] < found[depth, "blank"]["answer_loss"] - 1.0
    assert check_floor(needles)["needle"].mean == 1.0


def test_everything_kept_is_the_full_cache(needles):
    found = by_place(needles)
    for depth in (0.3, 1.0):
        whole, kept = found[depth, "full"], found[depth, "all"]
        assert kept["answer_loss"] == pytest.approx(whole["answer_loss"], abs=1e-3)
        assert kept["divergence"] == pytest.approx(0.0, abs=1e-4)
        for column in ("score", "output", "kept_tokens", "cache_bytes"):
            assert kept[column] == whole[column]


def test_a_fact_is_found_where_it_is_kept_and_lost_where_it_is_not(needles):
    found = by_place(needles)
    assert found[1.0, "newest"]["score"] == 1.0
    assert found[0.3, "newest"]["score"] == 0.0
    assert found[0.3, "newest"]["answer_loss"] > found[0.3, "full"]["answer_loss"] + 1.0
    # 30 layers.
    assert found[0.3, "newest"]["kept_tokens"] == 30 * 100
    assert found[0.3, "full"]["full_tokens"] >= 30 * 350


@pytest.mark.parametrize(
    "name",
    [
        "perplexity",
        pytest.param("multi_question", marks=pytest.mark.slow),
        pytest.param("variable_tracking", marks=pytest.mark.slow),
    ],
)
def test_rows_are_what_compress_and_generate_give(name, embedded, python_docs):
    """Each number taken another way: a cache of its own for each question, the answer by generate()."""
    model, tokenizer = embedded
    options = {"compression_ratio": 0.4, "selector": "h2o"}
    more = {"continuation": 24} if name == "perplexity" else {}
    (sample,), rows = run(embedded, python_docs, name, {"own": options}, lengths=(260,), count=1, **more)
    row = next(row for row in rows if row["setting"] == "own")
    context = torch.tensor(sample.context_ids)[None]
    losses, scores, outputs = [], [], []
    for prompt in sample.prompts:
        ids = torch.tensor(prompt.question_ids + prompt.answer_ids)[None]
        cache = compress(model, context, **options)
        kept = sum(cache.kept_lengths)
        with torch.no_grad():
            logits = model(ids, **cache_argument(cache)).logits[0].log_softmax(-1)
        first = max(1, len(prompt.question_ids))
        losses.append(-float(logits[first - 1 : -1].gather(-1, ids[0, first:, None]).mean()))
        if prompt.answers:
            asked = torch.cat([context, torch.tensor(prompt.question_ids)[None]], dim=1)
            output = model.generate(
                asked,
                max_new_tokens=len(prompt.answer_ids) + 8,
                do_sample=False,
                **cache_argument(compress(model, context, **options)),
            )
            outputs.append(tokenizer.decode(output[0, asked.shape[1] :], skip_special_tokens=True))
            scores.append(sum(answer in outputs[-1] for answer in prompt.answers) / len(prompt.answers))
    assert kept == row["kept_tokens"]
    assert row["answer_loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-3)
    if scores:
        assert row["score"] == pytest.approx(sum(scores) / len(scores))
    if len(outputs) == 1:
        # Where the right answer is what greedy decoding says, it is not decoded any further.
        assert outputs[0].startswith(row["output"])


def test_names_of_settings_that_are_taken(embedded, python_docs):
    with pytest.raises(ConfigError, match="'full'"):
        run(embedded, python_docs, "needle", {"full": {}}, lengths=(60,), count=1)


@pytest.mark.parametrize("asked", [[], [5, 6]], ids=["no question", "a question"])
def test_an_output_ends_eight_tokens_behind_the_length_of_the_answer(tiny_llama, asked):
    """A model that never stops: 3 tokens of the answer and 8 more, with and without a question."""
    from types import SimpleNamespace

    import oracles

    from rankkv.evaluation.prefill_record import record_prefill
    from rankkv.evaluation.task_runner import _decode

    model = tiny_llama(eos_token_id=None)
    ids = oracles.random_prompt(60)
    record = record_prefill(model, ids)
    prompt = SimpleNamespace(question_ids=asked, answer_ids=[1, 2, 3], max_new_tokens=None)
    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=0)
    said = _decode(record, tokenizer, prompt, record.build_cache(compression_ratio=1.0))
    given = torch.cat([ids, torch.tensor([asked], dtype=torch.long)], dim=1)
    assert said == oracles.generate(model, given, None, 3 + 8)[0].tolist()
