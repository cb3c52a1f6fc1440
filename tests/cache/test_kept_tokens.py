"""Which tokens a cache kept, against the positions that its layers' keys really belong to."""

from __future__ import annotations

import pytest
import torch

from rankkv import RankKVCache, compress
from rankkv.cache.kept_tokens import analyze_kept_tokens
from rankkv.errors import CacheStateError, InputError, UnsupportedModelError
from rankkv.evaluation import record_prefill
from rankkv.models.compat import cache_argument


def find_kept(model, ids, cache):
    """Count heads by looking each kept key up among the keys of the uncompressed cache."""
    full = record_prefill(model, ids).build_full_cache()
    counts = torch.zeros(len(cache.layer_indices), ids.shape[1], dtype=torch.long)
    for place, index in enumerate(cache.layer_indices):
        whole, layer = full.layers[index].keys[0], cache.layers[index]
        per_head = layer.kept_per_head[0]
        for head, count in enumerate(per_head):
            for key in layer.keys[0, head, layer.keys.shape[-2] - count :]:
                (position,) = (whole[head] - key).abs().amax(-1).lt(1e-5).nonzero()[:, 0].tolist()
                counts[place, position] += 1
    return counts


@pytest.mark.parametrize(
    "options",
    [{}, {"selector": "tova"}, {"head_budgets": "adaptive"}, {"strategy": "uniform", "storage": "offload"}],
    ids=["heads differ", "heads agree", "head budgets", "at rest"],
)
def test_counts_are_where_the_kept_keys_come_from(tiny_llama, options):
    model, ids = tiny_llama(), torch.randint(3, 128, (1, 90), generator=torch.manual_seed(1))
    cache = compress(model, ids, compression_ratio=0.4, **options)
    kept = analyze_kept_tokens(cache)
    assert kept.counts.equal(find_kept(model, ids, cache))
    assert kept.kv_heads == [2, 2, 2]
    fates = kept.count_fates()
    total = kept.counts.sum(0)
    assert fates == {
        "all": int((total == 6).sum()),
        "some": int(((total > 0) & (total < 6)).sum()),
        "none": int((total == 0).sum()),
    }
    assert min(fates.values()) > 0
    torch.testing.assert_close(kept.compute_shares(), total / 6)
    assert kept.count_layers().equal((kept.counts > 0).sum(0))


def test_a_padded_row_counts_its_own_tokens(tiny_llama):
    model, ids = tiny_llama(), torch.randint(3, 128, (1, 70), generator=torch.manual_seed(2))
    alone = analyze_kept_tokens(compress(model, ids, compression_ratio=0.4))
    batch = torch.cat([torch.randint(3, 128, (1, 90)), torch.cat([torch.zeros(1, 20).long(), ids], 1)])
    mask = torch.ones_like(batch)
    mask[1, :20] = 0
    cache = compress(model, batch, mask, compression_ratio=0.4)
    row = analyze_kept_tokens(cache, row=1)
    assert row.tokens == 70
    assert row.counts.equal(alone.counts)
    with pytest.raises(InputError, match="row 2 is not in a batch of 2"):
        analyze_kept_tokens(cache, row=2)


def test_everything_kept_and_generated_tokens_left_out(tiny_llama):
    model, ids = tiny_llama(), torch.arange(3, 60)[None]
    cache = RankKVCache(model, compression_ratio=1.0)
    model.generate(ids, max_new_tokens=5, do_sample=False, **cache_argument(cache))
    assert analyze_kept_tokens(cache).count_fates() == {"all": 57, "some": 0, "none": 0}


def test_decoding_that_evicts_is_seen(tiny_llama):
    model, ids = tiny_llama(), torch.arange(3, 63)[None]
    cache = RankKVCache(model, budget=30, decode="bounded")
    before = analyze_kept_tokens(compress(model, ids, budget=30)).counts.sum()
    model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False, **cache_argument(cache))
    assert analyze_kept_tokens(cache).counts.sum() < before


def test_a_model_without_layers_to_compress_is_named(tiny_llama):
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = MistralForCausalLM(
        MistralConfig(vocab_size=64, num_key_value_heads=2, sliding_window=16, **sizes)
    ).eval()
    with pytest.warns(UserWarning, match="no layer"):
        cache = RankKVCache(model)
    model.generate(torch.arange(40)[None], max_new_tokens=2, **cache_argument(cache))
    with pytest.raises(UnsupportedModelError, match="nothing to explain"):
        analyze_kept_tokens(cache)


def test_before_the_prefill_there_is_nothing_to_explain(tiny_llama):
    with pytest.raises(CacheStateError, match="not compressed yet"):
        analyze_kept_tokens(RankKVCache(tiny_llama()))
