"""Running a server: health, metrics, keys, the queue, clients that leave, and what transformers is relied on for."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading

import pytest
from live import open_stream, run_live, wait_for

from rankkv.serving.errors import RequestError
from rankkv.serving.turns import Turns

KEYS = ("key-of-alice-1", "key-of-bob-22")


def hold_first_layer(live):
    """Hold every forward at its first layer; return what tells that one is there, what lets it go on, and the hook."""
    inside, gone = threading.Event(), threading.Event()

    def hold(*_):
        inside.set()
        gone.wait(60)

    return inside, gone, live.service.model.model.layers[0].register_forward_pre_hook(hold)


def test_health_needs_no_key_and_models_lists_one(tiny, tmp_path):
    with run_live(*tiny, tmp_path, api_keys=KEYS) as live:
        assert live.send("GET", "/health", Authorization="").json == {"status": "ok", "model": "tiny"}
        assert [item["id"] for item in live.send("GET", "/v1/models").json["data"]] == ["tiny"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/metrics"),
        ("GET", "/v1/models"),
        ("GET", "/v1/contexts"),
        ("GET", "/v1/contexts/doc"),
        ("DELETE", "/v1/contexts/doc"),
        ("POST", "/v1/contexts"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"),
        ("POST", "/v1/responses"),
        ("POST", "/load_model"),
    ],
)
def test_every_other_route_needs_a_key(keyed, method, path):
    for given in ("", "Bearer", "Bearer wrong-key-123", f"Basic {KEYS[0]}", f"Bearer {KEYS[0][:-1]}"):
        reply = keyed.send(method, path, {} if method == "POST" else None, Authorization=given)
        assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
        assert reply.headers["www-authenticate"] == "Bearer"


@pytest.fixture(scope="module")
def keyed(tiny, tmp_path_factory):
    with run_live(*tiny, tmp_path_factory.mktemp("keyed"), api_keys=KEYS) as live:
        yield live


def test_each_key_has_its_own_contexts(keyed, document):
    alice, bob = (f"Bearer {key}" for key in KEYS)
    made = keyed.post("/v1/contexts", {"text": document, "name": "doc"}, Authorization=alice).json
    assert keyed.send("GET", "/v1/contexts", Authorization=bob).json["data"] == []
    for name in ("doc", made["id"]):
        for method in ("GET", "DELETE"):
            assert keyed.send(method, f"/v1/contexts/{name}", Authorization=bob).status == 404
        body = {
            "messages": [{"role": "user", "content": "What?"}],
            "max_tokens": 2,
            "rankkv": {"context": name},
        }
        assert keyed.post("/v1/chat/completions", body, Authorization=bob).status == 404
    # Nor does the text find the context of another key.
    body = {"messages": [{"role": "user", "content": f"{document}\n\nWhat?"}], "max_tokens": 2}
    cached = [
        keyed.post("/v1/chat/completions", body, Authorization=key).json["usage"]["prompt_tokens_details"]
        for key in (bob, alice)
    ]
    assert cached == [{"cached_tokens": 0}, {"cached_tokens": made["tokens"]}]
    assert keyed.post("/v1/contexts", {"text": document}, Authorization=bob).json["id"] != made["id"]


def test_metrics_count_what_was_done(live, document):
    made = live.post("/v1/contexts", {"text": document, "name": "doc"}).json
    reply = live.chat("What?", rankkv={"context": "doc"}).json["usage"]
    live.send("GET", "/v1/contexts/none")
    store = live.service.store
    values = {
        'rankkv_requests_total{route="/v1/chat/completions",status="200"}': 1,
        'rankkv_requests_total{route="/v1/contexts",status="201"}': 1,
        'rankkv_requests_total{route="/v1/contexts",status="404"}': 1,
        'rankkv_tokens_total{kind="prompt"}': reply["prompt_tokens"],
        'rankkv_tokens_total{kind="cached"}': made["tokens"],
        'rankkv_tokens_total{kind="answer"}': 8,
        'rankkv_context_lookups_total{result="hit"}': 1,
        "rankkv_cache_bytes": store.held_bytes(),
        "rankkv_cache_saved_bytes": store.saved_bytes(),
        "rankkv_contexts": 1,
        "rankkv_conversations": 1,
        "rankkv_queue_waiting": 0,
        "rankkv_ttft_seconds_count": 1,
        "rankkv_tpot_seconds_count": 1,
        "rankkv_compression_seconds_count": 1,
    }
    wait_for(lambda: live.metric("rankkv_ttft_seconds_count") == 1)
    assert {name: live.metric(name) for name in values} == values
    assert made["bytes"] < store.held_bytes()


def test_request_ids_come_back(live):
    assert live.send("GET", "/health", X_Request_Id="mine-1").headers["x-request-id"] == "mine-1"
    odd = live.send("GET", "/health", X_Request_Id="a b\tc").headers["x-request-id"]
    assert len(odd) == 32


def test_keys_take_turns():
    async def run():
        turns, order = Turns(limit=10), []

        async def one(key):
            await turns.take(key)
            order.append(key)
            turns.give_back()

        await turns.take("first")
        waiting = []
        for key in ("a1", "a2", "a3", "b1", "b2", "c1"):
            waiting.append(asyncio.ensure_future(one(key[0])))
            await asyncio.sleep(0)
        assert (turns.waiting, turns.running) == (6, 1)
        turns.give_back()
        await asyncio.gather(*waiting)
        assert (turns.waiting, turns.running) == (0, 0)
        return order

    assert asyncio.run(run()) == ["a", "b", "c", "a", "b", "a"]


def test_contexts_of_one_key_take_turns_and_several_run():
    async def run():
        turns, order = Turns(limit=10, slots=2), []

        async def one(context):
            await turns.take("key", context)
            order.append(context)
            await asyncio.sleep(0)
            turns.give_back()

        await turns.take("key", "first")
        await turns.take("key", "first")
        waiting = []
        for context in ("a", "a", "a", "b", "c", "b"):
            waiting.append(asyncio.ensure_future(one(context)))
            await asyncio.sleep(0)
        assert (turns.waiting, turns.running) == (6, 2)
        waiting[1].cancel()
        await asyncio.sleep(0)
        turns.give_back()
        assert (turns.waiting, turns.running) == (4, 2)
        turns.give_back()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert (turns.waiting, turns.running) == (0, 0)
        return order

    assert asyncio.run(run()) == ["a", "b", "c", "a", "b"]


def test_a_full_queue_of_one_key_leaves_room_for_another():
    async def run():
        turns = Turns(limit=1)
        await turns.take("a")
        waiting = asyncio.ensure_future(turns.take("a"))
        await asyncio.sleep(0)
        with pytest.raises(RequestError, match="1 requests of this key wait already") as caught:
            await turns.take("a")
        assert (caught.value.status, int(caught.value.headers["Retry-After"]) >= 1) == (429, True)
        other = asyncio.ensure_future(turns.take("b"))
        await asyncio.sleep(0)
        # One that leaves frees its place; one that leaves as its turn comes hands it on.
        waiting.cancel()
        await asyncio.sleep(0)
        assert turns.waiting == 1
        turns.give_back()
        other.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert (turns.waiting, turns.running) == (0, 0)

    asyncio.run(run())


def test_a_stop_refuses_all_that_wait():
    async def run():
        turns = Turns(limit=3)
        await turns.take("a")
        waiting = [asyncio.ensure_future(turns.take("a")) for _ in range(2)]
        await asyncio.sleep(0)
        turns.close()
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert [error.status for error in results] == [503, 503]
        with pytest.raises(RequestError, match="stopping"):
            await turns.take("b")

    asyncio.run(run())


def test_a_full_queue_answers_429_and_a_client_that_leaves_frees_its_place(tiny, tmp_path):
    with run_live(*tiny, tmp_path, max_queue=1, max_batch=1) as live:
        running = open_stream(live, 3000)
        replies = []
        waiting = threading.Thread(target=lambda: replies.append(live.chat("Hello", max_tokens=2)))
        waiting.start()
        wait_for(lambda: live.service.turns.waiting == 1)
        refused = live.chat("Hello", max_tokens=2)
        assert (refused.status, refused.error["code"]) == (429, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        # The health of a busy server is still told.
        assert live.send("GET", "/health").status == 200
        running.close()
        waiting.join(60)
        assert replies[0].status == 200
        # The long answer was cut off, and its tokens are counted as far as it went.
        wait_for(lambda: live.metric("rankkv_ttft_seconds_count") == 2)
        assert live.metric('rankkv_tokens_total{kind="answer"}') < 3000


@pytest.fixture
def narrow(tiny, tmp_path):
    """A server that makes one answer at a time."""
    with run_live(*tiny, tmp_path, max_batch=1) as live:
        yield live


@pytest.mark.parametrize("stage", ["prefill", "queue", "decoding"])
def test_a_client_that_leaves_a_plain_request_frees_its_place(narrow, document, stage):
    text, running, live = "Hello", None, narrow
    if stage == "prefill":
        # Every layer of a prefill asks if the client is still there: hold the first one until it has left.
        inside, gone, hook = hold_first_layer(live)
        text = document
    elif stage == "queue":
        running = open_stream(live, 3000)
    connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=60)
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 3000, "logit_bias": {"2": -100}}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    if stage == "prefill":
        assert inside.wait(60)
        job = live.service.manager._current
        connection.close()
        wait_for(job.cancelled.is_set)
        hook.remove()
        gone.set()
        wait_for(lambda: not live.service.turns.running)
        assert job.answer_tokens == 0
    elif stage == "queue":
        wait_for(lambda: live.service.turns.waiting == 1)
        connection.close()
        wait_for(lambda: live.service.turns.waiting == 0)
        running.close()
    else:
        wait_for(lambda: live.service.manager.batched == 1)
        connection.close()
    wait_for(lambda: not live.service.turns.running)
    wait_for(lambda: not live.service.manager.jobs)
    assert live.chat("Hello", max_tokens=2).status == 200


def test_a_context_whose_client_leaves_is_not_stored(live, document):
    inside, gone, hook = hold_first_layer(live)
    connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=60)
    connection.request(
        "POST", "/v1/contexts", json.dumps({"text": document}), {"Content-Type": "application/json"}
    )
    assert inside.wait(60)
    job = live.service.manager._current
    connection.close()
    wait_for(job.cancelled.is_set)
    hook.remove()
    gone.set()
    wait_for(lambda: not live.service.turns.running)
    assert live.send("GET", "/v1/contexts").json["data"] == []
    assert live.post("/v1/contexts", {"text": document}).status == 201


def test_a_stop_ends_a_running_answer(tiny, tmp_path):
    with run_live(*tiny, tmp_path, grace_seconds=1) as live:
        connection = open_stream(live, 3000)
    # The server has stopped, and its thread left the model.
    assert not live.service.turns.running
    assert live.service.manager._idle.is_set()
    connection.close()


def test_a_failure_in_a_stream_has_the_form_of_the_api_and_hides_its_message(live, document, caplog):
    live.post("/v1/contexts", {"text": document, "name": "doc"})

    def fail(*_):
        raise RuntimeError(f"broken by {document}")

    hook = live.service.model.model.layers[1].register_forward_pre_hook(fail)
    try:
        streamed = live.chat("What?", rankkv={"context": "doc"}, stream=True).events
        whole = live.chat("What?", rankkv={"context": "doc"})
    finally:
        hook.remove()
    assert streamed[-1]["error"]["type"] == "server_error"
    assert (whole.status, whole.error["type"]) == (500, "server_error")
    told = json.dumps(streamed[-1]) + whole.data.decode() + caplog.text
    assert document[:20] not in told
    assert "RuntimeError" in caplog.text
    # The context is whole, and the next answer is right.
    assert live.chat("What?", rankkv={"context": "doc"}).status == 200
