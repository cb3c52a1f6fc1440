"""The task "rankkv-text-generation" in transformers' own pipeline()."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
from transformers import TextGenerationPipeline, pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from rankkv import RankKVCache, RankKVConfig, compress
from rankkv.errors import ConfigError, InputError, UnknownNameError
from rankkv.integrations.generate import custom_generate
from rankkv.integrations.pipeline import TASK, RankKVTextGenerationPipeline, register, unregister
from rankkv.models.compat import cache_argument
from rankkv.models.prompts import split_prompt

CONTEXT = "The harbour office opens at seven, the archive at nine, and the museum at ten. " * 12
QUESTIONS = ["When does the archive open?", "What opens first?", "And the museum, when does it open?"]
SHORT = {"max_new_tokens": 6, "min_new_tokens": 6}


@pytest.fixture(scope="module")
def folder(embedded, tiny_llama, tmp_path_factory):
    """A folder with a random Llama that reads the embedded model's tokens."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama(vocab_size=len(embedded[1])).save_pretrained(path)
    embedded[1].save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pipe(folder):
    register()
    yield pipeline(TASK, model=str(folder), device="cpu")
    unregister()


def test_importing_registers_nothing_and_register_is_explicit():
    code = (
        "from transformers.pipelines import PIPELINE_REGISTRY as known\n"
        "import rankkv.integrations.pipeline as own\n"
        "seen = [own.TASK in known.supported_tasks]\n"
        "own.register(); own.register(); seen.append(own.TASK in known.supported_tasks)\n"
        "own.unregister(); seen.append(own.TASK in known.supported_tasks)\n"
        "print(seen)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[False, True, False]\n"
    assert "already registered" not in done.stderr


def test_another_class_of_this_name_is_not_replaced(monkeypatch):
    monkeypatch.setitem(PIPELINE_REGISTRY.supported_tasks, TASK, {"impl": TextGenerationPipeline, "pt": ()})
    with pytest.raises(ConfigError, match="already belongs to TextGenerationPipeline"):
        register()
    unregister()
    assert PIPELINE_REGISTRY.supported_tasks[TASK]["impl"] is TextGenerationPipeline


@pytest.mark.parametrize("question_aware", [False, True])
def test_everything_kept_answers_like_plain_generate(pipe, question_aware):
    answers = pipe(
        CONTEXT, questions=QUESTIONS, compression_ratio=1.0, question_aware=question_aware, **SHORT
    )
    prompt = split_prompt(pipe.tokenizer, CONTEXT, QUESTIONS)
    for question, answer in zip(prompt.question_ids, answers["answers"], strict=True):
        ids = torch.cat([prompt.context_ids, question], dim=1)
        plain = pipe.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **SHORT)
        assert answer == pipe.tokenizer.decode(plain[0, ids.shape[1] :], skip_special_tokens=True)


def test_a_compressed_context_answers_as_by_hand(pipe):
    prompt = split_prompt(pipe.tokenizer, CONTEXT, QUESTIONS[:1], "At")
    shared = compress(pipe.model, prompt.context_ids, compression_ratio=0.3, selector="h2o")
    ids = torch.cat([prompt.context_ids, prompt.question_ids[0]], dim=1)
    output = pipe.model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, **SHORT, **cache_argument(shared)
    )
    result = pipe(
        CONTEXT, question=QUESTIONS[0], answer_prefix="At", compression_ratio=0.3, selector="h2o", **SHORT
    )
    assert result == {"answer": pipe.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)}


def test_each_question_sees_the_context_alone(pipe):
    """The order of the questions and their number change nothing."""
    options = {"compression_ratio": 0.3, **SHORT}
    forward = pipe(CONTEXT, questions=QUESTIONS, **options)["answers"]
    backward = pipe(CONTEXT, questions=QUESTIONS[::-1], **options)["answers"]
    single = [pipe(CONTEXT, question=question, **options)["answer"] for question in QUESTIONS]
    assert forward == backward[::-1] == single


