"""Decoding without padding: heads of different lengths attend to their own tokens, with the padded way's answers."""

from __future__ import annotations

import inspect

import oracles
import pytest
import torch
from torch.nn.attention import varlen
from transformers import AttentionInterface
from varlen_stand_in import attend_plainly, copy_of_varlen

from rankkv import RankKVCache
from rankkv.cache import unpadded
from rankkv.cache.masks import PaddingCheck
from rankkv.cache.storage import ROOM, SlotLayout
from rankkv.cache.unpadded import UnpaddedHeads
from rankkv.errors import UnsupportedModelError
from rankkv.observe import hook

PROMPT = oracles.random_prompt(90, seed=1)
SHORT = oracles.random_prompt(33, seed=2)
KEEP = {"compression_ratio": 0.3, "min_budget": 3, "window_size": 8, "profile": None}
SPREAD = {"head_budgets": "adaptive", "head_floor": 0.0}


@pytest.fixture(params=[1, 2], ids=["single", "padded"])
def batch(request):
    return oracles.left_pad([PROMPT, SHORT][: request.param])


def count_growing(cache: RankKVCache) -> int:
    return sum(layer.is_growing for layer in cache.layers)


def build_heads(dtype=torch.float32, later=3, kv_heads=3, rows=2, size=16):
    generator = torch.Generator().manual_seed(4)
    valid = torch.rand(rows, kv_heads, 20, generator=generator) < torch.linspace(0.1, 0.9, kv_heads)[:, None]
    valid[..., -1] = True
    # Empty slots stand first, as the layer leaves them.
    layout = SlotLayout.of(valid.sort(dim=-1).values)
    tokens = sum(map(sum, layout.counts))

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    kept = draw(tokens, size), draw(tokens, size)
    new = draw(rows, kv_heads, later, size), draw(rows, kv_heads, later, size)
    return UnpaddedHeads(layout, kept, new), layout, kept, new


def take_head(layout, kept, new, row, head):
    """Keys and values of one head, built another way."""
    flat = [count for counts in layout.counts for count in counts]
    place = row * len(layout.counts[0]) + head
    first = sum(flat[:place])
    return [
        torch.cat([part[first : first + flat[place]], more[row, head]])
        for part, more in zip(kept, new, strict=True)
    ]


def test_a_layout_made_of_counts_is_that_of_the_slots():
    generator = torch.Generator().manual_seed(3)
    for slots in (1, 5, 20):
        counts = torch.randint(0, slots + 1, (2, 3), generator=generator).tolist()
        counts[1][2] = slots
        valid = torch.arange(slots) >= slots - torch.tensor(counts)[..., None]
        found, wanted = SlotLayout.of_counts(counts, slots, valid.device), SlotLayout.of(valid)
        assert found.shape == wanted.shape
        assert found.counts == wanted.counts
        assert torch.equal(found.held, wanted.held)
        tensor = torch.randn(*valid.shape, 4, generator=generator)
        assert torch.equal(found.pad(found.unpad(tensor)), wanted.pad(wanted.unpad(tensor)))


# -- the heads by themselves ----------------------------------------------------------------------------------


def test_the_stand_in_has_the_signature_of_torch():
    real, ours = (inspect.signature(f).parameters for f in (varlen.varlen_attn, copy_of_varlen))
    assert list(real) == list(ours)
    assert [p.kind for p in real.values()] == [p.kind for p in ours.values()]
    assert unpadded.find_varlen() is varlen.varlen_attn


def test_the_kernel_of_an_older_torch_takes_the_same_arguments(monkeypatch):
    """On the meta device, where torch checks a kernel's arguments and shapes without running it."""
    asked = []

    def of_torch_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, return_aux=None):
        """The public function, which hands no ``seqused_k`` on."""

    kernel = torch.ops.aten._flash_attention_forward

    def note(*args, **options):
        bound = (
            dict(zip([one.name for one in kernel.default._schema.arguments], args, strict=False)) | options
        )
        asked.append({name: value for name, value in bound.items() if not isinstance(value, torch.Tensor)})
        return kernel(*args, **options)

    note.default = kernel.default
    monkeypatch.setattr(varlen, "varlen_attn", of_torch_2_11)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", note)
    unpadded.find_varlen.cache_clear()
    try:
        _, layout, kept, new = build_heads(torch.bfloat16)
        layout = SlotLayout.of_counts(layout.counts, layout.shape[-1], torch.device("meta"))
        keys, values = ((old.to("meta"), more.to("meta")) for old, more in zip(kept, new, strict=True))
        heads = UnpaddedHeads(layout, (keys[0], values[0]), (keys[1], values[1]))
        output = heads.attend(torch.empty(2, 12, 1, 16, dtype=torch.bfloat16, device="meta"), 0.5)
    finally:
        unpadded.find_varlen.cache_clear()
    assert output.shape == (2, 1, 12, 16)
    longest = max(map(max, layout.counts)) + 3
    assert asked == [
        {
            "max_q": 1, "max_k": longest, "dropout_p": 0.0, "is_causal": False, "return_debug_mask": False,
            "scale": 0.5,
        }
    ]  # fmt: skip


