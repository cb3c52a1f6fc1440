"""Many clients at once for minutes, on contexts of all kinds, with clients that leave and a server that is killed.

    python -m benchmarks.serving_load

It starts `rankkv serve embedded` and asks it from 32 clients for 10 minutes.  Every answer is compared with that of
this process for the same tokens alone.  A tenth of the clients leave before their answer is complete.  After a tenth
of the time the server is killed (SIGKILL) and started again on the same folder; every context that it acknowledged
must be there.  `--narrow` takes a small random model, `--seconds` another time.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import http.client
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rankkv import compress, load_model
from rankkv.evaluation.results import describe_environment
from rankkv.models.compat import cache_argument
from rankkv.models.texts import python_docs_text, take_tokens
from rankkv.utils.files import write_text_atomically

from .serving import Server, write_narrow_model

QUESTIONS = (
    "Which statement is the first one?", "What does the del statement do?", "Name one operator.", "Why?",
    "When is an exception raised?", "Say it in one sentence.",
)  # fmt: skip
#: Tokens, fraction kept and selector of each context; None is a question without a context.
CONTEXTS: tuple[tuple[int, float, str] | None, ...] = (
    (1000, 0.2, "auto"), (600, 0.1, "auto"), (600, 0.5, "snapkv"), (300, 1.0, "auto"), None,
)  # fmt: skip
ANSWER_TOKENS = 24
LEAVING = 0.1
# A token whose logit is nearer than this to another's may change with the order of a sum.
_TIE = 1e-3


@dataclass
class Expected:
    """One question and the only right answer to it."""

    context: int
    question: str
    sampling: dict[str, Any]
    text: str
    # Of a greedy answer: beginnings after which two tokens were nearly equally likely.
    ties: list[str]
    tokens: int


@dataclass
class Tally:
    """What happened, counted by all clients."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    errors: collections.Counter[str] = field(default_factory=collections.Counter)
    wrong: list[dict[str, Any]] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)

    def add(self, **counts: int) -> None:
        with self.lock:
            self.counts.update(counts)


class Oracle:
    """Answers of this process, each for its tokens alone."""

    def __init__(self, model_name: str) -> None:
        self.model, self.tokenizer = load_model(model_name)
        text = python_docs_text()
        self.texts: list[str | None] = []
        for place, kind in enumerate(CONTEXTS):
            own = text[place * 30_000 :]
            self.texts.append(None if kind is None else take_tokens(self.tokenizer, own, kind[0]))

    def answer(
        self, text: str | None, kept: tuple[float, str], known: int, question: str, sampling: dict[str, Any]
    ) -> Any:
        """Return text, near ties and number of tokens of an answer, as `Expected` has them."""
        asked = question if text is None else f"{text}\n\n{question}"
        ids = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": asked}], add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt",
        )["input_ids"]  # fmt: skip
        options = {} if text is None else cache_argument(self._compress(text, kept, ids[:, :known]).copy())
        greedy = sampling["temperature"] == 0
        if not greedy:
            torch.manual_seed(sampling["seed"])
        output = self.model.generate(
            ids, max_new_tokens=ANSWER_TOKENS, do_sample=not greedy,
            **({} if greedy else {"temperature": sampling["temperature"]}),
            return_dict_in_generate=True, output_logits=True, **options,
        )  # fmt: skip
        tokens = output.sequences[0, ids.shape[1] :]
        ties = []
        for place, logits in enumerate(output.logits):
            top = logits[0].float().topk(2).values
            if greedy and float(top[0] - top[1]) < _TIE:
                ties.append(self.tokenizer.decode(tokens[:place], skip_special_tokens=True))
        return self.tokenizer.decode(tokens, skip_special_tokens=True), ties, len(tokens)

    def _compress(self, text: str, kept: tuple[float, str], ids: torch.Tensor) -> Any:
        if getattr(self, "_held", (None,))[0] != (text, kept):
            cache = compress(
                self.model, ids, tokenizer=self.tokenizer, compression_ratio=kept[0], selector=kept[1]
            )
            self._held = (text, kept), cache
        return self._held[1]


def send(port: int, method: str, path: str, body: Any = None, timeout: float = 600.0) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        data = None if body is None else json.dumps(body)
        connection.request(method, path, data, {"Content-Type": "application/json"} if data else {})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