def test_aware_of_the_question_other_tokens_are_kept(pipe):
    details = {
        aware: pipe(
            CONTEXT,
            questions=QUESTIONS[:2],
            question_aware=aware,
            compression_ratio=0.3,
            return_details=True,
            **SHORT,
        )["details"]
        for aware in (False, True)
    }
    assert [details[aware]["question_aware"] for aware in (False, True)] == [False, True]
    layers = pipe.model.config.num_hidden_layers
    for aware in (False, True):
        for cache in details[aware]["caches"]:
            tokens = cache["prompt_tokens"] if aware else details[aware]["context_tokens"]
            assert cache["kept_tokens"] == sum(cache["budgets"]) == round(0.3 * tokens * layers)
    assert details[False]["caches"][0]["budgets"] == details[False]["caches"][1]["budgets"]
    prompt = split_prompt(pipe.tokenizer, CONTEXT, QUESTIONS[:1])
    whole = torch.cat([prompt.context_ids, prompt.question_ids[0]], dim=1)
    by_hand = compress(pipe.model, whole, compression_ratio=0.3, selector="snapkv")
    assert details[True]["caches"][0]["budgets"] == by_hand.budgets


def test_what_a_call_gives_is_joined_to_what_the_pipeline_was_built_with(folder):
    register()
    built = pipeline(
        TASK,
        model=str(folder),
        device="cpu",
        selector="h2o",
        compression_ratio=0.5,
        max_new_tokens=2,
        num_beams=1,
    )
    record = built(CONTEXT, compression_ratio=0.3, return_details=True)["details"]["config"]
    assert (record["selector"], record["compression_ratio"]) == ("h2o", 0.3)
    assert built(CONTEXT, return_details=True)["details"]["config"]["compression_ratio"] == 0.5
    small = pipeline(
        TASK, model=str(folder), device="cpu", budget=32, strategy="power", strategy_options={"exponent": 2}
    )
    own = small(CONTEXT, return_details=True, max_new_tokens=1)["details"]["config"]
    assert (own["budget"], own["strategy_options"]) == (32, {"exponent": 2})
    other = small(CONTEXT, compression_ratio=0.5, strategy="uniform", return_details=True, max_new_tokens=1)[
        "details"
    ]["config"]
    assert (other["budget"], other["compression_ratio"], other["strategy_options"]) == (None, 0.5, {})
    config = RankKVConfig(budget=64)
    assert built(CONTEXT, config=config, return_details=True)["details"]["config"]["selector"] == "echo"


@pytest.mark.parametrize(("ratio", "question_aware"), [(1.0, False), (1.0, True), (0.3, True)])
def test_beams(pipe, ratio, question_aware):
    options = {"num_beams": 3, "do_sample": False, **SHORT}
    answer = pipe(
        CONTEXT, question=QUESTIONS[0], compression_ratio=ratio, question_aware=question_aware, **options
    )["answer"]
    prompt = split_prompt(pipe.tokenizer, CONTEXT, QUESTIONS[:1])
    ids = torch.cat([prompt.context_ids, prompt.question_ids[0]], dim=1)
    cache = {} if ratio == 1.0 else cache_argument(RankKVCache(pipe.model, compression_ratio=ratio))
    output = pipe.model.generate(ids, attention_mask=torch.ones_like(ids), **options, **cache)
    assert answer == pipe.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def test_many_contexts(pipe):
    inputs = [
        {"context": CONTEXT, "question": QUESTIONS[0]},
        {"context": CONTEXT[300:], "questions": QUESTIONS[:2]},
    ]
    options = {"compression_ratio": 0.3, **SHORT}
    results = pipe(inputs, **options)
    assert results[0] == pipe(CONTEXT, question=QUESTIONS[0], **options)
    assert results[1] == pipe(CONTEXT[300:], questions=QUESTIONS[:2], **options)
    assert pipe([CONTEXT], **options) == [pipe(CONTEXT, **options)]
    assert list(pipe((item for item in inputs), **options)) == results
    assert pipe([]) == []


def test_a_context_that_is_too_long_is_cut_and_said_so(pipe):
    with pytest.warns(UserWarning, match="longer than 40 tokens: its last"):
        result = pipe(CONTEXT, question=QUESTIONS[0], max_context_length=40, return_details=True, **SHORT)
    assert result["details"]["context_tokens"] == 40
    assert result["details"]["dropped_tokens"] > 0


