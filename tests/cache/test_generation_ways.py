"""Every way transformers generates, with a compressed cache: what is kept, and what comes out."""

from __future__ import annotations

import copy
import gc
import itertools

import oracles
import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from rankkv import RankKVCache, compress
from rankkv.errors import CacheStateError, ConfigError
from rankkv.models.compat import accepts_argument, cache_argument
from rankkv.observe import hook as attention

PROMPT = oracles.random_prompt(90, seed=1)
SHORT = oracles.random_prompt(41, seed=2)
#: A prompt that repeats itself, so that prompt lookup finds drafts.
LOOPED = oracles.random_prompt(15, seed=3).repeat(1, 6)
KEEP = {"compression_ratio": 0.3, "min_budget": 3}


@pytest.fixture(scope="module")
def llama(tiny_llama):
    return tiny_llama()


@pytest.fixture(scope="module", params=["llama", "neox"])
def model(request, tiny_llama, tiny_neox):
    return {"llama": tiny_llama, "neox": tiny_neox}[request.param]()


def assert_follows_masked_oracle(model, cache, prompt, text):
    """The greedy ``text`` after ``prompt`` is what the full cache gives, the tokens evicted at compression masked."""
    ids = torch.cat([prompt, text], dim=-1)
    at = cache.layers[cache.layer_indices[0]].compressed_at
    copied, full = oracles.masked_oracle(model, cache, ids[:, :at])
    expected = torch.cat(oracles.feed(copied, full, ids[:, at:-1].split(1, dim=-1)), dim=1).argmax(-1)
    assert torch.equal(ids[:, at + 1 :], expected)
    return ids.shape[1] - at - 1


# -- sampling, beams, what is called on the way ---------------------------------------------------------------


def test_greedy_equals_the_masked_oracle(model):
    cache = RankKVCache(model, **KEEP)
    text = oracles.generate(model, PROMPT, cache)
    assert assert_follows_masked_oracle(model, cache, PROMPT, text) == 11


@pytest.mark.parametrize("options", [{}, {"num_return_sequences": 3}, {"num_beams": 3}], ids=str)
def test_sampling_with_everything_kept_equals_plain(model, options):
    texts = []
    for cache in (None, RankKVCache(model, 1.0)):
        torch.manual_seed(7)
        texts.append(oracles.generate(model, PROMPT, cache, do_sample=True, top_k=20, **options))
    assert torch.equal(*texts)


@pytest.mark.parametrize("beams", [3, 4])
def test_beams_with_everything_kept_equal_plain(model, beams):
    options = {"num_beams": beams, "num_return_sequences": 2}
    plain = oracles.generate(model, PROMPT, None, **options)
    assert torch.equal(oracles.generate(model, PROMPT, RankKVCache(model, 1.0), **options), plain)


@pytest.mark.parametrize("beams", [3, 4])
@pytest.mark.parametrize("selector", oracles.ONE_PASS)
def test_beams_on_a_compressed_prompt_equal_those_on_the_masked_oracle(model, selector, beams):
    # The beams part at the first token, from logits of the whole prompt; so that both sides search alike, the prompt is
    # prefilled before and the search starts from its last token but one.
    cache = oracles.prefill(model, PROMPT[:, :-1], selector=selector, **KEEP)
    copied, full = oracles.masked_oracle(model, cache, PROMPT[:, :-1])
    for held in (cache, full):
        held.batch_repeat_interleave(beams)
    for module in oracles.attention_modules(copied).values():
        module.oracle_evicted = module.oracle_evicted.repeat_interleave(beams, 0)
    options = {"num_beams": beams, "num_return_sequences": beams}
    expected = oracles.generate(copied, PROMPT, full, **options)
    assert torch.equal(oracles.generate(model, PROMPT, cache, **options), expected)


class Recorder(BaseStreamer, LogitsProcessor):
    """Notes what a streamer and a logits processor are called with."""

    def __init__(self):
        self.streamed, self.lengths, self.ended = [], [], False

    def put(self, value):
        self.streamed.append(value.reshape(-1))

    def end(self):
        self.ended = True

    def __call__(self, input_ids, scores):
        self.lengths.append(input_ids.shape[1])
        # A token that can never win.
        scores[:, 5] = -1e9
        return scores


