"""Time to the first token of later questions, and bytes of many contexts, of a server that runs as a program.

    OMP_NUM_THREADS=2 python -m benchmarks.serving

It starts `rankkv serve embedded`, speaks HTTP to it, and writes both parts to `results/serving.json`.
`--parts` measures one of them.  Bytes do not depend on the weights: `--narrow` takes a random model with the cache of
the same shape (layers, key/value heads, head dimension) and less work.
"""

from __future__ import annotations

import argparse
import http.client
import json
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rankkv import load_model
from rankkv.evaluation.results import describe_environment
from rankkv.models.texts import python_docs_text, take_tokens
from rankkv.utils.files import write_text_atomically

QUESTIONS = (
    "Which statement is the first one?", "What does the del statement do?", "Name one operator.",
    "What is a generator?", "When is an exception raised?",
)  # fmt: skip


class Server:
    """A server in a folder of its own, which is removed with it; it can be killed and started again."""

    def __init__(self, model: str, *options: str) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.port = 0
        self._command = [
            sys.executable,
            "-m",
            "rankkv",
            "serve",
            model,
            "--cache-dir",
            self.folder.name,
            *options,
        ]
        self.start()

    def start(self) -> None:
        """Start the program, the second time on the same port, and wait until it listens."""
        command = [*self._command, "--port", str(self.port)]
        self.program = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.program.stderr is not None
        for line in self.program.stderr:
            found = re.search(r"at http://127\.0\.0\.1:(\d+)", line)
            if found:
                self.port = int(found[1])
                # Its log is read on, or the pipe would fill and hold it up.
                threading.Thread(target=self.program.stderr.read, daemon=True).start()
                return
        raise SystemExit(f"the server ended with code {self.program.wait()}")

    def kill(self) -> None:
        """End the program as a power cut would."""
        self.program.kill()
        self.program.wait()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: Any) -> None:
        self.program.terminate()
        self.program.wait(120)
        self.folder.cleanup()

    def post(self, path: str, body: dict[str, Any]) -> tuple[http.client.HTTPConnection, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=3600)
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status not in (200, 201):
            raise SystemExit(f"{path}: {response.status} {response.read().decode()}")
        return connection, response

    def compress(self, text: str, ratio: float) -> dict[str, Any]:
        connection, response = self.post("/v1/contexts", {"text": text, "compression_ratio": ratio})
        record: dict[str, Any] = json.loads(response.read())
        connection.close()
        return record

    def delete(self, name: str) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("DELETE", f"/v1/contexts/{name}")
        connection.getresponse().read()
        connection.close()

    def ask(self, messages: list[dict[str, str]], rankkv: dict[str, Any]) -> tuple[float, int]:
        """Return the seconds to the first piece of an answer, and the cached tokens."""
        start = time.perf_counter()
        body = {"messages": messages, "rankkv": rankkv, "stream": True, "temperature": 0, "max_tokens": 4}
        connection, response = self.post("/v1/chat/completions", body)
        first, cached = 0.0, 0
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line.removeprefix(b"data: "))
            if not first and event["choices"][0]["delta"].get("content"):
                first = time.perf_counter() - start
            if event.get("usage"):
                cached = event["usage"]["prompt_tokens_details"]["cached_tokens"]
        connection.close()
        return first, cached

    def read_metric(self, name: str) -> float:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
        return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"{name} "))

    def read_memory(self) -> int:
        """Return the resident bytes of the server's process."""
        status = Path(f"/proc/{self.program.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        return 0 if found is None else int(found[1]) * 1024


def measure_first_tokens(server: Server, text: str, ratio: float, repeats: int) -> dict[str, Any]:
    """Ask questions about one stored context, and one question with a full prefill, by turns."""
    context = server.compress(text, ratio)
    full, later, cached = [], [], set()
    for turn in range(repeats):
        for question in QUESTIONS:
            seconds, tokens = server.ask([{"role": "user", "content": question}], {"context": context["id"]})
            later.append(seconds)
            cached.add(tokens)
        whole = [{"role": "user", "content": f"{text}\n\n{QUESTIONS[turn % len(QUESTIONS)]}"}]
        seconds, tokens = server.ask(whole, {"reuse": False})
        assert tokens == 0
        full.append(seconds)
        print(
            f"full prefill {seconds:.1f} s, later questions {statistics.median(later):.2f} s", file=sys.stderr
        )
    assert cached == {context["tokens"]}
    return {
        "context_tokens": context["tokens"],
        "compression_ratio": ratio,
        "compression_seconds": context["seconds"],
        "full_prefill_seconds": [round(value, 3) for value in full],
        "later_question_seconds": [round(value, 3) for value in later],
        "ratio": round(statistics.median(later) / statistics.median(full), 4),
        "largest_ratio": round(max(later) / min(full), 4),
    }


def measure_bytes(server: Server, texts: list[str], ratio: float) -> dict[str, Any]:
    """Store many contexts, and compare the bytes held with those of full caches."""
    # Room for the work of one prefill, which stays with the process.
    warm = server.compress(texts[0][::-1][: len(texts[0]) // 2], ratio)
    server.delete(warm["id"])
    before, memory = server.read_metric("rankkv_cache_bytes"), server.read_memory()
    records = []
    for text in texts:
        records.append(server.compress(text, ratio))
        print(f"{len(records)} contexts", file=sys.stderr)
    held = server.read_metric("rankkv_cache_bytes") - before
    full = sum(record["full_bytes"] for record in records)
    return {
        "contexts": len(records),
        "tokens": [record["tokens"] for record in records],
        "compression_ratio": ratio,
        "held_bytes": int(held),
        "full_bytes": full,
        "ratio": round(held / full, 4),
        "resident_growth_bytes": server.read_memory() - memory,
        "disk_bytes": sum(path.stat().st_size for path in Path(server.folder.name).rglob("*.safetensors")),
    }


def write_narrow_model(name: str, folder: str) -> str:
    """Write a random model whose cache has the shape of another model's; return the folder."""
    model, tokenizer = load_model(name)
    config = model.config
    width = config.num_key_value_heads * config.head_dim
    narrow = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_key_value_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(narrow).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Later questions and bytes of contexts, of a running server."
    )
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--parts", default="first_token,bytes")
    parser.add_argument("--narrow", action="store_true")
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--contexts", type=int, default=16)
    parser.add_argument("--context-tokens", type=int, default=4096)
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--output", type=Path, default=Path("results/serving.json"))
    arguments = parser.parse_args()
    record: dict[str, Any] = {}
    tokenizer, text = load_model(arguments.model)[1], python_docs_text()
    for part in arguments.parts.split(","):
        with tempfile.TemporaryDirectory() as folder:
            is_narrow = arguments.narrow and part == "bytes"
            model = write_narrow_model(arguments.model, folder) if is_narrow else arguments.model
            with Server(model, "--cache-memory", "8GB") as server:
                if part == "first_token":
                    document = take_tokens(tokenizer, text, arguments.tokens)
                    found = measure_first_tokens(server, document, arguments.ratio, arguments.repeats)
                else:
                    # Enough characters for the tokens of each, from places that do not overlap.
                    step = len(text) // arguments.contexts
                    texts = [
                        take_tokens(
                            tokenizer, text[place * step : (place + 1) * step], arguments.context_tokens
                        )
                        for place in range(arguments.contexts)
                    ]
                    found = {"narrow": is_narrow, **measure_bytes(server, texts, arguments.ratio)}
        record = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
        record[part] = {**found, "environment": describe_environment()}
        write_text_atomically(arguments.output, json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
