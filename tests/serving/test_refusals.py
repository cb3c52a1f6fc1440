"""Bad input of every route: status, code, and a sentence with the value, the bound and the remedy."""

from __future__ import annotations

import http.client
import json
from pathlib import Path

import pytest

CHAT, TEXT, RESPONSES, CONTEXTS = (
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/contexts",
)  # fmt: skip
VALID = {
    CHAT: {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2},
    TEXT: {"prompt": "Hi", "max_tokens": 2},
    RESPONSES: {"input": "Hi", "max_output_tokens": 2, "stream": False},
    CONTEXTS: {"text": "A document. " * 20},
    "/load_model": {"model": "tiny"},
}


def check(reply, status, *words, code=None):
    assert reply.status == status, reply.data
    assert reply.headers["content-type"] == "application/json"
    error = reply.error
    assert set(error) == {"message", "type", "param", "code"}
    for word in words:
        assert word in error["message"], error["message"]
    assert code is None or error["code"] == code
    return error


@pytest.mark.parametrize("path", VALID)
def test_the_valid_bodies_are_valid(shared_live, path):
    assert shared_live.post(path, VALID[path]).status in (200, 201)


@pytest.mark.parametrize("path", VALID)
@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"{", "not JSON"),
        (b"", "not JSON"),
        (b"[]", "JSON list"),
        (b'"text"', "JSON str"),
        (b"\xff\xfe{}", "not JSON"),
        (b"[" * 15_000, "not JSON"),
    ],
)
def test_wrong_json(shared_live, path, raw, words):
    check(shared_live.send("POST", path, raw=raw), 400, words)


@pytest.mark.parametrize("path", VALID)
def test_another_content_type(shared_live, path):
    reply = shared_live.send("POST", path, raw=b"{}", Content_Type="text/plain")
    check(reply, 415, "'text/plain'", "application/json", code="unsupported_media_type")


@pytest.mark.parametrize("path", VALID)
def test_a_huge_body(shared_live, path):
    body = {**VALID[path], "text": "x" * 30_000}
    check(shared_live.post(path, body), 413, "20000 bytes", "--max-body", code="body_too_large")
    # Without its length in the header too: it is cut off while it is read.
    connection = http.client.HTTPConnection("127.0.0.1", shared_live.port, timeout=60)
    connection.request(
        "POST", path, iter([b"x" * 15_000] * 4), {"Content-Type": "application/json"}, encode_chunked=True
    )
    try:
        assert connection.getresponse().status == 413
    except (BrokenPipeError, ConnectionResetError):
        pytest.fail("the connection was dropped without an answer")
    finally:
        connection.close()


@pytest.mark.parametrize("path", VALID)
def test_an_unknown_field(shared_live, path):
    check(shared_live.post(path, {**VALID[path], "modle": "x"}), 400, "unknown field 'modle'", "'model'")


@pytest.mark.parametrize("path", VALID)
@pytest.mark.parametrize("model", ["gpt-4", "../../etc", "", 5, ["tiny"], "tiny@main"])
def test_an_unknown_model(shared_live, path, model):
    check(shared_live.post(path, {**VALID[path], "model": model}), 404, "'tiny'", code="model_not_found")


@pytest.mark.parametrize(
    "name", ["nothing", "ctx_" + "0" * 32, "../../etc/passwd", "..", "a/b", "%2e%2e%2fetc", "x" * 3000, "\n"]
)
def test_an_unknown_context_and_tricks_with_paths(shared_live, name):
    from urllib.parse import quote

    for method in ("GET", "DELETE"):
        error = check(shared_live.send(method, f"{CONTEXTS}/{quote(name, safe='')}"), 404)
        assert len(error["message"]) < 300
    check(shared_live.post(CHAT, {**VALID[CHAT], "rankkv": {"context": name}}), 404, code="unknown_context")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "..",
        ".hidden",
        "../up",
        "a/b",
        "a b",
        "a\\b",
        "é",
        "x" * 65,
        "ctx_1",
        "conv_1",
        "a\0b",
        5,
        ["a"],
        {},
    ],
)
def test_names_that_are_none(shared_live, name):
    check(shared_live.post(CONTEXTS, {**VALID[CONTEXTS], "name": name}), 400, "letters, digits")
    assert not [
        path for path in Path(shared_live.service.settings.folder).rglob("*") if "hidden" in path.name
    ]


