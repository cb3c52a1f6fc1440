"""Selectors that repeat the prompt: their scores by one plain forward, and every way to use them."""

from __future__ import annotations

import copy
import json

import families
import oracles
import pytest
import torch
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from rankkv import RankKVCache, compress
from rankkv.cache.prefill import build_cache
from rankkv.cache.replay import ReplayPlan, ReplayPrompt, replay_prompt
from rankkv.errors import CacheStateError, ConfigError, InputError, UnsupportedModelError
from rankkv.evaluation import record_prefill
from rankkv.integrations.generate import custom_generate, generate
from rankkv.models.compat import cache_argument
from rankkv.selection import SELECTORS, get_selector

REPLAYING = [name for name, selector in SELECTORS.items() if selector.replays]
PROMPT = ReplayPrompt([5, 6, 7], [8, 9], [10, 11])
LONG, SHORT = oracles.random_prompt(70, seed=70), oracles.random_prompt(41, seed=41)
CHUNK = 32
#: Grouped heads, one kv head, no rotary embedding, capped logits beside sliding layers, latent keys, linear layers.
KINDS = ["Llama", "GPT-BigCode", "GPT-2", "Gemma 2", "DeepSeek-V3", "Qwen3-Next"]


@pytest.fixture(params=KINDS)
def family(request):
    chosen = families.FAMILIES[request.param]
    if not (chosen.exists and chosen.is_promised):
        pytest.skip("not promised for this version of transformers")
    return chosen


@pytest.fixture(scope="module")
def model(tiny_llama):
    return tiny_llama()


def small(name, **options):
    """Return the selector with chunks that a short prompt has several of."""
    return get_selector(name, chunk_size=CHUNK, **options)


def squeeze(model, ids, mask=None, name="kvzip", **options):
    options = {"compression_ratio": 0.3, "min_budget": 3, "selector": small(name), **options}
    return compress(model, ids, mask, tokenizer=PROMPT, **options)


def build(family):
    return family.build(family.backends[0])


def prefill_plain(model, ids):
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    oracles.forward(model, cache, ids)
    return cache


def score(model, ids, name):
    """Return the scores of a prompt, a layer each, and the plain cache they were read from."""
    cache = prefill_plain(model, ids)
    indices = RankKVCache(model, 1.0, profile=None).layer_indices
    plan = ReplayPlan(ids, PROMPT)
    return replay_prompt(model, cache.layers, indices, plan, [0] * len(ids), small(name), 4), cache


def score_by_plain_forwards(model, ids, name):
    """Score a prompt from the attention weights of one forward over prompt and replay, without a cache."""
    eager, length, row = copy.deepcopy(model), ids.shape[1], ids[0].tolist()
    eager.set_attn_implementation("eager")
    modules = oracles.attention_modules(eager)
    hidden, parts = {}, {}
    for module in modules.values():
        module.register_forward_pre_hook(
            lambda module, args, kwargs: hidden.update(
                {module.layer_idx: kwargs.get("hidden_states", args[0] if args else None)}
            ),
            with_kwargs=True,
        )
    for start in range(0, length, CHUNK):
        chunk = row[start : start + CHUNK]
        asked = [5, 6, 7] if start == 0 else [8, 9, *row[start - 8 : start]]
        repeated = [*asked, 10, 11, *chunk]
        with torch.no_grad():
            attentions = eager(
                torch.tensor([row + repeated]), output_attentions=True, use_cache=False
            ).attentions
        if name == "kvgrad":
            gradients = differentiate(eager, torch.tensor([row + repeated]), length)
        sinks = min(4, start)
        columns = [*range(sinks), *range(start, start + len(chunk)), *range(length, length + len(repeated))]
        # Linear layers have no attention weights, and some models leave them out.
        by_layer = zip(
            sorted(modules) if len(attentions) == len(modules) else range(99), attentions, strict=False
        )
        for index, weights in by_layer:
            seen = weights[0, :, length:][..., columns]
            seen = seen / seen.sum(dim=-1, keepdim=True)
            if name == "kvzip_plus":
                seen = seen / hidden[index][0, length:].norm(dim=-1)[:, None]
            if name == "kvgrad":
                seen = seen * gradients[index][:, None]
            found = seen[..., sinks : sinks + len(chunk)].amax(dim=1)
            parts.setdefault(index, []).append(found)
    return {index: torch.cat(found, dim=-1) for index, found in parts.items()}


