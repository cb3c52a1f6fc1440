"""Memory as a budget, and disk: eviction, restarts, kill -9, damaged files, and what is part of a context's key."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from live import Live, run_live

from rankkv import compress
from rankkv.errors import ConfigError
from rankkv.serving import contexts
from rankkv.serving.contexts import Context, ContextStore
from rankkv.serving.errors import RequestError


@pytest.fixture
def make_store(tiny, tmp_path):
    """Stores in one folder, each closed before the next."""
    stores = []

    def make(memory=10**9, model=tiny[0], limit=100):
        if stores:
            stores[-1].close()
        stores.append(ContextStore(model, tmp_path / "contexts", memory, limit))
        return stores[-1]

    yield make
    stores[-1].close()


def add(store, model, first, tokens=64, key="public", name=None):
    import torch

    ids = np.arange(first, first + tokens, dtype=np.int64)
    cache = compress(model, torch.from_numpy(ids)[None], compression_ratio=0.5)
    options, content = {"compression_ratio": 0.5, "selector": "auto"}, {"text": f"from {first}"}
    context = Context(
        store.compute_id(key, ids, options, content),
        key,
        ids,
        content,
        options,
        name,
        bytes=cache.cache_bytes(),
        full_bytes=cache.full_cache_bytes(),
    )
    store.add(context, cache)
    return context


def test_memory_stays_below_the_budget_and_the_oldest_goes_first(make_store, tiny):
    size = add(make_store(), tiny[0], 10).bytes
    store = make_store(memory=2 * size)
    first, second = add(store, tiny[0], 100), add(store, tiny[0], 200)
    store.check_out(first)
    third = add(store, tiny[0], 300)
    assert [context.cache is not None for context in (first, second, third)] == [True, False, True]
    assert (store.held_bytes(), store.evicted) == (2 * size, 1)
    # It comes back, and the one used longest ago leaves.
    assert store.check_out(second).seen_tokens == 64
    assert [context.cache is not None for context in (first, second, third)] == [False, True, True]
    assert store.loaded == 1


def test_a_context_above_the_budget_is_served_from_disk(make_store, tiny):
    store = make_store(memory=0)
    context = add(store, tiny[0], 100)
    assert (context.cache, store.held_bytes()) == (None, 0)
    assert store.check_out(context).cache_bytes() == context.bytes
    assert store.held_bytes() == 0


def test_conversations_leave_before_their_document(make_store, tiny):
    store = make_store()
    document = add(store, tiny[0], 100)
    store._memory = 2 * document.bytes
    for last in (1, 2, 3):
        ids = np.append(document.ids, [5, last])
        store.add_conversation("public", ids, store.check_out(document), document)
    assert document.cache is not None
    assert store.count(stored=False) == 1
    assert store.match("public", np.append(document.ids, [5, 3, 9])).tokens == 66
    assert store.match("public", np.append(document.ids, [5, 1, 9])) is document


def test_a_restart_finds_every_context(make_store, tiny):
    store = make_store()
    before = [add(store, tiny[0], first, name=f"n{first}").describe() for first in (100, 200)]
    store = make_store()
    after = [context.describe() for context in store.list("public")]
    assert after == [{**record, "in_memory": False} for record in before]
    assert store.check_out(store.get("public", "n200")).seen_tokens == 64


def test_another_model_sees_nothing(make_store, tiny, tiny_llama, embedded):
    add(make_store(), tiny[0], 100)
    other = tiny_llama(vocab_size=len(embedded[1]), seed=1)
    assert make_store(model=other).list("public") == []
    assert len(make_store().list("public")) == 1


def test_adapters_are_part_of_the_key(make_store, tiny_llama, embedded):
    from peft import LoraConfig, get_peft_model

    model = tiny_llama(vocab_size=len(embedded[1]), seed=3)
    plain = make_store(model=model).fingerprint
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    assert make_store(model=adapted.base_model.model).fingerprint != plain


def test_what_a_killed_server_left_half_done_is_removed(make_store, tiny, tmp_path):
    store = make_store()
    kept, lost = add(store, tiny[0], 100), add(store, tiny[0], 200)
    folder = next((tmp_path / "contexts").rglob("*.json")).parent
    (folder / f"{lost.id}.json").unlink()
    (folder / ".ctx_half.json.0123").write_text("{")
    store = make_store()
    assert [context.id for context in store.list("public")] == [kept.id]
    assert sorted(path.name for path in folder.iterdir()) == [f"{kept.id}.json", f"{kept.id}.safetensors"]


@pytest.mark.parametrize(
    "change",
    [
        lambda record: {**record, "ids": record["ids"][:-1]},
        lambda record: {**record, "content": {"text": "another"}},
        lambda record: {**record, "options": {**record["options"], "compression_ratio": 1.0}},
        lambda record: {**record, "key": "0123456789abcdef"},
        lambda record: {**record, "name": "../../etc"},
        lambda record: {**record, "fingerprint": "0" * 64},
        lambda record: {},
        lambda record: [],
    ],
)
def test_a_changed_record_is_left_out(make_store, tiny, tmp_path, change):
    add(make_store(), tiny[0], 100)
    path = next((tmp_path / "contexts").rglob("*.json"))
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    assert make_store().list("public") == []


def test_two_servers_do_not_share_a_folder(make_store, tiny, tmp_path):
    make_store()
    with pytest.raises(ConfigError, match="another server uses"):
        ContextStore(tiny[0], tmp_path / "contexts", 10**9, 10)


def test_only_the_owner_reads_the_folder(make_store, tmp_path):
    make_store()
    (folder,) = (tmp_path / "contexts").iterdir()
    assert folder.stat().st_mode & 0o077 == 0


def test_a_damaged_file_is_said_and_can_be_replaced(tiny, document, tmp_path):
    with run_live(*tiny, tmp_path, cache_memory=0) as live:
        context = live.post("/v1/contexts", {"text": document}).json
        answer = live.chat("What?", rankkv={"context": context["id"]})
        (path,) = tmp_path.rglob("*.safetensors")
        data = bytearray(path.read_bytes())
        data[-5] ^= 1
        path.write_bytes(data)
        for options in ({}, {"stream": True}):
            reply = live.chat("What?", rankkv={"context": context["id"]}, **options)
            error = reply.events[-1]["error"] if options else reply.error
            assert error["code"] == "damaged_context"
        assert live.send("DELETE", f"/v1/contexts/{context['id']}").json["deleted"]
        assert live.post("/v1/contexts", {"text": document}).status == 201
        again = live.chat("What?", rankkv={"context": context["id"]})
        assert again.json["choices"] == answer.json["choices"]


def test_a_context_deleted_while_it_is_read_is_gone_not_damaged(make_store, tiny, monkeypatch):
    store = make_store(memory=0)
    context = add(store, tiny[0], 100)
    usual = contexts.RankKVCache.load

    def load(path, model):
        store.delete(context)
        return usual(path, model)

    monkeypatch.setattr(contexts.RankKVCache, "load", load)
    with pytest.raises(RequestError, match="was deleted") as error:
        store.borrow(context)
    assert error.value.status == 404


def test_a_plain_client_is_answered_without_a_damaged_file(tiny, document, tmp_path):
    with run_live(*tiny, tmp_path, cache_memory=0) as live:
        live.post("/v1/contexts", {"text": document})
        (path,) = tmp_path.rglob("*.safetensors")
        path.write_bytes(path.read_bytes()[:-9])
        asked = f"{document}\n\nWhat?"
        whole = live.chat(asked, rankkv={"reuse": False})
        reply = live.chat(asked)
        assert reply.json["choices"] == whole.json["choices"]
        assert reply.json["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert "x-rankkv-context" not in reply.headers


def test_a_closed_server_frees_the_folder_at_once(tiny, tmp_path):
    with run_live(*tiny, tmp_path):
        pass
    with run_live(*tiny, tmp_path) as live:
        assert live.send("GET", "/health").status == 200


def test_deleting_removes_files_and_conversations(live, document):
    context = live.post("/v1/contexts", {"text": document, "name": "doc"}).json
    live.chat("What?", rankkv={"context": "doc"})
    assert live.service.store.count(stored=False) == 1
    assert live.send("DELETE", "/v1/contexts/doc").json["id"] == context["id"]
    assert (live.service.store.held_bytes(), live.service.store.count(stored=False)) == (0, 0)
    assert not list(live.service.settings.folder.rglob("ctx_*"))
    assert live.send("GET", "/v1/contexts/doc").status == 404
    assert live.send("DELETE", "/v1/contexts/doc").status == 404


def start(folder: Path, cache: Path, *options: str) -> tuple[subprocess.Popen, Live]:
    """Start `rankkv serve` as a program on a free port, and wait until it listens."""
    command = [sys.executable, "-m", "rankkv", "serve", str(folder), "--port", "0", "--cache-dir", str(cache)]
    program = subprocess.Popen(
        [*command, *options], stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "300"}
    )
    assert program.stderr is not None
    for line in program.stderr:
        found = re.search(r"at http://127\.0\.0\.1:(\d+)/v1", line)
        if found:
            return program, Live(int(found[1]), str(folder))
    raise AssertionError(f"the server ended with {program.wait()}")


def test_kill_9_loses_no_acknowledged_context_and_a_stop_is_clean(small, document, tmp_path):
    program, live = start(small, tmp_path)
    try:
        names, texts = ["a", "b"], [document, document[::-1]]
        for name, text in zip(names, texts, strict=True):
            assert live.post("/v1/contexts", {"text": text, "name": name}).status == 201
        before = [live.chat("What?", rankkv={"context": name}).json["choices"] for name in names]
        # It dies in the middle of a third one.
        third = threading.Thread(target=lambda: _try(live, document * 5))
        third.start()
    finally:
        program.send_signal(signal.SIGKILL)
        program.wait()
    third.join()
    program, live = start(small, tmp_path)
    try:
        assert {"a", "b"} <= {item["name"] for item in live.send("GET", "/v1/contexts").json["data"]}
        assert [live.chat("What?", rankkv={"context": name}).json["choices"] for name in names] == before
    finally:
        program.send_signal(signal.SIGTERM)
        rest = program.stderr.read()
        assert program.wait(60) == 0
    assert "Traceback" not in rest
    # A log line for each request, and no word of a prompt.
    assert rest.count("/v1/chat/completions 200") == 2
    assert "What?" not in rest
    assert document[:20] not in rest


def _try(live, text):
    with contextlib.suppress(OSError):
        live.post("/v1/contexts", {"text": text})