def test_streamer_and_logits_processor_are_called_as_usual(llama):
    records = []
    for cache in (None, RankKVCache(llama, **KEEP)):
        record = Recorder()
        processors = LogitsProcessorList([record])
        text = oracles.generate(llama, PROMPT, cache, streamer=record, logits_processor=processors)
        assert record.ended
        assert torch.equal(torch.cat(record.streamed), torch.cat([PROMPT, text], dim=-1)[0])
        assert 5 not in text
        records.append(record.lengths)
    assert records[0] == records[1] == list(range(90, 102))


def test_scores_and_logits_are_returned(llama):
    cache = RankKVCache(llama, 1.0)
    options = {
        "return_dict_in_generate": True,
        "output_logits": True,
        "do_sample": False,
        "max_new_tokens": 5,
    }
    ours = llama.generate(PROMPT, **cache_argument(cache), **options)
    plain = llama.generate(PROMPT, **options)
    for mine, theirs in zip(ours.logits, plain.logits, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_inputs_embeds(model):
    expected = oracles.generate(model, PROMPT, RankKVCache(model, **KEEP))
    embeds = model.get_input_embeddings()(PROMPT)
    text = model.generate(
        inputs_embeds=embeds,
        do_sample=False,
        eos_token_id=None,
        max_new_tokens=12,
        **cache_argument(RankKVCache(model, **KEEP)),
    )
    assert torch.equal(text, expected)


# -- prompts in chunks ----------------------------------------------------------------------------------------


@oracles.needs_recent_generate
@pytest.mark.parametrize("chunk", [1, 7, 32, 45, 89])
@pytest.mark.parametrize("selector", oracles.ONE_PASS)
def test_chunks_keep_what_one_piece_keeps(model, selector, chunk):
    single, chunked = (
        RankKVCache(model, selector=selector, prefill=p, **KEEP) for p in ("single", "chunked")
    )
    expected = oracles.generate(model, PROMPT, single)
    if chunk in (1, 89):
        # The last chunk is one token, which cannot be told from a decode step.
        oracles.feed(model, chunked, PROMPT[:, :89].split(chunk, dim=1) if chunk == 89 else [PROMPT[:, :89]])
        oracles.feed(model, chunked.finish(), [PROMPT[:, 89:]])
        reference = oracles.prefill(model, PROMPT[:, :89], selector=selector, **KEEP)
        oracles.feed(model, reference, [PROMPT[:, 89:]])
        assert oracles.kept_tokens(chunked) == oracles.kept_tokens(reference)
        return
    text = oracles.generate(model, PROMPT, chunked, prefill_chunk_size=chunk)
    assert chunked.budgets == single.budgets
    assert oracles.kept_tokens(chunked) == oracles.kept_tokens(single)
    assert torch.equal(text, expected)


@oracles.needs_recent_generate
@pytest.mark.parametrize("selector", oracles.ONE_PASS)
@pytest.mark.parametrize("chunk", [16, 40, 64])
def test_chunks_of_a_padded_batch(model, selector, chunk):
    ids, mask = oracles.left_pad([PROMPT, SHORT])
    single, chunked = (
        RankKVCache(model, selector=selector, prefill=p, **KEEP) for p in ("single", "chunked")
    )
    expected = oracles.generate(model, ids, single, mask=mask)
    text = oracles.generate(model, ids, chunked, mask=mask, prefill_chunk_size=chunk)
    assert chunked.budgets_per_row == single.budgets_per_row
    assert oracles.kept_tokens(chunked, mask) == oracles.kept_tokens(single, mask)
    assert torch.equal(text, expected)


@oracles.needs_recent_generate
@pytest.mark.parametrize("decode", ["bounded", "periodic"])
def test_chunks_and_other_ways_of_decoding(llama, decode):
    texts = []
    for prefill, size in (("single", None), ("chunked", 32)):
        cache = RankKVCache(llama, decode=decode, decode_interval=5, prefill=prefill, **KEEP)
        texts.append((oracles.generate(llama, PROMPT, cache, 20, prefill_chunk_size=size), cache))
    assert torch.equal(texts[0][0], texts[1][0])
    assert oracles.kept_tokens(texts[0][1]) == oracles.kept_tokens(texts[1][1])


@pytest.mark.parametrize("padded", [False, True], ids=["single", "padded"])
@pytest.mark.parametrize("selector", oracles.ONE_PASS)
def test_streaming_prefill_is_bounded(llama, selector, padded):
    ids, mask = oracles.left_pad([oracles.random_prompt(400, 5), SHORT][: 1 + padded])
    cache = RankKVCache(llama, budget=40, selector=selector, prefill="streaming")
    most = []
    watch = lambda *_: most.append(cache.kept_lengths)  # noqa: E731
    hooks = [module.register_forward_hook(watch) for module in oracles.attention_modules(llama).values()]
    try:
        text = oracles.generate(llama, ids, cache, 10, mask, prefill_chunk_size=50)
    finally:
        for hook in hooks:
            hook.remove()
    # Never more than the budgets and one chunk in each layer, the layer under way included.
    assert max(sum(lengths) for lengths in most) <= 3 * (40 + 50)
    assert max(max(lengths) for lengths in most[:24]) < 200
    assert sum(cache.budgets) == 3 * 40
    assert cache.seen_tokens == 409
    assert text.shape == (1 + padded, 10)
    logits = oracles.feed(
        llama, cache, oracles.next_chunks(len(ids)), torch.cat([mask, mask.new_ones(len(ids), 9)], 1)
    )
    assert all(torch.isfinite(step).all() for step in logits)
    for layer in oracles.kept_tokens(cache, mask):
        for heads in layer:
            assert all(head[:4] == [0, 1, 2, 3] for head in heads)


# -- assisted decoding ------------------------------------------------------------------------------------------


@pytest.fixture(params=["itself", "prompt lookup", "prompt lookup, long drafts"])
def drafting(request, llama):
    return {
        "itself": {"assistant_model": copy.deepcopy(llama)},
        "prompt lookup": {"prompt_lookup_num_tokens": 5},
        "prompt lookup, long drafts": {"prompt_lookup_num_tokens": 75},
    }[request.param]


@pytest.mark.parametrize("prompt", [PROMPT, LOOPED], ids=["random", "looped"])
def test_assisted_with_everything_kept_equals_plain(llama, drafting, prompt):
    plain = oracles.generate(llama, prompt, None, 30)
    assert torch.equal(oracles.generate(llama, prompt, RankKVCache(llama, 1.0), 30, **drafting), plain)


@pytest.mark.parametrize("prompt", [PROMPT, LOOPED], ids=["random", "looped"])
@pytest.mark.parametrize("selector", oracles.ONE_PASS)
def test_assisted_on_a_compressed_prompt_follows_the_masked_oracle(llama, drafting, selector, prompt):
    cache = RankKVCache(llama, selector=selector, **KEEP)
    text = oracles.generate(llama, prompt, cache, 30, **drafting)
    assert text[0, 0] == oracles.generate(llama, prompt, None, 1)[0, 0]
    assert cache.layers[0].compressed_at < 120
    assert sum(cache.budgets) == round(0.3 * cache.layers[0].compressed_at * 3)
    assert_follows_masked_oracle(llama, cache, prompt, text)
    # What the rejected drafts left behind is gone.
    assert cache.seen_tokens == 119
    for layer_idx in range(3):
        for head in oracles.kept_positions(cache, layer_idx)[0]:
            assert head == sorted(set(head))
            assert head[-1] == 118


@pytest.mark.parametrize("selector", oracles.ONE_PASS)
def test_a_judged_draft_leaves_no_trace(llama, selector):
    # A cache that saw a draft and dropped it compresses as if it had never been there.
    for draft in (3, 64, 256):
        cache = RankKVCache(llama, selector=selector, **KEEP)
        cache.activate_past_recording()
        oracles.forward(llama, cache, torch.cat([PROMPT, oracles.random_prompt(draft, 9)], dim=-1))
        cache.crop(-draft)
        expected = oracles.prefill(llama, PROMPT, selector=selector, **KEEP)
        assert cache.budgets == expected.budgets
        assert oracles.kept_tokens(cache) == oracles.kept_tokens(expected)
        oracles.assert_equals_masked_oracle(llama, cache, PROMPT)


@pytest.mark.parametrize("steps", [1, 4])
def test_a_draft_that_is_accepted_in_silence_ends_the_prompt(llama, steps):
    # transformers 5.14 crops a cache only if it rejects something.
    cache = RankKVCache(llama, **KEEP)
    cache.activate_past_recording()
    oracles.forward(llama, cache, PROMPT)
    oracles.forward(llama, cache, oracles.random_prompt(steps, 9))
    assert cache.layers[0].compressed_at == 90
    expected = oracles.prefill(llama, PROMPT, **KEEP)
    cache.crop(-steps)
    assert oracles.kept_tokens(cache) == oracles.kept_tokens(expected)
    oracles.assert_equals_masked_oracle(llama, cache, PROMPT)


def test_a_draft_too_long_to_be_taken_back_is_named(llama):
    # The queries that observe the prompt would have to be there still.
    cache = RankKVCache(llama, **KEEP)
    cache.activate_past_recording()
    oracles.forward(llama, cache, torch.cat([PROMPT, oracles.random_prompt(300, 9)], dim=-1))
    with pytest.raises(CacheStateError, match=r"cannot take back 300 tokens .* at most 256"):
        cache.crop(-300)
    assert cache.kept_lengths == [390] * 3


def test_rows_may_change_before_a_chunked_prompt_is_compressed(model):
    prompts = [PROMPT, SHORT]
    ids, mask = oracles.left_pad(prompts)
    cache = RankKVCache(model, prefill="chunked", **KEEP)
    oracles.forward(model, cache, ids[:, :50], mask[:, :50])
    oracles.forward(model, cache, ids[:, 50:], mask)
    for order in ([1], [1, 0, 1], [0, 0]):
        copied = cache.copy()
        copied.batch_select_indices(torch.tensor(order))
        copied.finish()
        for row, number in enumerate(order):
            alone = oracles.prefill(model, prompts[number], **KEEP)
            assert copied.budgets_per_row[row] == alone.budgets
            kept = [layer[row] for layer in oracles.kept_tokens(copied, mask[order])]
            assert kept == [layer[0] for layer in oracles.kept_tokens(alone)]


def test_a_draft_of_the_compressed_prompt_cannot_be_taken_back(llama):
    cache = oracles.prefill(llama, PROMPT, **KEEP)
    with pytest.raises(CacheStateError, match="evicted tokens cannot come back"):
        cache.crop(60)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"decode": "bounded"}, "decode='bounded'"),
        ({"decode": "periodic"}, "decode='periodic'"),
        ({"prefill": "streaming"}, "prefill='streaming'"),
        ({"recompress_turns": True}, "recompress_turns"),
    ],
    ids=lambda value: str(value),
)
def test_assisted_decoding_is_refused_where_drafts_could_not_be_taken_back(llama, options, named):
    cache = RankKVCache(llama, **options)
    with pytest.raises(ConfigError, match=named):
        oracles.generate(llama, LOOPED, cache, prompt_lookup_num_tokens=4)
    # Nor does generate() rely on taking tokens back where it may, such as when it looks late whether to stop.
    assert not cache.is_croppable