def differentiate(model, ids, length):
    """Return the norm of the gradient at each attention output behind ``length``, by zeros that are added to it."""
    zeros, last, handles = {}, [], []
    for layer in model.model.layers:
        index, width = layer.self_attn.layer_idx, layer.self_attn.o_proj.weight.shape[0]
        zeros[index] = torch.zeros(ids.shape[1], width, requires_grad=True)
        handles.append(
            layer.self_attn.o_proj.register_forward_hook(
                lambda module, args, output, index=index: output + zeros[index]
            )
        )
    handles.append(model.model.norm.register_forward_pre_hook(lambda module, args: last.append(args[0])))
    with torch.enable_grad():
        model(ids, use_cache=False)
        (last[0][0, length:] ** 2).sum().backward()
    for handle in handles:
        handle.remove()
    return {index: added.grad[length:].norm(dim=-1) for index, added in zeros.items()}


def test_scores_are_those_of_a_plain_forward(family):
    model = build(family)
    scores, _ = score(model, LONG, "kvzip")
    expected = score_by_plain_forwards(model, LONG, "kvzip")
    for index, found in scores.items():
        # The maximum over the query heads that share a kv head.
        per_group = expected[index].unflatten(0, (found.shape[1], -1)).amax(dim=1)
        torch.testing.assert_close(found[0, :, 4:], per_group[:, 4:], atol=1e-4, rtol=1e-4)
        assert (found[0, :, :4] > found[0, :, 4:].max()).all()


