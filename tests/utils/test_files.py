"""Writing and reading files: links, modes, full disks, and JSON that is too deep or too large."""

from __future__ import annotations

import contextlib
import os
import resource
import stat

import pytest

from rankkv import RankProfile
from rankkv.errors import InputError, OutputError, ProfileError
from rankkv.evaluation.results import write_rows
from rankkv.utils.files import read_json, write_text_atomically

DEEP = "[" * 100_000


@contextlib.contextmanager
def full_disk(most_bytes):
    """Let every file of this process end at ``most_bytes``, as on a disk with no more room."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


WRITERS = {
    "text": lambda path: write_text_atomically(path, "x" * 100_000),
    "rows": lambda path: write_rows(path, [{"text": "x" * 100, "number": i} for i in range(3000)]),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_symlink_stays_and_its_target_is_replaced(tmp_path, write):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    write(link)
    assert link.is_symlink()
    assert target.stat().st_size > 3


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_new_file_follows_the_umask_and_an_old_one_keeps_its_mode(tmp_path, write, umask):
    before = os.umask(umask)
    try:
        write(tmp_path / "new")
        (tmp_path / "old").write_text("")
        os.chmod(tmp_path / "old", 0o640)
        write(tmp_path / "old")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE((tmp_path / "old").stat().st_mode) == 0o640


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_full_disk_is_an_error_that_names_the_path_and_leaves_the_old_file(tmp_path, write):
    path = tmp_path / "file"
    path.write_text("old")
    with full_disk(1000), pytest.raises(OutputError, match=r"cannot write '.*file': .*free space"):
        write(path)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_path_below_a_file_is_an_error_that_names_it(tmp_path, write):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write '.*below'"):
        write(tmp_path / "file" / "below")


def test_deep_json_is_refused(tmp_path):
    path = tmp_path / "deep.json"
    path.write_text(DEEP)
    with pytest.raises(InputError, match="nested too deeply"):
        read_json(path)
    with pytest.raises(ProfileError, match="nested too deeply"):
        RankProfile.load(path)


def test_a_large_json_file_is_refused_unread(tmp_path):
    path = tmp_path / "large.json"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(InputError, match=r"1,099,511,627,776 bytes, at most"):
        read_json(path)
    with pytest.raises(ProfileError, match="bytes, a profile has at most"):
        RankProfile.load(path)
