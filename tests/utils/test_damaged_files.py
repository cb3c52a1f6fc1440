"""Fuzz of every file that is read: a damaged one is refused by an error of the library, or loads right, in bounds."""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from rankkv import RankKVCache, RankProfile, compress
from rankkv.cache.file_checks import compute_digest
from rankkv.errors import RankKVError
from rankkv.evaluation.results import ResultStore, read_rows, write_rows
from rankkv.evaluation.sweep.config import read_sweep_config
from rankkv.models.compat import cache_argument
from rankkv.models.gguf_file import check_gguf
from rankkv.profile.known import describe_shape, sample_weights
from rankkv.selection.qfilter import load_query_filters
from rankkv.selection.triattention import load_query_centres

PROMPT = torch.randint(3, 128, (1, 60), generator=torch.Generator().manual_seed(1))
# Room for address space beyond what the process has, and seconds of this process' time, for one file.
MOST_BYTES, MOST_SECONDS = 2 * 2**30, 30
#: Values that no writer puts into a file, and some that are only wrong in their place.
VALUES: list[Any] = [
    None, True, -1, 0, 1, 10**12, 10**400, 0.5, 1e300, -1e300, math.nan, math.inf, "", "x", "../../x", "1",
    [], {}, [[]], [None], {"a": 1}, [0] * 1000,
]  # fmt: skip
DEPTHS = [200, 2_000, 100_000]


# -- damage -------------------------------------------------------------------------------------------------------


def damage_bytes(draw: Any, content: bytes) -> bytes:
    """Return a content that was cut, had bits flipped, or had a stretch overwritten or doubled."""
    kind = draw(st.sampled_from(["cut", "flip", "flip near the start", "overwrite", "double"]))
    place = draw(st.integers(0, max(0, len(content) - 1)))
    if kind == "cut":
        return content[:place]
    if kind == "double":
        return content[:place] + content[place // 2 :]
    changed = bytearray(content)
    if kind == "overwrite":
        stretch = draw(st.binary(min_size=1, max_size=16))
        changed[place : place + len(stretch)] = stretch
        return bytes(changed)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, (len(content) if kind == "flip" else min(400, len(content))) - 1)))
        changed[at] ^= 1 << draw(st.integers(0, 7))
    return bytes(changed)


def damage_record(draw: Any, record: Any) -> None:
    """Replace, remove or add one value somewhere in a JSON record."""
    spot = record
    while True:
        keys = list(spot) if isinstance(spot, dict) else list(range(len(spot)))
        key = draw(st.sampled_from(keys))
        inner = spot[key]
        if isinstance(inner, dict | list) and inner and draw(st.integers(0, 4)):
            spot = inner
            continue
        kind = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if kind == "replace":
            spot[key] = draw(st.sampled_from(VALUES))
        elif kind == "remove":
            del spot[key]
        elif isinstance(spot, dict):
            spot[draw(st.sampled_from(["update", "format", "x" * 300]))] = draw(st.sampled_from(VALUES))
        else:
            spot.insert(key, draw(st.sampled_from(VALUES)))
        return


def damage_json(draw: Any, content: bytes) -> bytes:
    if draw(st.booleans()):
        return damage_bytes(draw, content)
    if not draw(st.integers(0, 9)):
        return b'{"config": ' + b"[" * draw(st.sampled_from(DEPTHS))
    record = json.loads(content)
    damage_record(draw, record)
    return json.dumps(record).encode()


def damage_yaml(draw: Any, content: bytes) -> bytes:
    kind = draw(st.sampled_from(["bytes", "bytes", "lines", "value", "value", "deep", "bomb", "merge"]))
    lines = content.decode().splitlines()
    place = draw(st.integers(0, len(lines) - 1))
    if kind == "bytes":
        return damage_bytes(draw, content)
    if kind == "lines":
        lines.insert(place, lines[draw(st.integers(0, len(lines) - 1))])
    if kind == "value":
        lines[place] = lines[place].partition(":")[0] + ": " + repr(draw(st.sampled_from(VALUES)))
    if kind == "deep":
        lines.append("options: " + draw(st.sampled_from(["[", "{a: "])) * draw(st.sampled_from(DEPTHS)))
    if kind == "bomb":
        lines += ["a0: &a0 [1, 2, 3]"]
        lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    if kind == "merge":
        lines += [
            "<<: {seeds: [1]}",
            draw(st.sampled_from(["a: &a [*a]", "<<: [1]", "? [1]\n: 2", "b: !!int x"])),
        ]
    return "\n".join(lines).encode()


