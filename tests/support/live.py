"""A live server of `rankkv serve` in a thread, and a client that speaks plain HTTP to it."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass
class Reply:
    """One answer of the server."""

    status: int
    headers: dict[str, str]
    data: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.data)

    @property
    def error(self) -> dict[str, Any]:
        return self.json["error"]

    @property
    def events(self) -> list[Any]:
        lines = [
            line.removeprefix("data: ")
            for line in self.data.decode().split("\n")
            if line.startswith("data: ")
        ]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]


@dataclass
class Live:
    """A running server."""

    port: int
    model_name: str
    service: Any = None
    key: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def send(
        self, method: str, path: str, body: Any = None, *, raw: bytes | None = None, **headers: str
    ) -> Reply:
        data = raw if raw is not None else (None if body is None else json.dumps(body).encode())
        given = {"Content-Type": "application/json"} if data is not None else {}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        if self.key and "Authorization" not in given:
            given["Authorization"] = f"Bearer {self.key}"
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        try:
            connection.request(method, path, data, given)
            response = connection.getresponse()
            return Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    def post(self, path: str, body: Any, **headers: str) -> Reply:
        return self.send("POST", path, body, **headers)

    def chat(self, messages: Any, **options: Any) -> Reply:
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        options = {"max_tokens": 8, "temperature": 0, **options}
        return self.post("/v1/chat/completions", {"model": self.model_name, "messages": messages, **options})

    def metric(self, name: str) -> float:
        for line in self.send("GET", "/metrics").data.decode().splitlines():
            if line.startswith(name + " "):
                return float(line.split()[-1])
        raise AssertionError(f"no metric {name}")


@contextlib.contextmanager
def run_live(model: Any, tokenizer: Any, folder: Path, name: str = "tiny", **options: Any) -> Iterator[Live]:
    """Serve a model in a thread of this process until the block ends."""
    from rankkv.serving.app import Service
    from rankkv.serving.server import build_server
    from rankkv.serving.settings import ServeSettings

    settings = ServeSettings(name, port=0, cache_dir=folder, **options)
    service = Service(settings, model, tokenizer)
    ready, found = threading.Event(), []

    def on_ready(port: int) -> None:
        found.append(port)
        ready.set()

    server = build_server(service, on_ready)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        assert ready.wait(60), "the server did not begin to listen"
        yield Live(found[0], name, service, settings.api_keys[0] if settings.api_keys else None)
    finally:
        server.should_exit = True
        thread.join(60)
        service.close()
    assert not thread.is_alive()


def generate(model: Any, ids: Any, cache: Any, tokens: int = 8) -> list[int]:
    """Answer greedily in process, the way the server is compared with."""
    from rankkv.models.compat import cache_argument

    ids = torch.as_tensor(ids).view(1, -1)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=model.generation_config.eos_token_id,
        **cache_argument(cache),
    )
    return output[0, ids.shape[1] :].tolist()


def render(tokenizer, messages):
    """Return the tokens of a conversation, as the chat template writes them."""
    return list(
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)[
            "input_ids"
        ]
    )


def get_text(reply):
    """Return the text of a chat reply that must be a success."""
    assert reply.status == 200, reply.data
    return reply.json["choices"][0]["message"]["content"]


def wait_for(holds, seconds=60):
    """Wait until something holds; fail if it does not within a minute."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def open_stream(live, tokens, **options):
    """Begin a streamed answer, read its first token, and return the open connection."""
    connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=60)
    body = {
        "messages": [{"role": "user", "content": "Go on."}],
        "max_tokens": tokens,
        "stream": True,
        **options,
    }
    # No end-of-text token: the answer is as long as it may be.
    body["logit_bias"] = {"2": -100}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200
    while b'"content"' not in response.readline():
        pass
    return connection
