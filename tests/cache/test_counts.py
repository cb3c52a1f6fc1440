"""What a GPU would have to do beside the model: launches, waits of the host and copies, counted on a pretend GPU."""

from __future__ import annotations

import pretend_gpu
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from varlen_stand_in import copy_of_varlen

from rankkv import RankKVCache
from rankkv.cache import compressor, unpadded
from rankkv.cache.prefill import run_prefill
from rankkv.cache.schedule import CompressionSchedule
from rankkv.models.compat import cache_argument

LAYERS, TOKENS = 8, 256
SHAPE = {
    "num_hidden_layers": LAYERS, "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 1024,
}  # fmt: skip
DEFAULT = {"compression_ratio": 0.3, "profile": None}
#: Options, and the most launches a layer of a prefill: of one row, of a batch with padding.
PREFILLS = [
    ({}, 135, 196),
    ({"head_budgets": None}, 105, 168),
    ({"strategy": "power", "head_budgets": None}, 50, 95),
    ({"strategy": "uniform", "head_budgets": None}, 38, 50),
    ({"selector": "echo"}, 175, 500),
]
#: The same for a model of 32 layers with 32 heads and 2,048 tokens, one row.
LARGE = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
}
LARGE_PREFILLS = [
    ({}, 130),
    ({"head_budgets": None}, 102),
    ({"strategy": "uniform", "head_budgets": None}, 38),
]
#: Options of decoding that evicts, and the most launches a layer of a step that does not compress: of one row, padded.
EVICTING = [
    ({"decode": "bounded"}, 45, 60),
    ({"decode": "bounded", "head_budgets": None}, 30, 52),
    ({"decode": "periodic"}, 14, 25),
    ({"decode": "periodic", "head_budgets": None}, 9, 17),
]


@pytest.fixture(autouse=True)
def _shrinks_while_a_prompt_comes_in(monkeypatch):
    """Let a tiny model shrink its layers again and again, as a large one does."""
    monkeypatch.setattr(compressor, "_SMALL_BYTES", 0)