@pytest.mark.parametrize("way", ["_attend_in_turn", "_attend_at_once"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 3])
def test_every_head_attends_to_its_own_tokens(monkeypatch, way, dtype, groups):
    monkeypatch.setattr(unpadded, "find_varlen", lambda: copy_of_varlen)
    heads, layout, kept, new = build_heads(dtype)
    generator = torch.Generator().manual_seed(9)
    for step in range(ROOM):
        states = [torch.randn(2, 3, 1, 16, generator=generator).to(dtype) for _ in range(2)]
        with torch.no_grad():
            assert heads.has_room(states[0])
            heads.append(*states)
        new = [torch.cat([old, more], dim=-2) for old, more in zip(new, states, strict=True)]
        if step in (0, 1, ROOM - 1):
            query = torch.randn(2, 3 * groups, 1, 16, generator=generator).to(dtype)
            output = getattr(heads, way)(query.reshape(6, groups, 16), 0.3).view(2, 3 * groups, 16)
            for row in range(2):
                for head in range(3):
                    own = slice(head * groups, (head + 1) * groups)
                    wanted = attend_plainly(query[row, own, 0], *take_head(layout, kept, new, row, head), 0.3)
                    torch.testing.assert_close(
                        output[row, own].double(),
                        wanted,
                        atol=2e-2 if dtype == torch.bfloat16 else 1e-5,
                        rtol=1e-2,
                    )
    assert not heads.has_room(states[0])


def test_the_parts_come_back_as_they_went_in():
    heads, _layout, kept, new = build_heads()
    more = [torch.randn(2, 3, 1, 16) for _ in range(2)]
    with torch.no_grad():
        heads.append(*more)
    for (old, later), was, added, extra in zip(heads.split(), kept, new, more, strict=True):
        assert torch.equal(old, was)
        assert torch.equal(later, torch.cat([added, extra], dim=-2))
        assert old.untyped_storage().nbytes() == old.nbytes


# -- whole caches ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        SPREAD,
        {"strategy": "power", **SPREAD},
        {"selector": "h2o", **SPREAD},
        {"prefill": "chunked"},
        {"recompress_turns": True},
    ],
    ids=str,
)
def test_without_padding_the_answers_are_those_with_it(tiny_llama, monkeypatch, batch, options, dtype):
    model, (ids, mask) = tiny_llama().to(dtype), batch
    chunks = oracles.next_chunks(len(ids), (1, 1, 1, 5, 1, 1))
    without = oracles.prefill(model, ids, mask, **KEEP, **options)
    ours = oracles.feed(model, without, chunks, mask)
    assert count_growing(without)
    monkeypatch.setattr(RankKVCache, "_may_stay_unpadded", lambda *_: False)
    padded = oracles.prefill(model, ids, mask, **KEEP, **options)
    theirs = oracles.feed(model, padded, chunks, mask)
    assert not count_growing(padded)
    assert without.kept_per_head == padded.kept_per_head
    assert oracles.kept_tokens(without) == oracles.kept_tokens(padded)
    atol = 1e-4 if dtype == torch.float32 else 0.1
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=atol, rtol=1e-3)


@pytest.mark.parametrize(
    "options",
    [{"storage": "int8"}, {"storage": "offload"}, {"positions": "packed"}, {"decode": "bounded"},
     {"decode": "periodic", "decode_interval": 4}],
    ids=str,
)  # fmt: skip
def test_where_heads_must_be_padded_they_are(tiny_llama, batch, options):
    model, (ids, mask) = tiny_llama(), batch
    cache = oracles.prefill(model, ids, mask, **KEEP, **SPREAD, **options)
    oracles.feed(model, cache, oracles.next_chunks(len(ids), (1, 1, 1)), mask)
    assert not count_growing(cache)


def test_eager_attention_and_gradients_are_padded(tiny_llama):
    model = tiny_llama(attn_implementation="eager")
    cache = oracles.prefill(model, PROMPT, **KEEP, **SPREAD)
    oracles.feed(model, cache, oracles.next_chunks(1, (1, 1)))
    assert not count_growing(cache)
    model = tiny_llama()
    cache = oracles.prefill(model, PROMPT, **KEEP, **SPREAD)
    for _ in range(2):
        model(PROMPT[:, :1], past_key_values=cache, position_ids=torch.tensor([[cache.seen_tokens]]))
    assert not count_growing(cache)