class Client(threading.Thread):
    """One client: it asks, reads, sometimes leaves, and waits as long as a full queue tells it to."""

    def __init__(self, run: Run, number: int) -> None:
        super().__init__(daemon=True)
        self._run, self._draw = run, random.Random(number)

    def run(self) -> None:
        while time.monotonic() < self._run.end:
            expected = self._draw.choice(self._run.expected)
            leaves = self._draw.random() < LEAVING
            try:
                self._ask(expected, leaves)
            except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
                # A reply that is cut is a connection's error only while the server is killed.
                cut = self._run.is_down.is_set() or time.monotonic() - self._run.killed_at < 5.0
                self._run.tally.add(cut_by_kill=1) if cut else self._note(f"{type(error).__name__}: {error}")
                self._run.is_up.wait(120)
                time.sleep(0.2)

    def _note(self, error: str) -> None:
        with self._run.tally.lock:
            self._run.tally.errors[error[:200]] += 1

    def _ask(self, expected: Expected, leaves: bool) -> None:
        run, streams = self._run, self._draw.random() < 0.6
        body: dict[str, Any] = {"max_tokens": ANSWER_TOKENS, "stream": streams, **expected.sampling}
        context = run.ids[expected.context]
        question = expected.question
        if context is None:
            body["rankkv"] = {"reuse": False}
        elif self._draw.random() < 0.1:
            # A client that knows nothing of contexts carries the text.
            question = f"{run.oracle.texts[expected.context]}\n\n{question}"
        else:
            body["rankkv"] = {"context": context}
        body["messages"] = [{"role": "user", "content": question}]
        connection = http.client.HTTPConnection("127.0.0.1", run.server.port, timeout=600)
        start = time.monotonic()
        try:
            connection.request(
                "POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"}
            )
            if leaves and (not streams or self._draw.random() < 0.3):
                time.sleep(self._draw.random())
                run.tally.add(left=1)
                return
            response = connection.getresponse()
            if response.status != 200:
                told = json.loads(response.read())
                if response.status == 429:
                    run.tally.add(full_queue=1)
                    time.sleep(min(float(response.getheader("Retry-After", "1")), 5.0))
                else:
                    self._note(f"{response.status}: {told['error']['code']}")
                return
            first, text = self._read(response, streams, leaves)
            if text is None:
                run.tally.add(left=1)
                return
        finally:
            connection.close()
        self._check(expected, text, start, first)

    def _read(self, response: Any, streams: bool, leaves: bool) -> tuple[float, str | None]:
        if not streams:
            told = json.loads(response.read())
            return time.monotonic(), told["choices"][0]["message"]["content"]
        pieces, first, is_whole = [], 0.0, False
        for line in response:
            if line == b"data: [DONE]\n":
                is_whole = True
            elif line.startswith(b"data: {"):
                event = json.loads(line.removeprefix(b"data: "))
                if "error" in event:
                    raise ValueError(event["error"]["message"])
                pieces.append(event["choices"][0]["delta"].get("content") or "")
                first = first or (time.monotonic() if pieces[-1] else 0.0)
                if leaves and first:
                    return first, None
        if not is_whole:
            raise ValueError("the stream was cut")
        return first or time.monotonic(), "".join(pieces)

    def _check(self, expected: Expected, text: str, start: float, first: float) -> None:
        tally = self._run.tally
        with tally.lock:
            tally.counts["answers"] += 1
            tally.counts["tokens"] += expected.tokens
            tally.first.append(first - start)
            tally.whole.append(time.monotonic() - start)
            if text == expected.text:
                return
            shared = next(
                (i for i, (a, b) in enumerate(zip(text, expected.text, strict=False)) if a != b),
                min(len(text), len(expected.text)),
            )
            if any(len(tie) <= shared <= len(tie) + 12 for tie in expected.ties):
                tally.counts["near_ties"] += 1
            else:
                tally.wrong.append(
                    {
                        "question": expected.question,
                        "context": expected.context,
                        "got": text,
                        "expected": expected.text,
                    }
                )


