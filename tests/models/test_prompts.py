"""A prompt in two parts: the tokens of the whole, special tokens once, and the template's own words."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rankkv.errors import ConfigError, InputError
from rankkv.models.prompts import split_prompt

CONTEXT = "The archive opens at nine and closes at five."
QUESTION = "When does it open?"
LLAMA_2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}<<SYS>> {{ m.content }} <</SYS>> "
    "{% else %}[INST] {{ m.content.strip() }} [/INST]{% endif %}{% endfor %}"
)
THINKING = (
    "{% for m in messages %}<u>{{ m.content }}</u>{% endfor %}<a>"
    "{% if enable_thinking is not defined or enable_thinking %}<think>{% endif %}"
)


def make_tokenizer(template=None, beginning="<s>", end=None):
    """A tokenizer of words that writes ``beginning`` before a text, and ``end`` after it where there is one."""
    words = (CONTEXT + QUESTION + " [INST] [/INST] <<SYS>> <</SYS>> Be brief . ? Answer : \n").split()
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(["<unk>", "<s>", "</s>", *words]))}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pattern = " ".join(part for part in (beginning, "$A", end) if part)
    raw.post_processor = processors.TemplateProcessing(
        single=pattern, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=template
    )


@pytest.mark.parametrize("template", [None, LLAMA_2])
def test_there_is_one_beginning_token_and_it_is_the_first(template):
    tokenizer = make_tokenizer(template)
    prompt = split_prompt(tokenizer, CONTEXT, [QUESTION])
    ids = prompt.context_ids[0].tolist() + prompt.question_ids[0][0].tolist()
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1


def test_a_tokenizer_that_ends_every_text_does_not_end_the_prompt():
    tokenizer = make_tokenizer(end="</s>")
    assert tokenizer(CONTEXT).input_ids[-1] == tokenizer.eos_token_id
    prompt = split_prompt(tokenizer, CONTEXT, [QUESTION])
    ids = prompt.context_ids[0].tolist() + prompt.question_ids[0][0].tolist()
    assert tokenizer.eos_token_id not in ids
    assert ids[0] == tokenizer.bos_token_id


def test_a_tokenizer_without_a_beginning_token_gets_none():
    prompt = split_prompt(make_tokenizer(beginning=None), CONTEXT, [QUESTION])
    assert prompt.context_ids[0].tolist() == make_tokenizer(beginning=None)(CONTEXT).input_ids


def test_both_parts_are_the_template_s_own_text(embedded):
    _, tokenizer = embedded
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": f"{CONTEXT}\n\n{QUESTION}"},
    ]
    whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt = split_prompt(tokenizer, CONTEXT, [QUESTION], "It opens", system_prompt="Be brief.")
    parts = [tokenizer.decode(ids[0]) for ids in (prompt.context_ids, prompt.question_ids[0])]
    assert "".join(parts) == whole + "It opens"
    assert CONTEXT in parts[0]
    assert parts[1].startswith(QUESTION)


def test_the_context_s_ids_do_not_depend_on_the_questions(embedded):
    _, tokenizer = embedded
    alone = split_prompt(tokenizer, CONTEXT)
    several = split_prompt(tokenizer, CONTEXT, [QUESTION, "  and\nwhere?"], "Answer:")
    assert alone.context_ids.equal(several.context_ids)
    assert len(several.question_ids) == 2


def test_thinking_is_off_unless_asked_for(embedded):
    _, tokenizer = embedded
    before = tokenizer.chat_template
    try:
        tokenizer.chat_template = THINKING
        texts = [
            tokenizer.decode(split_prompt(tokenizer, CONTEXT, [QUESTION], **options).question_ids[0][0])
            for options in ({}, {"template_options": {"enable_thinking": True}})
        ]
    finally:
        tokenizer.chat_template = before
    assert texts == [f"{QUESTION}</u><a>", f"{QUESTION}</u><a><think>"]


def test_a_long_context_loses_its_end(embedded):
    _, tokenizer = embedded
    whole = split_prompt(tokenizer, CONTEXT, [QUESTION])
    cut = split_prompt(tokenizer, CONTEXT, [QUESTION], max_context_length=9)
    assert cut.context_ids.equal(whole.context_ids[:, :9])
    assert cut.dropped_tokens == whole.context_ids.shape[1] - 9
    assert cut.question_ids[0].equal(whole.question_ids[0])


def test_a_context_that_holds_the_mark_is_still_split_at_the_question(embedded):
    _, tokenizer = embedded
    context = f"{CONTEXT} RankKVQuestionGoesHere and more."
    prompt = split_prompt(tokenizer, context, [QUESTION])
    assert context in tokenizer.decode(prompt.context_ids[0])


@pytest.mark.parametrize(
    ("template", "options", "error", "said"),
    [
        (None, {"context": "  "}, InputError, "blank"),
        (None, {"context": None}, InputError, "NoneType"),
        (None, {"questions": []}, InputError, "questions is empty"),
        (None, {"questions": [7]}, InputError, "int"),
        (None, {"max_context_length": 0}, ConfigError, "max_context_length=0"),
        (None, {"use_chat_template": True}, ConfigError, "no chat template"),
        (None, {"system_prompt": "Be brief."}, ConfigError, "needs a chat template"),
        ("{{ messages[0].content }}{{ messages[0].content }}", {}, InputError, "once"),
        ("{{ raise_exception('no system role') }}", {}, InputError, "no system role"),
        ("{{ messages[0].content }}", {"questions": [""]}, InputError, "no token to continue from"),
    ],
)
def test_what_cannot_be_split_is_refused(template, options, error, said):
    arguments = {"context": CONTEXT, "questions": [QUESTION], **options}
    with pytest.raises(error, match=said):
        split_prompt(make_tokenizer(template), **arguments)


def test_a_template_can_be_left_out():
    prompt = split_prompt(make_tokenizer(LLAMA_2), CONTEXT, [QUESTION], use_chat_template=False)
    assert prompt.context_ids.equal(split_prompt(make_tokenizer(), CONTEXT, [QUESTION]).context_ids)
