"""Benchmark files as published: recognised by their fields, split where the question begins, cut in the middle."""

from __future__ import annotations

import gzip
import json
import re

import pytest
import torch

from rankkv.errors import ConfigError, InputError, RankKVError
from rankkv.evaluation import evaluate_task
from rankkv.evaluation.benchmarks import load_benchmark, make_benchmark_samples
from rankkv.models.texts import encode_plain

LONGBENCH = {
    "input": "Where is the tower?",
    "context": "The tower is in Paris. " * 40,
    "answers": ["Paris", "in Paris"],
    "length": 200,
    "dataset": "multifieldqa_en",
    "language": "en",
    "all_classes": None,
    "_id": "1",
}
RULER = {
    "index": 0,
    "input": "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you "
    "about the number afterwards.\nGrass is green. One of the special magic numbers for cat is: 1234567. Sky is blue.\n"
    "What is the special magic number for cat mentioned in the provided text? The special magic number for cat "
    "mentioned in the provided text is",
    "outputs": ["1234567"],
    "length": 90,
}
QUESTIONS = [{"input": f"What is the key {i}?", "answer": f"v{i}"} for i in range(3)]
CHOICE = {"input": "Who?", "answer": "Bob", "options": ["Al", "Bob", "Cy", "Di"]}
KVPRESS = {
    "context": "A long text. " * 30,
    "question": "What is it?\n",
    "answer_prefix": "It is",
    "answer": ["a text"],
    "task": "niah_single_1",
    "max_new_tokens": 12,
}
V2 = {
    "_id": "x", "domain": "d", "sub_domain": "s", "difficulty": "easy", "length": "short", "question": "Which?",
    "choice_A": "one", "choice_B": "two", "choice_C": "three", "choice_D": "four", "answer": "C", "context": "Text.",
}  # fmt: skip
INFINITE = {
    "id": 1,
    "context": "noise 71432 noise",
    "input": "What is the pass key?",
    "answer": ["71432"],
    "options": [],
}
TREC = LONGBENCH | {"dataset": "trec", "all_classes": ["a", "b"]}
TALK = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "My name is Ann."},
        {"role": "assistant", "content": "Hello Ann."},
        {"role": "user", "content": [{"type": "text", "text": "What is my name?"}]},
        {"role": "assistant", "content": "Ann."},
        {"role": "user", "content": "Thanks"},
    ]
}


