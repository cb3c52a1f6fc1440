"""RankKV on one GPU: answers beside those of the CPU, TTFT, TPOT, memory, waits of the host, batches and backends.

    python -m benchmarks.gpu --output results/gpu/h100.json     # under six minutes
    python -m benchmarks.gpu --small --output build/gpu.json    # tiny shapes, on a CPU too: only that it runs

Weights are random and made on the device, so nothing here says anything about quality.  Parts that no longer fit into
the budget of time are named as skipped; the record is written after every row.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import gc
import json
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import rankkv
from benchmarks.common import describe_machine, synchronize
from rankkv import RankKVCache
from rankkv.budget import STRATEGIES
from rankkv.cache import ReplayPrompt
from rankkv.cache.storage import SlotLayout
from rankkv.cache.unpadded import UnpaddedHeads
from rankkv.models.compat import cache_argument
from rankkv.selection import SELECTORS
from rankkv.utils.files import write_text_atomically

#: Name of each kind of cache, and its options; None is the plain cache.  No profile: random weights have none.
CACHES: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "default": {},
    "head_budgets=None": {"head_budgets": None},
    "strategy='uniform'": {"strategy": "uniform", "head_budgets": None},
    "selector='echo'": {"selector": "echo"},
}
#: Selectors that need a file or a profile, read the context twice, or draw at random.
_OTHERWISE = {"qfilter", "triattention", "kvzip", "kvzip_plus", "kvgrad", "random"}
#: Options whose answers on the device are compared with those on the CPU.
CORRECT: list[dict[str, Any]] = [
    {}, {"head_budgets": None}, {"head_budgets": "adaptive"},
    {"decode": "bounded"}, {"decode": "bounded", "head_budgets": None},
    {"decode": "periodic", "decode_interval": 6}, {"decode": "periodic", "decode_interval": 6, "head_budgets": None},
    {"prefill": "streaming"},
    {"storage": "int8"}, {"storage": "offload"},
    {"positions": "packed"}, {"scope": "full"}, {"max_loss": 0.05},
    *({"selector": name} for name in SELECTORS if name not in _OTHERWISE),
    *({"strategy": name} for name in STRATEGIES if name not in {"random", "threshold"}),
]  # fmt: skip
#: Ways of generating whose tokens on the device are compared with those on the CPU.
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}
_TINY = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
_EIGHT_BILLION = {
    "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
}  # fmt: skip
#: Config and class of each shape.
SHAPES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "Llama-3.1-8B": (
        LlamaConfig,
        LlamaForCausalLM,
        {**_EIGHT_BILLION, "vocab_size": 128256, "intermediate_size": 14336, "num_hidden_layers": 32},
    ),
    "Qwen3-8B": (
        Qwen3Config,
        Qwen3ForCausalLM,
        {**_EIGHT_BILLION, "vocab_size": 151936, "intermediate_size": 12288, "num_hidden_layers": 36},
    ),
}


class Bench:
    """One run: its options, the clock, and the rows so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.has_gpu = torch.cuda.is_available()
        self.small = options.small or not self.has_gpu
        self.device = torch.device("cuda" if self.has_gpu else "cpu")
        self.started = time.perf_counter()
        self.rows: list[dict[str, Any]] = []
        self.machine = {
            **describe_machine(),
            "card": torch.cuda.get_device_name() if self.has_gpu else "none",
            "cuda": torch.version.cuda,
            "small": self.small,
            "rankkv": rankkv.__version__,
        }

    def note(self, part: str, **values: Any) -> None:
        """Add a row, print it, and write the record."""
        # A ratio to what was not measured is no number, and JSON has none such.
        values = {name: None if value != value else value for name, value in values.items()}
        self.rows.append({"part": part, **values})
        shown = "  ".join(
            f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
            for name, value in values.items()
        )
        spent = time.perf_counter() - self.started
        print(f"[{spent:6.1f} s] {part}: {shown}", file=sys.stderr, flush=True)
        record = {"machine": self.machine, "seconds": round(spent, 1), "rows": self.rows}
        path = Path(self.options.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(path, json.dumps(record, indent=1) + "\n")

    def has_time(self, seconds: float, part: str, **values: Any) -> bool:
        """Return True if so many seconds are left; note what is skipped."""
        if self.small or self.options.budget - (time.perf_counter() - self.started) > seconds:
            return True
        self.note(part, **values, skipped="no time left")
        return False

    @contextlib.contextmanager
    def attempt(self, part: str, **values: Any) -> Iterator[None]:
        """Note what fails as a row, with the line of rankkv that it fails in, and go on with the next part."""
        try:
            yield
        # One broken setting must not cost the figures of the others.
        except Exception as error:
            places = [
                f"{frame.filename.rpartition('/rankkv/')[2]}:{frame.lineno}"
                for frame in traceback.extract_tb(error.__traceback__)
                if "/rankkv/" in frame.filename
            ]
            self.note(
                part, **values, failed=f"{type(error).__name__}: {str(error)[:300]}", places=places[-4:]
            )

    def build(self, name: str, layers: int | None = None, backend: str = "sdpa") -> Any:
        """Build a model of random weights, on the device and in the dtype that it runs in."""
        torch.manual_seed(0)
        config, kind, shape = SHAPES[name]
        shape = dict(_TINY) if self.small else dict(shape)
        if layers is not None and not self.small:
            shape["num_hidden_layers"] = layers
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16 if self.has_gpu else torch.float32)
        try:
            with torch.device(self.device):
                model = kind(config(**shape, max_position_embeddings=131072, attn_implementation=backend))
        finally:
            torch.set_default_dtype(before)
        return model.eval()

    def build_cache(self, model: Any, name: str, ratio: float) -> Any:
        """Build an empty cache."""
        options = CACHES[name]
        if options is None:
            return DynamicCache(config=model.config)
        return RankKVCache(model, ratio, profile=None, **options)

    def draw_ids(self, model: Any, rows: int, tokens: int) -> Tensor:
        """Draw random ids on the device."""
        return torch.randint(0, model.config.vocab_size, (rows, tokens), device=self.device)

    def clear(self) -> float:
        """Free what is free, start measuring the peak, and return the GiB held."""
        gc.collect()
        if not self.has_gpu:
            return 0.0
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**30

    def read_memory(self) -> tuple[float, float]:
        """Return GiB held now, and at the peak."""
        if not self.has_gpu:
            return 0.0, 0.0
        return torch.cuda.memory_allocated() / 2**30, torch.cuda.max_memory_allocated() / 2**30


