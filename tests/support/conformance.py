"""The ways of using a cache that every model family passes, or is refused by name: one function a way.

Each asserts; an :class:`~rankkv.errors.UnsupportedModelError` that leaves it is a refusal.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import families
import oracles
import torch
from transformers import DynamicCache

from rankkv import RankKVCache
from rankkv.errors import UnsupportedModelError


class NotOffered(Exception):
    """The model itself cannot do this, with any cache."""


#: The first is more than twice the sliding window; the last passes the window while generating.
LONG, SHORT, WITHIN = (oracles.random_prompt(n, seed=n) for n in (70, 41, families.WINDOW - 4))
NEW_TOKENS = 12
#: Small floors, so that a third of a short prompt leaves the layers something to differ by.
KEEP = {"compression_ratio": 0.3, "min_budget": 3}


def _cache(model: Any, **options: Any) -> RankKVCache:
    with warnings.catch_warnings():
        # Where no layer can be compressed, a test of its own looks at the warning.
        warnings.filterwarnings("ignore", message="no layer of .* has a full-attention KV cache")
        return RankKVCache(model, **options)


def _prefill(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, **options: Any) -> RankKVCache:
    cache = _cache(model, **options)
    oracles.forward(model, cache, ids, torch.ones_like(ids) if mask is None else mask)
    return cache


def _is_left_alone(family: families.Family) -> bool:
    return family.outcome == families.UNCHANGED


def check_identity(family: families.Family, model: Any) -> None:
    """Everything kept, or nothing that could be dropped: the text is the plain model's, padding or none."""
    ratio = KEEP["compression_ratio"] if _is_left_alone(family) else 1.0
    for ids, mask in (oracles.left_pad([LONG]), oracles.left_pad([WITHIN]), oracles.left_pad([LONG, SHORT])):
        plain = oracles.generate(model, ids, None, NEW_TOKENS, mask)
        ours = oracles.generate(model, ids, _cache(model, compression_ratio=ratio), NEW_TOKENS, mask)
        assert torch.equal(ours, plain)


def check_compressed(family: families.Family, model: Any) -> None:
    """What was dropped counts as masked, and the budgets are those of the compressible layers alone."""
    mask = torch.ones_like(LONG)
    cache = _prefill(model, LONG, **KEEP)
    expected = range(len(cache.layers)) if family.compressible is None else family.compressible
    assert cache.layer_indices == list(expected)
    if not cache.layer_indices:
        assert cache.kept_lengths == _prefill(model, LONG, compression_ratio=1.0).kept_lengths
        return
    total = round(KEEP["compression_ratio"] * LONG.shape[1] * len(cache.layer_indices))
    assert sum(cache.budgets) == sum(cache.kept_lengths[index] for index in cache.layer_indices) == total
    others = len(cache.layers) - len(cache.layer_indices)
    assert not others or f"{others} of {len(cache.layers)} layers" in cache.summary()
    chunks = oracles.next_chunks(1)
    whole = oracles.feed(model, _prefill(model, LONG, compression_ratio=1.0), chunks, mask)
    ours = oracles.feed(model, cache.copy(), chunks, mask)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(ours, whole, strict=True)), "nothing was dropped"
    oracles.assert_equals_masked_oracle(model, cache, LONG, mask, chunks)


def check_padded(family: families.Family, model: Any) -> None:
    """A row of a left-padded batch keeps what it keeps alone, and gives the same text."""
    if not _is_left_alone(family):
        oracles.assert_batch_invariant(model, [LONG, SHORT], **KEEP)
        return
    ids, mask = oracles.left_pad([LONG, SHORT])
    together = oracles.generate(model, ids, _cache(model, **KEEP), NEW_TOKENS, mask)
    for row, prompt in enumerate((LONG, SHORT)):
        alone = oracles.generate(model, prompt, _cache(model, **KEEP), NEW_TOKENS)
        assert torch.equal(together[row], alone[0])


def check_beam(family: families.Family, model: Any) -> None:
    """Beam search gives the plain model's text where everything is kept, and runs where it is not."""
    plain = oracles.generate(model, LONG, None, NEW_TOKENS, num_beams=3)
    for ratio in (1.0, KEEP["compression_ratio"]):
        cache = _cache(model, compression_ratio=ratio)
        ours = oracles.generate(model, LONG, cache, NEW_TOKENS, num_beams=3)
        if ratio == 1.0 or _is_left_alone(family):
            assert torch.equal(ours, plain)
        else:
            assert cache.kept_lengths[cache.layer_indices[0]] < cache.seen_tokens


