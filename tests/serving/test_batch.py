"""Answers that decode together: each equals the answer alone, whatever else runs, joins, leaves or fails."""

from __future__ import annotations

import http.client
import json
import random
import threading

import pytest
import torch
from families import VOCABULARY, build
from live import generate, get_text, open_stream, render, run_live, wait_for

from rankkv import RankKVCache, compress
from rankkv.models.compat import cache_argument
from rankkv.serving import batch as batch_module
from rankkv.serving.batch import Base, Batch

QUESTIONS = [
    "What does assert do?",
    "Which statement?",
    "Name 3 words.",
    "A",
    "é?",
    "1",
    "Why? " * 40,
    "And so?",
]


def ask_together(live, requests):
    """Send all requests at once; return the replies in their order."""
    replies = [None] * len(requests)

    def ask(place):
        question, options = requests[place]
        replies[place] = live.chat(question, **options)

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return replies


def test_greedy_answers_on_two_contexts_and_without_one(live, tiny, document):
    model, tokenizer = tiny
    texts = {"one": document, "two": document[500:1500]}
    for name, text in texts.items():
        live.post("/v1/contexts", {"text": text, "name": name})
    requests, expected = [], []
    for place, question in enumerate(QUESTIONS * 2):
        name = ("one", "two", None)[place % 3]
        # Different lengths, so that rows leave while others go on.
        options = {"max_tokens": 4 + 3 * place, **({"rankkv": {"context": name}} if name else {})}
        requests.append((question, options))
        text = f"{texts[name]}\n\n{question}" if name else question
        ids = render(tokenizer, [{"role": "user", "content": text}])
        cache = RankKVCache(model, compression_ratio=1.0)
        if name:
            known = live.service.store.get("public", name).tokens
            cache = compress(model, torch.tensor([ids[:known]]), compression_ratio=0.3)
        answer = generate(model, ids, cache, options["max_tokens"])
        expected.append(tokenizer.decode(answer, skip_special_tokens=True))
    assert [get_text(reply) for reply in ask_together(live, requests)] == expected
    assert live.service.manager.batched == 0


def test_sampled_answers_draw_as_alone(live, tiny, document):
    model, tokenizer = tiny
    known = live.post("/v1/contexts", {"text": document, "name": "doc"}).json["tokens"]
    requests, expected = [], []
    for seed, question in enumerate(QUESTIONS):
        options = {
            "temperature": 1.3,
            "top_p": 0.9,
            "seed": seed,
            "max_tokens": 12,
            "rankkv": {"context": "doc"},
        }
        requests.append((question, options))
        ids = torch.tensor([render(tokenizer, [{"role": "user", "content": f"{document}\n\n{question}"}])])
        torch.manual_seed(seed)
        output = model.generate(
            ids,
            max_new_tokens=12,
            do_sample=True,
            temperature=1.3,
            top_p=0.9,
            **cache_argument(compress(model, ids[:, :known], compression_ratio=0.3)),
        )
        expected.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    assert [get_text(reply) for reply in ask_together(live, requests)] == expected


def test_penalties_and_stop_texts_are_each_answers_own(live, document):
    live.post("/v1/contexts", {"text": document, "name": "doc"})
    doc = {"rankkv": {"context": "doc"}, "max_tokens": 16}
    whole = get_text(live.chat("What?", **doc))
    requests = [
        ("What?", {**doc, "stop": whole[5:8]}),
        ("What?", {**doc, "frequency_penalty": 1.0}),
        ("What?", {**doc, "logit_bias": {"5": 100}}),
        ("What?", {**doc, "max_tokens": 1}),
        ("What?", doc),
    ]
    alone = [get_text(live.chat(question, **options)) for question, options in requests]
    assert [get_text(reply) for reply in ask_together(live, requests)] == alone
    assert len(set(alone)) >= 4


