"""Echo: its formula written another way, its turn of the queries, its chunks, and the models that it refuses."""

from __future__ import annotations

import copy

import oracles
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from rankkv import RankKVCache, compress
from rankkv.errors import BudgetError, ConfigError, UnsupportedModelError
from rankkv.selection import get_selector
from rankkv.selection.echo import split_chunks

LENGTH = 90
SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(5)
    return LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=256)).eval()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 96, (1, LENGTH), generator=torch.Generator().manual_seed(3))


def read_inputs(model, ids):
    """Return each layer's queries and keys before rotary embedding, values and module, from plain hooks."""
    found = []

    def note(module, args, kwargs):
        states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        shape = (*states.shape[:2], -1, module.head_dim)
        found.append([
            getattr(module, name)(states).view(shape).transpose(1, 2) for name in ("q_proj", "k_proj", "v_proj")
        ] + [module])  # fmt: skip

    handles = [
        layer.self_attn.register_forward_pre_hook(note, with_kwargs=True) for layer in model.model.layers
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return found


def rotate(model, query, key, start):
    positions = torch.arange(start, start + query.shape[-2])[None]
    cos, sin = model.model.rotary_emb(query, positions)
    return apply_rotary_pos_emb(query, key, cos, sin)


def replay_scores(model, inputs, chunk_size, gap, own_keys=True, far_keys=0, sinks=4):
    """Score by queries and keys that the model's own rotary embedding places behind the prompt: nothing is turned."""
    query, key, value, module = inputs
    tokens = query.shape[-2]
    _, cached = rotate(model, query, key, 0)
    later_query, later_key = rotate(model, query, key, tokens + gap)
    groups = query.shape[1] // key.shape[1]
    scores = torch.zeros(key.shape[1], tokens)
    width = (tokens - sinks) / max(1, min(far_keys, tokens - sinks))
    middles = [int(sinks + (number + 0.5) * width) for number in range(min(far_keys, tokens - sinks))]
    for start, stop in split_chunks(tokens, chunk_size):
        far = [place for place in middles if not start <= place < stop]
        for head in range(query.shape[1]):
            own = head // groups
            weight = module.o_proj.weight[:, head * module.head_dim : (head + 1) * module.head_dim]
            most = torch.zeros(stop - start)
            for row in range(start, stop):
                columns = [cached[0, own, start:stop]]
                columns += [later_key[0, own, start : row + 1]] if own_keys else []
                columns += [cached[0, own, :sinks]] if start else []
                shares = (torch.cat(columns) @ later_query[0, head, row] * module.head_dim**-0.5).exp()
                others = (cached[0, own, far] @ later_query[0, head, row] * module.head_dim**-0.5).exp()
                total = shares.sum() + (others.mean() * (tokens - stop + start) if far else 0)
                most = torch.maximum(most, shares[: stop - start] / total)
            norms = torch.stack([(weight @ one).norm() for one in value[0, own, start:stop]])
            scores[own, start:stop] += most * norms
    return scores


@pytest.mark.parametrize("own_keys", [True, False])
@pytest.mark.parametrize(
    ("chunk_size", "gap", "far_keys"), [(3, 8, 0), (32, 8, 5), (40, 3, 64), (32, 8, 999), (512, 8, 64)]
)
def test_the_scores_are_those_of_queries_placed_behind_the_prompt(
    model, ids, chunk_size, gap, far_keys, own_keys
):
    options = {"chunk_size": chunk_size, "gap": gap, "far_keys": far_keys, "own_keys": own_keys}
    selector = get_selector("echo", **options, expected=0)
    for inputs, observation in zip(read_inputs(model, ids), observe_turning(model, ids), strict=True):
        with torch.no_grad():
            expected = replay_scores(model, inputs, **options)
        found = selector.compute_scores(observation)[0]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def observe_turning(model, ids, mask=None):
    """Return each layer's observation with its rotation, as the cache gives it to the selector."""
    seen = []
    cache = RankKVCache(model, selector="echo", compression_ratio=0.5)
    add = cache._schedule._add_past
    cache._schedule._add_past = lambda layer, observation: seen.append(add(layer, observation)) or seen[-1]
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    return seen


def test_a_remainder_below_half_a_chunk_joins_the_chunk_before():
    assert split_chunks(100, 32) == [(0, 32), (32, 64), (64, 100)]
    assert split_chunks(112, 32) == [(0, 32), (32, 64), (64, 96), (96, 112)]


@pytest.mark.parametrize(
    "options",
    [
        {"group": "max"},
        {"value_norms": False},
        {"own_keys": False},
        {"far_keys": 0},
        {"gap": 900},
        {"expected": 0},
    ],
)
def test_every_option_changes_the_scores(model, ids, options):
    observation = observe_turning(model, ids)[1]
    usual, other = (
        get_selector("echo", chunk_size=16, **given).compute_scores(observation) for given in ({}, options)
    )
    assert not torch.allclose(usual, other, rtol=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"chunk_size": 0},
        {"chunk_size": 2.5},
        {"far_keys": -1},
        {"gap": -1},
        {"group": "mean"},
        {"own_keys": 1},
        {"expected": -1},
    ],
)
def test_an_option_out_of_range_is_refused(model, ids, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        compress(model, ids, selector=get_selector("echo", **options))


ROPES = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
    "llama3": {
        "rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "longrope": {
        "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.5, 2.0, 2.5, 3.0], "factor": 2.0,
        "original_max_position_embeddings": 96,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", ROPES)
def test_the_models_frequencies_stay_as_they_are(kind, ids):
    """The turn goes beyond the original length here; the model's rotary module must not see it."""
    torch.manual_seed(5)
    limit = 96 if kind == "longrope" else LENGTH + 4
    config = LlamaConfig(
        **SIZES, max_position_embeddings=limit, rope_parameters={"rope_theta": 1e4, **ROPES[kind]}
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        plain = copy.deepcopy(model)(ids).logits
        plain_model = copy.deepcopy(model)
        plain_model(ids)
        cache = compress(model, ids, selector="echo", compression_ratio=1.0)
        expected = {name: buffer.clone() for name, buffer in plain_model.named_buffers()}
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, expected[name]), name
    with torch.no_grad():
        again = model(ids, past_key_values=RankKVCache(model, selector="echo", compression_ratio=0.4)).logits
        following = model(ids[:, :1], past_key_values=cache).logits
        whole = plain_model(torch.cat([ids, ids[:, :1]], dim=1)).logits[:, -1:]
    torch.testing.assert_close(again, plain)
    if kind not in ("dynamic", "longrope"):
        # Those two turn the keys of a longer prompt otherwise.
        torch.testing.assert_close(following, whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("head_budgets", ["auto", None])
def test_a_prompt_in_chunks_keeps_what_a_whole_one_keeps(model, ids, head_budgets):
    options = {
        "selector": get_selector("echo", chunk_size=32),
        "compression_ratio": 0.4,
        "head_budgets": head_budgets,
    }
    whole = oracles.prefill(model, ids, **options)
    parts = RankKVCache(model, prefill="chunked", **options)
    with torch.no_grad():
        for part in ids.split(25, dim=1):
            model(part, past_key_values=parts)
    parts.finish()
    assert oracles.kept_tokens(parts) == oracles.kept_tokens(whole)


@pytest.mark.parametrize(
    "other",
    [
        GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=96, n_positions=128)),
        OPTForCausalLM(
            OPTConfig(
                vocab_size=96, hidden_size=16, num_hidden_layers=2, ffn_dim=32, num_attention_heads=2,
                max_position_embeddings=128, word_embed_proj_dim=16,
            )
        ),
    ],
    ids=["gpt2", "opt"],
)  # fmt: skip
def test_a_model_without_rotary_embedding_is_refused_by_name(other, ids):
    with pytest.raises(
        UnsupportedModelError, match=rf"'echo' turns .*{type(other).__name__}.*selector='snapkv'"
    ):
        RankKVCache(other.eval(), selector="echo")


def test_a_later_query_raises_what_it_looks_up_and_lowers_nothing(model, ids):
    """While decoding, a key's score is the most that any query so far has paid it."""
    cache = oracles.prefill(model, ids, selector="echo", decode="bounded", budget=80)
    kept = cache.layers[0].kept_positions
    before = cache.layers[0].running_scores.clone()
    with torch.no_grad():
        model(ids[:, :1], past_key_values=cache)
    layer = cache.layers[0]
    after = {
        (head, position): score
        for head, (positions, scores) in enumerate(
            zip(layer.compute_positions()[0].tolist(), layer.running_scores[0].tolist(), strict=True)
        )
        for position, score in zip(positions, scores, strict=True)
    }
    raised = 0
    for head in range(2):
        for position, score in zip(kept[0, head].tolist(), before[0, head].tolist(), strict=True):
            if score and (head, position) in after:
                assert after[head, position] >= score
                raised += after[head, position] > score
    assert raised


def test_an_explicit_budget_below_the_floor_is_refused(model, ids):
    with pytest.raises(BudgetError, match="floor of 20 tokens"):
        oracles.prefill(model, ids, selector="echo", budget=19)
    cache = oracles.prefill(model, ids, selector="echo", compression_ratio=0.05)
    assert sum(cache.budgets) == 60
    assert "raised to 60" in cache.summary()


def test_compress_takes_echo_and_generate_does_not(model, ids):
    cache = compress(model, ids)
    assert cache.selector.name == "echo"
    assert cache.config.strategy == "global"
    assert RankKVCache(model).selector.name == "snapkv"
    explicit = compress(model, ids, selector="echo")
    assert oracles.kept_tokens(cache) == oracles.kept_tokens(explicit)


@pytest.mark.parametrize(
    "options",
    [
        {"selector": "snapkv"},
        {"strategy": "uniform"},
        {"head_budgets": None},
        {"profile": None},
        {"scope": "window"},
    ],
)
def test_a_choice_of_the_user_is_left_alone(model, ids, options):
    cache = compress(model, ids, **options)
    assert cache.selector.name == "snapkv"
    assert "later" not in cache.summary()


def test_a_model_that_cannot_turn_says_so_and_works(ids):
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=96, n_positions=128)).eval()
    cache = compress(model, ids)
    assert cache.selector.name == "snapkv"
    assert "selector 'echo', but how GPT2LMHeadModel applies positions is not known" in cache.summary()


