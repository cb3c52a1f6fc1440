"""Clients that know nothing of RankKV, unchanged: the openai package, curl and `transformers chat`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from live import generate, run_live

from rankkv import RankKVCache

#: Facts that a document of other text hides, and what an answer must contain.
FACT, QUESTION, WORD = (
    "The gate code of the north yard is 7391.",
    "What is the gate code of the north yard?",
    "7391",
)


@pytest.fixture(scope="module")
def keyed(tiny, tmp_path_factory):
    with run_live(*tiny, tmp_path_factory.mktemp("clients"), api_keys=("key-of-alice-1",)) as live:
        yield live


def make_client(live):
    import openai

    return openai.OpenAI(base_url=f"{live.url}/v1", api_key=live.key or "none", max_retries=0, timeout=300)


def test_the_openai_client_chats_streams_and_reads_usage(keyed, document):
    client = make_client(keyed)
    assert [model.id for model in client.models.list()] == ["tiny"]
    made = keyed.post("/v1/contexts", {"text": document}).json
    asked = [{"role": "user", "content": f"{document}\n\nWhat?"}]
    options = {"model": "tiny", "messages": asked, "max_tokens": 6, "temperature": 0}
    whole = client.chat.completions.create(**options)
    assert whole.usage.prompt_tokens_details.cached_tokens == made["tokens"]
    pieces, usage = [], None
    for chunk in client.chat.completions.create(
        **options, stream=True, stream_options={"include_usage": True}
    ):
        pieces += [choice.delta.content or "" for choice in chunk.choices]
        usage = chunk.usage or usage
    assert "".join(pieces) == whole.choices[0].message.content
    assert usage.prompt_tokens_details.cached_tokens == made["tokens"]
    named = client.chat.completions.create(
        **{**options, "messages": [{"role": "user", "content": "What?"}]},
        extra_body={"rankkv": {"context": made["id"]}},
    )
    assert named.choices[0].message.content == whole.choices[0].message.content


def test_the_openai_client_completes_and_responds(keyed):
    client = make_client(keyed)
    text = client.completions.create(model="tiny", prompt="Once", max_tokens=4, temperature=0)
    assert text.usage.completion_tokens == 4
    answer = client.responses.create(
        model="tiny", input="Once", max_output_tokens=4, temperature=0, stream=False
    )
    assert answer.usage.input_tokens_details.cached_tokens == 0
    assert answer.output_text


def test_the_openai_client_raises_its_own_errors(keyed):
    import openai

    client = make_client(keyed)
    asked = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    with pytest.raises(openai.NotFoundError, match="only the model 'tiny'") as missing:
        client.chat.completions.create(model="gpt-4", **asked)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="n 2 is not supported"):
        client.chat.completions.create(model="tiny", n=2, **asked)
    with pytest.raises(openai.AuthenticationError, match="API key"):
        client.with_options(api_key="wrong-key-1").chat.completions.create(model="tiny", **asked)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(keyed, document, tmp_path: Path):
    def curl(*arguments):
        command = ["curl", "-sS", "-H", f"Authorization: Bearer {keyed.key}", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    body = tmp_path / "context.json"
    body.write_text(json.dumps({"text": document, "name": "curled"}))
    post = ("-H", "Content-Type: application/json", "--data-binary")
    made = json.loads(curl(f"{keyed.url}/v1/contexts", *post, f"@{body}"))
    asked = {
        "messages": [{"role": "user", "content": "What?"}],
        "rankkv": {"context": "curled"},
        "max_tokens": 3,
    }
    reply = json.loads(curl(f"{keyed.url}/v1/chat/completions", *post, json.dumps(asked)))
    assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] == made["tokens"]
    streamed = curl("-N", f"{keyed.url}/v1/chat/completions", *post, json.dumps({**asked, "stream": True}))
    assert streamed.endswith("data: [DONE]\n\n")
    assert json.loads(curl("-X", "DELETE", f"{keyed.url}/v1/contexts/curled"))["deleted"]


def chat(live, typed, home):
    """Run `transformers chat` with lines typed into it, and return what it prints."""
    flags = ["max_new_tokens=24", "do_sample=false"]
    command = [
        sys.executable,
        "-m",
        "transformers.cli.transformers",
        "chat",
        live.model_name,
        live.url,
        *flags,
    ]
    # Its client refuses even a server of this machine if the hub is switched off.
    environment = {**os.environ, "COLUMNS": "200", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(command, input=typed, capture_output=True, text=True, cwd=home, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_transformers_chat_talks_and_its_turns_are_cached(tiny, tmp_path):
    with run_live(*tiny, tmp_path) as live:
        # It asks whether to go on when the answer reaches its limit, and "n" answers that.
        printed = chat(live, "Hello\nn\n!exit\n", tmp_path)
        assert "was already loaded" in printed
        assert "tokens in" in printed
        assert live.metric('rankkv_requests_total{route="/load_model",status="200"}') == 1
        assert live.metric('rankkv_requests_total{route="/v1/chat/completions",status="200"}') == 1


@pytest.mark.slow
def test_all_clients_find_a_fact_with_the_embedded_model(embedded, python_docs, tmp_path):
    """The live server on the embedded model: a fact in 2,000 tokens, asked for by three clients."""
    from rankkv.models.texts import insert_fact

    text = insert_fact(python_docs[:7000], FACT, depth=0.5)
    with run_live(*embedded, tmp_path, name="embedded") as live:
        made = live.post("/v1/contexts", {"text": text, "name": "yard"}).json
        assert made["bytes"] < 0.35 * made["full_bytes"]
        client = make_client(live)
        asked = [{"role": "user", "content": f"{text}\n\n{QUESTION}"}]
        plain = client.chat.completions.create(model="embedded", messages=asked, max_tokens=24, temperature=0)
        assert WORD in plain.choices[0].message.content
        assert plain.usage.prompt_tokens_details.cached_tokens == made["tokens"]
        named = live.chat(QUESTION, rankkv={"context": "yard"}, max_tokens=24)
        assert named.json["choices"][0]["message"]["content"] == plain.choices[0].message.content
        # Token for token what the stored file answers in this process.
        model, tokenizer = embedded
        (path,) = tmp_path.rglob("*.safetensors")
        ids = tokenizer.apply_chat_template(
            asked, add_generation_prompt=True, tokenize=True, return_dict=True
        )
        answer = generate(model, ids["input_ids"], RankKVCache.load(path, model), 24)
        assert tokenizer.decode(answer, skip_special_tokens=True) == plain.choices[0].message.content
        printed = chat(live, "Tell me a long story.\nn\nGo on with it.\nn\n!exit\n", tmp_path)
        assert printed.count("tokens in") == 2
        # The second turn of that chat begins with its first one.
        assert live.metric('rankkv_context_lookups_total{result="hit"}') == 3