@pytest.mark.parametrize("leaver", ["streamed", "plain"])
def test_a_client_that_leaves_frees_its_row_and_others_go_on(live, document, leaver):
    live.post("/v1/contexts", {"text": document, "name": "doc"})
    doc = {"rankkv": {"context": "doc"}}
    alone = get_text(live.chat("What?", max_tokens=40, **doc))
    if leaver == "streamed":
        gone = open_stream(live, 3000, **doc)
    else:
        gone = http.client.HTTPConnection("127.0.0.1", live.port, timeout=60)
        body = {
            "messages": [{"role": "user", "content": "Go on."}],
            "max_tokens": 3000,
            "logit_bias": {"2": -100},
        }
        headers = {"Content-Type": "application/json"}
        gone.request("POST", "/v1/chat/completions", json.dumps({**body, **doc}), headers)
    stays = open_stream(live, 3000)
    wait_for(lambda: live.service.manager.batched == 2)
    replies = []
    asking = threading.Thread(target=lambda: replies.append(live.chat("What?", max_tokens=40, **doc)))
    asking.start()
    gone.close()
    asking.join(60)
    assert get_text(replies[0]) == alone
    wait_for(lambda: live.service.manager.batched == 1)
    wait_for(lambda: live.service.turns.running == 1)
    stays.close()
    wait_for(lambda: not live.service.turns.running)


def test_a_failing_row_does_not_touch_the_others(live, document):
    live.post("/v1/contexts", {"text": document, "name": "doc"})
    doc = {"rankkv": {"context": "doc"}, "max_tokens": 12}
    alone = get_text(live.chat("What?", **doc))
    running = open_stream(live, 3000)
    wait_for(lambda: live.service.manager.batched == 1)
    choose = live.service.manager._running[0].answer

    usual, seen = choose._criteria, []

    def fail(*given):
        # Only once the other answer decodes in the same batch.
        seen.append(live.service.manager.batched)
        if seen[-1] == 2:
            raise RuntimeError("broken")
        return usual(*given)

    choose._criteria = fail
    assert get_text(live.chat("What?", **doc)) == alone
    assert seen[-1] == 2
    wait_for(lambda: not live.service.manager.batched)
    running.close()


def test_answers_go_on_while_a_context_is_prefilled(live, document):
    running = open_stream(live, 3000)
    wait_for(lambda: live.service.manager.batched == 1)
    answer, layers = live.service.manager._running[0].job, live.service.model.model.layers
    seen = []

    def note(module, args, *_):
        if args[0].shape[1] > 100:
            seen.append(answer.answer_tokens)

    handles = [layers[0].register_forward_pre_hook(note), layers[-1].register_forward_hook(note)]
    assert live.post("/v1/contexts", {"text": document}).status == 201
    for handle in handles:
        handle.remove()
    running.close()
    assert len(seen) == 2
    assert seen[0] < seen[1]


def test_the_next_turn_of_a_conversation_shares_the_context(live, document):
    context = live.post("/v1/contexts", {"text": document, "name": "doc"}).json
    first = get_text(live.chat("What is it?", rankkv={"context": "doc"}))
    store = live.service.store
    # The conversation holds its own tokens alone.
    assert store.held_bytes() < 1.5 * context["bytes"]
    turns = [
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "And then?"},
    ]
    cached = live.chat(turns, rankkv={"context": "doc"}).json["usage"]["prompt_tokens_details"][
        "cached_tokens"
    ]
    assert cached > context["tokens"]
    # If the conversation has left memory, the context still answers.
    expected = get_text(live.chat(turns, rankkv={"context": "doc"}))
    prepare, manager = live.service.manager._prepare, live.service.manager

    def evict(*arguments):
        found = prepare(*arguments)
        with store._lock:
            for other in [c for c in store._contexts.values() if not c.is_stored]:
                del store._contexts[other.id]
        return found

    manager._prepare = evict
    reply = live.chat(turns, rankkv={"context": "doc"})
    assert get_text(reply) == expected


# -- the batch itself ------------------------------------------------------------------------------------------------


def decode_alone(model, cache, question, tokens):
    """Return the logits after the question and after each token, with a copy of the cache."""
    own, logits = cache.copy(), []
    with torch.no_grad():
        for ids in (question, *([token] for token in tokens)):
            output = model(input_ids=torch.tensor([list(ids)]), use_cache=True, **cache_argument(own))
            logits.append(output.logits[0, -1])
    return logits