def test_a_model_that_cannot_be_probed_still_compresses(ids):
    class WantsMore(LlamaForCausalLM):
        def forward(self, input_ids, logits_to_keep=None, position_ids=None, **kwargs):
            if logits_to_keep is None:
                raise ValueError("this model wants logits_to_keep")
            kwargs |= {"logits_to_keep": logits_to_keep, "position_ids": position_ids}
            return super().forward(input_ids, **kwargs)

    torch.manual_seed(5)
    cache = compress(WantsMore(LlamaConfig(**SIZES)).eval(), ids)
    assert cache.selector.name == "snapkv"
    assert "could not be probed with six tokens (ValueError)" in cache.summary()


@pytest.mark.parametrize(
    "selector",
    ["echo", "criticalkv", get_selector("chunkkv", base="criticalkv")],
    ids=["echo", "criticalkv", "chunkkv"],
)
def test_the_summary_says_where_no_output_projection_is_found(ids, selector):
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    # Two children fit: which of them is the projection is not clear.
    model.model.layers[1].self_attn.other = torch.nn.Linear(32, 32)
    told = oracles.prefill(model, ids, selector=selector, compression_ratio=0.5).summary()
    assert "the output projection of layer 1 is not found" in told
    assert "of layer 0 is not found" not in told
    plain = oracles.prefill(
        model, ids, selector=get_selector("echo", value_norms=False), compression_ratio=0.5
    )
    assert "is not found" not in plain.summary()