@torch.no_grad()
def prefill(model: Any, cache: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Run a prompt."""
    given: dict[str, Any] = {}
    if mask is not None:
        given = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    return model(ids, use_cache=True, logits_to_keep=1, **given, **cache_argument(cache)).logits[:, -1]


@torch.no_grad()
def step(model: Any, cache: Any, token: Tensor, past: int, mask: Tensor | None = None) -> Tensor:
    """Decode one token of each row."""
    given: dict[str, Any] = {"position_ids": torch.full((token.shape[0], 1), past, device=token.device)}
    if mask is not None:
        given = {"attention_mask": mask, "position_ids": mask.sum(-1, keepdim=True) - 1}
    return model(token, use_cache=True, **given, **cache_argument(cache)).logits[:, -1]


def decode(model: Any, cache: Any, token: Tensor, past: int, count: int) -> tuple[float, float]:
    """Milliseconds of a step, and until the host is done with it, over ``count`` steps after three that warm up."""
    for place in range(3):
        token = step(model, cache, token, past + place).argmax(-1, keepdim=True)
    synchronize()
    begun = time.perf_counter()
    for place in range(3, 3 + count):
        token = step(model, cache, token, past + place).argmax(-1, keepdim=True)
    host = time.perf_counter() - begun
    synchronize()
    return 1e3 * (time.perf_counter() - begun) / count, 1e3 * host / count


@contextlib.contextmanager
def count_waits() -> Iterator[collections.Counter[str]]:
    """Count the host's waits inside the block, by the line of rankkv that made them."""
    found: collections.Counter[str] = collections.Counter()

    def take(
        message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None
    ) -> None:
        if "synchroniz" not in str(message):
            return
        frame: Any = sys._getframe(1)
        while frame is not None:
            _, inside, place = frame.f_code.co_filename.rpartition("/rankkv/")
            if inside:
                found[f"rankkv/{place}:{frame.f_lineno}"] += 1
                return
            frame = frame.f_back
        found["model"] += 1

    if not torch.cuda.is_available():
        yield found
        return
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = take
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")


def measure_correct(bench: Bench) -> None:
    """Compare one tiny float32 model on the device and on the CPU: kept tokens, and the logits of 16 steps."""
    models = build_pair(bench)
    ids, mask = draw_padded()
    for rows in (1, 3):
        for options in CORRECT[: 3 if bench.small else None]:
            named = {"rows": rows, "options": str(options)}
            if not bench.has_time(190, "correct", **named):
                continue
            with bench.attempt("correct", **named):
                found = []
                for model, device in zip(models, (torch.device("cpu"), bench.device), strict=True):
                    cache = RankKVCache(model, **{"compression_ratio": 0.3, "profile": None, **options})
                    tokens, real = ids[:rows].to(device), mask[:rows].to(device)
                    logits = [prefill(model, cache, tokens, real)]
                    places = list_positions(cache)
                    for place in range(16):
                        real = torch.cat([real, real[:, -1:]], dim=1)
                        logits.append(step(model, cache, tokens[:, place : place + 1], 400 + place, real))
                    found.append((cache.kept_per_head, places, torch.stack(logits).float().cpu()))
                bench.note(
                    "correct",
                    **named,
                    same_counts=found[0][0] == found[1][0],
                    same_tokens=found[0][1] == found[1][1],
                    logit_error=float((found[0][2] - found[1][2]).abs().max()),
                )


def measure_ways(bench: Bench) -> None:
    """Compare the tokens that one tiny float32 model generates on the device and on the CPU, way by way."""
    models = build_pair(bench)
    devices = (torch.device("cpu"), bench.device)
    ids, mask = draw_padded()
    wanted = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for way, options in WAYS.items():
        # transformers looks ahead in the prompt for one row at a time.
        rows = 1 if "prompt_lookup_num_tokens" in options else 3
        with bench.attempt("ways", way=way):
            answers = [
                model.generate(
                    ids[:rows].to(device), attention_mask=mask[:rows].to(device), **wanted, **options,
                    **cache_argument(RankKVCache(model, 0.3, profile=None)),
                ).tolist()
                for model, device in zip(models, devices, strict=True)
            ]  # fmt: skip
            bench.note("ways", way=way, same_tokens=answers[0] == answers[1])
    replay = ReplayPrompt([5, 6], [7, 8], [9])
    for selector in ("auto", "kvzip", "kvzip_plus", "kvgrad"):
        with bench.attempt("ways", way=f"compress, {selector}"), tempfile.TemporaryDirectory() as folder:
            answers = []
            for model, device in zip(models, devices, strict=True):
                context, question = ids[:1, :380].to(device), ids[:1].to(device)
                cache = rankkv.compress(
                    model, context, compression_ratio=0.3, selector=selector, profile=None, tokenizer=replay
                )
                answers.append(ask(model, cache.copy(), question, wanted))
                path = cache.save(Path(folder) / f"{device.type}-{len(answers)}.safetensors")
                # The other device continues from the file.
                other, place = next((m, d) for m, d in zip(models, devices, strict=True) if m is not model)
                answers.append(ask(other, RankKVCache.load(path, other), question.to(place), wanted))
            same = all(answer == answers[0] for answer in answers)
            bench.note("ways", way=f"compress, {selector}, save, load elsewhere", same_tokens=same)


def measure_numerics(bench: Bench) -> None:
    """Compare what is kept in bfloat16 on the device and on the CPU, and in float32 with and without TF32."""
    ids, _ = draw_padded()
    allowed = torch.backends.cuda.matmul.allow_tf32
    for selector in ("snapkv", "echo"):
        found: dict[str, tuple[list[Any], Tensor]] = {}
        for name, dtype in (
            ("bfloat16", torch.bfloat16),
            ("float32", torch.float32),
            ("tf32", torch.float32),
        ):
            for model, device in zip(build_pair(bench), (torch.device("cpu"), bench.device), strict=True):
                cache = RankKVCache(model.to(dtype), 0.3, profile=None, selector=selector)
                torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
                try:
                    prefill(model, cache, ids[:1].to(device))
                finally:
                    torch.backends.cuda.matmul.allow_tf32 = allowed
                found[f"{name} on {device.type}"] = (list_positions(cache), torch.tensor(cache.layer_ranks))
        for one, other in (("bfloat16", "bfloat16"), ("float32", "float32"), ("float32", "tf32")):
            (kept, ranks), (others, other_ranks) = (
                found[f"{one} on cpu"],
                found[f"{other} on {bench.device.type}"],
            )
            bench.note(
                "numerics",
                selector=selector,
                cpu=one,
                device=other,
                same_kept=compute_shared(kept, others),
                # Echo measures no rank.
                rank_error=float(((ranks - other_ranks) / ranks).abs().max()) if len(ranks) else None,
            )


def compute_shared(kept: list[Any], others: list[Any]) -> float:
    """Return the share of the kept tokens of all layers and heads that the others keep too."""
    shared, total = 0, 0
    for layer, other_layer in zip(kept, others, strict=True):
        for head, other_head in zip(layer[0], other_layer[0], strict=True):
            mine = {place for place in head if place >= 0}
            shared += len(mine & set(other_head))
            total += len(mine)
    return shared / total


def ask(model: Any, cache: Any, ids: Tensor, options: dict[str, Any]) -> list[list[int]]:
    """Generate after ids whose start the cache has seen."""
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), **options, **cache_argument(cache)
    ).tolist()