@pytest.mark.parametrize("slots", [(64, 256, 128), (4, 8, 6)])
def test_rows_that_join_and_leave_at_any_step_have_the_logits_of_the_row_alone(tiny, monkeypatch, slots):
    model, draw = tiny[0], random.Random(slots[0])
    names = ("_FIRST_SLOTS", "_MOST_SLOTS", "_LONGEST_START")
    for name, value in zip(names, slots, strict=True):
        monkeypatch.setattr(batch_module, name, value)
    monkeypatch.setattr(batch_module, "_CHUNK", 7)
    caches = [
        compress(model, torch.arange(first, first + 90)[None], compression_ratio=ratio, selector=selector)
        for first, ratio, selector in ((5, 0.2, "snapkv"), (300, 0.5, "echo"), (40, 1.0, "streaming_llm"))
    ]
    batch, waiting, running, ended = Batch(model, 6), [], [], []
    for _ in range(12):
        question = [draw.randrange(400) for _ in range(draw.randrange(1, 12))]
        tokens = [draw.randrange(400) for _ in range(draw.randrange(1, 24))]
        waiting.append((draw.choice(caches), question, tokens))
    while waiting or running:
        if waiting and len(running) < 6 and draw.random() < 0.7:
            cache, question, tokens = waiting.pop()
            row = batch.open(cache)
            logits = [batch.fill(row, torch.tensor(question))[0]]
            batch.join(row)
            running.append((row, cache, question, tokens, logits))
        if not running:
            continue
        by_row = {id(item[0]): item for item in running}
        order = [by_row[id(row)] for row in batch.rows]
        for item, scores in zip(
            order, batch.step([item[3][len(item[4]) - 1] for item in order]), strict=True
        ):
            item[4].append(scores)
        for item in [item for item in running if len(item[4]) > len(item[3])]:
            running.remove(item)
            batch.leave(item[0])
            ended.append(item)
    assert len(ended) == 12
    for row, cache, question, tokens, logits in ended:
        torch.testing.assert_close(logits, decode_alone(model, cache, question, tokens), rtol=1e-4, atol=1e-4)
        # What leaves is the whole tail: another row goes on from it.
        assert row.own.length == len(question) + len(tokens)
        again = batch.open(cache, row.own)
        last = batch.fill(again, torch.tensor([7]))[0]
        expected = decode_alone(model, cache, [*question, *tokens], [7])[-1]
        torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-4)


def test_rows_share_the_memory_of_a_context(tiny):
    model = tiny[0]
    cache = compress(model, torch.arange(5, 95)[None], compression_ratio=0.3)
    batch = Batch(model, 4)
    rows = [batch.open(cache) for _ in range(1)]
    batch.fill(rows[0], torch.tensor([3]))
    batch.join(rows[0])
    rows.append(batch.open(cache))
    assert rows[0].base is rows[1].base
    held = {tensor.untyped_storage().data_ptr() for layer in cache.layers for tensor in layer.held()}
    for layer in rows[0].base.layers:
        for pair in layer:
            assert {tensor.untyped_storage().data_ptr() for tensor in pair} <= held
    assert (
        sum(t.nbytes for layer in Base(cache).layers for pair in layer for t in pair) == cache.cache_bytes()
    )


def test_a_head_that_keeps_nothing_has_no_weight(tiny):
    empty = torch.zeros(0, 4)
    keys, values, query = torch.randn(5, 4), torch.randn(5, 4), torch.randn(2, 3, 4)
    part = batch_module._attend_heads(query, [(keys, values), (empty, empty)])
    first = batch_module._weigh(query @ keys.T, values[None].expand(2, -1, -1))
    merged = batch_module._merge(first, part)
    torch.testing.assert_close(merged[2][1] / merged[1][1], first[2][1] / first[1][1])
    torch.testing.assert_close(merged[2][0] / merged[1][0], first[2][0] / first[1][0])


def test_models_that_cannot_decode_together_answer_one_by_one(tiny_llama, tiny, document, tmp_path):
    model = tiny_llama(vocab_size=len(tiny[1]))
    assert Batch.check(model) is None
    model.set_attn_implementation("eager")
    assert Batch.check(model) == "its attention does not run through sdpa"
    with run_live(model, tiny[1], tmp_path) as live:
        live.post("/v1/contexts", {"text": document, "name": "doc"})
        requests = [(question, {"rankkv": {"context": "doc"}, "max_tokens": 4}) for question in QUESTIONS[:4]]
        drawn = ("Say it.", {"temperature": 1.2, "seed": 3, "max_tokens": 6})
        alone = [get_text(live.chat(question, **options)) for question, options in (*requests, drawn)]
        assert [get_text(reply) for reply in ask_together(live, [*requests, drawn])] == alone