@pytest.mark.parametrize("name", ["kvzip_plus", "kvgrad"])
def test_weighed_by_projected_values_and_by_hidden_states_or_the_gradient(model, name):
    scores, cache = score(model, LONG, name)
    expected = score_by_plain_forwards(model, LONG, name)
    for index, found in scores.items():
        projection = model.model.layers[index].self_attn.o_proj.weight
        heads = expected[index].shape[0]
        dim = projection.shape[1] // heads
        values = cache.layers[index].values[0]
        best = []
        for head in range(heads):
            written = values[head * len(values) // heads] @ projection[:, head * dim : (head + 1) * dim].mT
            best.append(expected[index][head] * written.norm(dim=-1))
        per_group = torch.stack(best).unflatten(0, (found.shape[1], -1)).amax(dim=1)
        torch.testing.assert_close(found[0, :, 4:], per_group[:, 4:], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("name", REPLAYING)
def test_the_prompts_cache_is_only_read(family, name):
    model = build(family)
    _, cache = score(model, LONG, name)
    again = prefill_plain(model, LONG)
    chunks = oracles.next_chunks(1)
    mask = torch.ones_like(LONG)
    for ours, theirs in zip(
        oracles.feed(model, cache, chunks, mask), oracles.feed(model, again, chunks, mask), strict=True
    ):
        assert ours.equal(theirs)


@pytest.mark.parametrize("name", REPLAYING)
def test_a_padded_row_is_repeated_as_if_alone(family, name):
    model = build(family)
    ids, mask = oracles.left_pad([LONG, SHORT])
    together = squeeze(model, ids, mask, name, strategy="uniform", head_budgets=None)
    kept = oracles.kept_tokens(together, mask)
    for row, prompt in enumerate((LONG, SHORT)):
        alone = squeeze(model, prompt, None, name, strategy="uniform", head_budgets=None)
        assert [layer[row] for layer in kept] == [layer[0] for layer in oracles.kept_tokens(alone)]
    oracles.assert_equals_masked_oracle(model, together, ids, mask)


OPTIONS = {
    "default": {},
    "global, equal heads": {"strategy": "global", "head_budgets": None},
    "uniform": {"strategy": "uniform"},
    "adaptive": {"strategy": "uniform", "head_budgets": "adaptive"},
    "rank": {"strategy": "proportional", "head_budgets": "distortion"},
    "packed": {"positions": "packed", "strategy": "uniform"},
    "int8": {"storage": "int8", "strategy": "uniform"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", REPLAYING)
def test_every_strategy_frees_what_it_evicts(model, name, options):
    cache = squeeze(model, LONG, name=name, **options)
    assert cache.seen_tokens == LONG.shape[1]
    assert sum(cache.budgets) == round(0.3 * LONG.shape[1] * len(cache.layer_indices))
    assert oracles.storage_bytes(cache) == cache.cache_bytes()
    if "storage" not in options:
        oracles.assert_bytes_match(cache)
        assert cache.cache_bytes() == pytest.approx(0.3 * cache.full_cache_bytes())
    if not {"storage", "positions"} & options.keys():
        oracles.assert_equals_masked_oracle(model, cache, LONG)


def test_at_ratio_one_nothing_changes(model):
    plain = oracles.generate(model, LONG)
    ours = oracles.generate(
        model, LONG, build_cache(model, LONG, PROMPT, compression_ratio=1.0, selector="kvzip")
    )
    assert ours.equal(plain)


def test_tokens_that_the_replay_looks_at_are_kept(model):
    scores, _ = score(model, LONG, "kvzip")
    alone = small("kvzip", recent_fraction=0.0)
    cache = squeeze(model, LONG, selector=alone, strategy="uniform", head_budgets=None)
    for kept, found in zip(oracles.kept_tokens(cache), scores.values(), strict=True):
        for head, own in zip(kept[0], found[0], strict=True):
            # The newest token is always kept.
            best = own[:-1].topk(len(head) - 1).indices.tolist()
            assert head == sorted([*best, LONG.shape[1] - 1])


@pytest.mark.parametrize("backend", ["eager", "flex_attention"])
def test_backends_keep_the_same_tokens(backend):
    family = families.FAMILIES["Llama"]
    options = {"strategy": "uniform", "head_budgets": None}
    # One chunk: the CPU kernels of flex_attention do not compile for a second length.
    options["selector"] = "kvzip"
    expected = squeeze(family.build("sdpa"), LONG, **options)
    found = squeeze(family.build(backend), LONG, **options)
    assert oracles.kept_tokens(found) == oracles.kept_tokens(expected)


def test_a_wrapper_refines_the_scores_of_the_replay(model):
    # chunk_length belongs to the wrapper, chunk_size to its base.
    wrapped = get_selector("chunkkv", base=small("kvzip"), chunk_length=10)
    cache = squeeze(model, LONG, selector=wrapped, strategy="uniform", head_budgets=None)
    for layer in oracles.kept_tokens(cache):
        assert layer[0][0] != oracles.kept_tokens(squeeze(model, LONG, strategy="uniform"))[0][0][0]


# -- ways to use them -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beams", [1, 3])
def test_custom_generate_and_generate_keep_what_compress_keeps(model, beams):
    options = {"compression_ratio": 0.3, "min_budget": 3, "selector": small("kvzip"), "strategy": "uniform"}
    greedy = {
        "do_sample": False,
        "pad_token_id": 0,
        "max_new_tokens": 8,
        "min_new_tokens": 8,
        "num_beams": beams,
    }
    ids, mask = oracles.left_pad([LONG, SHORT])
    cache = build_cache(model, ids, PROMPT, **options)
    expected = model.generate(ids, attention_mask=mask, **greedy, **cache_argument(cache))
    by_function = model.generate(
        ids,
        attention_mask=mask,
        custom_generate=custom_generate,
        replay_tokenizer=PROMPT,
        **options,
        **greedy,
    )
    by_module = generate(model, ids, attention_mask=mask, tokenizer=PROMPT, **options, **greedy)
    assert by_function.equal(expected)
    assert by_module.equal(expected)
    compressed = squeeze(model, ids, mask, strategy="uniform")
    assert cache.budgets_per_row[::beams] == compressed.budgets_per_row
    plain = model.generate(
        ids, attention_mask=mask, **{**greedy, "num_beams": 1, "max_new_tokens": 1, "min_new_tokens": 1}
    )
    if beams == 1:
        assert expected[:, ids.shape[1]].equal(plain[:, -1])
        # What follows the first token is what follows it after compress().
        continued = model.generate(
            expected[:, : ids.shape[1] + 1],
            attention_mask=torch.cat([mask, mask[:, -1:]], dim=1),
            **{**greedy, "max_new_tokens": 7, "min_new_tokens": 7},
            **cache_argument(compressed),
        )
        assert continued.equal(expected)


def test_the_pipeline_answers_as_compress_does(embedded, python_docs):
    from transformers import pipeline

    from rankkv.integrations.pipeline import register
    from rankkv.models.prompts import split_prompt

    register()
    model, tokenizer = embedded
    text, question = python_docs[:900], "What is this about?"
    options = {"selector": "kvzip", "compression_ratio": 0.4, "strategy": "uniform"}
    ask = pipeline("rankkv-text-generation", model=model, tokenizer=tokenizer, device="cpu")
    answer = ask(text, question=question, max_new_tokens=6, **options)["answer"]
    prompt = split_prompt(tokenizer, text, [question])
    cache = compress(model, prompt.context_ids, tokenizer=tokenizer, **options)
    ids = torch.cat([prompt.context_ids, prompt.question_ids[0]], dim=1)
    output = oracles.generate(model, ids, cache, 6)
    assert answer == tokenizer.decode(output[0], skip_special_tokens=True)


@pytest.mark.parametrize("name", REPLAYING)
def test_a_recorded_prefill_gives_the_cache_of_compress(model, name):
    ids, mask = oracles.left_pad([LONG, SHORT])
    record = record_prefill(model, ids, mask, tokenizer=PROMPT)
    for ratio in (0.3, 0.5):
        options = {"selector": small(name), "compression_ratio": ratio, "min_budget": 3}
        cut, alone = record.build_cache(**options), squeeze(model, ids, mask, **options)
        assert cut.budgets_per_row == alone.budgets_per_row
        assert oracles.kept_tokens(cut, mask) == oracles.kept_tokens(alone, mask)
        assert cut.cache_bytes() == alone.cache_bytes()
    chunks = oracles.next_chunks(2)
    for ours, theirs in zip(
        oracles.feed(model, cut, chunks, mask), oracles.feed(model, alone, chunks, mask), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_a_record_without_a_tokenizer_says_so(model):
    with pytest.raises(ConfigError, match="tokenizer=tokenizer"):
        record_prefill(model, LONG).build_cache(selector="kvzip")


def test_a_saved_cache_goes_on_as_before(model, tmp_path):
    cache = squeeze(model, LONG)
    loaded = RankKVCache.load(cache.save(tmp_path / "cache.safetensors"), model)
    chunks = oracles.next_chunks(1)
    for ours, theirs in zip(
        oracles.feed(model, loaded, chunks), oracles.feed(model, cache, chunks), strict=True
    ):
        assert ours.equal(theirs)


def test_a_copy_waits_for_its_own_replay(model):
    waiting = build_cache(model, LONG, PROMPT, selector=small("kvzip"), min_budget=3)
    oracles.forward(model, waiting, LONG)
    copied = waiting.copy()
    assert oracles.kept_tokens(copied.finish()) == oracles.kept_tokens(waiting.finish())
    assert oracles.kept_tokens(waiting) == oracles.kept_tokens(squeeze(model, LONG))


# -- the instruction --------------------------------------------------------------------------------------------


def test_the_instruction_is_the_methods(embedded):
    _, tokenizer = embedded
    prompt = ReplayPrompt.of(tokenizer)
    assert tokenizer.decode(prompt.first) == "\n\nRepeat the previous context exactly."
    assert tokenizer.decode(prompt.later).startswith(
        "\n\nRepeat the part of the previous context exactly, start"
    )
    assert tokenizer.decode(prompt.answer) == "<|im_end|>\n<|im_start|>assistant\n"
    plain = copy.copy(tokenizer)
    plain.chat_template = None
    assert tokenizer.decode(ReplayPrompt.of(plain).answer) == "\n"
    first, later = prompt.build([1, 2]), prompt.build([3, 4], list(range(20, 40)))
    assert first == [*prompt.first, *prompt.answer, 1, 2]
    assert later == [*prompt.later, *range(32, 40), *prompt.answer, 3, 4]


# -- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REPLAYING)
def test_a_bare_cache_names_the_way_that_works(model, name):
    with pytest.raises(ConfigError, match=r"rankkv.compress\(model, input_ids, tokenizer=tokenizer"):
        RankKVCache(model, selector=name)
    with pytest.raises(ConfigError, match="tokenizer=tokenizer"):
        compress(model, LONG, selector=name)
    with pytest.raises(ConfigError, match="replay_tokenizer=tokenizer"):
        model.generate(LONG, custom_generate=custom_generate, selector=name, max_new_tokens=2)


@pytest.mark.parametrize(
    "options",
    [
        {"decode": "bounded", "budget": 20},
        {"decode": "periodic"},
        {"prefill": "chunked"},
        {"prefill": "streaming"},
        {"recompress_turns": True},
        {"scope": "full"},
        {"selector": get_selector("kvzip", chunk_size=3)},
        {"selector": get_selector("kvzip", chunk_size=3.5)},
    ],
    ids=lambda options: ", ".join(f"{name}={value}" for name, value in options.items()),
)
def test_options_that_no_replay_serves_are_refused_before_the_model_runs(model, options, monkeypatch):
    monkeypatch.setattr(type(model), "forward", None)
    with pytest.raises(ConfigError, match=r"selector 'kvzip'"):
        squeeze(model, LONG, **options)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_gradient_leaves_nothing_behind_whatever_the_caller_turned_off(tiny_llama, guard):
    model = tiny_llama()
    list(model.parameters())[3].requires_grad_(False)
    trained = [parameter.requires_grad for parameter in model.parameters()]
    expected = oracles.kept_tokens(squeeze(model, LONG, name="kvgrad"))
    with guard():
        cache = squeeze(model, LONG, name="kvgrad")
        assert oracles.kept_tokens(cache) == expected
        asked = torch.cat([LONG, SHORT[:, :3]], dim=1)
        assert oracles.generate(model, asked, cache, 2).shape[1] == 2
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(layer.keys.requires_grad for layer in cache.layers)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_cannot_be_differentiated_is_refused_by_name(tiny_llama, monkeypatch):
    quantized, flexible = tiny_llama(), tiny_llama(attn_implementation="flex_attention")
    quantized.hf_quantizer = object()
    with torch.inference_mode():
        frozen = tiny_llama()
    unclear = tiny_llama()
    unclear.config.num_hidden_layers += 1
    dropping = tiny_llama().train()
    dropping.gradient_checkpointing_enable()
    monkeypatch.setattr(type(quantized), "forward", None)
    for model, fragment in (
        (quantized, "quantized weights"),
        (dropping, "gradient checkpointing in training"),
        (flexible, "'flex_attention'"),
        (frozen, r"created in torch.inference_mode\(\)"),
        (unclear, "as many decoder layers"),
    ):
        with pytest.raises(UnsupportedModelError, match=rf"selector 'kvgrad' .*{fragment}.*'kvzip_plus'"):
            squeeze(model, LONG, name="kvgrad")
        # A wrapper needs what its base needs.
        wrapped = get_selector("chunkkv", base=small("kvgrad"))
        with pytest.raises(UnsupportedModelError, match=fragment):
            squeeze(model, LONG, selector=wrapped)


def test_images_are_refused(model):
    with pytest.raises(InputError, match="inputs_embeds"):
        compress(model, LONG, tokenizer=PROMPT, selector="kvzip", inputs_embeds=torch.zeros(1, 70, 32))


def test_another_prompt_is_refused(model):
    cache = build_cache(model, LONG, PROMPT, selector="kvzip")
    oracles.forward(model, cache, SHORT)
    with pytest.raises(
        CacheStateError, match=r"built for a prompt of shape \(1, 70\) and has seen one of shape \(1, 41\)"
    ):
        cache.finish()


def test_a_prompt_in_parts_and_a_mask_with_holes_are_refused(model):
    cache = build_cache(model, LONG, PROMPT, selector="kvzip")
    oracles.forward(model, cache, LONG[:, :30])
    with pytest.raises(CacheStateError, match="comes in one forward"):
        oracles.forward(model, cache, LONG[:, 30:])
    mask = torch.ones_like(LONG)
    mask[0, 20] = 0
    with pytest.raises(InputError, match="hides 1 tokens inside a row"):
        squeeze(model, LONG, mask)


def test_positions_beyond_the_models_own_are_told(tiny_llama):
    learned = GPT2LMHeadModel(
        GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=100)
    ).eval()
    with pytest.raises(InputError, match="reaches position 114, and the model has 100"):
        squeeze(learned, LONG)
    assert squeeze(learned, SHORT).seen_tokens == 41
    short = tiny_llama(max_position_embeddings=100)
    with pytest.warns(UserWarning, match="reaches position 114"):
        squeeze(short, LONG)


def test_the_default_is_one_top_k_over_all_heads_and_layers(model):
    scores, _ = score(model, LONG, "kvzip")
    cache = squeeze(model, LONG, min_budget=None, head_floor=0.0, compression_ratio=0.5)
    assert (cache.config.strategy, cache.config.head_budgets) == ("global", "adaptive")
    found = torch.stack([layer[0] for layer in scores.values()])
    # Every head keeps its sinks and its 16 newest tokens.
    found[..., :4] = found[..., -16:] = float("inf")
    best = found.flatten().topk(found.numel() // 2).indices
    wanted = torch.bincount(best // found[0].numel(), minlength=len(found)).tolist()
    for layer, rows, count in zip(found, oracles.kept_tokens(cache), wanted, strict=True):
        total = sum(map(len, rows[0]))
        # A layer's budget is a whole number of tokens per head.
        assert abs(total - count) < len(layer)
        kept = torch.zeros(layer.numel(), dtype=torch.bool)
        kept[layer.flatten().topk(total).indices] = True
        assert [head.nonzero()[:, 0].tolist() for head in kept.view(layer.shape)] == rows[0]


def test_records_name_the_pass(model):
    cache = squeeze(model, LONG)
    assert json.loads(json.dumps(cache.config.to_dict()))["selector"] == f"kvzip(chunk_size={CHUNK})"


def test_a_gradient_beyond_half_precision_is_that_of_float32(tiny_llama):
    """Hidden states of thousands have squares that float16 does not hold."""
    kept = []
    for dtype in (torch.float32, torch.float16):
        model = tiny_llama()
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mlp.down_proj.weight *= 300
                layer.self_attn.o_proj.weight *= 20
        cache = squeeze(model.to(dtype), LONG, name="kvgrad")
        kept.append(cache.budgets)
    assert len(set(kept[0])) > 1
    assert kept[1] == pytest.approx(kept[0], abs=3)
