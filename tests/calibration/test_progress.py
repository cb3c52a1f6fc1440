"""The file from which a calibration goes on: nothing is lost by a kill, and nothing of another run is taken."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankkv.calibration.progress import DoneRecords, forget_done
from rankkv.errors import InputError

IDENTITY = {"model": "a", "weights": "b", "context_tokens": 96, "ratios": [0.1, 0.4]}
RECORDS = {f"piece {number}": {"nll": number / 7, "divergence": [[0.1 * number]]} for number in range(4)}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A file with all records."""
    path = tmp_path_factory.mktemp("records") / "unfinished"
    done = DoneRecords(path, IDENTITY)
    for key, record in RECORDS.items():
        done.add(key, record)
    return path


def find(done):
    return {key: done[key] for key in RECORDS if key in done}


def test_every_piece_is_one_line_more(tmp_path):
    path = tmp_path / "folder" / "unfinished"
    done, content = DoneRecords(path, IDENTITY), b""
    assert not path.exists()
    for number, (key, record) in enumerate(RECORDS.items(), start=2):
        done.add(key, record)
        # What was there stays there: a kill between two pieces can take nothing of it.
        assert path.read_bytes().startswith(content)
        content = path.read_bytes()
        assert content.count(b"\n") == number
        assert content.endswith(b"\n")
    assert find(DoneRecords(path, IDENTITY)) == RECORDS


@given(data=st.data())
def test_wherever_it_was_cut_off_it_goes_on(written, tmp_path_factory, data):
    content = written.read_bytes()
    length = data.draw(st.integers(0, len(content)))
    path = tmp_path_factory.mktemp("cut") / "unfinished"
    path.write_bytes(content[:length])
    done = DoneRecords(path, IDENTITY)
    whole_lines = max(0, content[:length].count(b"\n") - 1)
    assert find(done) == dict(list(RECORDS.items())[:whole_lines])
    for key, record in RECORDS.items():
        if key not in done:
            done.add(key, record)
    # Half a line is gone, not glued to the next.
    assert path.read_bytes() == content


def test_a_kill_while_it_writes_takes_no_whole_line(tmp_path):
    path = tmp_path / "unfinished"
    program = (
        "import itertools, sys\n"
        "from rankkv.calibration.progress import DoneRecords\n"
        "done = DoneRecords(sys.argv[1], {'model': 'a'})\n"
        "for number in itertools.count():\n"
        "    done.add(str(number), {'values': [number / 7] * 5000})\n"
        "    print(number, flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True
    ) as running:
        for _ in range(20):
            running.stdout.readline()
        running.send_signal(signal.SIGKILL)
        told = 20 + len(running.stdout.read().split())
    assert running.returncode == -signal.SIGKILL
    done = DoneRecords(path, {"model": "a"})
    assert len(done) in (told, told + 1)
    assert all(done[str(number)] == {"values": [number / 7] * 5000} for number in range(len(done)))


def test_processes_keep_a_file_each_and_read_all(tmp_path):
    path = tmp_path / "unfinished"
    for rank, (key, record) in enumerate(RECORDS.items()):
        DoneRecords(path, IDENTITY, rank).add(key, record)
    assert sorted(os.listdir(tmp_path)) == ["unfinished", *(f"unfinished.{rank}" for rank in (1, 2, 3))]
    assert find(DoneRecords(path, IDENTITY, 2)) == RECORDS
    # A file of another process may be amid a line, which is its own to cut.
    with (tmp_path / "unfinished.1").open("a") as file:
        file.write('{"piece": "half')
    before = (tmp_path / "unfinished.1").read_bytes()
    DoneRecords(path, IDENTITY).add("one more", {})
    assert (tmp_path / "unfinished.1").read_bytes() == before
    forget_done(path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_tokens": 128}, r"another calibration \(context_tokens: file 96, now 128\)"),
        ({"ratios": [0.1], "weights": "c"}, r"\(other weights; ratios: file \[0.1, 0.4\], now \[0.1\]\)"),
        ({"model": "c"}, r"\(a model of another shape\)"),
        ({"rankkv": "9"}, r"\(rankkv: file None, now '9'\)"),
    ],
)
def test_another_calibration_is_refused_with_the_difference(written, changes, message):
    before = written.read_bytes()
    with pytest.raises(InputError, match=message):
        DoneRecords(written, IDENTITY | changes)
    assert written.read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [
        "no measurements",
        "[]\n",
        '{"format": "another"}\n{"piece": "a", "measured": {}}\n',
        # One object for all pieces, as earlier versions wrote them.
        json.dumps(RECORDS),
    ],
)
def test_a_file_of_another_kind_is_refused_and_left_as_it_is(tmp_path, content):
    path = tmp_path / "unfinished"
    path.write_text(content)
    with pytest.raises(InputError, match="holds no measurements that this RankKV can resume: delete it"):
        DoneRecords(path, IDENTITY)
    assert path.read_text() == content


@pytest.mark.parametrize(
    "damaged", ["\0\0", "[" * 100_000, '{"piece": 1', "5"], ids=["zeros", "deep", "cut", "5"]
)
def test_a_damaged_line_is_named(written, tmp_path, damaged):
    path, lines = tmp_path / "unfinished", written.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], f"{damaged}\n", *lines[3:]]))
    with pytest.raises(InputError, match=r"line 3 of .* is damaged: delete that line"):
        DoneRecords(path, IDENTITY)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot write the measurements to .*: name another file"):
        DoneRecords(tmp_path / "file" / "unfinished", IDENTITY).add("piece", {})