#: Families whose answers decode together; the others answer one by one.
TOGETHER = [
    "Llama", "Mistral", "Mixtral", "Qwen2", "Qwen2-MoE", "Qwen3", "Qwen3-MoE", "Phi", "Phi-3", "Gemma", "GPT-NeoX",
    "GPT-2", "GPT-2, scaled by layer", "GPT-J", "GPT-BigCode", "OPT", "OLMo", "OLMo 2", "OLMoE", "StarCoder2",
    "Granite", "Granite-MoE", "SmolLM3", "Cohere", "GLM", "GLM-4", "GLM-4-MoE", "StableLM", "Nemotron", "ERNIE 4.5",
    "Hunyuan", "Seed-OSS", "Helium", "MiniMax-M2", "Persimmon", "CodeGen", "BioGPT",
]  # fmt: skip
OFTEN = ("GPT-2, scaled by layer", "Granite", "Phi", "OPT")


@pytest.mark.parametrize(
    "name", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in TOGETHER]
)
def test_rows_of_every_family_have_the_logits_of_the_row_alone(name):
    model = build(name)
    assert Batch.check(model) is None
    draw = torch.Generator().manual_seed(7)

    def make(count):
        return torch.randint(3, VOCABULARY, (count,), generator=draw)

    caches = [
        compress(model, make(60)[None], compression_ratio=ratio, selector="snapkv") for ratio in (0.3, 0.6)
    ]
    batch, rows = Batch(model, 4), []
    for place in range(4):
        question, row = make(4 + place), batch.open(caches[place % 2])
        batch.fill(row, question)
        batch.join(row)
        rows.append((caches[place % 2], question.tolist(), make(5).tolist()))
    steps = [batch.step([tokens[step] for _, _, tokens in rows]) for step in range(5)]
    for place, (cache, question, tokens) in enumerate(rows):
        found, expected = (
            [logits[place] for logits in steps],
            decode_alone(model, cache, question, tokens)[1:],
        )
        scale = float(torch.stack(expected).abs().max())
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("Ministral", "no ordinary keys and values"),
        ("Gemma 3n", "no ordinary keys and values"),
        ("Qwen2-VL", "position_ids alone"),
        ("DeepSeek-V3", "in a trial"),
    ],
)
def test_a_family_that_cannot_decode_together_is_told(name, told):
    assert told in Batch.check(build(name))


@pytest.mark.parametrize("attention", ["sdpa", "eager"], ids=["in a batch", "alone"])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 1}], ids=["greedy", "drawn"])
def test_a_prediction_that_is_no_number_is_an_error(tiny_llama, tiny, tmp_path, attention, options):
    model = tiny_llama(vocab_size=len(tiny[1]))
    model.set_attn_implementation(attention)
    with run_live(model, tiny[1], tmp_path) as live:
        assert live.chat("What?", max_tokens=4, **options).status == 200
        with torch.no_grad():
            model.get_output_embeddings().weight[7] = float("nan")
        reply = live.chat("Why?", max_tokens=4, **options)
        assert (reply.status, reply.error["code"]) == (500, "not_finite")
        events = live.chat("Why?", max_tokens=4, stream=True, **options).events
        assert events[-1]["error"]["code"] == "not_finite"


@pytest.mark.parametrize("option", [{"num_beams": 2}, {"penalty_alpha": 0.6, "top_k": 4}])
def test_a_model_that_searches_by_default_answers_one_by_one(tiny_llama, option):
    model = tiny_llama()
    for name, value in option.items():
        setattr(model.generation_config, name, value)
    assert "search" in Batch.check(model)