def build_pair(bench: Bench) -> tuple[Any, Any]:
    """Build one tiny float32 model twice: on the CPU and on the device."""
    torch.manual_seed(1)
    on_cpu = LlamaForCausalLM(LlamaConfig(**_TINY, attn_implementation="sdpa")).eval()
    on_device = LlamaForCausalLM(LlamaConfig(**_TINY, attn_implementation="sdpa")).eval()
    on_device.load_state_dict(on_cpu.state_dict())
    return on_cpu, on_device.to(bench.device)


def draw_padded() -> tuple[Tensor, Tensor]:
    """Draw three rows of 400 ids, two of them padded, and their mask."""
    ids = torch.randint(0, 256, (3, 400), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :90], mask[2, :200] = 0, 0
    return ids, mask


def list_positions(cache: RankKVCache) -> list[Any]:
    """Positions of the kept tokens of each layer and head; -1 where a slot is empty."""
    found = []
    for index in cache.layer_indices:
        layer = cache.layers[index]
        places, valid = layer.compute_positions().cpu(), layer.compute_slot_valid()
        if valid is not None:
            valid = (valid if valid.dim() == 3 else valid[:, None]).cpu()
            places = torch.where(valid, places, -1)
        found.append(places.tolist())
    return found


def measure_unpadded(bench: Bench) -> None:
    """Compare decoding without padding with the padded way, in half precision: logits and milliseconds of a step."""
    model = bench.build("Llama-3.1-8B", layers=4)
    ids = bench.draw_ids(model, 1, 300 if bench.small else 16384)
    found: dict[str, tuple[Tensor, tuple[float, float], int]] = {}
    allowed = RankKVCache._may_stay_unpadded
    for way in ("without padding", "padded"):
        cache = bench.build_cache(model, "default", 0.2)
        try:
            if way == "padded":
                RankKVCache._may_stay_unpadded = lambda *_: False  # type: ignore[method-assign]
            prefill(model, cache, ids)
            logits = torch.stack(
                [step(model, cache, ids[:, -1:], ids.shape[1] + place) for place in range(4)]
            )
            taken = decode(model, cache, ids[:, -1:], ids.shape[1] + 4, 8 if bench.small else 32)
        finally:
            RankKVCache._may_stay_unpadded = allowed  # type: ignore[method-assign]
        growing = sum(getattr(layer, "is_growing", False) for layer in cache.layers)
        found[way] = logits.float(), taken, growing
    bench.note(
        "unpadded",
        tokens=ids.shape[1],
        step_ms=found["without padding"][1][0],
        padded_step_ms=found["padded"][1][0],
        layers_without_padding=found["without padding"][2],
        logit_error=float((found["without padding"][0] - found["padded"][0]).abs().max()),
        **measure_kernel(bench),
    )


