"""Five oracles that any compressed cache must pass, and what they need, shared by the test files.

O1 identity: what evicts nothing changes no token.
O2 masked oracle: decoding on a compressed cache equals decoding on the full one, the evicted tokens masked.
O3 batch invariance: a row of a left-padded batch is treated as if it were alone.
O4 call independence: what one call did does not reach the next.
O5 bytes: the memory held is that of the tokens kept, and the rest is gone.
"""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import AttentionInterface, DynamicCache
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from rankkv import RankKVCache
from rankkv.cache.head_budget_layer import HeadBudgetLayer
from rankkv.cache.layer import RankKVLayer
from rankkv.models.compat import cache_argument, find_eager_homes
from rankkv.observe.call import observe
from rankkv.observe.observation import Observation
from rankkv.selection import SELECTORS

#: Before 5.3: other chunks, and every turn with all its ids.
OLD_GENERATE = Version(transformers.__version__) < Version("5.3")
needs_recent_generate = pytest.mark.skipif(OLD_GENERATE, reason="older generate() does this another way")
IS_NEWEST = Version(transformers.__version__) >= Version("5.24")
needs_newest = pytest.mark.skipif(not IS_NEWEST, reason="not promised for older transformers")

#: Selectors that a cache alone can use; the others repeat the prompt (tests/cache/test_replay.py) or need a file.
ONE_PASS = [name for name, selector in SELECTORS.items() if not selector.replays and not selector.required]

MASKED_ORACLE = "masked_oracle"
PAD = 0


# -- prompts --------------------------------------------------------------------------------------------


def random_prompt(length: int, seed: int = 0, vocab_size: int = 128) -> Tensor:
    """Return random ids ``[1, length]``, special tokens left out."""
    return torch.randint(3, vocab_size, (1, length), generator=torch.Generator().manual_seed(seed))


def left_pad(prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Join ``[1, length]`` prompts to a left-padded batch: ids and attention mask ``[batch, longest]``."""
    longest = max(prompt.shape[1] for prompt in prompts)
    ids = torch.full((len(prompts), longest), PAD)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - prompt.shape[1] :] = prompt[0]
        mask[row, longest - prompt.shape[1] :] = 1
    return ids, mask


# -- running models -------------------------------------------------------------------------------------


def forward(model: Any, cache: Any, input_ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Run one forward and return the logits; ``mask`` covers all tokens seen so far and the new ones."""
    options: dict[str, Any] = {}
    if mask is not None:
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        options = {"attention_mask": mask, "position_ids": positions[:, -input_ids.shape[1] :]}
    with torch.no_grad():
        return model(input_ids=input_ids, use_cache=True, **cache_argument(cache), **options).logits


def feed(model: Any, cache: Any, chunks: Sequence[Tensor], mask: Tensor | None = None) -> list[Tensor]:
    """Teacher-force ``chunks``, each ``[batch, tokens]``; ``mask`` covers what the cache has seen already."""
    logits = []
    for chunk in chunks:
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(chunk.shape)], dim=-1)
        logits.append(forward(model, cache, chunk, mask))
    return logits


def prefill(model: Any, input_ids: Tensor, mask: Tensor | None = None, **options: Any) -> RankKVCache:
    """Return a cache that was compressed at the end of the prefill of ``input_ids``."""
    cache = RankKVCache(model, **options)
    forward(model, cache, input_ids, mask)
    return cache