def test_greedy_says_nothing_of_sampling_options_that_a_repository_sets(pipe):
    config = pipe.model.generation_config
    before = config.do_sample, config.temperature, config.top_p
    config.do_sample, config.temperature, config.top_p = True, 0.6, 0.9
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            answers = {pipe(CONTEXT, question=QUESTIONS[0], **SHORT)["answer"] for _ in range(3)}
    finally:
        config.do_sample, config.temperature, config.top_p = before
    assert len(answers) == 1


def test_sampling_streaming_and_stop_strings_reach_generate(pipe):
    torch.manual_seed(0)
    sampled = {
        pipe(CONTEXT, question=QUESTIONS[0], do_sample=True, temperature=5.0, **SHORT)["answer"]
        for _ in range(3)
    }
    assert len(sampled) > 1
    whole = pipe(CONTEXT, question=QUESTIONS[0], **SHORT)["answer"]
    stopped = pipe(CONTEXT, question=QUESTIONS[0], stop_strings=[whole[:3]], max_new_tokens=6)["answer"]
    assert whole.startswith(stopped)
    assert len(stopped) < len(whole)


def test_a_pipeline_is_saved_as_model_and_tokenizer_without_code(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    again = pipeline(TASK, model=str(tmp_path), device="cpu")
    assert isinstance(again, RankKVTextGenerationPipeline)
    assert again(CONTEXT, **SHORT) == pipe(CONTEXT, **SHORT)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_a_model_with_adapters(folder, pipe):
    """An adapter that is trained changes the answer, an untrained one does not; custom_generate reaches both."""
    peft = pytest.importorskip("peft")
    base = type(pipe.model).from_pretrained(folder)
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj", "v_proj"])).eval()
    adapted = pipeline(TASK, model=model, tokenizer=pipe.tokenizer, device="cpu", compression_ratio=0.3)
    expected = pipe(CONTEXT, question=QUESTIONS[0], compression_ratio=0.3, **SHORT)
    assert adapted(CONTEXT, question=QUESTIONS[0], **SHORT) == expected
    ids = pipe.tokenizer(CONTEXT, return_tensors="pt").input_ids
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, **SHORT}
    cached = model.generate(
        input_ids=ids, **options, **cache_argument(RankKVCache(model, compression_ratio=0.3))
    )
    found = model.generate(input_ids=ids, custom_generate=custom_generate, compression_ratio=0.3, **options)
    assert found.equal(cached)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=1.0, generator=torch.Generator().manual_seed(0))
    assert adapted(CONTEXT, question=QUESTIONS[0], **SHORT) != expected


def test_the_other_pipeline_takes_the_cache(pipe):
    plain = TextGenerationPipeline(model=pipe.model, tokenizer=pipe.tokenizer, device="cpu")
    cache = RankKVCache(pipe.model, compression_ratio=0.3)
    options = {"do_sample": False, "return_full_text": False, **SHORT}
    (result,) = plain(CONTEXT, **options, **cache_argument(cache))
    assert result["generated_text"]
    length = len(pipe.tokenizer(CONTEXT).input_ids)
    assert sum(cache.budgets) == round(0.3 * length * 3)


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"question": "a", "questions": ["b"]}, InputError, "not both"),
        ({"questions": "abc"}, InputError, "give a single text as question"),
        ({"questions": []}, InputError, "questions is empty"),
        ({"compresion_ratio": 0.3}, UnknownNameError, "did you mean 'compression_ratio'"),
        ({"compression_ratio": 1.5}, ConfigError, "outside"),
        ({"config": RankKVConfig(), "budget": 64}, ConfigError, "not both"),
        ({"batch_size": 2}, ConfigError, "batch_size=2"),
        ({"num_return_sequences": 2}, ConfigError, "num_return_sequences"),
    ],
)
def test_what_cannot_be_done_is_refused(pipe, given, error, said):
    with pytest.raises(error, match=said):
        pipe(CONTEXT, **given)


@pytest.mark.parametrize("context", ["", {"text": "abc"}, {"context": "abc", "answer": "x"}, 7])
def test_a_context_that_is_none_is_refused(pipe, context):
    with pytest.raises(InputError):
        pipe(context)