def measure_kernel(bench: Bench) -> dict[str, float]:
    """Error of the attention without padding, and of torch's own over padded heads, relative to float64."""
    generator = torch.Generator().manual_seed(4)
    counts = torch.randint(20, 300 if bench.small else 4000, (2, 4), generator=generator)
    layout = SlotLayout.of_counts(counts.tolist(), int(counts.max()), bench.device)
    dtype = torch.bfloat16 if bench.has_gpu else torch.float32

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(bench.device, dtype)

    kept = draw(int(counts.sum()), 64), draw(int(counts.sum()), 64)
    later = draw(2, 4, 1, 64), draw(2, 4, 1, 64)
    heads = UnpaddedHeads(layout, kept, (later[0][:, :, :0], later[1][:, :, :0]))
    query = draw(2, 12, 1, 64)
    heads.append(*later)
    output = heads.attend(query, None).transpose(1, 2)
    keys, values = (torch.cat([layout.pad(part), new], dim=2) for part, new in zip(kept, later, strict=True))
    slots = torch.arange(keys.shape[2], device=bench.device)
    mask = (slots >= keys.shape[2] - 1 - counts.to(bench.device)[..., None]).repeat_interleave(3, dim=1)
    wide = [states.repeat_interleave(3, dim=1) for states in (keys, values)]

    def attend(kind: torch.dtype) -> Tensor:
        return scaled_dot_product_attention(
            query.to(kind), wide[0].to(kind), wide[1].to(kind), attn_mask=mask[:, :, None]
        ).double()

    wanted = attend(torch.float64)
    return {
        "kernel_error": float((output.double() - wanted).norm() / wanted.norm()),
        "padded_kernel_error": float((attend(dtype) - wanted).norm() / wanted.norm()),
    }


