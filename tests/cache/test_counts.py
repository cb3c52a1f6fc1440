"""What a GPU would have to do beside the model: launches, waits of the host and copies, counted on a pretend GPU."""

from __future__ import annotations

import pretend_gpu
import pytest
import torch
from varlen_stand_in import copy_of_varlen

from rankkv import RankKVCache
from rankkv.cache import unpadded
from rankkv.models.compat import cache_argument

LAYERS, TOKENS = 8, 256
SHAPE = {
    "num_hidden_layers": LAYERS, "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 1024,
}  # fmt: skip
DEFAULT = {"compression_ratio": 0.3, "profile": None}
#: Options, and the most launches and waits a layer of a prefill; the same of a batch with padding.
PREFILLS = [
    ({}, 200, 2, 245, 2.5),
    ({"head_budgets": None}, 160, 3, 235, 3.5),
    ({"strategy": "power", "head_budgets": None}, 125, 2, 155, 2.5),
    ({"strategy": "uniform", "head_budgets": None}, 65, 0, 75, 0.5),
]
#: Options of decoding that evicts, and the most launches a layer of a step that does not compress: of one row, padded.
EVICTING = [
    ({"decode": "bounded"}, 45, 60),
    ({"decode": "bounded", "head_budgets": None}, 30, 52),
    ({"decode": "periodic"}, 14, 25),
    ({"decode": "periodic", "head_budgets": None}, 9, 17),
]