class Run:
    """One run of the load."""

    def __init__(self, arguments: argparse.Namespace, server: Server, oracle: Oracle) -> None:
        self.arguments, self.server, self.oracle = arguments, server, oracle
        self.tally, self.is_up, self.is_down = Tally(), threading.Event(), threading.Event()
        self.is_up.set()
        self.killed_at = -1e9
        # Moment, resident bytes, and bytes of the caches among them.
        self.memory: list[tuple[float, int, int]] = []
        # Contexts by place, and those made under load: id, text.
        self.ids: list[str | None] = []
        self.known: list[int] = []
        self.made: dict[str, str] = {}
        self.expected: list[Expected] = []
        self.end = 0.0

    def prepare(self) -> None:
        """Store the contexts, and find every right answer."""
        for kind, text in zip(CONTEXTS, self.oracle.texts, strict=True):
            told: dict[str, Any] = {"id": None, "tokens": 0}
            if kind is not None:
                body = {"text": text, "compression_ratio": kind[1], "selector": kind[2]}
                status, told = send(self.server.port, "POST", "/v1/contexts", body)
                assert status == 201, told
            self.ids.append(told["id"])
            self.known.append(told["tokens"])
        for place, kind in enumerate(CONTEXTS):
            kept = (1.0, "auto") if kind is None else kind[1:]
            for number, question in enumerate(QUESTIONS):
                sampling: dict[str, Any] = {"temperature": 0}
                if number % 3 == 2:
                    sampling = {"temperature": 0.8, "seed": number}
                found = self.oracle.answer(
                    self.oracle.texts[place], kept, self.known[place], question, sampling
                )
                self.expected.append(Expected(place, question, sampling, *found))
        print(f"{len(self.expected)} answers are known", file=sys.stderr, flush=True)

    def run(self) -> dict[str, Any]:
        """Let the clients ask until the time is over; return the record."""
        seconds, start = self.arguments.seconds, time.monotonic()
        self.end = start + seconds
        clients = [Client(self, number) for number in range(self.arguments.clients)]
        others = [
            threading.Thread(target=work, args=(start,), daemon=True) for work in (self._watch, self._make)
        ]
        for thread in (*clients, *others):
            thread.start()
        time.sleep(seconds / 10)
        self._kill()
        for thread in (*clients, *others):
            thread.join(max(0.0, self.end - time.monotonic() + 600))
        return self._record(seconds, time.monotonic() - start)

    def _kill(self) -> None:
        self.is_up.clear()
        self.is_down.set()
        self.server.kill()
        acknowledged = {*filter(None, self.ids), *self.made}
        begun = time.monotonic()
        self.server.start()
        self.restart_seconds = time.monotonic() - begun
        self.killed_at = time.monotonic()
        _, told = send(self.server.port, "GET", "/v1/contexts")
        self.lost = sorted(acknowledged - {context["id"] for context in told["data"]})
        self.acknowledged_at_kill = len(acknowledged)
        self.is_down.clear()
        self.is_up.set()
        print(f"killed and started again in {self.restart_seconds:.0f} s", file=sys.stderr, flush=True)

    def _watch(self, start: float) -> None:
        while time.monotonic() < self.end:
            if self.is_up.is_set():
                with contextlib.suppress(OSError, http.client.HTTPException):
                    held = int(self.server.read_metric("rankkv_cache_bytes"))
                    self.memory.append((time.monotonic() - start, self.server.read_memory(), held))
            time.sleep(1.0)

    def _make(self, start: float) -> None:
        """Store a new context now and then, while others ask."""
        text, number = python_docs_text()[200_000:], 0
        while time.monotonic() < self.end - 5:
            number += 1
            own = take_tokens(self.oracle.tokenizer, text[number * 1500 :], 200)
            try:
                status, told = send(
                    self.server.port, "POST", "/v1/contexts", {"text": own, "compression_ratio": 0.3}
                )
                if status == 201:
                    self.made[told["id"]] = own
            except (OSError, http.client.HTTPException, ValueError):
                self.is_up.wait(120)
            time.sleep(self.arguments.seconds / 30)

    def _record(self, seconds: float, passed: float) -> dict[str, Any]:
        _, told = send(self.server.port, "GET", "/v1/contexts")
        held = {context["id"]: context["tokens"] for context in told["data"]}
        lost = sorted({*self.lost, *(set(self.made) | set(filter(None, self.ids))) - set(held)})
        # Each context that was acknowledged under load still answers as it should.
        for made, text in self.made.items():
            if made in held:
                sampling = {"temperature": 0}
                body = {
                    "messages": [{"role": "user", "content": QUESTIONS[0]}], "rankkv": {"context": made},
                    "max_tokens": ANSWER_TOKENS, **sampling,
                }  # fmt: skip
                _, reply = send(self.server.port, "POST", "/v1/chat/completions", body)
                found = self.oracle.answer(text, (0.3, "auto"), held[made], QUESTIONS[0], sampling)
                self._compare_last(reply["choices"][0]["message"]["content"], found)
        tally = self.tally
        memory = {
            "at_2_of_10_bytes": self._memory_at(0.2 * seconds),
            "at_the_end_bytes": self._memory_at(seconds),
            "caches_at_2_of_10_bytes": self._memory_at(0.2 * seconds, 2),
            "caches_at_the_end_bytes": self._memory_at(seconds, 2),
            "most_bytes": max(size for _, size, _ in self.memory),
        }
        return {
            "clients": self.arguments.clients,
            "seconds": round(passed, 1),
            "narrow": self.arguments.narrow,
            "answers": tally.counts["answers"],
            "answer_tokens": tally.counts["tokens"],
            "wrong_answers": len(tally.wrong),
            "near_ties": tally.counts["near_ties"],
            "clients_that_left": tally.counts["left"],
            "refused_429": tally.counts["full_queue"],
            "cut_by_the_kill": tally.counts["cut_by_kill"],
            "other_errors": dict(tally.errors),
            "contexts_acknowledged": len(held),
            "contexts_acknowledged_at_the_kill": self.acknowledged_at_kill,
            "contexts_lost": len(lost),
            "restart_seconds": round(self.restart_seconds, 1),
            "first_token_seconds": _quantiles(tally.first),
            "answer_seconds": _quantiles(tally.whole),
            "memory": {
                **memory,
                "growth": round(memory["at_the_end_bytes"] / memory["at_2_of_10_bytes"] - 1, 4),
            },
            "examples": tally.wrong[:3],
        }

    def _compare_last(self, text: str, found: Any) -> None:
        expected = Expected(-1, QUESTIONS[0], {}, *found)
        if text != expected.text and not expected.ties:
            self.tally.wrong.append({"question": QUESTIONS[0], "got": text, "expected": expected.text})

    def _memory_at(self, moment: float, column: int = 1) -> int:
        # The median of five seconds, as near as there are any.
        near = sorted(self.memory, key=lambda entry: abs(entry[0] - moment))[:5]
        return int(statistics.median(entry[column] for entry in near))


