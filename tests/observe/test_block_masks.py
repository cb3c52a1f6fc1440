"""flex_attention's block masks against dense ones."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention

from rankkv.cache import masks
from rankkv.errors import UnsupportedModelError
from rankkv.observe import block_masks

SEEN, WINDOW = 20, 6
PADDING = torch.tensor([0, 5])


def causal(b, h, q, k):
    return k <= q


def padded(b, h, q, k):
    return (k <= q) & (k >= PADDING[b])


def sliding(b, h, q, k):
    return (k <= q) & (k > q - WINDOW)


def block_mask(function, queries, batch=2):
    def offset(b, h, q, k):
        return function(b, h, q + SEEN - queries, k)

    return create_block_mask(offset, batch, None, queries, SEEN, device="cpu")


def dense(function, queries, batch=2):
    rows = torch.arange(SEEN - queries, SEEN)[:, None]
    b = torch.arange(batch)[:, None, None]
    return function(b, None, rows, torch.arange(SEEN)).expand(batch, queries, SEEN)


def draw_positions(heads):
    torch.manual_seed(heads)
    drawn = [torch.randperm(SEEN - 4)[:7].sort().values for _ in range(2 * heads)]
    newest = torch.arange(SEEN - 4, SEEN)
    return torch.stack([torch.cat([slots, newest]) for slots in drawn]).view(2, heads, -1)


@pytest.mark.parametrize("function", [causal, padded, sliding])
@pytest.mark.parametrize("queries", [1, 4, SEEN])
def test_what_is_real_or_the_whole_mask(function, queries):
    reduced = block_masks.reduce_block_mask(block_mask(function, queries), queries, SEEN)
    whole = dense(function, queries)
    if reduced.dim() == 2:
        # All that is hidden are padding and later tokens.
        rows = torch.arange(SEEN - queries, SEEN)[:, None]
        assert torch.equal(reduced[:, None] & (torch.arange(SEEN) <= rows), whole)
    else:
        assert torch.equal(reduced[:, 0], whole)
    assert reduced.dim() == 2 or function is sliding or (function is padded and queries < SEEN)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("function", [causal, padded, sliding])
@pytest.mark.parametrize("queries", [1, 4])
def test_columns_of_the_kept_slots(function, queries, heads):
    positions = draw_positions(heads)
    valid = torch.ones(2, positions.shape[-1], dtype=torch.bool)
    valid[0, :2] = False
    projected = masks.project_mask(
        block_mask(function, queries), positions, valid, queries, 4, "flex_attention", torch.float32
    )
    index = positions[:, :, None].expand(-1, -1, queries, -1)
    expected = dense(function, queries)[:, None].expand(-1, heads, -1, -1).gather(-1, index)
    expected = expected & valid[:, None, None]
    found = create_mask(projected.mask_mod, 2, 4, queries, positions.shape[-1], device="cpu")
    assert torch.equal(found, expected.repeat_interleave(4 // heads, dim=1))


def test_a_step_that_hides_nothing_needs_no_mask():
    positions = draw_positions(2)
    mask = block_mask(causal, 1)
    assert masks.project_mask(mask, positions, None, 1, 4, "flex_attention", torch.float32) is None
    assert masks.project_mask(None, positions, None, 1, 4, "flex_attention", torch.float32) is None


def test_without_a_mask_new_tokens_do_not_see_each_other_too_early():
    positions = draw_positions(1)
    projected = masks.project_mask(None, positions, None, 4, 4, "flex_attention", torch.float32)
    found = create_mask(projected.mask_mod, 2, 4, 4, 11, device="cpu")[:, 0]
    assert torch.equal(found[0], torch.ones(4, 11).tril(7).bool())


def test_a_dense_mask_counts_for_every_head():
    # flex_attention would read the first head's mask for all of them.
    positions = draw_positions(2)
    mask = torch.zeros(2, 1, 1, SEEN).masked_fill(~dense(padded, 1)[:, None], torch.finfo(torch.float32).min)
    projected = masks.project_mask(mask, positions, None, 1, 4, "flex_attention", torch.float32)
    query, key = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 11, 8)
    ours = flex_attention(query, key, key, block_mask=projected, enable_gqa=True)
    hidden = ~mask.expand(-1, 2, -1, -1).gather(-1, positions[:, :, None]).eq(0).repeat_interleave(2, 1)
    logits = (query @ key.repeat_interleave(2, 1).mT * 8**-0.5).masked_fill(hidden, float("-inf"))
    torch.testing.assert_close(ours, logits.softmax(-1) @ key.repeat_interleave(2, 1))


def test_masks_of_another_kind_are_refused():
    with pytest.raises(UnsupportedModelError, match=r"masks of type str are not supported.*sdpa"):
        block_masks.reduce_block_mask("causal", 1, 1)
