"""Answers of the server beside generation in this process, token for token, and beside transformers' own server."""

from __future__ import annotations

import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from live import Live, generate, get_text, render, run_live

from rankkv import RankKVCache, compress
from rankkv.serving.prompts import encode_context

QUESTIONS = ["What does assert do?", "  (Which statement?)", "\nName 3 words.", "A", "é?", "1"]


@pytest.mark.parametrize(
    "options",
    [{}, {"compression_ratio": 0.5, "selector": "snapkv"}, {"selector": "kvzip"}, {"max_loss": 0.2}],
)
def test_answers_equal_generation_with_a_copy(live, tiny, document, options):
    model, tokenizer = tiny
    made = live.post("/v1/contexts", {"text": document, **options})
    assert made.status == 201
    context = made.json
    ids = render(tokenizer, [{"role": "user", "content": f"{document}\n\nWhy?"}])[: context["tokens"]]
    options = options if "max_loss" in options else {"compression_ratio": 0.3, **options}
    stored = compress(model, torch.tensor([ids]), tokenizer=tokenizer, **options)
    assert (context["bytes"], context["full_bytes"]) == (stored.cache_bytes(), stored.full_cache_bytes())
    assert context["predicted_loss"] == (stored.predicted_loss and round(stored.predicted_loss, 5))
    for question in QUESTIONS:
        reply = live.chat(question, rankkv={"context": context["id"]})
        whole = render(tokenizer, [{"role": "user", "content": f"{document}\n\n{question}"}])
        expected = generate(model, whole, stored.copy())
        assert get_text(reply) == tokenizer.decode(expected, skip_special_tokens=True)
        assert reply.headers["x-rankkv-context"] == context["id"]
        usage = reply.json["usage"]
        assert usage["prompt_tokens"] == len(whole)
        assert usage["prompt_tokens_details"]["cached_tokens"] == context["tokens"]