def measure_waits(bench: Bench, model: Any) -> None:
    """Count the host's waits of a prefill and of a decode step."""
    ids = bench.draw_ids(model, 1, 300 if bench.small else 8192)
    for name in CACHES:
        with bench.attempt("waits", cache=name):
            cache = bench.build_cache(model, name, 0.3)
            with count_waits() as waits:
                prefill(model, cache, ids)
            for place in range(2):
                step(model, cache, ids[:, -1:], ids.shape[1] + place)
            with count_waits() as later:
                step(model, cache, ids[:, -1:], ids.shape[1] + 2)
            bench.note(
                "waits",
                cache=name,
                tokens=ids.shape[1],
                prefill_a_layer=sum(waits.values()) / model.config.num_hidden_layers,
                step=sum(later.values()),
                places=dict(waits.most_common(10)),
                step_places=dict(later.most_common(5)),
            )
            del cache
        bench.clear()


def measure_ttft(bench: Bench, model: Any, shape: str, lengths: tuple[int, ...], repeats: int) -> None:
    """Time prefills in turn; note the memory at their peak and afterwards, over that of the model."""
    for tokens in lengths:
        if not bench.has_time(60, "ttft", shape=shape, tokens=tokens):
            continue
        ids = bench.draw_ids(model, 1, tokens)
        seconds: dict[str, list[float]] = {name: [] for name in CACHES}
        memory: dict[str, dict[str, float]] = {}
        # The longest is measured once: after the shorter ones its first run is not cold.
        for turn in range(1) if tokens > 40000 else range(-1, repeats):
            for name in list(CACHES) if turn % 2 == 0 else list(CACHES)[::-1]:
                before = bench.clear()
                with bench.attempt("ttft", shape=shape, tokens=tokens, cache=name):
                    cache = bench.build_cache(model, name, 0.3)
                    synchronize()
                    begun = time.perf_counter()
                    prefill(model, cache, ids)
                    host = time.perf_counter() - begun
                    synchronize()
                    if turn >= 0:
                        seconds[name].append(time.perf_counter() - begun)
                    held, peak = bench.read_memory()
                    memory[name] = {
                        "host_ms": 1e3 * host, "peak_GiB": peak - before, "held_GiB": held - before,
                    }  # fmt: skip
                cache = None
        for name in CACHES:
            if len(seconds[name]) != len(seconds["plain"]):
                continue
            ratios = [ours / plain for ours, plain in zip(seconds[name], seconds["plain"], strict=True)]
            bench.note(
                "ttft",
                shape=shape,
                tokens=tokens,
                cache=name,
                ms=1e3 * statistics.median(seconds[name]),
                over_plain=statistics.median(ratios),
                **memory[name],
            )


