"""What every task's samples obey, and what is particular to each."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from rankkv.errors import ConfigError, InputError, UnknownNameError
from rankkv.evaluation.task_runner import compute_recall
from rankkv.evaluation.tasks import (
    TASKS,
    Draft,
    Haystack,
    Question,
    Task,
    get_task,
    make_samples,
    register_task,
    unregister_task,
)

LENGTH = 500
WORD_LISTS = ("common_words", "frequent_words")


@pytest.fixture(scope="module")
def tokenizer(embedded):
    return embedded[1]


@pytest.fixture(scope="module")
def haystack(tokenizer, python_docs):
    return Haystack(tokenizer, python_docs[:120_000])


def make(name, tokenizer, haystack, **options):
    return make_samples(get_task(name), tokenizer, haystack, **{"lengths": (LENGTH,), "count": 3, **options})


# -- every task ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_samples_are_drawn_by_their_seed_alone(name, tokenizer, haystack):
    once, again, other = (make(name, tokenizer, haystack, seed=seed) for seed in (1, 1, 2))
    assert once == again
    assert once[0].context_ids != other[0].context_ids
    assert len({sample.context_ids for sample in once}) == 3
    if name != "perplexity":
        assert make(name, tokenizer, haystack, seed=1, count=1, lengths=(LENGTH,))[0] == once[0]


@pytest.mark.parametrize("name", TASKS)
def test_contexts_have_the_length_asked_for(name, tokenizer, haystack):
    for length in (LENGTH, 800):
        for sample in make(name, tokenizer, haystack, lengths=(length,)):
            for ids in (sample.context_ids, sample.blank_ids):
                if name in WORD_LISTS:
                    assert 0.85 * length < len(ids) <= length
                else:
                    assert len(ids) == length


@pytest.mark.parametrize(
    ("name", "facts", "answers", "questions"),
    [
        ("needle", 1, 1, 1),
        ("niah_single", 1, 1, 1),
        ("niah_multikey", 4, 1, 1),
        ("niah_multivalue", 4, 4, 1),
        ("niah_multiquery", 4, 4, 1),
        ("multi_question", 4, 1, 4),
        ("variable_tracking", 10, 5, 1),
        ("quotation", 0, 1, 3),
        ("common_words", 0, 10, 1),
        ("frequent_words", 0, 3, 1),
    ],
)
def test_a_task_hides_and_asks_for_what_its_name_says(name, facts, answers, questions, tokenizer, haystack):
    for sample in make(name, tokenizer, haystack, lengths=(900,)):
        context = tokenizer.decode(sample.context_ids)
        assert len(re.findall(r"The access code for the .*? is \d+\.|VAR [A-Z]{3} = ", context)) == facts
        assert [len(prompt.answers) for prompt in sample.prompts] == [answers] * questions


@pytest.mark.parametrize("name", [name for name in TASKS if name not in ("perplexity", *WORD_LISTS)])
def test_answers_stand_in_the_context_and_not_in_the_blank_one(name, tokenizer, haystack):
    for sample in make(name, tokenizer, haystack, lengths=(LENGTH, 900)):
        context, blank = (tokenizer.decode(ids) for ids in (sample.context_ids, sample.blank_ids))
        for prompt in sample.prompts:
            said = tokenizer.decode(prompt.answer_ids)
            assert compute_recall(said, prompt.answers) == 1.0
            assert compute_recall(context, prompt.answers) == 1.0
            if name != "variable_tracking":
                assert compute_recall(blank, prompt.answers) == 0.0


@pytest.mark.parametrize("name", TASKS)
def test_question_aware_moves_the_question_and_nothing_else(name, tokenizer, haystack):
    after = make(name, tokenizer, haystack)
    within = make(name, tokenizer, haystack, question_aware=True)
    expected = [
        (*sample.context_ids, *prompt.question_ids, *prompt.answer_ids)
        for sample in after
        for prompt in sample.prompts
    ]
    assert [(*one.context_ids, *one.prompts[0].answer_ids) for one in within] == expected
    assert all(one.question_aware and not one.prompts[0].question_ids for one in within)
    assert len({one.name for one in within}) == len(within)


@pytest.mark.parametrize("name", ["needle", "multi_question"])
def test_chat_template_stands_around_context_and_question(name, tokenizer, haystack):
    plain = make(name, tokenizer, haystack)[0]
    framed = make(name, tokenizer, haystack, chat=True)[0]
    question = re.sub(r" The access code.*", "", tokenizer.decode(plain.prompts[0].question_ids))
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": tokenizer.decode(plain.context_ids) + question}],
        tokenize=False,
        add_generation_prompt=True,
    )
    whole = tokenizer.decode((*framed.context_ids, *framed.prompts[0].question_ids))
    assert whole.startswith(rendered)
    assert whole.removeprefix(rendered).startswith("The access code for")


@pytest.mark.parametrize("name", TASKS)
def test_options_and_numbers_are_checked(name, tokenizer, haystack):
    with pytest.raises(ConfigError, match="no option colour"):
        make(name, tokenizer, haystack, colour="red")
    with pytest.raises(ConfigError, match="count=0"):
        make(name, tokenizer, haystack, count=0)
    with pytest.raises(InputError):
        make(name, tokenizer, haystack, lengths=(3,) if name != "perplexity" else (10**6,))


# -- one by one ------------------------------------------------------------------------------------


def test_needles_stand_at_the_depths_of_the_grid(tokenizer, haystack):
    samples = make("needle", tokenizer, haystack, count=6, depths=(0.0, 0.5, 1.0))
    assert [sample.depth for sample in samples] == [0.0, 0.5, 1.0] * 2
    for sample in samples:
        text = tokenizer.decode(sample.context_ids)
        at = text.index("The access code") / (len(text) - 30)
        # A needle moves to the next end of a sentence.
        assert at == pytest.approx(sample.depth, abs=0.15)


def test_distractors_stay_where_the_answer_is_taken_out(tokenizer, haystack):
    for sample in make("niah_multikey", tokenizer, haystack, keys=5):
        context, blank = (tokenizer.decode(ids) for ids in (sample.context_ids, sample.blank_ids))
        assert (context.count("The access code for"), blank.count("The access code for")) == (5, 4)


def test_questions_to_one_context_ask_for_different_codes(tokenizer, haystack):
    (sample,) = make("multi_question", tokenizer, haystack, count=1, keys=6, queries=3)
    assert len({prompt.answers for prompt in sample.prompts}) == 3
    together = make("niah_multiquery", tokenizer, haystack, count=1, keys=6, queries=3)[0]
    assert len(together.prompts) == 1
    assert len(together.prompts[0].answers) == 3


def test_tracked_variables_are_those_that_follow_from_the_value(tokenizer, haystack):
    """Solved from the text by running the assignments."""
    for sample in make("variable_tracking", tokenizer, haystack, count=5, chains=3, hops=3):
        question = tokenizer.decode(sample.prompts[0].question_ids)
        value = re.search(r"the value (\d+)", question)[1]
        for ids, count in ((sample.context_ids, 4), (sample.blank_ids, 0)):
            held = {}
            for name, given in re.findall(r"VAR (\w+) = (\w+)\.", tokenizer.decode(ids)):
                held[name] = held.get(given, given)
            assert len(held) == 12
            found = [name for name, number in held.items() if number == value]
            assert found == list(sample.prompts[0].answers)[:count]


def test_a_quotation_follows_its_first_words_in_the_context(tokenizer, haystack):
    for sample in make("quotation", tokenizer, haystack, count=4, lengths=(900,), questions=2):
        context, blank = (tokenizer.decode(ids) for ids in (sample.context_ids, sample.blank_ids))
        for prompt in sample.prompts:
            begins = tokenizer.decode(prompt.question_ids).split("following words. ")[1]
            said = tokenizer.decode(prompt.answer_ids)
            assert context.count(begins + said) == 1
            assert begins in blank
            assert begins + said not in blank


def test_a_text_without_passages_is_refused(tokenizer):
    with pytest.raises(InputError, match="hold no passage"):
        make("quotation", tokenizer, "word " * 2000)


@pytest.mark.parametrize("name", WORD_LISTS)
def test_words_asked_for_are_the_most_frequent_of_the_list(name, tokenizer, haystack):
    for sample in make(name, tokenizer, haystack, lengths=(700,)):
        answers = sample.prompts[0].answers
        context, blank = (
            Counter(re.findall(r"[a-z]+", tokenizer.decode(ids)))
            for ids in (sample.context_ids, sample.blank_ids)
        )
        assert {word for word, _ in context.most_common(len(answers))} == set(answers)
        assert max(blank.values()) - min(blank.values()) <= 2
        assert set(answers) <= set(blank)


def test_continuations_share_no_token_and_are_not_in_the_blank_context(tokenizer, haystack):
    samples = make("perplexity", tokenizer, haystack, count=8, continuation=64)
    ids = haystack.ids
    at = 0
    for sample in samples:
        whole = list(sample.context_ids + sample.prompts[0].answer_ids)
        start = next(i for i in range(at, len(ids)) if ids[i : i + len(whole)] == whole)
        at = start + len(whole)
        blank = list(sample.blank_ids)
        there = next(i for i in range(len(ids)) if (ids + ids)[i : i + LENGTH] == blank)
        assert not set(range(start, at)) & {i % len(ids) for i in range(there, there + LENGTH)}
    with pytest.raises(InputError, match="no room for 1000 samples"):
        make("perplexity", tokenizer, haystack, count=1000)


def test_recall_counts_whole_words_in_any_order_and_case():
    assert compute_recall("b, A and 123.", ["a", "B", "123"]) == 1.0
    assert compute_recall("12345", ["123", "345"]) == 0.0
    assert compute_recall("", ["x"]) == 0.0


def test_a_task_of_ones_own(tokenizer, haystack):
    def make_echo(haystack, place, *, word="yes"):
        return Draft(haystack.cut(place.length, place), [Question(" Say it:", "", (word,), f" {word}")])

    register_task(Task("echo", make_echo, "recall", "this test"))
    try:
        (sample,) = make("echo", tokenizer, haystack, count=1, word="no")
        assert (sample.prompts[0].answers, sample.blank_ids) == (("no",), None)
        with pytest.raises(InputError, match="one token"):
            make("echo", tokenizer, haystack, word="no", question_aware=True)
        with pytest.raises(ConfigError, match="'echo'"):
            register_task(Task("echo", make_echo, "recall", "again"))
    finally:
        unregister_task("echo")
    with pytest.raises(UnknownNameError, match="did you mean 'needle'"):
        get_task("neddle")


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("needle", {"depths": (1.5,)}, r"depths \[1.5\]"),
        ("needle", {"keys": 2}, "depths need keys=1 and values=1"),
        ("niah_single", {"digits": 1}, "digits=1"),
        ("niah_multikey", {"queries": 9}, "queries=9 must be at most keys=4"),
        ("niah_multikey", {"keys": 0}, "keys=0"),
        ("niah_multikey", {"keys": 500}, "keys=500 must be at most"),
        ("variable_tracking", {"hops": 0}, "hops=0"),
        ("variable_tracking", {"chains": 900}, "chains=900"),
        ("variable_tracking", {"chains": 250, "hops": 4}, "chains=250 of 5 variables"),
        ("quotation", {"asked": 0}, "asked=0"),
        ("common_words", {"contrast": 1}, "contrast=1"),
        ("frequent_words", {"frequent": 40}, "frequent=40"),
        ("perplexity", {"continuation": 1}, "continuation=1"),
    ],
)
def test_refusals(name, options, words, tokenizer, haystack):
    with pytest.raises(ConfigError, match=words):
        make(name, tokenizer, haystack, **options)