@pytest.fixture
def kernels(monkeypatch):
    """A card that has flash attention's kernels, and a stand-in for the one that decoding uses."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    stand_in = pretend_gpu.count_as_one(copy_of_varlen)
    monkeypatch.setattr(unpadded, "find_varlen", lambda: stand_in)


def start(model, counts, rows, **options):
    """Prefill on the pretend GPU; return the cache and a function that decodes one token."""
    ids = torch.randint(3, 128, (rows, TOKENS), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : 40 * row] = 0
    ids, mask = pretend_gpu.put_on_gpu(ids), pretend_gpu.put_on_gpu(mask)
    cache = RankKVCache(model, **{**DEFAULT, **options})
    state = {"mask": mask, "seen": TOKENS}

    def run(tokens):
        given = {}
        if rows > 1:
            positions = (state["mask"].cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
            given = {"attention_mask": state["mask"], "position_ids": positions}
        counts.clear()
        with torch.no_grad():
            return model(tokens, **given, **cache_argument(cache)).logits

    def step():
        state["mask"] = torch.cat([state["mask"], state["mask"][:, -1:]], dim=1)
        return run(ids[:, :1])

    run(ids)
    return cache, step


@pytest.mark.parametrize("rows", [1, 3], ids=["single", "padded"])
@pytest.mark.parametrize(
    ("options", "launches", "waits", "padded_launches", "padded_waits"), PREFILLS, ids=str
)
def test_a_prefill(tiny_llama, rows, options, launches, waits, padded_launches, padded_waits):
    model = pretend_gpu.put_on_gpu(tiny_llama(**SHAPE))
    with pretend_gpu.pretend() as counts:
        start(model, counts, rows, **options)
        launches, waits = (launches, waits) if rows == 1 else (padded_launches, padded_waits)
        assert counts.own(counts.launches) <= launches * LAYERS, counts.launches.most_common(5)
        assert counts.own(counts.waits) <= waits * LAYERS, counts.waits
        # Small lists of numbers go to the GPU from pinned memory, behind the host's back.
        assert not counts.own(counts.copies), counts.copies


@pytest.mark.parametrize("rows", [1, 3], ids=["single", "padded"])
@pytest.mark.parametrize(
    ("options", "launches", "padded_launches"),
    [({}, 5, 12), ({"head_budgets": None}, 2, 6), ({"storage": "int8"}, 25, 30)],
    ids=str,
)
def test_a_decode_step(tiny_llama, rows, options, launches, padded_launches):
    model = pretend_gpu.put_on_gpu(tiny_llama(**SHAPE))
    with pretend_gpu.pretend() as counts:
        _, step = start(model, counts, rows, **options)
        # The first step checks positions, and the next makes room.
        step(), step(), step()
        most = launches if rows == 1 else padded_launches
        assert counts.own(counts.launches) <= most * LAYERS, counts.launches.most_common(5)
        assert not counts.own(counts.waits), counts.waits
        assert not counts.own(counts.copies), counts.copies


@pytest.mark.parametrize("rows", [1, 3], ids=["single", "padded"])
@pytest.mark.parametrize(("options", "launches", "padded_launches"), EVICTING, ids=str)
def test_a_step_of_decoding_that_evicts(tiny_llama, rows, options, launches, padded_launches):
    model = pretend_gpu.put_on_gpu(tiny_llama(**SHAPE))
    with pretend_gpu.pretend() as counts:
        cache, step = start(model, counts, rows, **options)
        # The first step checks positions, and room is made in the next.
        step(), step(), step()
        held = [layer.kept_length for layer in cache.layers]
        step()
        # Bounded layers stay at their budgets; with "periodic" all grow until the next compression.
        grown = [layer.kept_length - before for layer, before in zip(cache.layers, held, strict=True)]
        assert grown == [options["decode"] == "periodic"] * LAYERS
        most = launches if rows == 1 else padded_launches
        assert counts.own(counts.launches) <= most * LAYERS, counts.launches.most_common(5)
        # What a mask hides beside padding is read once a step, not in each layer.
        assert counts.own(counts.waits) == (rows > 1), counts.waits
        assert not counts.own(counts.copies), counts.copies


@pytest.mark.parametrize(
    ("options", "of_prefill", "waits", "copies"),
    [
        ({"storage": "offload"}, 6, 2, 4),
        ({"positions": "packed"}, 3, 1, 2),
        ({"head_budgets": "adaptive", "decode": "bounded"}, 6, 1, 0),
        ({"selector": "keydiff", "decode": "bounded"}, 2, 9, 0),
    ],
    ids=str,
)
def test_what_still_waits_in_each_layer(tiny_llama, options, of_prefill, waits, copies):
    model = pretend_gpu.put_on_gpu(tiny_llama(**SHAPE))
    with pretend_gpu.pretend() as counts:
        _, step = start(model, counts, 1, **options)
        assert counts.own(counts.waits) <= of_prefill * LAYERS, counts.waits
        step(), step()
        assert 0 < counts.own(counts.waits) <= waits * LAYERS, counts.waits
        assert counts.own(counts.copies) <= copies * LAYERS, counts.copies


@pytest.mark.usefixtures("kernels")
def test_a_step_without_padding_takes_three_launches_a_layer(tiny_llama):
    """Two writes and one attention, in half precision; nothing is masked, padded, joined or waited for."""
    model = pretend_gpu.put_on_gpu(tiny_llama(**SHAPE).to(torch.bfloat16))
    with pretend_gpu.pretend() as counts:
        cache, step = start(model, counts, 1)
        step(), step()
        assert not counts.own(counts.waits), counts.waits
        logits = step()
        growing = sum(getattr(layer, "is_growing", False) for layer in cache.layers)
        assert growing == sum(layer.kept_valid is not None for layer in cache.layers) > LAYERS // 2
        assert counts.own(counts.launches) <= 3 * LAYERS, counts.launches.most_common(5)
        assert not counts.own(counts.waits) + counts.own(counts.copies)
        logits = logits.cpu()
    # The same model on the CPU, where each head attends by itself.
    plain = tiny_llama(**SHAPE).to(torch.bfloat16)
    cache = RankKVCache(plain, **DEFAULT)
    ids = torch.randint(3, 128, (1, TOKENS), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        for tokens in (ids, ids[:, :1], ids[:, :1], ids[:, :1]):
            wanted = plain(tokens, **cache_argument(cache)).logits
    # In half precision the two may keep different tokens, and random weights have logits of about one.
    assert (logits - wanted).abs().mean() < 0.05


def test_only_decode_steps_do_without_cudnns_plans(tiny_llama, monkeypatch):
    """cuDNN builds a plan for each new number of keys; layers and heads with budgets of their own differ in it."""
    model = pretend_gpu.put_on_gpu(tiny_llama(**SHAPE))
    attend, seen = torch.nn.functional.scaled_dot_product_attention, []

    def note(*args, **options):
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attend(*args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", note)
    with pretend_gpu.pretend() as counts:
        _, step = start(model, counts, 1, head_budgets=None)
        assert seen == [True] * LAYERS
        step()
    assert seen[LAYERS:] == [False] * LAYERS
    assert torch.backends.cuda.cudnn_sdp_enabled()