def test_a_plain_client_gains_too(live, tiny, document):
    context = live.post("/v1/contexts", {"text": document, "name": "doc"}).json
    named = live.chat("What is it?", rankkv={"context": "doc"})
    live.service.store.delete(live.service.store.get("public", "doc"))
    assert live.post("/v1/contexts", {"text": document}).json["id"] == context["id"]
    plain = live.chat(f"{document}\n\nWhat is it?")
    assert get_text(plain) == get_text(named)
    assert plain.json["usage"] == named.json["usage"]
    whole = live.chat(f"{document}\n\nWhat is it?", rankkv={"reuse": False})
    assert whole.json["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert "x-rankkv-context" not in whole.headers


def test_streamed_text_equals_the_whole_answer(live, document):
    live.post("/v1/contexts", {"text": document, "name": "doc"})
    whole = live.chat("What is it?", rankkv={"context": "doc"})
    events = live.chat("What is it?", rankkv={"context": "doc"}, stream=True).events
    pieces = [event["choices"][0]["delta"].get("content", "") for event in events[:-1]]
    assert ("".join(pieces), events[-1]) == (get_text(whole), "[DONE]")
    assert events[-2]["usage"] == whole.json["usage"]


def test_the_next_turn_begins_with_the_last_answer(live, tiny, document):
    model, tokenizer = tiny
    context = live.post("/v1/contexts", {"text": document, "name": "doc"}).json
    first = live.chat("What is it?", rankkv={"context": "doc"})
    follow = [
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": get_text(first)},
        {"role": "user", "content": "And then?"},
    ]
    second = live.chat(follow, rankkv={"context": "doc"})
    cached = second.json["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached == first.json["usage"]["total_tokens"] - 1 > context["tokens"]
    # The same from the stored context alone: float noise apart, where a cache came from changes nothing.
    whole = [{"role": "user", "content": f"{document}\n\nWhat is it?"}, *follow[1:]]
    ids = render(tokenizer, whole)
    stored = compress(model, torch.tensor([ids[: context["tokens"]]]), compression_ratio=0.3)
    assert get_text(second) == tokenizer.decode(generate(model, ids, stored), skip_special_tokens=True)
    # A client that carries everything gets the same.
    assert get_text(live.chat(whole)) == get_text(second)


def test_a_context_of_messages(live, tiny, document):
    model, tokenizer = tiny
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": document},
        {"role": "assistant", "content": "I have read it."},
    ]
    context = live.post("/v1/contexts", {"messages": messages}).json
    question = {"role": "user", "content": [{"type": "text", "text": "What is it?"}]}
    reply = live.chat([question], rankkv={"context": context["id"]})
    ids = render(tokenizer, [*messages, {"role": "user", "content": "What is it?"}])
    stored = compress(model, torch.tensor([ids[: context["tokens"]]]), compression_ratio=0.3)
    assert get_text(reply) == tokenizer.decode(generate(model, ids, stored), skip_special_tokens=True)
    # All of the messages but perhaps the newline after the last one.
    assert document[-40:] in tokenizer.decode(ids[: context["tokens"]])
    assert "I have read it." in tokenizer.decode(ids[: context["tokens"]])


def test_completions_continue_what_was_prefilled_before(live, document):
    # The last token of an answer is not in the cache, so one token leaves the prompt.
    first = live.post("/v1/completions", {"prompt": document, "max_tokens": 1, "temperature": 0}).json
    longer = document + " and more"
    body = {"prompt": longer, "max_tokens": 6, "temperature": 0}
    second = live.post("/v1/completions", body).json
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == first["usage"]["prompt_tokens"]
    fresh = live.post("/v1/completions", {**body, "rankkv": {"reuse": False}}).json
    assert fresh["choices"] == second["choices"]


def test_responses_report_cached_tokens(live, document):
    tokens = live.post("/v1/contexts", {"text": document}).json["tokens"]
    body = {"input": f"{document}\n\nWhat is it?", "max_output_tokens": 4, "temperature": 0}
    whole = live.post("/v1/responses", {**body, "stream": False}).json
    assert whole["usage"]["input_tokens_details"]["cached_tokens"] == tokens
    last = live.post("/v1/responses", {**body, "stream": True}).events[-1]
    assert last["type"] == "response.completed"
    assert last["response"]["usage"]["input_tokens_details"]["cached_tokens"] == tokens
    assert last["response"]["output"][0]["content"] == whole["output"][0]["content"]


def test_the_longest_context_that_keeps_most_is_taken(live, document):
    half = document[: len(document) // 2]
    live.post("/v1/contexts", {"text": half})
    live.post("/v1/contexts", {"text": document, "compression_ratio": 0.2})
    best = live.post("/v1/contexts", {"text": document, "compression_ratio": 0.8}).json
    reply = live.chat(f"{document}\n\nWhat?", stream=True)
    assert reply.headers["x-rankkv-context"] == best["id"]


def test_the_same_context_again_costs_nothing(live, document):
    first = live.post("/v1/contexts", {"text": document})
    again = live.post("/v1/contexts", {"text": document, "name": "doc"})
    other = live.post("/v1/contexts", {"text": document, "compression_ratio": 0.5})
    assert (first.status, again.status, other.status) == (201, 200, 201)
    assert again.json["id"] == first.json["id"] != other.json["id"]
    assert live.send("GET", "/v1/contexts/doc").json == again.json
    assert [item["id"] for item in live.send("GET", "/v1/contexts").json["data"]] == [
        first.json["id"], other.json["id"],
    ]  # fmt: skip


def test_seeds_repeat_a_sampled_answer(live):
    texts = [
        get_text(live.chat("Say a word.", temperature=1.5, seed=seed, max_tokens=12, rankkv={"reuse": False}))
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_stop_texts_and_the_reason_to_finish(live, document):
    live.post("/v1/contexts", {"text": document, "name": "doc"})
    whole = get_text(live.chat("What?", rankkv={"context": "doc"}))
    stop = whole[4:7]
    cut = live.chat("What?", rankkv={"context": "doc"}, stop=stop)
    assert whole.startswith(get_text(cut))
    assert stop in get_text(cut) != whole
    assert cut.json["choices"][0]["finish_reason"] == "stop"


@pytest.fixture(scope="module")
def transformers_serve(small):
    """transformers' own server with the same tiny model, on a free port."""
    from transformers.cli.serve import Serve

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own = Serve(force_model=str(small), host="127.0.0.1", port=port, device="cpu", non_blocking=True)
    live = Live(port, str(small))
    for _ in range(600):
        try:
            live.send("GET", "/health")
            break
        except ConnectionRefusedError:
            import time

            time.sleep(0.05)
    yield live
    own.kill_server()


def test_all_kept_equals_transformers_serve(transformers_serve, small, document, tmp_path):
    from rankkv import load_model

    model, tokenizer = load_model(small)
    with run_live(model, tokenizer, tmp_path, name=str(small)) as live:
        live.post("/v1/contexts", {"text": document, "compression_ratio": 1.0, "name": "doc"})
        for question in QUESTIONS:
            asked = {"role": "user", "content": f"{document}\n\n{question}"}
            theirs = transformers_serve.chat([asked], max_tokens=12)
            named = live.chat(question, rankkv={"context": "doc"}, max_tokens=12)
            fresh = live.chat([asked], rankkv={"reuse": False}, max_tokens=12)
            assert get_text(theirs) == get_text(named) == get_text(fresh)
            assert named.json["usage"]["prompt_tokens_details"]["cached_tokens"] > 400
            assert theirs.json["usage"]["prompt_tokens"] == named.json["usage"]["prompt_tokens"]
            assert theirs.json["choices"][0]["finish_reason"] == named.json["choices"][0]["finish_reason"]


TEMPLATES = {
    "strips": "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}",
    "alternates": "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}",
}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize(
    "content", [{"text": " One fact.\n"}, {"messages": [{"role": "user", "content": "A fact "}]}]
)
def test_tokens_of_a_context_begin_every_conversation_with_it(tiny, template, content):
    import copy

    from rankkv.serving.prompts import join_messages

    tokenizer = copy.deepcopy(tiny[1])
    tokenizer.chat_template = TEMPLATES[template]
    ids = encode_context(tokenizer, content, lambda messages: messages)
    for text in QUESTIONS:
        role = "user" if "text" in content else "assistant"
        whole = render(tokenizer, join_messages(content, [{"role": role, "content": text}]))
        assert np.array_equal(whole[: len(ids)], ids)
    assert "fact" in tokenizer.decode(ids)


def test_a_template_that_changes_its_beginning_is_refused(tiny):
    import copy

    from rankkv.serving.errors import RequestError

    tokenizer = copy.deepcopy(tiny[1])
    tokenizer.chat_template = "{{ messages[-1].content[-3:] }}" + TEMPLATES["strips"]
    with pytest.raises(RequestError, match="tokens of this context stay the same"):
        encode_context(tokenizer, {"text": "One fact. " * 30}, lambda messages: messages)


def test_a_model_without_a_chat_template(tiny, document, tmp_path: Path):
    import copy

    model, tokenizer = tiny[0], copy.deepcopy(tiny[1])
    tokenizer.chat_template = None
    with run_live(model, tokenizer, tmp_path) as live:
        context = live.post("/v1/contexts", {"text": document}).json
        body = {
            "prompt": " And then",
            "max_tokens": 6,
            "temperature": 0,
            "rankkv": {"context": context["id"]},
        }
        reply = live.post("/v1/completions", body).json
        ids = tokenizer(document + " And then")["input_ids"]
        stored = compress(model, torch.tensor([ids[: context["tokens"]]]), compression_ratio=0.3)
        assert reply["choices"][0]["text"] == tokenizer.decode(
            generate(model, ids, stored, 6), skip_special_tokens=True
        )
        assert live.chat("What?", rankkv={"context": context["id"]}).status == 400
        assert live.post("/v1/contexts", {"messages": [{"role": "user", "content": "x"}]}).status == 400


def test_files_are_those_of_the_library(live, tiny, document):
    context = live.post("/v1/contexts", {"text": document}).json
    (path,) = (live.service.settings.folder).rglob("*.safetensors")
    cache = RankKVCache.load(path, tiny[0])
    assert (path.stem, cache.seen_tokens, cache.cache_bytes()) == (
        context["id"], context["tokens"], context["bytes"],
    )  # fmt: skip