def generate(
    model: Any,
    input_ids: Tensor,
    cache: Any = None,
    new_tokens: int = 12,
    mask: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Generate greedily and return the new tokens, ``[batch, new_tokens]``; no cache: the plain model."""
    # Some older versions look drafts up only where there is an end token: one that never comes.
    end = model.config.vocab_size if "prompt_lookup_num_tokens" in options else None
    options = {"do_sample": False, "eos_token_id": end, "pad_token_id": PAD, **options}
    if cache is not None:
        options |= cache_argument(cache)
    mask = torch.ones_like(input_ids) if mask is None else mask
    output = model.generate(input_ids, attention_mask=mask, max_new_tokens=new_tokens, **options)
    return output[:, input_ids.shape[1] :]


# -- what a cache keeps ---------------------------------------------------------------------------------


def kept_positions(cache: RankKVCache, layer_idx: int) -> list[list[list[int]]]:
    """Return the logical positions a layer keeps, ``[row][kv_head]``, ascending, empty slots left out."""
    layer = cache.layers[layer_idx]
    rows, heads = layer.keys.shape[:2]
    positions = layer.compute_positions().expand(rows, heads, -1)
    valid = layer.compute_slot_valid()
    if valid is None:
        valid = torch.ones(rows, positions.shape[-1], dtype=torch.bool)
    valid = (valid if valid.dim() == 3 else valid[:, None]).expand(rows, heads, -1)
    return [[positions[row, head][valid[row, head]].tolist() for head in range(heads)] for row in range(rows)]


def kept_tokens(cache: RankKVCache, mask: Tensor | None = None) -> list[list[list[list[int]]]]:
    """Return ``[layer][row][kv_head]`` lists of the kept tokens, counted without padding.

    ``mask`` is the prompt's attention mask; a padding position that was kept fails here.
    """
    layers = []
    for layer_idx in cache.layer_indices:
        rows = kept_positions(cache, layer_idx)
        if mask is not None:
            padding = (mask.shape[1] - mask.sum(-1)).tolist()
            is_real = [set(range(pad, cache.seen_tokens)) for pad in padding]
            real_rows = []
            for row, heads in enumerate(rows):
                # A prompt that keeps everything still holds its padding, masked by the model's own mask.
                everything = list(range(cache.seen_tokens))
                for head in heads:
                    assert head == everything or set(head) <= is_real[row], (
                        f"padding kept in layer {layer_idx}"
                    )
                real_rows.append([[p - padding[row] for p in head if p in is_real[row]] for head in heads])
            rows = real_rows
        layers.append(rows)
    return layers


# -- O1 identity ----------------------------------------------------------------------------------------


def assert_identity(
    model: Any, input_ids: Tensor, mask: Tensor | None = None, new_tokens: int = 12, **options: Any
) -> None:
    """O1: greedy output with the cache equals the plain model's, token for token."""
    plain = generate(model, input_ids, None, new_tokens, mask)
    ours = generate(model, input_ids, RankKVCache(model, **options), new_tokens, mask)
    assert torch.equal(ours, plain)


# -- O2 masked oracle -----------------------------------------------------------------------------------


_last_keys: list[tuple[weakref.ref[Tensor], Tensor]] = []


def _evicted_keys(module: Any, key: Tensor) -> Tensor | None:
    evicted = getattr(module, "oracle_evicted", None)
    if evicted is not None:
        _last_keys[:] = [(ref, mask) for ref, mask in _last_keys if ref() is not None]
        _last_keys.append((weakref.ref(key), evicted))
        return evicted
    # A layer without keys of its own attends to those of another layer, and misses what that one evicted.
    return next((mask for ref, mask in _last_keys if ref() is key), None)


def _masked_oracle_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    evicted = _evicted_keys(module, key)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    logits = (query @ key.mT).float() * scaling
    if softcap is not None:
        logits = (logits / softcap).tanh() * softcap
    assert attention_mask is not None, "the oracle's mask function always gives a 4-D mask"
    logits = logits + attention_mask
    if evicted is not None:
        hidden = torch.zeros(*evicted.shape[:2], key.shape[-2], dtype=torch.bool)
        hidden[..., : evicted.shape[-1]] = evicted
        # A cache may have fewer heads than the keys that attention sees (latent attention).
        hidden = hidden.repeat_interleave(query.shape[1] // evicted.shape[1], 1)[:, :, None]
        logits = logits.masked_fill(hidden, torch.finfo(torch.float32).min)
    if s_aux is not None:
        logits = torch.cat([logits, s_aux.float().view(1, -1, 1, 1).expand(*logits.shape[:3], 1)], -1)
    output = logits.softmax(-1)[..., : key.shape[-2]].to(value.dtype) @ value
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(MASKED_ORACLE, _masked_oracle_attention)
AttentionMaskInterface.register(MASKED_ORACLE, eager_mask)


def attention_modules(model: Any) -> dict[int, Any]:
    """Return the attention modules by layer index."""
    return {
        module.layer_idx: module
        for module in model.modules()
        if hasattr(module, "layer_idx") and "Attention" in type(module).__name__
    }


def masked_oracle(
    model: Any, cache: RankKVCache, input_ids: Tensor, mask: Tensor | None = None
) -> tuple[Any, DynamicCache]:
    """Return a copied of ``model`` that hides what ``cache`` has evicted, and its full cache."""
    copied = copy.deepcopy(model)
    copied.set_attn_implementation(MASKED_ORACLE)
    full = DynamicCache(config=copied.config.get_text_config(decoder=True))
    forward(copied, full, input_ids, mask)
    for layer_idx in cache.layer_indices:
        rows = kept_positions(cache, layer_idx)
        evicted = torch.ones(len(rows), len(rows[0]), input_ids.shape[1], dtype=torch.bool)
        for row, heads in enumerate(rows):
            for head, kept in enumerate(heads):
                evicted[row, head, [p for p in kept if p < input_ids.shape[1]]] = False
        attention_modules(copied)[layer_idx].oracle_evicted = evicted
    return copied, full


def next_chunks(rows: int, lengths: Sequence[int] = (1, 1, 1, 4), seed: int = 99) -> list[Tensor]:
    """Return token chunks to teacher-force: single-token steps and one of several tokens."""
    return [random_prompt(rows * n, seed + i).view(rows, n) for i, n in enumerate(lengths)]


def assert_equals_masked_oracle(
    model: Any,
    cache: RankKVCache,
    input_ids: Tensor,
    mask: Tensor | None = None,
    chunks: Sequence[Tensor] | None = None,
    atol: float = 1e-4,
) -> None:
    """O2: continuing on ``cache``, compressed after ``input_ids``, equals the masked full cache."""
    chunks = next_chunks(input_ids.shape[0]) if chunks is None else chunks
    copied, full = masked_oracle(model, cache, input_ids, mask)
    expected = feed(copied, full, chunks, mask)
    actual = feed(model, cache, chunks, mask)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=atol, rtol=1e-4)


# -- O3 batch invariance --------------------------------------------------------------------------------


def assert_every_step_equals_masked(model, cache, ids, mask) -> int:
    """Check a prompt of 90 tokens and eight chunks against a full cache that hides what each forward evicted.

    A streaming cache gets the prompt in three parts.  Returns how often the heads of a layer kept different numbers.
    """
    copied, full = copy.deepcopy(model), DynamicCache(config=model.config)
    copied.set_attn_implementation(MASKED_ORACLE)
    sizes = (30, 30, 30) if cache.config.prefill == "streaming" else (90,)
    chunks = [*ids.split(sizes, dim=1), *next_chunks(len(ids), (1, 1, 6, 1, 1, 1, 1, 1))]
    mask = torch.cat([mask, mask.new_ones(len(ids), 13)], dim=-1)
    differ = 0
    for chunk in chunks:
        past = cache.seen_tokens
        for layer_idx, module in attention_modules(copied).items() if past else ():
            kept = kept_positions(cache, layer_idx)
            evicted = torch.ones(len(ids), len(kept[0]), past, dtype=torch.bool)
            for row, heads in enumerate(kept):
                for head, positions in enumerate(heads):
                    evicted[row, head, positions] = False
                differ += len({len(positions) for positions in heads}) > 1
            module.oracle_evicted = evicted
        so_far = mask[:, : past + chunk.shape[1]]
        ours, theirs = (forward(m, c, chunk, so_far) for m, c in ((model, cache), (copied, full)))
        is_real = so_far[:, past:].bool()
        torch.testing.assert_close(ours[is_real], theirs[is_real], atol=1e-4, rtol=1e-4)
    return differ


def assert_batch_invariant(
    model: Any, prompts: Sequence[Tensor], new_tokens: int = 8, **options: Any
) -> None:
    """O3: each row of the left-padded batch keeps what the row keeps alone, and gives its text."""
    ids, mask = left_pad(prompts)
    together = prefill(model, ids, mask, **options)
    kept = kept_tokens(together, mask)
    text = generate(model, ids, RankKVCache(model, **options), new_tokens, mask)
    for row, prompt in enumerate(prompts):
        alone = prefill(model, prompt, **options)
        assert together.budgets_per_row[row] == alone.budgets
        torch.testing.assert_close(
            torch.tensor(together.layer_ranks_per_row[row]),
            torch.tensor(alone.layer_ranks),
            rtol=1e-5,
            atol=0,
        )
        assert [layer[row] for layer in kept] == [layer[0] for layer in kept_tokens(alone)]
        text_alone = generate(model, prompt, RankKVCache(model, **options), new_tokens)
        assert text[row].tolist() == text_alone[0].tolist()


# -- O4 call independence -------------------------------------------------------------------------------


def assert_calls_independent(model: Any, fresh_model: Any, a: Tensor, b: Tensor, **options: Any) -> None:
    """O4: A, B, A on one model: the 1st equals the 3rd, and B equals B on a model that never saw A."""
    first = generate(model, a, RankKVCache(model, **options))
    second = generate(model, b, RankKVCache(model, **options))
    third = generate(model, a, RankKVCache(model, **options))
    assert torch.equal(first, third)
    assert torch.equal(second, generate(fresh_model, b, RankKVCache(fresh_model, **options)))


# -- O5 bytes -------------------------------------------------------------------------------------------


def storage_bytes(cache: Any) -> int:
    """Sum the bytes of all distinct storages that the layers' keys and values stand on."""
    storages = {}
    for layer in cache.layers:
        for tensor in layer.held() if isinstance(layer, RankKVLayer) else (layer.keys, layer.values):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def assert_bytes_match(cache: RankKVCache) -> None:
    """O5: the storages hold the kept slots, keys and values, of every row and layer, and nothing besides."""
    # At rest: while decoding there is room for tokens to come.
    cache = cache.copy()
    expected = 0
    for layer_idx in cache.layer_indices:
        layer = cache.layers[layer_idx]
        keys = layer.keys
        rows, heads, slots, dim = keys.shape
        if isinstance(layer, HeadBudgetLayer):
            # Packed: no head is padded to another.
            kept = sum(count for row in layer.kept_per_head for count in row)
        else:
            assert slots == cache.kept_lengths[layer_idx]
            assert keys.is_contiguous()
            kept = rows * heads * slots
        expected += 2 * kept * dim * keys.element_size()
    assert storage_bytes(cache) == expected == cache.cache_bytes()


# -- what a layer's attention used --------------------------------------------------------------------------


def capture_calls(model: Any, input_ids: Tensor, mask: Tensor | None = None) -> list[tuple[Any, ...]]:
    """Return, a layer each, the arguments of ``observe`` that one forward's attention calls make."""
    calls: list[tuple[Any, ...]] = []

    def capture(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **options: Any
    ) -> Any:
        calls.append((module.layer_idx, module, query, key, value, attention_mask, options))
        return inner(module, query, key, value, attention_mask, **options)

    backend = model.config._attn_implementation
    registered = AttentionInterface._global_mapping
    before = registered.get(backend)
    home = sys.modules[type(model).__module__]
    inner = home.eager_attention_forward if before is None else before
    # Older transformers call the eager function where it stands.
    stands = backend == "eager" and home in find_eager_homes(model)
    if stands:
        inner = home.eager_attention_forward
        home.eager_attention_forward = capture
    AttentionInterface.register(backend, capture)
    try:
        forward(model, DynamicCache(config=model.config), input_ids, mask)
    finally:
        if stands:
            home.eager_attention_forward = inner
        if before is None:
            registered.pop(backend)
        else:
            AttentionInterface.register(backend, before)
    return calls


def observe_layers(
    model: Any, input_ids: Tensor, mask: Tensor | None = None, window_size: int = 32, sink_size: int = 4
) -> list[Observation]:
    """Return the observations of one forward, a layer each, with what a replay would note.

    Hidden states are those of the forward; their norms stand for those of a gradient.
    """
    hidden: dict[int, Tensor] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda module, args, kwargs: hidden.update(
                {module.layer_idx: kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]}
            ),
            with_kwargs=True,
        )
        for module in attention_modules(model).values()
    ]
    try:
        calls = capture_calls(model, input_ids, mask)
    finally:
        for handle in handles:
            handle.remove()
    layers = [
        observe(*call, kv_heads=call[3].shape[1], window_size=window_size, sink_size=sink_size)
        for call in calls
    ]
    for layer in layers:
        layer.hidden = hidden[layer.layer_idx]
        layer.gradient = layer.hidden.norm(dim=-1)
    return layers


def observe_random(
    tokens: int, heads: int = 4, key_heads: int = 2, kv_heads: int = 2, dim: int = 8, value_dim: int = 8
) -> Observation:
    """Return an observation of one row of random queries, keys and values, the same at each call."""
    generator = torch.Generator().manual_seed(3)
    shapes = ((heads, dim), (key_heads, dim), (key_heads, value_dim))
    states = [torch.randn(1, count, tokens, width, generator=generator) for count, width in shapes]
    return observe(0, torch.nn.Module(), *states, None, {}, kv_heads=kv_heads, window_size=16, sink_size=4)


def eager_attentions(model: Any, input_ids: Tensor, mask: Tensor | None = None) -> list[Tensor]:
    """Return the weights ``[batch, head, query, key]`` the model's eager attention computes, a layer each."""
    copied = copy.deepcopy(model)
    copied.set_attn_implementation("eager")
    options: dict[str, Any] = {}
    if mask is not None:
        options = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    with torch.no_grad():
        return list(copied(input_ids, output_attentions=True, use_cache=False, **options).attentions)
