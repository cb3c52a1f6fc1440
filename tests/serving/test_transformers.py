"""What the server relies on in transformers' serving code: names, signatures, and what each does."""

from __future__ import annotations

import asyncio
import inspect

import pytest
import torch
from transformers.cli.serving import chat_completion, completion, model_manager, response, utils

from rankkv.serving.answers import Answer
from rankkv.serving.errors import RequestError
from rankkv.serving.generation import CountingStreamer, PinnedModelManager, TokenCounter
from rankkv.serving.options import HARMLESS, READ, check_options
from rankkv.serving.turns import Job


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (
            utils.GenerateManager.generate_streaming,
            "model processor inputs gen_config request_id response_parser",
        ),
        (utils.GenerateManager.generate_non_streaming, "model processor inputs gen_config request_id"),
        (utils.BaseHandler._resolve_model, "body"),
        (utils.BaseHandler._build_generation_config, "body model_generation_config use_cb"),
        (utils.BaseHandler.__init__, "model_manager generation_state chat_template_kwargs"),
        (utils.GenerationState.get_manager, "model_id use_cb"),
        (utils.InferenceThread.submit, "fn args kwargs"),
        (utils.DirectStreamer.__init__, "tokenizer loop queue response_parser"),
        (model_manager.ModelManager.load_model_and_processor, None),
        (model_manager.TimedModel.__init__, "model timeout_seconds processor on_unload"),
        (chat_completion.ChatCompletionHandler.handle_request, "body request_id"),
        (completion.CompletionHandler.handle_request, "body request_id"),
        (response.ResponseHandler.handle_request, "body request_id"),
    ],
)
def test_signatures(function, names):
    if names is not None:
        assert list(inspect.signature(function).parameters) == ["self", *names.split()]


@pytest.mark.parametrize(
    ("handler", "fields"),
    [
        (
            chat_completion.ChatCompletionHandler,
            {"messages", "model", "max_tokens", "stream", "generation_config"},
        ),
        (completion.CompletionHandler, {"prompt", "model", "max_tokens", "stream", "generation_config"}),
        (response.ResponseHandler, {"input", "model", "max_output_tokens", "stream", "generation_config"}),
    ],
)
def test_handlers_name_their_fields(handler, fields):
    assert fields <= set(handler._valid_params_class.__mutable_keys__)


@pytest.mark.parametrize(
    ("kind", "module", "handler"),
    [
        ("chat", chat_completion, chat_completion.ChatCompletionHandler),
        ("completions", completion, completion.CompletionHandler),
        ("responses", response, response.ResponseHandler),
    ],
)
def test_every_field_is_read_harmless_or_refused(kind, module, handler):
    fields = set(handler._valid_params_class.__mutable_keys__)
    assert fields >= READ[kind]
    source = inspect.getsource(module) + inspect.getsource(utils.BaseHandler)
    for name in READ[kind] - {"model"}:
        assert f'body["{name}"]' in source or f'body.get("{name}"' in source
    for name in fields - READ[kind] - HARMLESS:
        with pytest.raises(RequestError, match=f"^{name} 'x' is not supported"):
            check_options(kind, {name: "x"}, 100, 10)
        assert check_options(kind, {name: None}, 100, 10) is None


def test_stream_errors_stand_where_they_are_replaced():
    source = inspect.getsource(chat_completion.ChatCompletionHandler._streaming)
    assert 'data: {{"error": "{item.msg}"}}' in source
    assert 'data: {{"error": "{text.msg}"}}' in inspect.getsource(completion.CompletionHandler._streaming)


def test_generate_hands_a_function_in_its_place_what_an_answer_needs(tiny):
    from transformers import GenerationConfig

    model, tokenizer = tiny
    config = GenerationConfig(
        max_new_tokens=3,
        do_sample=True,
        temperature=0.5,
        repetition_penalty=1.5,
        stop_strings=["x"],
        eos_token_id=2,
    )
    answer = Answer.prepare(
        model, tokenizer, {"input_ids": torch.tensor([[5, 6]])}, config, 7, TokenCounter(Job("c", "k"))
    )
    names = {type(part).__name__ for part in (*answer._processors, *answer._criteria)}
    assert names == {
        "RepetitionPenaltyLogitsProcessor", "TemperatureLogitsWarper", "TopKLogitsWarper", "MaxLengthCriteria",
        "EosTokenCriteria", "StopStringCriteria", "FiniteLogits",
    }  # fmt: skip
    assert answer.ids.tolist() == [[5, 6]]
    assert answer._generator.initial_seed() == 7
    assert answer._criteria[0].max_length == 5


def test_one_thread_runs_all_jobs_in_order():
    manager, seen = utils.GenerateManager(), []
    import threading

    futures = [
        manager.submit(lambda place=place: seen.append((place, threading.get_ident()))) for place in range(5)
    ]
    for future in futures:
        future.result(10)
    assert [place for place, _ in seen] == list(range(5))
    assert {thread for _, thread in seen} == {manager._thread._thread.ident}


def test_the_first_put_is_the_prompt_and_a_cancelled_streamer_raises(tiny):
    job = Job("chat", "public")

    async def run():
        queue = asyncio.Queue()
        streamer = CountingStreamer(job, tiny[1]._tokenizer, asyncio.get_running_loop(), queue)
        streamer.put(torch.tensor([[5, 6, 7]]))
        assert (job.answer_tokens, job.first_token) == (0, None)
        streamer.put(torch.tensor([28]))
        streamer.end()
        await asyncio.sleep(0)
        assert (job.answer_tokens, streamer.total_tokens) == (1, 1)
        assert job.first_token is not None
        assert [await queue.get(), await queue.get()] == [tiny[1].decode([28]), None]
        streamer.cancel()
        with pytest.raises(utils._GenerationCancelled):
            streamer.put(torch.tensor([29]))
        assert job.cancelled.is_set()

    asyncio.run(run())


def test_the_pinned_model_stays(tiny):
    manager = PinnedModelManager("tiny", *tiny)
    assert manager.load_model_and_processor("tiny") == tiny
    for name in ("other", "tiny@main", "../tiny"):
        with pytest.raises(RequestError, match="only the model 'tiny'"):
            manager.load_model_and_processor(name)
    assert [(item["id"], item["status"]) for item in manager.list_models()] == [("tiny", {"value": "loaded"})]
    manager.loaded_models["tiny"]._timer.join(10)
    assert manager.load_model_and_processor("tiny") == tiny