def damage_cache(draw: Any, content: bytes) -> bytes:
    kind = draw(st.sampled_from(["bytes", "header", "dtype", "shape", "name", "drop", "fill"]))
    if kind == "bytes":
        return damage_bytes(draw, content)
    size = struct.unpack("<Q", content[:8])[0]
    table, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    names = sorted(name for name in table if name != "__metadata__")
    name = draw(st.sampled_from(names))
    if kind == "header":
        record = json.loads(table["__metadata__"]["rankkv"])
        damage_record(draw, record)
        table["__metadata__"]["rankkv"] = json.dumps(record)
    if kind == "dtype":
        table[name]["dtype"] = draw(
            st.sampled_from(["I32", "F32", "BF16", "F16", "I64", "F64", "BOOL", "U8", "F8_E4M3"])
        )
    if kind == "shape":
        table[name]["shape"] = draw(st.permutations(table[name]["shape"]))
    if kind == "name":
        other = draw(
            st.sampled_from(
                ["0.update", "-1.keys", "9.keys", "0.epoch.0.0", "prompt_ids", name + "x", *names]
            )
        )
        table[other] = table.pop(name)
    if kind == "drop":
        del table[name]
    if kind == "fill":
        start, end = table[name]["data_offsets"]
        data = data[:start] + draw(st.sampled_from([b"\xff", b"\x00", b"\x7f"])) * (end - start) + data[end:]
    return seal(draw, json.dumps(table).encode(), data)


def seal(draw: Any, table: bytes, data: bytes) -> bytes:
    """Join a cache's parts; half of the time with the right digest, as if the damage were intended."""
    content = struct.pack("<Q", len(table)) + table + data
    if draw(st.booleans()):
        return content
    path = seal.folder / "sealed"  # type: ignore[attr-defined]
    path.write_bytes(content)
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata()["rankkv"]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception:
        # No longer a file of tensors: it stays as it is.
        return content
    save_file(tensors, path, metadata={"rankkv": header, "digest": compute_digest(header, tensors)})
    return path.read_bytes()


# -- files --------------------------------------------------------------------------------------------------------


def write_profile(folder: Path, model: Any) -> Path:
    curve = [[0.3, 0.2, 0.1], [0.5, 0.2, 0.1]]
    profile = RankProfile(
        model=describe_shape(model), weight_sample=sample_weights(model), layer_indices=[0, 1],
        ratios=[0.1, 0.2, 0.4], excess_loss=curve, divergence=curve, gain_loss=[0.1, 0.2],
        gain_divergence=[0.1, 0.2], base_ratio=0.1, head_gain_divergence=[[0.1, 0.2]] * 2,
        ranks={"evictable/concat": {"mean": [3.5, 4.5], "std": [0.1, 0.2]}}, calibration={"texts": 2}, name="tiny",
    )  # fmt: skip
    return profile.save(folder / "profile.json")


def check_profile_file(path: Path, model: Any) -> None:
    found, told = RankProfile.load(path), json.loads(path.read_text())
    for name in ("weight_sample", "gain_divergence", "ratios"):
        assert list(getattr(found, name)) == told[name]
    assert all(map(math.isfinite, (*found.weight_sample, *found.gain_loss, *sum(found.divergence, ()))))


def write_manifest(folder: Path, model: Any) -> Path:
    ResultStore(folder, {"seed": 0, "ratios": [0.1], "task": {"name": "needle"}})
    return folder / "manifest.json"


def check_manifest(path: Path, model: Any) -> None:
    ResultStore(path.parent, {"seed": 0, "ratios": [0.1], "task": {"name": "needle"}})
    assert json.loads(path.read_text())["config"]["seed"] == 0


def write_some_rows(folder: Path, model: Any) -> Path:
    rows = [{"text": f"text {i}", "loss": i / 7, "kept": i, "found": bool(i % 2)} for i in range(40)]
    return write_rows(folder / "rows.parquet", rows)


def check_rows(path: Path, model: Any) -> None:
    rows = read_rows([path])
    # What is stored in pages has checksums; names of columns stand in the footer, which has none.
    for i, row in enumerate(rows):
        assert i / 7 in row.values() or "loss" not in row


def write_sweep(folder: Path, model: Any) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(
        "models: [embedded, {name: some/model, dtype: bfloat16}]\n"
        "tasks:\n  - perplexity\n  - task: needle\n    lengths: [512, 1024]\n    count: 3\n"
        "common: &common {allocation: uniform}\n".replace("common: &common {allocation: uniform}\n", "")
        + "selectors: [snapkv, {name: h2o, recent_fraction: 0.5}]\nallocations: [uniform, default]\n"
        "methods:\n  - {name: recent, selector: streaming_llm, allocation: uniform, sink_size: 8}\n"
        "ratios: [0.1, 0.5]\nseeds: [0, 7]\nblank: true\n"
    )
    return path


def check_sweep(path: Path, model: Any) -> None:
    config = read_sweep_config(path)
    assert all(0 < ratio <= 1 for ratio in config.ratios)
    assert config.list_settings()
    assert len(json.dumps(config.to_dict(), default=str)) < 2**20


def write_filters(folder: Path, model: Any) -> Path:
    path = folder / "filters.json"
    layers = {
        str(i): torch.randn(2, 8, generator=torch.Generator().manual_seed(i)).tolist() for i in range(2)
    }
    path.write_text(json.dumps({"format": "rankkv.query_filters/1", "layers": layers}))
    return path