def test_a_taken_name_and_too_many_contexts(tiny, tmp_path):
    from live import run_live

    with run_live(*tiny, tmp_path, max_contexts=2) as live:
        first = live.post(CONTEXTS, {"text": "One. " * 20, "name": "doc"}).json["id"]
        check(
            live.post(CONTEXTS, {"text": "Two. " * 20, "name": "doc"}),
            409,
            first,
            "DELETE",
            code="name_taken",
        )
        second = live.post(CONTEXTS, {"text": "Two. " * 20})
        check(live.post(CONTEXTS, {"text": "Two. " * 20, "name": "doc"}), 409, code="name_taken")
        check(live.post(CONTEXTS, {"text": "Three. " * 20}), 409, "2 are the most", code="too_many_contexts")
        # Those that are there are still told, and one that goes makes room.
        assert live.post(CONTEXTS, {"text": "Two. " * 20}).json == second.json
        live.send("DELETE", f"{CONTEXTS}/doc")
        assert live.post(CONTEXTS, {"text": "Three. " * 20, "name": "doc"}).status == 201


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"text": None}, "either text or messages"),
        ({"messages": [{"role": "user", "content": "x"}]}, "either text or messages"),
        ({"text": " \n"}, "not white space"),
        ({"text": 5}, "not white space"),
        ({"text": None, "messages": []}, "at least one message"),
        ({"text": None, "messages": "x"}, "at least one message"),
        ({"compression_ratio": 0}, "compression_ratio"),
        ({"compression_ratio": 1.5}, "compression_ratio"),
        ({"compression_ratio": "0.5"}, "must be a number"),
        ({"compression_ratio": True}, "must be a number"),
        ({"max_loss": 0}, "max_loss=0 is outside (0, 10]"),
        ({"max_loss": "0.1"}, "max_loss='0.1' is outside (0, 10]"),
        ({"max_loss": 0.1, "selector": "h2o"}, "'h2o' was not measured"),
        ({"selector": "snapvk"}, "did you mean 'snapkv'"),
        ({"selector": 3}, "name of a selector"),
        ({"selector": "/etc/passwd"}, "unknown selector"),
    ],
)
def test_contexts_that_are_none(shared_live, change, words):
    body = {name: value for name, value in {**VALID[CONTEXTS], **change}.items() if value is not None}
    check(shared_live.post(CONTEXTS, body), 400, words)