def write(path, *entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


@pytest.mark.parametrize(
    ("name", "entry", "shape", "metric", "most", "chance"),
    [
        ("multifieldqa_en.jsonl", LONGBENCH, "LongBench", "qa_f1", 64, None),
        ("trec.jsonl", TREC, "LongBench", "classification", 64, 0.5),
        ("niah_single_1.jsonl", RULER, "RULER", "string_match_all", 128, None),
        ("passkey.jsonl", INFINITE, "InfiniteBench", "first_digits", 6, None),
        ("scbench_kv.jsonl", {"context": "{}", "multi_turns": QUESTIONS}, "SCBench", "contains", 150, None),
        ("scbench_choice_eng.jsonl", {"context": "x", "multi_turns": [CHOICE]}, "SCBench", "choice", 40, 0.25),
        ("data.jsonl", V2, "LongBench v2", "stated_choice", 128, 0.25),
        ("rows.jsonl", KVPRESS, "kvpress rows", "string_match_all", 12, None),
        ("talk.jsonl", TALK, "conversations", "loss", 256, None),
    ],
)  # fmt: skip
def test_shapes_are_recognised_by_their_fields(name, entry, shape, metric, most, chance, tmp_path):
    path = write(tmp_path / name, entry)
    found = load_benchmark(path)
    assert found.shapes == {str(path): shape}
    question = found.items[0].questions[0]
    assert (question.metric, question.max_new_tokens, found.items[0].chance) == (metric, most, chance)
    assert load_benchmark(path, max_new_tokens=7).items[0].questions[0].max_new_tokens == 7


def test_longbench_prompt_is_the_published_one(tmp_path, embedded):
    item = load_benchmark(write(tmp_path / "a.jsonl", LONGBENCH)).items[0]
    assert item.head + item.document + item.questions[0].text == (
        "Read the following text and answer briefly.\n\n"
        + LONGBENCH["context"]
        + "\n\nNow, answer the following "
        "question based on the above text, only give me the answer and do not output any other words.\n\nQuestion: "
        "Where is the tower?\nAnswer:"
    )
    assert item.task == "multifieldqa_en"
    tokenizer = embedded[1]
    sample = make_benchmark_samples([item], tokenizer, chat=False).samples[0]
    prompt = sample.prompts[0]
    assert tokenizer.decode(sample.context_ids) == item.head + item.document
    assert tokenizer.decode(prompt.question_ids) == item.questions[0].text
    assert tokenizer.decode(prompt.answer_ids) == " Paris"
    assert tokenizer.decode(sample.blank_ids) == item.head


@pytest.mark.parametrize(
    ("kind", "question", "lead"),
    [
        ("niah", "What are all the special magic words for a and b mentioned in the provided text?",
         " The special magic words for a and b mentioned in the provided text are"),
        ("vt", "Question: Find all variables that are assigned the value 5 in the text above.",
         " Answer: According to the chain(s) of variable assignment in the text above, 2 variables are assgined the "
         "value 5, they are: "),
        ("cwe", "Question: What are the 10 most common words in the above list?",
         " Answer: The top 10 words that appear most often in the list are:"),
        ("fwe", "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most "
         "frequently appeared words in the above coded text?",
         " Answer: According to the coded text above, the three most frequently appeared words are:"),
        ("qa", "Answer the question based on the given documents. Only give me the answer and do not output any other "
         "words.\n\nQuestion: Who?", " Answer:"),
    ],
)  # fmt: skip
def test_ruler_is_split_where_the_last_question_begins(kind, question, lead, tmp_path):
    # The prompt shows an example with a question and an answer of its own first.
    body = f"Read this.\nAn example. {question}{lead} x y.\nThe text itself.\n"
    path = write(tmp_path / "any.jsonl", {**RULER, "input": body + question + lead})
    item = load_benchmark(path).items[0]
    assert (item.head, item.head + item.document) == ("Read this.\n", body)
    assert (item.questions[0].text, item.questions[0].lead) == (question, lead)
    assert item.task == kind
    # Newer files hold the beginning of the answer in a field of its own.
    split = {**RULER, "input": body + question, "answer_prefix": lead}
    assert load_benchmark(write(path, split)).items[0].questions == item.questions


def test_the_lead_stands_in_the_models_turn(tmp_path, embedded):
    tokenizer = embedded[1]
    items = load_benchmark(write(tmp_path / "niah_single_1.jsonl", RULER)).items
    prompt = make_benchmark_samples(items, tokenizer).samples[0].prompts[0]
    asked = tokenizer.decode(prompt.question_ids)
    assert re.search(
        r"text\?<\|im_end\|>\n<\|im_start\|>assistant\nThe special magic number .* is$", asked, re.S
    )
    assert tokenizer.decode(prompt.answer_ids) == " 1234567"


@pytest.mark.parametrize("chat", [False, True])
def test_question_before_and_after_give_the_same_prompt(chat, tmp_path, embedded):
    items = load_benchmark(write(tmp_path / "a.jsonl", LONGBENCH)).items
    after, before = (
        make_benchmark_samples(items, embedded[1], chat=chat, question=place).samples[0]
        for place in ("after", "before")
    )
    whole = after.context_ids + after.prompts[0].question_ids
    assert before.context_ids + before.prompts[0].question_ids == whole
    # The last token is fed after the compression, so that the first token of the answer reads the cache.
    assert len(before.prompts[0].question_ids) == 1
    assert (before.question_aware, after.question_aware) == (True, False)
    assert before.blank_ids + whole[-1:] == after.blank_ids + after.prompts[0].question_ids


@pytest.mark.parametrize("most", [100, 101, 160])
def test_a_long_prompt_loses_its_middle(most, tmp_path, embedded):
    tokenizer = embedded[1]
    items = load_benchmark(write(tmp_path / "a.jsonl", LONGBENCH)).items
    made = make_benchmark_samples(items, tokenizer, chat=False, max_length=most)
    whole = make_benchmark_samples(items, tokenizer, chat=False).samples[0]
    sample = made.samples[0]
    full = whole.context_ids + whole.prompts[0].question_ids
    kept = sample.context_ids + sample.prompts[0].question_ids
    assert len(kept) == most
    # As LongBench: the first half of the allowed tokens, and the last.
    assert kept[: most // 2] == full[: most // 2]
    assert kept[most // 2 :] == full[len(full) - (most - most // 2) :]
    assert (made.cut_contexts, made.cut_tokens, sample.cut_tokens) == (1, len(full) - most, len(full) - most)
    assert whole.cut_tokens == 0
    # A model's context length bounds prompt and output together.
    bounded = make_benchmark_samples(items, tokenizer, chat=False, context_length=most + 64).samples[0]
    assert bounded.context_ids == sample.context_ids
    with pytest.raises(InputError, match="give a greater --max-length"):
        make_benchmark_samples(items, tokenizer, max_length=20)


def test_turns_are_asked_of_one_context(tmp_path, embedded):
    path = write(tmp_path / "scbench_kv.jsonl", {"context": "{}", "multi_turns": QUESTIONS})
    items = load_benchmark(path).items
    (sample,) = make_benchmark_samples(items, embedded[1]).samples
    assert [prompt.answers for prompt in sample.prompts] == [("v0",), ("v1",), ("v2",)]
    before = make_benchmark_samples(items, embedded[1], question="before").samples
    assert [one.name for one in before] == ["0000-0", "0000-1", "0000-2"]
    # kvpress writes a row for each question.
    path = write(
        tmp_path / "rows.jsonl",
        *({**KVPRESS, "question": f"{i}?"} for i in range(3)),
        {**KVPRESS, "context": "b"},
    )
    assert [len(item.questions) for item in load_benchmark(path).items] == [3, 1]
    assert [len(item.questions) for item in load_benchmark(path, limit=1).items] == [3]


def test_mixed_turns_are_tasks_of_their_own(tmp_path):
    turns = [
        {"input": "Sum up.", "answer": "short", "task": "scbench_passkey"},
        {"input": "Key?", "answer": "5", "task": "scbench_kv"},
    ]
    items = load_benchmark(
        write(tmp_path / "scbench_summary_with_needles.jsonl", {"context": "c", "multi_turns": turns})
    ).items
    assert [(item.task, item.questions[0].metric) for item in items] == [
        ("scbench_summary_with_needles:passkey", "first_digits"),
        ("scbench_summary_with_needles:kv", "contains"),
    ]  # fmt: skip


def test_prompts_repeat_what_their_question_names(tmp_path):
    run = {**INFINITE, "input": "Please give me the value of func_12(-3).", "answer": "7"}
    item = load_benchmark(write(tmp_path / "code_run.jsonl", run)).items[0]
    assert item.head.startswith("There is a function called func_12 in")
    assert item.questions[0].text.endswith("The value of func_12(-3) is")
    find = {**INFINITE, "input": "The smallest number of the list is:", "answer": [5]}
    item = load_benchmark(write(tmp_path / "math_find.jsonl", find)).items[0]
    assert item.head.startswith("What is the smallest number in the following list?")
    assert item.questions[0].references == ("5",)


def test_choices_are_scored_by_letter_and_text(tmp_path):
    path = write(tmp_path / "longbook_choice_eng.jsonl", {**CHOICE, "context": "b", "answer": ["Bob"]})
    question = load_benchmark(path).items[0].questions[0]
    assert question.references == ("Bob", "B")
    assert "C. Cy" in question.text


def test_a_conversation_is_split_at_its_last_question(tmp_path, embedded):
    tokenizer = embedded[1]
    items = load_benchmark(write(tmp_path / "talk.jsonl", TALK)).items
    sample = make_benchmark_samples(items, tokenizer).samples[0]
    prompt = sample.prompts[0]
    rendered = tokenizer.apply_chat_template(
        [*TALK["messages"][:3], {"role": "user", "content": "What is my name?"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert tokenizer.decode(sample.context_ids + prompt.question_ids) == rendered
    assert tokenizer.decode(prompt.question_ids).startswith("What is my name?")
    assert tokenizer.decode(prompt.answer_ids) == "Ann."


def test_texts_are_continued(tmp_path, embedded, python_docs):
    tokenizer = embedded[1]
    (tmp_path / "long.txt").write_text(python_docs[:4000])
    (tmp_path / "short.txt").write_text("too short")
    benchmark = load_benchmark(tmp_path)
    with pytest.raises(InputError, match="none of the 1 texts has 192 tokens"):
        make_benchmark_samples(benchmark.tasks["short"], tokenizer)
    made = make_benchmark_samples(benchmark.items, tokenizer, text_length=300)
    ids = encode_plain(tokenizer, python_docs[:4000])
    (sample,) = made.samples
    assert made.too_short == 1
    assert list(sample.context_ids + sample.prompts[0].answer_ids) == ids[:428]
    assert sample.task.metric == "loss"


def test_limit_takes_the_first_contexts_of_each_file(tmp_path):
    for length in (4096, 8192):
        (tmp_path / str(length)).mkdir()
        entries = [RULER | {"input": RULER["input"].replace("Sky", f"Sky {i}")} for i in range(4)]
        write(tmp_path / str(length) / "niah_single_1.jsonl", *entries)
    packed = gzip.compress((tmp_path / "4096" / "niah_single_1.jsonl").read_bytes())
    (tmp_path / "4096" / "vt.jsonl.gz").write_bytes(packed)
    found = load_benchmark(tmp_path, limit=2)
    assert {name: len(items) for name, items in found.tasks.items()} == {
        "niah_single_1": 2, "vt": 2, "8192/niah_single_1": 2,
    }  # fmt: skip
    assert (
        load_benchmark(tmp_path, limit=2).digest == found.digest != load_benchmark(tmp_path, limit=3).digest
    )


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "a.jsonl",
            '{"title": "x"}',
            r"fields 'title', .* known shapes: .*LongBench \(context, input",
        ),
        ("a.jsonl", "{", "line 1 of .* is not JSON"),
        ("a.jsonl", "[1]", "line 1 of .* is not an object with named fields"),
        ("a.jsonl", "", "has no entry"),
        ("a.xlsx", "x", r"unknown ending: give a \.jsonl"),
        ("a.jsonl", json.dumps(LONGBENCH | {"dataset": "hotpot"}), "did you mean 'hotpotqa'"),
        ("my.jsonl", json.dumps(INFINITE), "unknown task 'my'.*--data-task"),
        ("a.jsonl", json.dumps(RULER | {"input": "no question"}), "ends in no question of RULER"),
        ("a.jsonl", json.dumps(LONGBENCH) + '\n{"context": "x"}', "line 2 of .* has no field 'input'"),
        ("a.jsonl", json.dumps(LONGBENCH | {"answers": []}), "'answers' must be a text or a list"),
        (
            "scbench_repoqa.jsonl",
            json.dumps({"context": "c", "multi_turns": QUESTIONS}),
            "scored by a parser",
        ),
        ("t.jsonl", json.dumps({"messages": [{"role": "user", "content": "x"}]}), "no answer to score"),
        ("a.csv", "context,input,answers\na,b\n", "another number of fields"),
        ("a.parquet", "not", "not Parquet"),
        ("a.jsonl.gz", "not", "damaged gzip|cannot read"),
    ],
)
def test_bad_files_are_one_sentence(name, content, words, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(RankKVError, match=words) as caught:
        load_benchmark(tmp_path / name)
    assert len(str(caught.value)) < 900


def test_options_out_of_range(tmp_path, embedded):
    path = write(tmp_path / "a.jsonl", LONGBENCH)
    with pytest.raises(ConfigError, match="limit=0"):
        load_benchmark(path, limit=0)
    with pytest.raises(ConfigError, match="must be 'after' or 'before'"):
        make_benchmark_samples(load_benchmark(path).items, embedded[1], question="during")


def test_the_score_is_that_of_plain_generate(tmp_path, embedded):
    """The full cache's output is the text that the model itself generates after the same prompt."""
    model, tokenizer = embedded
    entry = LONGBENCH | {"context": "The tower is in Paris. The bridge is in London."}
    items = load_benchmark(write(tmp_path / "a.jsonl", entry), max_new_tokens=12).items
    for question in ("after", "before"):
        made = make_benchmark_samples(items, tokenizer, question=question)
        rows = list(evaluate_task(model, tokenizer, made.samples, {"half": {"compression_ratio": 1.0}}))
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": items[0].head + items[0].document + items[0].questions[0].text}],
            tokenize=False, add_generation_prompt=True,
        )  # fmt: skip
        sample = made.samples[0]
        ids = torch.tensor([sample.context_ids + sample.prompts[0].question_ids])
        assert tokenizer.decode(ids[0]) == text
        said = model.generate(ids, do_sample=False, max_new_tokens=12)[0, ids.shape[1] :]
        assert [row["setting"] for row in rows] == ["full", "half", "blank"]
        assert rows[0]["output"] == rows[1]["output"] == tokenizer.decode(said, skip_special_tokens=True)
        assert rows[0]["metric"] == "qa_f1"