def _quantiles(values: list[float]) -> dict[str, float]:
    found = statistics.quantiles(values, n=100) if len(values) > 1 else [*values, *[0.0] * 99][:1] * 99
    return {"median": round(found[49], 2), "p95": round(found[94], 2)}


def list_misses(record: dict[str, Any]) -> list[str]:
    """Return the goals that a record misses, one sentence each."""
    rules = (
        (record["wrong_answers"] == 0, f"{record['wrong_answers']} answers were wrong"),
        (record["contexts_lost"] == 0, f"{record['contexts_lost']} acknowledged contexts were lost"),
        (not record["other_errors"], f"other errors than 429 and cut connections: {record['other_errors']}"),
        (record["memory"]["growth"] <= 0.05, f"resident memory grew by {record['memory']['growth']:.1%}"),
        (record["answers"] > 0, "there was no answer"),
        (
            record["near_ties"] <= record["answers"] / 50,
            f"{record['near_ties']} answers differ where two tokens are said to be equally likely",
        ),
    )
    return [sentence for holds, sentence in rules if not holds]


def main(given: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description="Load on a running server: answers, errors, memory, a kill.")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--narrow", action="store_true")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--max-queue", type=int, default=12)
    parser.add_argument("--cache-memory", default="256MB")
    parser.add_argument("--output", type=Path, default=Path("results/serving_load.json"))
    arguments = parser.parse_args(given)
    with tempfile.TemporaryDirectory() as folder:
        model = write_narrow_model(arguments.model, folder) if arguments.narrow else arguments.model
        options = ("--max-queue", str(arguments.max_queue), "--cache-memory", arguments.cache_memory)
        with Server(model, *options, "--dtype", "float32", "--log-level", "warning") as server:
            run = Run(arguments, server, Oracle(model))
            run.prepare()
            record = run.run()
    misses = list_misses(record)
    record |= {"options": list(options), "missed": misses, "environment": describe_environment()}
    write_text_atomically(arguments.output, json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))
    for sentence in misses:
        print(f"MISSED: {sentence}", file=sys.stderr)
    return record


if __name__ == "__main__":
    main()