def check_filters(path: Path, model: Any) -> None:
    filters = load_query_filters(path)
    record = json.loads(path.read_text())
    record = record.get("query_filters", record)
    for layer, found in filters.items():
        assert found.isfinite().all()
        assert torch.equal(found, torch.tensor(record["layers"][str(layer)]))


def write_centres(folder: Path, model: Any) -> Path:
    path = folder / "centres.json"
    layers = {
        str(i): torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(i)).tolist() for i in range(2)
    }
    path.write_text(json.dumps({"query_centres": {"format": "rankkv.query_centres/1", "layers": layers}}))
    return path


def check_centres(path: Path, model: Any) -> None:
    centres = load_query_centres(path)
    record = json.loads(path.read_text())
    record = record.get("query_centres", record)
    for layer, found in centres.items():
        assert found.isfinite().all()
        assert found.shape[1] == 3
        assert torch.equal(found, torch.tensor(record["layers"][str(layer)]))


def write_gguf(folder: Path, model: Any) -> Path:
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(str(folder / "tiny.gguf"), "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(32)
    writer.add_head_count(4)
    writer.add_token_list(["a", "b", "c"])
    writer.add_bos_token_id(1)
    rng = np.random.default_rng(0)
    for name, shape in {"token_embd": (3, 32), "blk.0.attn_q": (32, 32), "output_norm": (32,)}.items():
        writer.add_tensor(f"{name}.weight", rng.normal(0, 0.2, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "tiny.gguf"


def check_gguf_file(path: Path, model: Any) -> None:
    from gguf import GGUFReader

    check_gguf(path)
    # The other reader finds every tensor inside the file.
    for tensor in GGUFReader(path).tensors:
        assert tensor.data_offset + tensor.n_bytes <= path.stat().st_size


def write_cache(folder: Path, model: Any) -> Path:
    cache = compress(model, PROMPT, budget=24, decode="periodic", selector="h2o", positions="packed")
    with torch.no_grad():
        model(input_ids=torch.tensor([[7, 8]]), **cache_argument(cache))
    return cache.save(folder / "cache.safetensors")


def check_cache(path: Path, model: Any) -> None:
    cache = RankKVCache.load(path, model)
    assert cache.seen_tokens <= 1000
    with torch.no_grad():
        logits = [
            model(input_ids=torch.tensor([[token]]), **cache_argument(cache)).logits for token in (5, 9)
        ]
    assert all(bool(found.isfinite().all()) for found in logits)


Kind = tuple[Callable[[Path, Any], Path], Callable[[Path, Any], None], Callable[[Any, bytes], bytes]]
KINDS: dict[str, Kind] = {
    "cache": (write_cache, check_cache, damage_cache),
    "profile": (write_profile, check_profile_file, damage_json),
    "manifest": (write_manifest, check_manifest, damage_json),
    "rows": (write_some_rows, check_rows, damage_bytes),
    "sweep": (write_sweep, check_sweep, damage_yaml),
    "gguf": (write_gguf, check_gguf_file, damage_bytes),
    "filters": (write_filters, check_filters, damage_json),
    "centres": (write_centres, check_centres, damage_json),
}


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Let an allocation beyond the file's due fail, and end what takes too much of the processor's time."""
    status = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (int(status["VmSize"].split()[0]) * 1024 + MOST_BYTES, hard))

    def stop(*_: object) -> None:
        raise AssertionError(f"one damaged file took more than {MOST_SECONDS} seconds of processor time")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture(scope="module")
def model(tiny_llama):
    return tiny_llama(2, eos_token_id=None)


def fuzz(kind: str, count: int, folder: Path, model: Any) -> dict[str, int]:
    """Damage a file of one kind ``count`` times; return how many were refused and how many loaded."""
    write, check, damage = KINDS[kind]
    seal.folder = folder  # type: ignore[attr-defined]
    good = folder / "good"
    good.mkdir()
    path = write(good, model)
    content, found = path.read_bytes(), {"refused": 0, "loaded": 0, "longest message": 0}
    check(path, model)

    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def run(data: Any) -> None:
        path.write_bytes(damage(data.draw, content))
        # Another time for each content: clocks of file systems are coarse, and filters are remembered by it.
        os.utime(path, ns=(sum(found.values()),) * 2)
        with bounded():
            try:
                check(path, model)
            except RankKVError as error:
                found["refused"] += 1
                found["longest message"] = max(found["longest message"], len(str(error)))
            else:
                found["loaded"] += 1

    run()
    return found


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="limits of memory need Linux")
@pytest.mark.parametrize("count", [30, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_refused_or_loads_right(kind, count, model, tmp_path, record_property):
    found = fuzz(kind, count, tmp_path, model)
    record_property(f"{kind} {count}", found)
    print(kind, found)
    # Most damage is noticed; bits in numbers of a text file may only make another number.
    assert found["refused"] > 0.2 * count
    # No message holds the content of the file.
    assert found["longest message"] < 2000
