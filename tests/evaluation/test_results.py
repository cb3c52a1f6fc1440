"""Results outlive a kill: whole parts or none, resumed under the same config only."""

from __future__ import annotations

import json
import os
import shutil
import warnings

import pytest

from rankkv.errors import InputError
from rankkv.evaluation.results import ResultStore, read_rows, write_rows

ROWS = [{"text": "a", "loss": 1.25, "kept": 3}, {"text": "b", "loss": 2.5, "kept": 4}]


def test_rows_come_back(tmp_path):
    store = ResultStore(tmp_path, {"seed": 0})
    store.write("one", ROWS[:1])
    store.write("two", ROWS[1:])
    assert store.read() == ROWS
    assert read_rows([store.join(tmp_path / "all.parquet")]) == ROWS


def test_a_killed_write_leaves_nothing(tmp_path, monkeypatch):
    store = ResultStore(tmp_path, {"seed": 0})

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            store.write("one", ROWS)
    assert not store.is_done("one")
    assert store.read() == []
    assert list(store.parts.iterdir()) == []
    resumed = ResultStore(tmp_path, {"seed": 0})
    resumed.write("one", ROWS)
    assert resumed.is_done("one")
    assert resumed.read() == ROWS


def test_another_config_is_refused_by_what_differs(tmp_path):
    ResultStore(tmp_path, {"seed": 0, "ratios": [0.1]})
    ResultStore(tmp_path, {"seed": 0, "ratios": [0.1]})
    with pytest.raises(InputError, match=r"seed: 0, now 1"):
        ResultStore(tmp_path, {"seed": 1, "ratios": [0.1]})


def test_manifest_names_what_a_reader_needs(tmp_path):
    ResultStore(tmp_path, {"seed": 0})
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["config"] == {"seed": 0}
    assert {"rankkv", "torch", "transformers", "device", "commit"} <= set(manifest["environment"])


def test_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.parquet does not exist"):
        read_rows([tmp_path / "none.parquet"])


def test_rows_of_different_columns_lose_nothing(tmp_path):
    store = ResultStore(tmp_path, {"seed": 0})
    store.write("text-0", [{"loss": 1.5}, {"found": True}, {"loss": 2.5, "depth": 0.5}])
    store.write("text-1", [{"note": "alone"}])
    rows = read_rows([store.join(tmp_path / "rows.parquet")])
    kept = [{key: value for key, value in row.items() if value is not None} for row in rows]
    assert kept == [{"loss": 1.5}, {"found": True}, {"loss": 2.5, "depth": 0.5}, {"note": "alone"}]


def test_a_run_that_begins_anew_says_where_it_ran(tmp_path):
    store = ResultStore(tmp_path, {"seed": 0})
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    stale = manifest | {"environment": manifest["environment"] | {"commit": "another"}}
    (tmp_path / "manifest.json").write_text(json.dumps(stale))
    ResultStore(tmp_path, {"seed": 0})
    assert json.loads((tmp_path / "manifest.json").read_text()) == manifest
    (tmp_path / "manifest.json").write_text(json.dumps(stale))
    store.write("one", [{"a": 1}])
    ResultStore(tmp_path, {"seed": 0})
    assert json.loads((tmp_path / "manifest.json").read_text()) == stale


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"config": 1}', "[" * 100_000, "\x00"])
def test_a_damaged_manifest_is_named(tmp_path, content):
    ResultStore(tmp_path, {"seed": 0})
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(InputError, match=r"manifest\.json"):
        ResultStore(tmp_path, {"seed": 0})


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + b"\x00" * 40 + b"PAR1"])
def test_an_unreadable_part_is_put_aside_once_and_measured_again(tmp_path, content):
    store = ResultStore(tmp_path, {"seed": 0})
    store.write("one", ROWS)
    store.write("two", [{"text": "c"}])
    (store.parts / "one.parquet").write_bytes(content)
    with pytest.raises(InputError, match=r"one\.parquet is damaged or not Parquet"):
        store.read()
    with pytest.warns(UserWarning, match="one.parquet' cannot be read: it was renamed"):
        resumed = ResultStore(tmp_path, {"seed": 0})
    assert (resumed.is_done("one"), resumed.is_done("two")) == (False, True)
    assert (store.parts / "one.parquet.damaged").read_bytes() == content
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = ResultStore(tmp_path, {"seed": 0})
    again.write("one", ROWS)
    assert len(again.read()) == 3


def test_a_changed_number_in_a_part_is_noticed(tmp_path):
    path = write_rows(tmp_path / "rows.parquet", [{"text": f"t{i}", "loss": i / 7} for i in range(200)])
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="is damaged"):
        read_rows([path])


def test_a_copied_part_is_named_and_not_counted_twice(tmp_path):
    store = ResultStore(tmp_path, {"seed": 0})
    store.write("one", ROWS)
    shutil.copy(store.parts / "one.parquet", store.parts / "two.parquet")
    with pytest.raises(InputError, match=r"row 0 of .*two\.parquet is also row 0 of .*one\.parquet"):
        store.read()
    doubled = write_rows(tmp_path / "rows.parquet", ROWS * 2)
    with pytest.raises(InputError, match=r"would count twice"):
        read_rows([doubled])


@pytest.mark.parametrize("unit", ["../../x", "a/b", "", ".", "..", ".hidden", "a\\b", "a\0b"])
def test_a_unit_cannot_leave_the_folder(tmp_path, unit):
    store = ResultStore(tmp_path / "in" / "side", {"seed": 0})
    with pytest.raises(InputError, match="is not the name of a file"):
        store.write(unit, ROWS)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["manifest.json"]