def test_too_long(shared_live):
    text = "a b c d " * 600
    check(
        shared_live.post(CONTEXTS, {"text": text}), 400, "2047 are the most", code="context_length_exceeded"
    )
    for path, field in ((CHAT, "messages"), (TEXT, "prompt"), (RESPONSES, "input")):
        given = [{"role": "user", "content": text}] if field == "messages" else text
        reply = shared_live.post(path, {**VALID[path], field: given})
        check(reply, 400, "2048 are the most", code="context_length_exceeded")
    # A prompt that fits, with an answer that does not.
    text = "a b c d " * 500
    body = {**VALID[CHAT], "messages": [{"role": "user", "content": text}], "max_tokens": 64}
    check(shared_live.post(CHAT, body), 400, "an answer of 64", code="context_length_exceeded")


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (None, "at least one message"),
        ([], "at least one message"),
        ("Hi", "at least one message"),
        ({}, "at least one message"),
        (["Hi"], "messages[0] must be an object"),
        ([{"content": "Hi"}], "messages[0].role is None"),
        ([{"role": "robot", "content": "Hi"}], "'robot'"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "'image_url'"),
        ([{"role": "user", "content": ["Hi"]}], "text parts"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
            "tool_calls",
        ),
        ([{"role": "assistant", "tool_calls": "x"}], "tool_calls"),
    ],
)
def test_messages_that_are_none(shared_live, messages, words):
    check(shared_live.post(CHAT, {"messages": messages} if messages is not None else {}), 400, words)
    if messages:
        check(shared_live.post(CONTEXTS, {"messages": messages}), 400, words)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("doc", "give {"),
        ({"contxt": "doc"}, "give {"),
        ({"context": 5}, "id or name"),
        ({"reuse": "no"}, "true or false"),
        ({"context": "doc", "reuse": False}, "always used"),
    ],
)
def test_the_own_field(shared_live, given, words):
    for path in (CHAT, TEXT, RESPONSES):
        check(shared_live.post(path, {**VALID[path], "rankkv": given}), 400, words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n": 2}, "n 2 is not supported by this server: give 1"),
        ({"logprobs": True}, "logprobs"),
        ({"response_format": {"type": "json_object"}}, '{"type": "text"}'),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"functions": [{}]}, "functions"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"temperature": 3}, "from 0 to 2"),
        ({"temperature": "hot"}, "from 0 to 2"),
        ({"temperature": float("nan")}, "from 0 to 2"),
        ({"top_p": 1.5}, "from 0 to 1"),
        ({"top_p": 0}, "above 0"),
        ({"frequency_penalty": -1}, "from -0.9 to 2"),
        ({"seed": -1}, "whole number"),
        ({"seed": 1.5}, "whole number"),
        ({"seed": 2**70}, "whole number"),
        ({"max_tokens": 0}, "from 1 to 64"),
        ({"max_tokens": 65}, "from 1 to 64"),
        ({"max_completion_tokens": "9"}, "from 1 to 64"),
        ({"stop": ""}, "16 texts"),
        ({"stop": ["x"] * 17}, "16 texts"),
        ({"stop": 5}, "16 texts"),
        ({"logit_bias": {"x": 1}}, "'x'"),
        ({"logit_bias": {"999999": 1}}, "ids from 0"),
        ({"logit_bias": {"5": 200}}, "from -100 to 100"),
        ({"logit_bias": [5]}, "token ids"),
        ({"stream": "yes"}, "true or false"),
        ({"tools": "x"}, "list of objects"),
        ({"chat_template_kwargs": {"tokenize": False}}, "variables of the chat template"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template is not open"),
        ({"chat_template_kwargs": {"truncation": True, "max_length": 5}}, "truncation is not open"),
        ({"chat_template_kwargs": {"add_generation_prompt": False}}, "is not open"),
        ({"chat_template_kwargs": "x"}, "variables of the chat template"),
        ({"generation_config": "{"}, "JSON object"),
        ({"generation_config": {"top_k": 5}}, "JSON object"),
        ({"generation_config": '{"num_beams": 4}'}, "generation_config.num_beams is not open to clients"),
        ({"generation_config": '{"num_return_sequences": 8}'}, "is not open"),
        ({"generation_config": '{"use_cache": false}'}, "is not open"),
        ({"generation_config": '{"cache_implementation": "static"}'}, "is not open"),
        ({"generation_config": '{"prompt_lookup_num_tokens": 5}'}, "is not open"),
        ({"generation_config": '{"max_length": 100000}'}, "is not open"),
        ({"generation_config": '{"max_time": 1}'}, "is not open"),
        ({"generation_config": '{"compile_config": {}}'}, "is not open"),
        ({"generation_config": '{"made_up": 1}'}, "is not open"),
        ({"generation_config": '{"max_new_tokens": 65}'}, "from 1 to 64"),
        ({"generation_config": '{"temperature": 0}'}, "from 0.01 to 2"),
        ({"generation_config": '{"typical_p": 0}'}, "from 0.01 to 1"),
        ({"generation_config": '{"do_sample": "yes"}'}, "true or false"),
        ({"generation_config": '{"suppress_tokens": ["x"]}'}, "is not open"),
        ({"generation_config": '{"eos_token_id": [999999]}'}, "whole number"),
        ({"generation_config": '{"top_k": "x"}'}, "whole number"),
    ],
)
def test_options_that_are_forbidden_or_out_of_range(shared_live, options, words):
    raw = json.dumps({**VALID[CHAT], **options}).encode()
    check(shared_live.send("POST", CHAT, raw=raw), 400, words)


@pytest.mark.parametrize(
    "options",
    [
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"temperature": 2, "top_p": 0.5, "seed": 2**63 - 1, "frequency_penalty": -0.9},
        {"temperature": 0, "top_p": 0.5, "n": 1, "logprobs": False, "stop": None, "user": "me", "metadata": {}},
        {"logit_bias": {}}, {"logit_bias": {"5": 100, "6": -100.0}}, {"stop": ["a", "b"], "presence_penalty": 0.0},
        {"generation_config": json.dumps({
            "do_sample": True, "temperature": 0.01, "top_k": 0, "top_p": 0.01, "min_p": 0.5, "typical_p": 0.5,
            "repetition_penalty": 0.1, "no_repeat_ngram_size": 2, "min_new_tokens": 1, "max_new_tokens": 2,
            "num_beams": 1, "use_cache": True, "transformers_version": "5.24.0", "eos_token_id": [2, 3],
        })},
    ],
)  # fmt: skip
def test_options_at_their_bounds_are_taken(shared_live, options):
    for stream in (False, True):
        reply = shared_live.send(
            "POST", CHAT, raw=json.dumps({**VALID[CHAT], **options, "stream": stream}).encode()
        )
        assert reply.status == 200, reply.data
        assert not stream or reply.events[-1] == "[DONE]"