def check_chunked(family: families.Family, model: Any) -> None:
    """A prompt in chunks keeps the tokens of the prompt in one piece, and gives its text."""
    single, chunked = _cache(model, **KEEP), _cache(model, prefill="chunked", **KEEP)
    plain = oracles.generate(model, LONG, None, NEW_TOKENS)
    full = DynamicCache(config=model.config.get_text_config(decoder=True))
    if not torch.equal(oracles.generate(model, LONG, full, NEW_TOKENS, prefill_chunk_size=24), plain):
        raise NotOffered("without RankKV, too, the model gives another text for a prompt in chunks")
    expected = oracles.generate(model, LONG, single, NEW_TOKENS)
    ours = oracles.generate(model, LONG, chunked, NEW_TOKENS, prefill_chunk_size=24)
    assert chunked.kept_lengths == single.kept_lengths
    assert oracles.kept_tokens(chunked) == oracles.kept_tokens(single)
    assert torch.equal(ours, expected)


def check_bytes(family: families.Family, model: Any) -> None:
    """The storages of the compressed layers hold the kept slots and nothing besides; the rest is as without RankKV."""
    ids, mask = oracles.left_pad([LONG, SHORT])
    cache = _prefill(model, ids, mask, head_budgets=None, **KEEP)
    full = _prefill(model, ids, mask, compression_ratio=1.0, head_budgets=None)
    for index in cache.layer_indices:
        layer, whole = cache.layers[index], full.layers[index]
        widest = max(row[cache.layer_indices.index(index)] for row in cache.budgets_per_row)
        for kept, everything in ((layer.keys, whole.keys), (layer.values, whole.values)):
            assert kept.shape == (*everything.shape[:2], widest, everything.shape[-1])
            assert kept.untyped_storage().nbytes() == kept.numel() * kept.element_size()
    others = [i for i in range(len(cache.layers)) if i not in cache.layer_indices]
    assert [cache.kept_lengths[i] for i in others] == [full.kept_lengths[i] for i in others]
    assert cache.full_cache_bytes() == full.full_cache_bytes() == full.cache_bytes()
    assert cache.layer_indices == [] or cache.cache_bytes() < full.cache_bytes()


def check_turn(family: families.Family, model: Any) -> None:
    """A second turn on the same cache goes on where the first ended."""
    for ratio in (1.0, KEEP["compression_ratio"]):
        cache = _cache(model, compression_ratio=ratio)
        first = oracles.generate(model, LONG, cache, 6)
        ids = torch.cat([LONG, first, oracles.random_prompt(9, seed=9)], dim=-1)
        kept = cache.kept_lengths
        second = oracles.generate(model, ids, cache, 6)
        assert cache.seen_tokens == ids.shape[1] + 5
        grown = {cache.kept_lengths[i] - kept[i] for i in cache.layer_indices}
        # The last token of a turn is fed with the next one.
        assert grown <= {1 + 9 + 5}
        if ratio == 1.0 or _is_left_alone(family):
            assert torch.equal(second, oracles.generate(model, ids, None, 6))


def check_bfloat16(family: families.Family, model: Any) -> None:
    """In bfloat16 the first token is the plain model's, and nothing breaks."""
    ids, mask = oracles.left_pad([LONG, SHORT])
    cache = _cache(model, **KEEP)
    ours = oracles.generate(model, ids, cache, NEW_TOKENS, mask)
    assert torch.equal(ours[:, :1], oracles.generate(model, ids, None, 1, mask))
    assert ours.shape == (2, NEW_TOKENS)
    assert cache.layer_indices == [] or min(cache.layer_ranks) >= 1.0
    mask = torch.cat([mask, mask.new_ones(2, NEW_TOKENS - 1)], dim=-1)
    logits = oracles.feed(model, cache, oracles.next_chunks(2, (4,)), mask)
    assert torch.isfinite(logits[0]).all()


WAYS: dict[str, Callable[[families.Family, Any], None]] = {
    "identity": check_identity,
    "compressed": check_compressed,
    "padded": check_padded,
    "beam": check_beam,
    "chunked": check_chunked,
    "bytes": check_bytes,
    "second turn": check_turn,
    "bfloat16": check_bfloat16,
}


#: On a CPU flex_attention does not compile for every shape: its uncompiled form runs here, and is slow.
FLEX_WAYS = ("compressed", "padded", "beam", "chunked", "bytes")


def list_rows(name: str) -> list[tuple[str, str]]:
    """List the ``(backend, way)`` pairs of a family."""
    family = families.FAMILIES[name]
    return [
        (backend, way)
        for backend in family.backends
        for way in (FLEX_WAYS if backend == "flex_attention" else WAYS)
    ]


def run_way(name: str, backend: str, way: str) -> str:
    """Run one way on one family; return ``"pass"``, ``"refused: ..."`` or ``"not offered: ..."``.

    Whatever else happens is raised.
    """
    family = families.FAMILIES[name]
    model = families.build(name, backend, torch.bfloat16 if way == "bfloat16" else torch.float32)
    try:
        with torch.compiler.set_stance("force_eager" if backend == "flex_attention" else "default"):
            WAYS[way](family, model)
    except UnsupportedModelError as error:
        return f"refused: {error}"
    except NotOffered as error:
        return f"not offered: {error}"
    return "pass"
