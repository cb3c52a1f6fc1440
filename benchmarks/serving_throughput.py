"""Decoded tokens per second of clients that ask about one document at once, beside transformers' own server.

    OMP_NUM_THREADS=2 python -m benchmarks.serving_throughput

Both servers run as programs, in turn, with the same weights in float32, the same document and questions.  RankKV's has
the document as a context, 20 % kept; `transformers serve --continuous-batching` gets it in every prompt, and shares the
blocks of that prefix after one request has computed them.  Only decoding counts on both sides: the tokens that arrive
from the moment at which the last client has its first token until the first client has its last one.
"""

from __future__ import annotations

import argparse
import http.client
import json
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


def ask_at_once(port: int, bodies: list[dict[str, Any]]) -> tuple[float, list[int]]:
    """Send all requests at once; return tokens per second while all of them decode, and tokens of each answer."""
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
    return inside / (end - begin), counts


@contextmanager
def run_transformers(folder: str, blocks: int) -> Iterator[int]:
    """Run `transformers serve --continuous-batching` and yield its port."""
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
        yield port
    finally:
        program.terminate()
        program.wait(60)


def measure(port: int, bodies: list[dict[str, Any]], repeats: int, name: str) -> list[float]:
    # The prefix is computed once before, and everything is warm.
    ask_alone = {**bodies[0], "max_tokens": 4, "stream": False}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=3600)
    connection.request(
        "POST", "/v1/chat/completions", json.dumps(ask_alone), {"Content-Type": "application/json"}
    )
    told = connection.getresponse().read()
    assert b'"choices"' in told, told
    found = []
    for _ in range(repeats):
        rate, counts = ask_at_once(port, bodies)
        print(
            f"{name}: {rate:.1f} tokens per second, answers of {min(counts)} to {max(counts)}",
            file=sys.stderr,
        )
        found.append(round(rate, 2))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Tokens per second beside transformers serve.")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--answer-tokens", type=int, default=64)
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
    with Server(arguments.model, "--dtype", "float32", "--max-batch", str(arguments.clients)) as server:
        context = server.compress(text, arguments.ratio)
        bodies = [
            {"messages": [{"role": "user", "content": q}], "rankkv": {"context": context["id"]}, **options}
            for q in questions
        ]
        ours = measure(server.port, bodies, arguments.repeats, "rankkv serve")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        del model
        # 256 tokens each: context, question, answer, and one block that is not full.
        blocks = arguments.clients * ((arguments.tokens + 200 + arguments.answer_tokens) // 256 + 2)
        with run_transformers(folder, blocks) as port:
            bodies = [
                {"messages": [{"role": "user", "content": f"{text}\n\n{q}"}], **options} for q in questions
            ]
            theirs = measure(port, bodies, arguments.repeats, "transformers serve")
    ratio = round(statistics.median(ours) / statistics.median(theirs), 2)
    record = {
        "clients": arguments.clients,
        "context_tokens": context["tokens"],
        "compression_ratio": arguments.ratio,
        "answer_tokens": arguments.answer_tokens,
        "tokens_per_second": {"rankkv": ours, "transformers": theirs},
        "ratio": ratio,
        "goal": GOAL,
        "missed": ratio < GOAL,
        "environment": describe_environment(),
    }
    write_text_atomically(arguments.output, json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))
    if record["missed"]:
        print(f"MISSED: {ratio} times the tokens per second, the goal is {GOAL}", file=sys.stderr)


if __name__ == "__main__":
    main()