@oracles.needs_recent_generate
def test_a_second_plain_turn_after_assisted_decoding(llama):
    cache = RankKVCache(llama, **KEEP)
    text = oracles.generate(llama, LOOPED, cache, 10, prompt_lookup_num_tokens=4)
    ids = torch.cat([LOOPED, text, SHORT], dim=-1)
    # An assisted second turn would be given the whole prompt once more by transformers.
    with pytest.raises(CacheStateError, match="start at position 0, but the cache has seen 99"):
        oracles.generate(llama, ids, cache.copy(), 6, prompt_lookup_num_tokens=4)
    kept = cache.kept_lengths
    oracles.generate(llama, ids, cache, 6)
    assert cache.kept_lengths == [n + 1 + 41 + 5 for n in kept]
    cache.reset()
    expected = oracles.generate(llama, PROMPT, RankKVCache(llama, **KEEP))
    assert torch.equal(oracles.generate(llama, PROMPT, cache), expected)


# -- wrapped and compiled models ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapted(tiny_llama):
    """A model wrapped by PEFT, its adapter changed from the identity, and the same weights merged into one."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(tiny_llama(), config).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.2, generator=torch.Generator().manual_seed(0))
    return wrapped, copy.deepcopy(wrapped).merge_and_unload()


@pytest.mark.parametrize(
    "options", [{}, {"positions": "packed", "decode": "bounded"}, {"storage": "int8"}], ids=str
)
def test_peft_wrapped_model(adapted, options):
    wrapped, merged = adapted
    for ids, mask in (oracles.left_pad([PROMPT]), oracles.left_pad([PROMPT, SHORT])):
        ours = RankKVCache(wrapped, **KEEP, **options)
        expected = RankKVCache(merged, **KEEP, **options)
        text = wrapped.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            **cache_argument(ours),
        )
        assert torch.equal(text[:, 90:], oracles.generate(merged, ids, expected, mask=mask))
        assert oracles.kept_tokens(ours, mask) == oracles.kept_tokens(expected, mask)


def test_compress_with_a_peft_wrapped_model(adapted):
    # A padded prompt needs position ids, which the wrapper's own signature does not name.
    wrapped, merged = adapted
    ids, mask = oracles.left_pad([PROMPT, SHORT])
    ours, expected = compress(wrapped, ids, mask, **KEEP), compress(merged, ids, mask, **KEEP)
    assert oracles.kept_tokens(ours, mask) == oracles.kept_tokens(expected, mask)
    torch.testing.assert_close(ours.layers[-1].keys, expected.layers[-1].keys, atol=1e-4, rtol=1e-4)
    assert accepts_argument(wrapped, "position_ids")
    assert not accepts_argument(wrapped, "no_such_argument")


def count_graphs(run) -> int:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run()
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("decode", ["grow", pytest.param("bounded", marks=pytest.mark.slow)])
def test_compiled_forward(tiny_llama, decode):
    model = tiny_llama(2)
    expected = oracles.generate(model, PROMPT, RankKVCache(model, decode=decode, **KEEP), 32)
    model = copy.deepcopy(model)
    model.forward = torch.compile(model.forward, backend="eager", dynamic=True)
    texts = []
    counts = [
        count_graphs(
            lambda n=n: texts.append(
                oracles.generate(model, PROMPT, RankKVCache(model, decode=decode, **KEEP), n)
            )
        )
        for n in (16, 32)
    ]
    torch._dynamo.reset()
    assert torch.equal(texts[0], expected[:, :16])
    assert torch.equal(texts[1], expected)
    # No step of decoding compiles anew.
    assert counts[0] == counts[1] <= 20


def test_a_compiled_model_without_our_cache_keeps_its_whole_graph(tiny_llama):
    model = tiny_llama()
    gc.collect()
    attention.install()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        logits = compiled(PROMPT, use_cache=False).logits
        torch.testing.assert_close(logits, model(PROMPT, use_cache=False).logits, atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()


# -- loops by hand, turns, questions ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"decode": "bounded"}, {"storage": "int8"}, {"positions": "packed"}], ids=str
)
def test_manual_loop_equals_generate(model, options):
    cache = RankKVCache(model, **KEEP, **options)
    tokens, ids = [], PROMPT
    for _ in range(12):
        ids = oracles.forward(model, cache, ids)[:, -1:].argmax(-1)
        tokens.append(ids)
    expected = oracles.generate(model, PROMPT, RankKVCache(model, **KEEP, **options))
    assert torch.equal(torch.cat(tokens, dim=1), expected)


TURN_MODES = {
    "grow": {},
    "recompress": {"recompress_turns": True},
    "bounded": {"decode": "bounded"},
    "periodic": {"decode": "periodic", "decode_interval": 6},
    "packed": {"positions": "packed", "decode": "bounded"},
    "int8": {"storage": "int8", "recompress_turns": True},
}


@oracles.needs_recent_generate
@pytest.mark.parametrize("mode", TURN_MODES)
@pytest.mark.parametrize("selector", oracles.ONE_PASS)
def test_three_turns_that_each_cross_the_budget(llama, selector, mode):
    options = {"budget": 24, "selector": selector, **TURN_MODES[mode]}
    cache = RankKVCache(llama, **options)
    ids = PROMPT
    for turn in range(3):
        if turn:
            # The new ids alone, with a mask over everything, say the same as all ids.
            new = ids[:, cache.seen_tokens :]
            mask = torch.ones_like(ids)
            short = oracles.generate(llama, new, cache.copy(), 8, mask)
        answer = oracles.generate(llama, ids, cache, 8)
        if turn:
            assert torch.equal(short, answer)
        assert cache.seen_tokens == ids.shape[1] + 7
        for layer_idx in cache.layer_indices:
            for head in oracles.kept_positions(cache, layer_idx)[0]:
                assert all(a < b for a, b in itertools.pairwise(head))
                assert head[-1] == cache.seen_tokens - 1
        ids = torch.cat([ids, answer, oracles.random_prompt(40, seed=turn)], dim=1)
    logits = oracles.feed(llama, cache, oracles.next_chunks(1))
    assert all(torch.isfinite(step).all() for step in logits)
    oracles.assert_bytes_match(cache) if mode != "int8" else None


@pytest.mark.parametrize("selector", oracles.ONE_PASS)
def test_later_turns_are_compressed_when_asked(model, selector):
    protect = [(10, 17), (100, 105)]
    kept = {}
    for recompress in (False, True):
        cache = RankKVCache(
            model, 0.3, selector=selector, recompress_turns=recompress, protect=protect, min_budget=3
        )
        ids, mask = oracles.left_pad([PROMPT, SHORT])
        for turn in range(3):
            text = oracles.generate(model, ids, cache, 5, mask)
            new = torch.cat([oracles.random_prompt(60, 10 * turn + row) for row in range(2)])
            ids = torch.cat([ids, text, new], dim=1)
            mask = torch.cat([mask, mask.new_ones(2, 65)], dim=1)
        kept[recompress] = sum(cache.kept_lengths)
        spans = {*range(10, 17), *range(100, 105)}
        for layer in oracles.kept_tokens(cache, mask[:, :90]):
            for row, heads in enumerate(layer):
                for head in heads:
                    assert spans <= set(head), f"row {row}"
    assert kept[True] < 0.7 * kept[False]


@pytest.mark.parametrize("mode", ["grow", "recompress", "int8"])
def test_questions_after_one_another_equal_those_on_a_fresh_copy(model, mode):
    # With recompress_turns a question evicts, so only a copy can be asked again.
    context = compress(model, PROMPT, **KEEP, **TURN_MODES[mode])
    questions = [oracles.random_prompt(n, seed=n) for n in (6, 20)]
    ask = lambda question, cache: oracles.generate(model, torch.cat([PROMPT, question], 1), cache)  # noqa: E731
    expected = [ask(question, compress(model, PROMPT, **KEEP, **TURN_MODES[mode])) for question in questions]
    for duplicate in (RankKVCache.copy, copy.deepcopy):
        answers = [ask(question, duplicate(context)) for question in questions]
        assert all(torch.equal(*pair) for pair in zip(answers, expected, strict=True))
    ask(questions[0], context)
    if mode == "grow":
        assert torch.equal(ask(questions[1], context.rewind(90)), expected[1])
    elif mode == "recompress":
        with pytest.raises(CacheStateError, match="evicted"):
            context.rewind(90)