def test_the_cache_of_a_generation_config_gives_way(tiny_llama, tiny, document, tmp_path):
    """A model may ask for a static cache by default; each answer brings its own."""
    answers = []
    for kind in (None, "static"):
        model = tiny_llama(vocab_size=len(tiny[1]))
        model.generation_config.cache_implementation = kind
        model.set_attn_implementation("eager")
        with run_live(model, tiny[1], tmp_path / str(kind)) as live:
            live.post("/v1/contexts", {"text": document, "name": "doc"})
            answers.append(get_text(live.chat("What?", rankkv={"context": "doc"}, max_tokens=4)))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_by_the_longest_text_are_not_shared(tiny_llama, kind):
    model = tiny_llama()
    model.model.rotary_emb.rope_type = kind
    assert "longest text" in Batch.check(model)


@pytest.mark.parametrize("place", [0, 2], ids=["moved into", "joined into"])
def test_a_row_that_was_not_finite_leaves_nothing_behind(tiny, place):
    """No weight takes NaN away, not even 0: a later row in its place must not find it."""
    model = tiny[0]
    cache = compress(model, torch.arange(90)[None], compression_ratio=0.5)
    batch = Batch(model, 3)

    def enter(question):
        row = batch.open(cache)
        batch.fill(row, torch.tensor(question))
        batch.join(row)
        return row

    questions = [[8] * 20, [9]]
    questions.insert(place, [5, 6, 7])
    rows = [enter(question) for question in questions]
    batch.step([1, 1, 1])
    for memory in (*batch._keys, *batch._values):
        memory[place] = float("nan")
    # At 0, the short last row moves there; at 2, a short new row joins there.  Both stand beside a longer one.
    batch.leave(rows[place])
    tokens = {id(row): [1, 3] for row in batch.rows}
    asked = {id(row): question for row, question in zip(rows, questions, strict=True)}
    if place == 2:
        fresh = enter([7])
        tokens[id(fresh)], asked[id(fresh)] = [3], [7]
    found = batch.step([3] * len(batch.rows))
    for row, logits in zip(batch.rows, found, strict=True):
        wanted = decode_alone(model, cache, asked[id(row)], tokens[id(row)])[-1]
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["_settle", "_reserve"])
def test_a_batch_without_memory_is_as_it_was(tiny, monkeypatch, method):
    model = tiny[0]
    cache = compress(model, torch.arange(90)[None], compression_ratio=0.5)
    batch = Batch(model, 3)
    # The second question needs more room than a batch starts with.
    one, two = batch.open(cache), batch.open(cache)
    for row, length in ((one, 2), (two, 70)):
        batch.fill(row, torch.full((length,), 5))
    batch.join(one)
    usual = Batch._reserve

    def fail(self, *given):
        if method == "_reserve" and given[1] <= 64:
            return usual(self, *given)
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(Batch, method, fail)
        with pytest.raises(torch.OutOfMemoryError):
            batch.leave(one) if method == "_settle" else batch.join(two)
    assert batch.rows == ([] if method == "_settle" else [one])
    batch.join(two)
    wanted = decode_alone(model, cache, [5] * 70, [4])[-1]
    torch.testing.assert_close(batch.step([4] * len(batch.rows))[-1], wanted, rtol=1e-4, atol=1e-4)


def test_requests_for_one_context_at_once_compress_it_once(live, document, monkeypatch):
    from rankkv.serving import generation

    counted, usual = [], generation.compress

    def count(model, ids, *args, **more):
        counted.append(tuple(ids.flatten().tolist()))
        return usual(model, ids, *args, **more)

    monkeypatch.setattr(generation, "compress", count)
    texts = [(document, "a"), (document[:900], "b"), (document, "b"), (document, None)]
    replies = [None] * len(texts)

    def post(place):
        text, name = texts[place]
        replies[place] = live.post("/v1/contexts", {"text": text, **({"name": name} if name else {})})

    threads = [threading.Thread(target=post, args=(place,)) for place in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    # One or two: the name that two texts ask for may go to either.
    assert len(counted) == len(set(counted)) > 0
    assert {reply.status for reply in replies} <= {200, 201, 409}
    for reply in replies:
        if reply.status < 300:
            folder = live.service.store._folder / "public"
            assert (folder / f"{reply.json['id']}.safetensors").is_file()
            assert live.chat("What?", rankkv={"context": reply.json["id"]}).status == 200