@pytest.fixture
def kernels(monkeypatch):
    """A card that has flash attention's kernels, and a stand-in for the one that decoding uses."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    stand_in = pretend_gpu.count_as_one(copy_of_varlen)
    monkeypatch.setattr(unpadded, "find_varlen", lambda: stand_in)


def make_rows(rows, tokens=TOKENS):
    """Return random ids and a mask that pads later rows on the left."""
    ids = torch.randint(3, 128, (rows, tokens), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : 40 * row] = 0
    return ids, mask


def start(model, counts, rows, tokens=TOKENS, **options):
    """Prefill on the pretend GPU; return the cache and a function that decodes one token."""
    ids, mask = map(pretend_gpu.put_on_gpu, make_rows(rows, tokens))
    cache = RankKVCache(model, **{**DEFAULT, **options})
    state = {"mask": mask}

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
@pytest.mark.parametrize(("options", "launches", "padded_launches"), PREFILLS, ids=str)
def test_a_prefill(tiny_llama, rows, options, launches, padded_launches):
    model = pretend_gpu.put_on_gpu(tiny_llama(**SHAPE))
    with pretend_gpu.pretend() as counts:
        start(model, counts, rows, **options)
        most = launches if rows == 1 else padded_launches
        assert counts.own(counts.launches) <= most * LAYERS, counts.launches.most_common(5)
        # A mask is read once a forward; what the host must know of a layer, one layer later.
        assert counts.own(counts.waits) <= (0 if rows == 1 else 3), counts.waits
        assert counts.own(counts.late) == (0 if options.get("strategy") == "uniform" else LAYERS), counts.late
        # Small lists of numbers go to the GPU from pinned memory, behind the host's back.
        assert not counts.own(counts.copies), counts.copies


@pytest.mark.parametrize(
    ("options", "launches"),
    [LARGE_PREFILLS[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in LARGE_PREFILLS[1:])],
    ids=str,
)
def test_a_prefill_of_many_layers_and_tokens_takes_no_more_launches(tiny_llama, options, launches):
    model = pretend_gpu.put_on_gpu(tiny_llama(**LARGE))
    with pretend_gpu.pretend() as counts:
        start(model, counts, 1, tokens=2048, **options)
        layers = LARGE["num_hidden_layers"]
        assert counts.own(counts.launches) <= launches * layers, counts.launches.most_common(5)
        assert not counts.own(counts.waits) + counts.own(counts.copies), counts.waits
        assert counts.own(counts.late) <= layers, counts.late


@pytest.mark.parametrize(
    ("options", "launches"),
    [({}, 122), pytest.param({"head_budgets": None}, 98, marks=pytest.mark.slow)],
    ids=str,
)
def test_a_short_prompt_shrinks_once(tiny_llama, monkeypatch, options, launches):
    model = pretend_gpu.put_on_gpu(tiny_llama(**{**LARGE, "num_attention_heads": 8}))
    layers = LARGE["num_hidden_layers"]
    with pretend_gpu.pretend() as counts:
        often, _ = start(model, counts, 1, **options)
        monkeypatch.setattr(compressor, "_SMALL_BYTES", 1 << 30)
        once, _ = start(model, counts, 1, **options)
        assert counts.own(counts.launches) <= launches * layers, counts.launches.most_common(5)
        for one, other in zip(once.layers, often.layers, strict=True):
            assert one.kept_per_head == other.kept_per_head
            assert torch.equal(one.compute_positions().cpu(), other.compute_positions().cpu())


@pytest.mark.parametrize("rows", [1, 3], ids=["single", "padded"])
@pytest.mark.parametrize("tokens", [pytest.param(TOKENS, marks=pytest.mark.slow), 700])
@pytest.mark.parametrize(
    "options",
    [options for options, *_ in PREFILLS] + [{"prefill": "streaming"}],
    ids=str,
)
def test_a_gpu_keeps_the_tokens_of_a_cpu(tiny_llama, rows, tokens, options):
    """Whatever is computed in another order there, and shrinks one layer later."""
    model = tiny_llama(**SHAPE)
    with pretend_gpu.pretend() as counts:
        found, _ = start(pretend_gpu.put_on_gpu(tiny_llama(**SHAPE)), counts, rows, tokens=tokens, **options)
        kept = [(layer.kept_per_head, layer.compute_positions().cpu()) for layer in found.layers]
    ids, mask = make_rows(rows, tokens)
    expected = RankKVCache(model, **{**DEFAULT, **options})
    run_prefill(model, expected, ids, mask if rows > 1 else None)
    assert found.budgets_per_row == expected.budgets_per_row
    for (counted, positions), layer in zip(kept, expected.layers, strict=True):
        assert counted == layer.kept_per_head
        assert torch.equal(positions, layer.compute_positions())


def test_a_gpu_holds_one_layer_more_while_a_prompt_comes_in(tiny_llama, monkeypatch):
    """Beyond the total budget and the layer under way, one that waits for its measures."""
    held = []
    after_attention = CompressionSchedule.after_attention

    def watch(schedule, layers, *args, **kwargs):
        after_attention(schedule, layers, *args, **kwargs)
        held.append(sum(layer.kept_length for layer in layers if layer.seen))

    monkeypatch.setattr(CompressionSchedule, "after_attention", watch)
    with pretend_gpu.pretend() as counts:
        cache, _ = start(
            pretend_gpu.put_on_gpu(tiny_llama(**{**SHAPE, "num_hidden_layers": 16})), counts, 1, tokens=600
        )
    total = sum(cache.budgets)
    assert total + 600 < max(held) <= 1.05 * (total + 600) + 600
    assert held[-1] == total


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
        ({"storage": "offload"}, 4, 2, 4),
        ({"positions": "packed"}, 0, 1, 2),
        ({"head_budgets": "adaptive", "decode": "bounded"}, 3, 1, 0),
        ({"selector": "keydiff", "decode": "bounded"}, 0, 9, 0),
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
        # What a CPU has, whatever is allowed here.
        with sdpa_kernel([SDPBackend.MATH]):
            return attend(*args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", note)
    with pretend_gpu.pretend() as counts:
        _, step = start(model, counts, 1, head_budgets=None)
        assert seen == [True] * LAYERS
        step()
        assert seen[LAYERS:] == [False] * LAYERS
        assert torch.backends.cuda.cudnn_sdp_enabled()
        seen.clear()
        # Without cuDNN's no kernel would be left.
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
            step()
    assert seen == [True] * LAYERS
