"""Tests that a cache used wrongly says so: foreign models, unobserved layers, chunks, holes, rewinds, other prompts."""

from __future__ import annotations

import copy
import pickle
import types
from dataclasses import asdict

import families
import oracles
import pytest
import torch
from torch.nn import functional
from transformers import AttentionInterface

from rankkv import RankKVCache, RankKVConfig, compress
from rankkv.cache.owner import Owner
from rankkv.errors import CacheStateError, InputError, UnknownNameError, UnsupportedModelError
from rankkv.integrations.generate import custom_generate
from rankkv.models.compat import cache_argument

PROMPT = torch.randint(3, 128, (1, 90), generator=torch.Generator().manual_seed(1))
MORE = torch.randint(3, 128, (1, 4), generator=torch.Generator().manual_seed(2))
ASKED = torch.cat([PROMPT, MORE], dim=1)


@pytest.fixture
def model(tiny_llama):
    return tiny_llama(4, eos_token_id=None)


def generate(model, ids, cache, **options):
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(ids, **cache_argument(cache), **options)


# -- layers whose attention is not observed ---------------------------------------------------------------------


def bypass(model, index):
    """Let a layer compute its attention without transformers' attention interface."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **options):
        shape = (*hidden_states.shape[:2], -1, self.head_dim)
        query, key, value = (
            layer(hidden_states).view(shape).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        cache = options.get("cache", options.get("past_key_values"))
        key, value = cache.update(key, value, self.layer_idx)
        key, value = (states.repeat_interleave(2, dim=1) for states in (key, value))
        output = functional.scaled_dot_product_attention(query, key, value, is_causal=query.shape[2] > 1)
        return self.o_proj(output.transpose(1, 2).flatten(2)), None

    attention = model.model.layers[index].self_attn
    attention.forward = types.MethodType(forward, attention)


@pytest.mark.parametrize("head_budgets", ["auto", None])
@pytest.mark.parametrize("index", [0, 3])
def test_a_layer_that_bypasses_the_interface_is_an_error_even_if_it_is_the_last(model, head_budgets, index):
    bypass(model, index)
    with pytest.raises((UnsupportedModelError, CacheStateError), match=f"layer {index}.*attention interface"):
        generate(model, PROMPT, RankKVCache(model, 0.3, head_budgets=head_budgets))


def test_every_reader_notices_an_unobserved_last_layer(model):
    bypass(model, 3)
    cache = RankKVCache(model, 0.3)
    oracles.forward(model, cache, PROMPT)
    readers = [
        cache.finish,
        cache.copy,
        cache.summary,
        lambda: cache.budgets,
        lambda: cache.kept_lengths,
        lambda: cache.kept_per_head,
        lambda: cache.layer_ranks,
        lambda: cache.save("never.safetensors"),
        lambda: cache.rewind(10),
    ]
    for read in readers:
        with pytest.raises(
            CacheStateError, match="layer 3 updated this cache, but its attention was not observed"
        ):
            read()
    cache.reset()
    assert cache.budgets == []


def test_a_layer_without_attention_is_named(model):
    attention = model.model.layers[1].self_attn
    attention.forward = types.MethodType(
        lambda self, hidden_states, **options: (hidden_states, None), attention
    )
    with pytest.raises(UnsupportedModelError, match="layer 1 did not run its attention"):
        generate(model, PROMPT, RankKVCache(model, 0.3))


# -- another model ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [2, 4, 6])
@pytest.mark.parametrize("options", [{}, {"positions": "packed"}, {"head_budgets": None}], ids=str)
def test_a_cache_refuses_another_model_by_name(tiny_llama, model, layers, options):
    other = tiny_llama(
        layers, seed=1, eos_token_id=None, rope_parameters={"rope_type": "default", "rope_theta": 99.0}
    )
    with pytest.raises(CacheStateError, match="belongs to LlamaForCausalLM 'llama' with 4 layers"):
        generate(other, PROMPT, RankKVCache(model, 0.3, **options))


def test_a_refused_model_leaves_the_cache_as_it_was(tiny_llama, model):
    other = tiny_llama(4, seed=1, eos_token_id=None)
    cache = compress(model, PROMPT, compression_ratio=0.3)
    expected = generate(model, ASKED, cache.copy())
    with pytest.raises(CacheStateError, match="another model uses it"):
        generate(other, ASKED, cache)
    assert torch.equal(generate(model, ASKED, cache), expected)


def test_another_prompt_is_refused_where_the_ids_are_seen(model):
    cache = compress(model, PROMPT, compression_ratio=0.5)
    other = torch.cat([MORE, PROMPT], dim=1)
    with pytest.raises(
        InputError, match="do not begin with the 90 tokens that this cache was compressed from"
    ):
        generate(model, other, cache.copy(), custom_generate=custom_generate)
    answer = generate(model, ASKED, cache.copy(), custom_generate=custom_generate)
    assert torch.equal(answer, generate(model, ASKED, cache.copy()))
    # New ids alone, with a mask over all tokens, are the other way to go on.
    mask = torch.ones_like(ASKED)
    alone = generate(model, MORE, cache, custom_generate=custom_generate, attention_mask=mask)
    assert torch.equal(alone[:, 4:], answer[:, 94:])


# -- rows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"head_budgets": None}, {"storage": "int8"}, {"decode": "bounded"}], ids=str
)
@pytest.mark.parametrize("ways", [{"num_return_sequences": 3, "do_sample": True}, {"num_beams": 3}], ids=str)
def test_one_compressed_row_serves_several_answers(model, options, ways):
    cache = compress(model, PROMPT, compression_ratio=0.4, **options)
    repeated = cache.copy()
    repeated.batch_repeat_interleave(3)
    torch.manual_seed(5)
    answers = generate(model, ASKED, cache, **ways)
    torch.manual_seed(5)
    assert torch.equal(answers, generate(model, ASKED, repeated, **ways))


def test_rows_that_cannot_be_repeated_are_refused(model):
    cache = compress(model, PROMPT.repeat(2, 1), compression_ratio=0.4)
    with pytest.raises(InputError, match="the new tokens have 3 rows, the cache has 2"):
        oracles.forward(model, cache, MORE.repeat(3, 1))


# -- how the prompt comes -----------------------------------------------------------------------------------------


def test_a_prompt_in_undeclared_chunks_warns_with_the_chunk_size(model):
    ids = torch.randint(3, 128, (1, 400), generator=torch.Generator().manual_seed(3))
    with pytest.warns(UserWarning, match="forwards of 100 tokens.*prefill='chunked'.*prefill_chunk_size=100"):
        generate(model, ids, RankKVCache(model, 0.3), prefill_chunk_size=100)


@pytest.mark.filterwarnings("error:the prompt comes in forwards")
def test_declared_chunks_and_later_turns_do_not_warn(model):
    ids = torch.randint(3, 128, (1, 400), generator=torch.Generator().manual_seed(3))
    generate(model, ids, RankKVCache(model, 0.3, prefill="chunked"), prefill_chunk_size=100)
    cache = compress(model, PROMPT, compression_ratio=0.3)
    oracles.forward(model, cache, PROMPT)


def test_a_text_beyond_the_models_positions_warns_with_the_limit(tiny_llama):
    model = tiny_llama(max_position_embeddings=64, eos_token_id=None)
    with pytest.warns(UserWarning, match="90 tokens, and the model was made for 64 positions"):
        compress(model, PROMPT, compression_ratio=0.3)


def test_a_mask_with_holes_reads_as_without_rankkv(model):
    mask = torch.ones_like(PROMPT)
    mask[:, 20:25] = 0
    plain = generate(model, PROMPT, None, attention_mask=mask)
    assert torch.equal(generate(model, PROMPT, RankKVCache(model, 1.0), attention_mask=mask), plain)
    cache = RankKVCache(model, 0.4)
    generate(model, PROMPT, cache, attention_mask=mask)
    # Hidden tokens take no place in the cache.
    positions = cache.layers[0].compute_positions()[cache.layers[0].compute_head_valid()]
    assert not set(range(20, 25)) & set(positions.tolist())


@pytest.mark.parametrize(
    "options",
    [
        {"decode": "bounded"},
        {"decode": "periodic"},
        {"recompress_turns": True},
        {"prefill": "streaming"},
        {"positions": "packed"},
    ],
    ids=str,
)
def test_a_mask_with_holes_is_refused_where_it_cannot_be_followed(model, options):
    mask = torch.ones_like(PROMPT)
    mask[:, 20:25] = 0
    with pytest.raises(InputError, match="attention_mask hides 5 tokens inside row 0"):
        generate(model, PROMPT, RankKVCache(model, 0.3, **options), attention_mask=mask)


def test_ids_fed_again_name_use_cache(model):
    with pytest.raises(CacheStateError, match="use_cache=False, or assisted decoding on a prefilled cache"):
        generate(model, PROMPT, RankKVCache(model, 0.3), use_cache=False)


def test_more_inputs_of_the_model_are_taken_and_unknown_options_named(model):
    mask = torch.ones_like(PROMPT)
    cache = compress(model, input_ids=PROMPT, attention_mask=mask, position_ids=torch.arange(90)[None])
    assert cache.seen_tokens == 90
    with pytest.raises(UnknownNameError, match="unknown option 'pixel_values'"):
        compress(model, input_ids=PROMPT, pixel_values=torch.zeros(1))


# -- going back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("selector", ["snapkv", "h2o", "expected_attention", "knorm"])
def test_rewinding_a_bounded_cache_is_exact_or_refused(model, selector):
    cache = compress(model, PROMPT, budget=120, decode="bounded", selector=selector)
    fresh = cache.copy()
    generate(model, ASKED, cache, max_new_tokens=12)
    later = torch.cat([PROMPT, ASKED[:, :40]], dim=1)
    if selector == "knorm":
        cache.rewind(90)
        assert torch.equal(generate(model, later, cache), generate(model, later, fresh))
    else:
        with pytest.raises(CacheStateError, match=f"scores of selector '{selector}'.*copy\\(\\)"):
            cache.rewind(90)


HYBRIDS = [
    name
    for name, family in families.FAMILIES.items()
    if family.outcome == families.COMPRESSED
    and family.compressible is not None
    and family.exists
    and family.is_promised
]


@pytest.mark.parametrize("name", HYBRIDS)
def test_rewinding_a_hybrid_is_exact_or_refused_before_anything_changes(name):
    family = families.FAMILIES[name]
    model = family.build(family.backends[0])
    cache = compress(model, PROMPT, compression_ratio=0.5)
    fresh = cache.copy()
    generate(model, ASKED, cache)
    held = [layer.get_seq_length() for layer in cache.layers if hasattr(layer, "get_seq_length")]
    try:
        cache.rewind(90)
    except CacheStateError:
        assert held == [layer.get_seq_length() for layer in cache.layers if hasattr(layer, "get_seq_length")]
    else:
        assert torch.equal(generate(model, ASKED, cache), generate(model, ASKED, fresh))


# -- options and caches as objects --------------------------------------------------------------------------------


def test_options_can_be_copied_pickled_hashed_and_listed():
    config = RankKVConfig(strategy="power", strategy_options={"exponent": 2})
    assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config))  # noqa: S301
    assert hash(config) == hash(copy.copy(config))
    assert asdict(config)["strategy_options"] == {"exponent": 2}
    with pytest.raises(TypeError, match="cannot change"):
        config.strategy_options["exponent"] = 3


def test_pickling_a_cache_points_to_save(model):
    with pytest.raises(CacheStateError, match=r"save\(path\)"):
        pickle.dumps(RankKVCache(model))


def test_a_new_cache_observes_again_after_another_library_registered_its_function(model):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    expected = generate(model, PROMPT, RankKVCache(model, 0.3))
    AttentionInterface.register("sdpa", sdpa_attention_forward)
    cache = RankKVCache(model, 0.3)
    assert torch.equal(generate(model, PROMPT, cache), expected)
    assert max(cache.kept_lengths) < 90


@pytest.mark.slow
def test_a_cache_that_a_paged_cache_replaced_says_that_no_forward_used_it(model):
    cache = RankKVCache(model, 0.3)
    model.generate(
        PROMPT, **cache_argument(cache), cache_implementation="paged", max_new_tokens=2, do_sample=False
    )
    assert "0 tokens seen" in cache.summary()
    assert "no forward has used this cache" in cache.summary()
    generate(model, PROMPT, cache)
    assert "no forward" not in cache.summary()


# -- models with a way of their own -------------------------------------------------------------------------------


def test_a_model_that_drops_its_cache_is_announced_and_compress_serves_it():
    from transformers import Phi3Config, Phi3ForCausalLM

    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 96}
    config = Phi3Config(
        **{
            **families.USUAL,
            "max_position_embeddings": 512,
            "original_max_position_embeddings": 96,
            "pad_token_id": 0,
        },
        rope_parameters={**rope, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8},
    )
    model = Phi3ForCausalLM(config).eval()
    ids = torch.randint(3, 128, (1, 120), generator=torch.Generator().manual_seed(4))
    with pytest.warns(UserWarning, match=r"drops any cache when the text passes 96 tokens.*rankkv\.compress"):
        cache = compress(model, ids, compression_ratio=0.3)
    output = generate(model, torch.cat([ids, MORE], dim=1), cache, return_dict_in_generate=True)
    assert output.past_key_values is cache
    assert cache.seen_tokens == 120 + 4 + 5


@pytest.fixture(scope="module")
def vision_model():
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    torch.manual_seed(3)
    text = {
        **families.USUAL,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    }
    vision = {
        "depth": 1,
        "embed_dim": 32,
        "hidden_size": 64,
        "num_heads": 2,
        "mlp_ratio": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 1,
        "in_channels": 3,
    }
    tokens = {
        "image_token_id": 120,
        "vision_start_token_id": 121,
        "vision_end_token_id": 122,
        "video_token_id": 123,
    }
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(text_config=text, vision_config=vision, **tokens)
    ).eval()


def show(side, words, seed):
    """Build the inputs of one image of ``side`` x ``side`` patches between words."""
    draw = torch.Generator().manual_seed(seed)
    image = torch.tensor([[121] + [120] * (side // 2) ** 2 + [122]])
    before, after = (torch.randint(3, 100, (1, words), generator=draw) for _ in range(2))
    ids = torch.cat([before, image, after], dim=1)
    pixels = torch.randn(side**2, 3 * 16, generator=draw)
    grid = torch.tensor([[1, side, side]])
    return {
        "input_ids": ids,
        "pixel_values": pixels,
        "image_grid_thw": grid,
        "mm_token_type_ids": (ids == 120).int(),
    }


def test_an_image_context_keeps_its_offset_whatever_was_asked_in_between(vision_model, tmp_path):
    model, first, other = vision_model, show(16, 20, 1), show(4, 30, 2)
    asked = torch.cat([first["input_ids"], MORE % 90 + 3], dim=1)
    types_of = torch.cat([first["mm_token_type_ids"], torch.zeros_like(MORE).int()], dim=1)
    plain = generate(model, asked, None, **{**first, "input_ids": None, "mm_token_type_ids": types_of})
    cache = compress(model, **first, compression_ratio=1.0)
    assert torch.equal(generate(model, asked, cache.copy()), plain)
    compress(model, **other, compression_ratio=1.0)
    assert torch.equal(generate(model, asked, cache.copy()), plain)
    path = cache.save(tmp_path / "cache.safetensors")
    model.model.rope_deltas = None
    assert torch.equal(generate(model, asked, RankKVCache.load(path, model)), plain)
    compress(model, **other, compression_ratio=1.0)
    with pytest.warns(UserWarning, match="position offset of another image"):
        generate(model, asked, cache)


@pytest.mark.filterwarnings("error")
def test_the_image_offset_is_checked_after_the_prefill_and_only_then(vision_model):
    owner, holder = Owner(vision_model), vision_model.model
    mine, same, other = torch.tensor([[-5]]), torch.tensor([[-5]]), torch.tensor([[7]])
    holder.rope_deltas = mine
    assert owner.check_offset(None, 90, compressed=False) is mine
    # The prefill of a new prompt sets its own.
    assert owner.check_offset(other, 90, compressed=False) is mine
    assert owner.check_offset(mine, 1, compressed=True) is mine
    assert owner.check_offset(same, 1, compressed=True) is same
    for known in (other, None):
        with pytest.raises(CacheStateError, match="position offset of another image"):
            owner.check_offset(known, 1, compressed=True)
        with pytest.warns(UserWarning, match="if this turn brings a new image"):
            assert owner.check_offset(known, 4, compressed=True) is mine
    holder.rope_deltas = None