def measure_tpot(
    bench: Bench, model: Any, tokens: int, ratios: tuple[float, ...], rows: int, steps: int, turns: int = 3
) -> None:
    """Time decode steps of all caches in turn, over those of the plain one; note the memory that each holds."""
    ids = bench.draw_ids(model, rows, tokens)
    # cuDNN's attention builds a plan in each step of the plain cache; without it torch takes flash attention.
    settings = [("plain", 1.0), ("plain, without cuDNN", 1.0), ("default", 1.0)] + [
        (name, ratio) for ratio in ratios for name in ("default", "head_budgets=None")
    ]
    caches: dict[tuple[str, float], Any] = {}
    held: dict[tuple[str, float], float] = {}
    for name, ratio in settings:
        if not bench.has_time(30, "tpot", rows=rows, tokens=tokens, cache=name, kept=ratio):
            continue
        if "without" in name:
            # The same cache: only torch's choice differs.
            if ("plain", 1.0) in caches:
                caches[name, ratio], held[name, ratio] = caches["plain", 1.0], held["plain", 1.0]
            continue
        before = bench.clear()
        with bench.attempt("tpot", rows=rows, tokens=tokens, cache=name, kept=ratio):
            cache = bench.build_cache(model, name, ratio)
            prefill(model, cache, ids)
            decode(model, cache, ids[:, -1:], tokens, 1)
            caches[name, ratio], held[name, ratio] = cache, bench.read_memory()[0] - before
        cache = None
    times: dict[tuple[str, float], list[tuple[float, float]]] = {setting: [] for setting in caches}
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    for turn in range(turns):
        for setting in list(caches) if turn % 2 == 0 else list(caches)[::-1]:
            with bench.attempt("tpot", rows=rows, tokens=tokens, cache=setting[0], kept=setting[1]):
                torch.backends.cuda.enable_cudnn_sdp(cudnn and "without" not in setting[0])
                try:
                    cache = caches[setting]
                    times[setting].append(decode(model, cache, ids[:, -1:], cache.get_seq_length(), steps))
                finally:
                    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    plain, steady = times.get(("plain", 1.0), []), times.get(("plain, without cuDNN", 1.0), [])
    for (name, ratio), found in times.items():
        if len(found) < turns:
            # Named above, as what failed.
            continue
        bench.note(
            "tpot",
            rows=rows,
            tokens=tokens,
            cache=name,
            kept=ratio,
            ms=statistics.median(taken for taken, _ in found),
            host_ms=statistics.median(host for _, host in found),
            over_plain=compute_paired(found, plain),
            over_plain_without_cudnn=compute_paired(found, steady),
            held_GiB=held[name, ratio],
            held_over_plain=held[name, ratio] / held["plain", 1.0] if held.get(("plain", 1.0)) else None,
        )


def compute_paired(found: list[tuple[float, float]], base: list[tuple[float, float]]) -> float | None:
    """Return the median of the paired ratios of times; None where there is nothing to compare with."""
    ratios = [one[0] / other[0] for one, other in zip(found, base, strict=False)]
    return statistics.median(ratios) if ratios else None


def measure_backends(bench: Bench) -> None:
    """Run four layers with each attention backend: whether it runs, and how long a step takes."""
    backends = ("sdpa", "eager") if bench.small else ("sdpa", "eager", "flex_attention", "flash_attention_2")
    for backend in backends:
        if not bench.has_time(30, "backends", backend=backend):
            continue
        # A backend that is not installed, or that the library refuses, is a row like any other.
        with bench.attempt("backends", backend=backend):
            model = bench.build("Llama-3.1-8B", layers=4, backend=backend)
            ids = bench.draw_ids(model, 1, 200 if bench.small else 4096)
            for name in ("plain", "default"):
                cache = bench.build_cache(model, name, 0.3)
                prefill(model, cache, ids)
                taken, _ = decode(model, cache, ids[:, -1:], ids.shape[1], 4 if bench.small else 16)
                bench.note("backends", backend=backend, tokens=ids.shape[1], cache=name, ms=taken)


def run(bench: Bench) -> None:
    """Run the parts, those that everything else relies on first."""
    parts: dict[str, Callable[[], None]] = {
        "correct": lambda: measure_correct(bench),
        "ways": lambda: measure_ways(bench),
        "numerics": lambda: measure_numerics(bench),
        "unpadded": lambda: measure_unpadded(bench),
    }
    for name, part in parts.items():
        with bench.attempt(name):
            part()
        bench.clear()
    model = bench.build("Llama-3.1-8B")
    measure_waits(bench, model)
    measure_ttft(
        bench, model, "Llama-3.1-8B", (200,) if bench.small else (8192, 32768, 65536), 1 if bench.small else 2
    )
    ratios = (0.3,) if bench.small else (0.1, 0.2, 0.3)
    measure_tpot(bench, model, 300 if bench.small else 32768, ratios, rows=1, steps=24)
    for rows in (1, 8):
        measure_tpot(bench, model, 200 if bench.small else 16384, ratios[:1], rows=rows, steps=16)
    del model
    bench.clear()
    if bench.has_time(45, "ttft", shape="Qwen3-8B"):
        measure_ttft(bench, bench.build("Qwen3-8B"), "Qwen3-8B", (200,) if bench.small else (16384,), 1)
    bench.clear()
    measure_backends(bench)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="tiny shapes, for a CPU too")
    parser.add_argument("--budget", type=float, default=330.0, help="seconds after which parts are skipped")
    parser.add_argument("--output", default="results/gpu/gpu.json")
    run(Bench(parser.parse_args()))


if __name__ == "__main__":
    main()
