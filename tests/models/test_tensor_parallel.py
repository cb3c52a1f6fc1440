"""Models split over processes by tp_plan="auto": what they keep and say is what one process keeps and says."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sharded_program
from generation_cases import make_cases
from launching import launch

PROGRAM = str(Path(sharded_program.__file__))


CASES = make_cases()
#: One for each way in which heads are joined; the others run with the slow tests.
QUICK = [
    *(f"selector {name}" for name in ("snapkv", "h2o", "tova", "criticalkv", "chunkkv", "random")),
    *(f"strategy {name}" for name in ("cake", "distortion", "dynamickv", "lava", "zigzagkv")),
    *(f"{scope} concat" for scope in ("evictable", "window", "full")),
    *(f"evictable {name}" for name in ("mean", "median", "mass_normalized")),
    *("snapkv text", "h2o text", "padded", "beams", "head budgets"),
]
EMBEDDED_TOKENS = 600
#: Refused with a reason where heads are split.
REFUSED = {"head budgets": "tensor parallelism splits them over"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Any) -> Path:
    """A model of 6 kv heads, which 2 and 3 processes divide, and the cases beside it."""
    path = tmp_path_factory.mktemp("model")
    model = tiny_llama(
        3, vocab_size=96, hidden_size=96, num_attention_heads=12, num_key_value_heads=6, eos_token_id=None
    )
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def alone(folder: Path) -> Any:
    """What one process keeps and says, by case."""
    model = sharded_program.load(str(folder))
    return functools.cache(lambda name: sharded_program.run(model, CASES[name]))


def start(folder: Path, cases: list[dict[str, Any]], processes: int, out: Path) -> list[list[dict[str, Any]]]:
    """Run cases in so many processes, and return what each of them keeps and says."""
    out.mkdir()
    (out / "cases.json").write_text(json.dumps(cases))
    launch([PROGRAM, str(folder), str(out / "cases.json"), str(out)], processes, timeout=600)
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(processes)]


@pytest.fixture(scope="module")
def shared_out(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What each of several processes keeps and says, by case; started once for all of a number of processes."""

    @functools.cache
    def run(processes: int, quick: bool) -> list[dict[str, Any]]:
        names = QUICK if quick else list(CASES)
        out = tmp_path_factory.mktemp("out") / "records"
        records = start(folder, [CASES[name] for name in names], processes, out)
        return [dict(zip(names, record, strict=True)) for record in records]

    return run


def check(parts: list[dict[str, Any]], one: dict[str, Any]) -> None:
    """Check that what processes keep is together what one keeps, and that each says and decides the same."""
    for part in parts:
        assert part["text"] == one["text"]
        assert part["budgets"] == one["budgets"]
        for row, expected in zip(part["measures"], one["measures"], strict=True):
            assert row == pytest.approx(expected, rel=2e-5)
    # Heads of consecutive processes follow each other.
    for layer, expected in enumerate(one["kept"]):
        assert [head for part in parts for head in part["kept"][layer]] == expected
    assert sum(part["bytes"] for part in parts) == one["bytes"]


def check_case(alone: Any, shared_out: Any, name: str, processes: int, quick: bool) -> None:
    parts = [records[name] for records in shared_out(processes, quick)]
    assert len(parts) == processes
    one = alone(name)
    if name in REFUSED:
        assert "error" not in one
        assert all(REFUSED[name] in part["error"] for part in parts)
    else:
        check(parts, one)


@pytest.mark.parametrize("name", QUICK)
def test_two_processes_decide_as_one(alone: Any, shared_out: Any, name: str) -> None:
    check_case(alone, shared_out, name, processes=2, quick=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_three_processes_decide_as_one(alone: Any, shared_out: Any, name: str) -> None:
    check_case(alone, shared_out, name, processes=3, quick=False)


# -- the embedded model: three kv heads, one in each of three processes ------------------------------------------------

EMBEDDED_OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "default without a profile": {"profile": None},
    "snapkv": {"selector": "snapkv", "strategy": "power", "profile": None},
    "h2o": {"selector": "h2o", "profile": None},
}


@pytest.fixture(scope="module")
def embedded_cases(embedded: Any, python_docs: str) -> dict[str, dict[str, Any]]:
    _, tokenizer = embedded
    ids = tokenizer(python_docs[20_000:], return_tensors="pt", verbose=False)["input_ids"][
        :, :EMBEDDED_TOKENS
    ]
    return {
        name: {"options": {"compression_ratio": 0.2, **options}, "input_ids": ids.tolist()}
        for name, options in EMBEDDED_OPTIONS.items()
    }


@pytest.fixture(scope="module")
def embedded_shares(
    embedded: Any, embedded_cases: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, Any]]]:
    """What each of three processes keeps and says, by case."""
    folder = tmp_path_factory.mktemp("embedded")
    embedded[0].save_pretrained(folder / "model")
    records = start(folder / "model", list(embedded_cases.values()), 3, folder / "records")
    shutil.rmtree(folder / "model")
    return dict(zip(embedded_cases, zip(*records, strict=True), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", EMBEDDED_OPTIONS)
def test_the_embedded_models_heads_keep_the_same(
    embedded: Any, embedded_cases: dict[str, Any], embedded_shares: dict[str, Any], name: str
) -> None:
    check(embedded_shares[name], sharded_program.run(embedded[0], embedded_cases[name]))