def test_wrong_prompts(shared_live):
    for prompt in (None, "", ["a"], [1, 2], 5):
        check(shared_live.post(TEXT, {**VALID[TEXT], "prompt": prompt}), 400, "one text")
    for given in (None, "", [], 5):
        check(shared_live.post(RESPONSES, {**VALID[RESPONSES], "input": given}), 400, "input must be")
    picture = {"type": "input_image", "image_url": "data:"}
    for given in (
        [5],
        [{"type": "nothing"}],
        [picture],
        [{"role": "user", "content": [picture]}],
        [{"role": "user"}, 5],
    ):
        check(shared_live.post(RESPONSES, {**VALID[RESPONSES], "input": given}), 400)
    made = shared_live.post(CONTEXTS, VALID[CONTEXTS]).json["id"]
    named = {"context": made}
    check(shared_live.post(RESPONSES, {**VALID[RESPONSES], "rankkv": named}), 400, CHAT)
    check(shared_live.post(TEXT, {**VALID[TEXT], "rankkv": named}), 400, CHAT)


def test_messages_that_do_not_follow_a_context(shared_live):
    made = shared_live.post(CONTEXTS, VALID[CONTEXTS]).json["id"]
    for messages in ([], [{"role": "system", "content": "x"}], [{"role": "assistant", "content": "x"}]):
        body = {"messages": messages, "max_tokens": 2, "rankkv": {"context": made}}
        check(shared_live.post(CHAT, body), 400, "must have the role user")


def test_tools_that_change_the_beginning_of_a_context(tiny, tmp_path):
    import copy

    from live import run_live

    model, tokenizer = tiny[0], copy.deepcopy(tiny[1])
    tokenizer.chat_template = (
        "{% if tools %}tools: {{ tools | tojson }}\n{% endif %}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    with run_live(model, tokenizer, tmp_path) as live:
        made = live.post(CONTEXTS, VALID[CONTEXTS]).json["id"]
        reply = live.chat("Hi", rankkv={"context": made}, tools=tools)
        check(reply, 400, "tools", code="context_mismatch")
        assert live.chat("Hi", tools=tools).status == 200
        # The queue is not stuck behind a request that was refused.
        assert live.chat("Hi", rankkv={"context": made}).status == 200


def test_a_template_that_refuses(tiny, tmp_path):
    import copy

    from live import run_live

    model, tokenizer = tiny[0], copy.deepcopy(tiny[1])
    tokenizer.chat_template = "{{ raise_exception('no talk today') }}"
    with run_live(model, tokenizer, tmp_path) as live:
        check(live.chat("Hi"), 400, "refuses the conversation", "no talk today")
        check(live.post(CONTEXTS, VALID[CONTEXTS]), 400, "no talk today")
        assert live.service.turns.running == 0


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/docs", 404), ("GET", "/openapi.json", 404), ("GET", "/v1/contexts/a/b", 404),
        ("POST", "/v1/embeddings", 404), ("GET", "/v1/../metrics/x", 404), ("DELETE", "/health", 405),
        ("GET", CHAT, 405), ("PUT", CONTEXTS, 405), ("POST", "/metrics", 405), ("GET", "/load_model", 405),
        ("POST", "/reset", 403), ("GET", "/reset", 403), ("POST", "/v1/systemone", 403),
        ("POST", "/v1/audio/transcriptions", 403),
    ],
)  # fmt: skip
def test_closed_and_unknown_routes(shared_live, method, path, status):
    check(shared_live.send(method, path), status)
    assert shared_live.chat("Hi").status == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "localhost@evil.example"])
def test_a_web_page_does_not_reach_a_server_without_keys(shared_live, host):
    for path in ("/health", "/v1/contexts"):
        check(shared_live.send("GET", path, Host=host), 403, "--api-key", code="wrong_host")