def test_a_mask_that_hides_a_later_token_is_kept_to(tiny_llama):
    """A row may hide tokens after its prompt; then the heads are padded, and the mask says which they are."""
    model = tiny_llama()
    ids, mask = oracles.left_pad([PROMPT, SHORT])
    cache = oracles.prefill(model, ids, mask, **KEEP, **SPREAD)
    chunks = oracles.next_chunks(2, (1, 1, 1, 1))
    oracles.feed(model, cache, chunks[:2], mask)
    assert count_growing(cache)
    mask = torch.cat([mask, mask.new_ones(2, 2)], dim=-1)
    mask[1, 90] = 0
    position = torch.tensor([[92], [35]])
    results = []
    for copied in (cache.copy(), cache.copy()):
        seen = torch.cat([mask, mask.new_ones(2, 1)], dim=-1)
        with torch.no_grad():
            results.append(
                model(chunks[2], attention_mask=seen, position_ids=position, past_key_values=copied).logits
            )
    # The other row is as it was; the one with the hidden token answers as if that token's keys were not there.
    cache_with_all = cache.copy()
    with torch.no_grad():
        whole = model(chunks[2], attention_mask=torch.ones_like(seen).masked_fill(seen.cumsum(-1) == 0, 0),
                      position_ids=position, past_key_values=cache_with_all).logits  # fmt: skip
    torch.testing.assert_close(results[0][0], whole[0], atol=1e-5, rtol=1e-4)
    assert (results[0][1] - whole[1]).abs().max() > 1e-3


def test_only_a_mask_of_padding_alone_is_left_out():
    mask = torch.ones(2, 1, 1, 6, dtype=torch.bool)
    mask[1, ..., :2] = False
    biased = torch.zeros(2, 1, 1, 6).masked_fill(~mask, torch.finfo(torch.float32).min)
    hidden = mask.clone()
    hidden[0, ..., 3] = False
    check = PaddingCheck()
    for given, wanted in ((mask, True), (biased, True), (biased - 0.5, False), (hidden, False)):
        assert check.hides_only_padding(given, 6, [0, 2]) is wanted
    # Of other tokens, or of a layer with heads of their own.
    assert not check.hides_only_padding(mask, 7, [0, 2])
    assert not check.hides_only_padding(mask.expand(-1, 3, -1, -1), 6, [0, 2])
    # Read once a forward; the next may bring the same tensor with other content.
    assert check.hides_only_padding(mask, 6, [0, 2])
    mask[0, ..., 3] = False
    check.forget()
    assert not check.hides_only_padding(mask, 6, [0, 2])


def test_another_function_under_the_backends_name_still_runs(tiny_llama):
    """Another library's sdpa gets keys and values in one padded tensor each, as before."""
    hook.uninstall()
    original = AttentionInterface._global_mapping["sdpa"]
    lengths = []

    def theirs(module, query, key, value, attention_mask, *unnamed, **options):
        lengths.append(key.shape[-2])
        return original(module, query, key, value, attention_mask, *unnamed, **options)

    AttentionInterface.register("sdpa", theirs)
    try:
        model = tiny_llama()
        cache = oracles.prefill(model, PROMPT, **KEEP, **SPREAD)
        lengths.clear()
        oracles.feed(model, cache, oracles.next_chunks(1, (1, 1)))
    finally:
        hook.uninstall()
        AttentionInterface.register("sdpa", original)
    assert lengths[-3:] == [layer.width for layer in cache.layers]


def test_attention_to_other_keys_than_the_cached_ones(tiny_llama):
    """A layer whose keys change between cache and attention is never shown its newest token alone."""
    model = tiny_llama()
    cache = oracles.prefill(model, PROMPT, **KEEP, **SPREAD)
    expected = oracles.feed(model, cache.copy(), oracles.next_chunks(1, (1, 1, 1)))
    update = RankKVCache.update

    def changed(self, *args, **kwargs):
        keys, values = update(self, *args, **kwargs)
        return keys.clone(), values

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RankKVCache, "update", changed)
        other = oracles.prefill(model, PROMPT, **KEEP, **SPREAD)
        for ours, theirs in zip(
            oracles.feed(model, other, oracles.next_chunks(1, (1, 1, 1))), expected, strict=True
        ):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
        assert not count_growing(other)
        with pytest.raises(UnsupportedModelError, match="other keys and values than its cache returned"):
            oracles.feed(model, cache, oracles.next_chunks(1, (1,)))
