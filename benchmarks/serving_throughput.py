"""Decoded tokens per second of clients that ask about one document at once, beside transformers' own server.

    OMP_NUM_THREADS=2 python -m benchmarks.serving_throughput

Both servers run as programs, asked in turn, with the same weights in float32, the same document and questions.
RankKV's has the document as a context, 20 % kept; `transformers serve --continuous-batching` gets it in every prompt,
and shares the blocks of that prefix after one request has computed them.  Only decoding counts on both sides: the
tokens that arrive from the moment at which the last client has its first token until the first client has its last one.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from rankkv import load_model
from rankkv.evaluation.results import describe_environment
from rankkv.models.texts import python_docs_text, take_tokens
from rankkv.utils.files import write_text_atomically

from .serving import Server

GOAL = 2.5
_TOPICS = (
    "assert", "del", "return", "yield", "raise", "break", "continue", "import", "global", "nonlocal", "if", "while",
    "for", "try", "with", "match",
)  # fmt: skip
# No answer ends before its limit: the token that ends one is one that text never has.
_NEVER = 3


class CpuClock(threading.Thread):
    """The CPU seconds that a process has used, noted ten times a second: a busy machine changes them little."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._pid, self._is_over = pid, threading.Event()
        self._moments: list[float] = []
        self._seconds: list[float] = []

    def run(self) -> None:
        while not self._is_over.wait(0.1):
            fields = Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()
            self._moments.append(time.perf_counter())
            self._seconds.append((int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"))

    def read(self, begin: float, end: float) -> float:
        """Return the seconds used between two moments."""
        self._is_over.set()
        first, last = np.interp([begin, end], self._moments, self._seconds)
        return float(last - first)


def ask_at_once(port: int, pid: int, bodies: list[dict[str, Any]]) -> dict[str, float]:
    """Send all requests at once; return tokens per second, and per CPU second, while all of them decode."""
    clock = CpuClock(pid)
    clock.start()
    times: list[list[float]] = [[] for _ in bodies]
    counts = [0] * len(bodies)

    def ask(place: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=3600)
        data = json.dumps({**bodies[place], "stream": True})
        connection.request("POST", "/v1/chat/completions", data, {"Content-Type": "application/json"})
        for line in connection.getresponse():
            if line.startswith(b"data: {"):
                event = json.loads(line.removeprefix(b"data: "))
                if event["choices"][0]["delta"].get("content"):
                    times[place].append(time.perf_counter())
                if event.get("usage"):
                    counts[place] = event["usage"]["completion_tokens"]
        connection.close()

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    begin, end = max(own[0] for own in times), min(own[-1] for own in times)
    # A piece of text is a token, but for characters of several tokens: scaled by what the usage counts.
    inside = sum(
        count * sum(begin < moment <= end for moment in own) / len(own)
        for own, count in zip(times, counts, strict=True)
    )
    if end - begin < 1.0:
        raise SystemExit("the answers did not decode together for a second: give more --answer-tokens")
    return {
        "tokens_per_second": round(inside / (end - begin), 2),
        "tokens_per_cpu_second": round(inside / clock.read(begin, end), 2),
        "seconds": round(end - begin, 1),
        "shortest_answer": min(counts),
    }


@contextmanager
def run_transformers(folder: str, blocks: int) -> Iterator[tuple[int, int]]:
    """Run `transformers serve --continuous-batching` and yield its port and process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Without a number of blocks it takes most of the machine's memory.  It reads as many tokens in one forward as the
    # blocks hold, so that all clients decode together only if each could have blocks of its own.
    command = [
        sys.executable, "-m", "transformers.cli.transformers", "serve", folder, "--continuous-batching", "--dtype",
        "float32", "--device", "cpu", "--host", "127.0.0.1", "--port", str(port), "--cb-num-blocks", str(blocks),
        # Chunks of the prefill, which is not measured; the mask is as wide.
        "--cb-max-batch-tokens", "1024",
    ]  # fmt: skip
    program = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while True:
            if program.poll() is not None:
                raise SystemExit(f"transformers serve ended with code {program.returncode}")
            try:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
                connection.request("GET", "/health")
                connection.getresponse().read()
                break
            except OSError:
                time.sleep(0.5)
        yield port, program.pid
    finally:
        program.terminate()
        program.wait(60)


def warm(port: int, body: dict[str, Any]) -> None:
    """Let a server compute the prefix once before."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=3600)
    data = json.dumps({**body, "max_tokens": 4, "stream": False})
    connection.request("POST", "/v1/chat/completions", data, {"Content-Type": "application/json"})
    told = connection.getresponse().read()
    if b'"choices"' not in told:
        raise SystemExit(told.decode())


def main() -> None:
    parser = argparse.ArgumentParser(description="Tokens per second beside transformers serve.")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--answer-tokens", type=int, default=32)
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("results/serving_throughput.json"))
    arguments = parser.parse_args()
    model, tokenizer = load_model(arguments.model, "float32")
    text = take_tokens(tokenizer, python_docs_text(), arguments.tokens)
    questions = [f"Tell me about the {_TOPICS[i % 16]} statement." for i in range(arguments.clients)]
    options = {
        "max_tokens": arguments.answer_tokens,
        "generation_config": json.dumps(
            {"eos_token_id": _NEVER, "do_sample": False, "max_new_tokens": arguments.answer_tokens}
        ),
    }
    with (
        Server(arguments.model, "--dtype", "float32", "--max-batch", str(arguments.clients)) as server,
        tempfile.TemporaryDirectory() as folder,
    ):
        context = server.compress(text, arguments.ratio)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        del model
        # 256 tokens each: context, question, answer, and one block that is not full.
        blocks = arguments.clients * ((arguments.tokens + 200 + arguments.answer_tokens) // 256 + 2)
        with run_transformers(folder, blocks) as (port, pid):
            named = {"rankkv": {"context": context["id"]}}
            sides = {
                "rankkv": (server.port, server.program.pid, [
                    {"messages": [{"role": "user", "content": q}], **named, **options} for q in questions
                ]),
                "transformers": (port, pid, [
                    {"messages": [{"role": "user", "content": f"{text}\n\n{q}"}], **options} for q in questions
                ]),
            }  # fmt: skip
            waves: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
            for name, (port, _, bodies) in sides.items():
                warm(port, bodies[0])
                print(f"{name} is warm", file=sys.stderr, flush=True)
            for _ in range(arguments.repeats):
                for name, (port, pid, bodies) in sides.items():
                    waves[name].append(ask_at_once(port, pid, bodies))
                    print(f"{name}: {waves[name][-1]}", file=sys.stderr, flush=True)

    def compare(what: str) -> float:
        ours, theirs = (statistics.median(wave[what] for wave in waves[name]) for name in sides)
        return round(ours / theirs, 2)

    record = {
        "clients": arguments.clients,
        "context_tokens": context["tokens"],
        "compression_ratio": arguments.ratio,
        "answer_tokens": arguments.answer_tokens,
        "waves": waves,
        "ratio": compare("tokens_per_second"),
        "ratio_per_cpu_second": compare("tokens_per_cpu_second"),
        "goal": GOAL,
        "missed": compare("tokens_per_second") < GOAL,
        # Other programs on the machine make both sides slower.
        "load_average": round(os.getloadavg()[2], 1),
        "environment": describe_environment(),
    }
    write_text_atomically(arguments.output, json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))
    if record["missed"]:
        print(f"MISSED: {record['ratio']} times the tokens per second, the goal is {GOAL}", file=sys.stderr)


if __name__ == "__main__":
    main()
