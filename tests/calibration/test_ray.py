"""Calibration on Ray: the profile of one process bit by bit, whichever worker dies and wherever the driver stops."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import torch
from calibrating import CONTEXT_TOKENS, CONTINUATION_TOKENS, OPTIONS, PIECES, write_model_and_text
from launching import run
from typer.testing import CliRunner

from rankkv import RankProfile, load_model
from rankkv.calibration import calibrate
from rankkv.calibration.ray import calibrate_on_ray
from rankkv.cli import app
from rankkv.errors import ConfigError, ProcessGroupError, SourceUnavailableError
from rankkv.selection import Selector, get_selector

pytest.importorskip("ray", reason="Ray is not installed: pip install 'rankkv[ray]'")

TOKEN = secrets.token_hex(32)
SIZES = {
    "context_tokens": CONTEXT_TOKENS,
    "continuation_tokens": CONTINUATION_TOKENS,
    "max_texts": PIECES,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Any) -> tuple[Path, Path]:
    """A tiny model in a folder, and five pieces of text."""
    return write_model_and_text(tmp_path_factory.mktemp("calibration"), tiny_llama(2))


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sums of several threads may differ in their last bit."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def family(monkeypatch: pytest.MonkeyPatch) -> Iterator[Family]:
    """Ray with a folder of its own; whatever a test does, nothing of it is left."""
    # Sockets have short paths only, which pytest's own folders are not.
    folder = tempfile.mkdtemp(prefix="ray")
    monkeypatch.setenv("RAY_TMPDIR", folder)
    # Else it writes a token into the user's home; a process reads it once.
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    family = Family()
    yield family
    import ray

    family.look()
    ray.shutdown()
    left = family.wait()
    for process in left:
        process.kill()
    shutil.rmtree(folder, ignore_errors=True)
    # What did not start whole is ended with the program only.
    assert family.is_incomplete or not left


class Family:
    """The processes that this one started, seen whenever it is asked to look."""

    def __init__(self) -> None:
        self._before = {process.pid for process in psutil.Process().children(recursive=True)}
        self.seen: dict[int, psutil.Process] = {}
        self.is_incomplete = False

    def look(self) -> None:
        for process in psutil.Process().children(recursive=True):
            if process.pid not in self._before:
                self.seen[process.pid] = process

    def wait(self, seconds: float = 30) -> list[psutil.Process]:
        """Wait until all have ended, and return those that have not."""
        deadline = time.monotonic() + seconds
        while (left := [process for process in self.seen.values() if _is_alive(process)]) and (
            time.monotonic() < deadline
        ):
            time.sleep(0.1)
        return left


def _is_alive(process: psutil.Process) -> bool:
    try:
        # One whose parent has not asked for its exit code has ended all the same.
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def make_watched(folder: Path, deadly_call: int | None = None, victim: str = "worker") -> Selector:
    """SnapKV that notes in whose process each call was made.

    At a worker's so many-th call it kills the ``"worker"``, once, or ``"each"`` that comes so far; or, once, the worker
    and what started it, which are the ``"machine"`` as far as Ray knows.
    """
    snapkv = get_selector("snapkv")
    folder.mkdir(exist_ok=True)
    notes, fallen = folder / "calls", folder / "fallen"

    def score(observation: Any) -> Any:
        own = str(os.getpid())
        with notes.open("a") as file:
            file.write(f"{own}\n")
        called = notes.read_text().split().count(own)
        if called == deadly_call and (victim == "each" or not fallen.exists()):
            fallen.write_text(own)
            if victim == "machine":
                os.kill(os.getppid(), signal.SIGKILL)
            os.kill(int(own), signal.SIGKILL)
        return snapkv.compute_lasting_scores(observation)

    return replace(snapkv, name="watched", score=score)


@contextmanager
def may_not_start(family: Family) -> Iterator[None]:
    """Skip where Ray's own processes miss the time limits that it sets them, as on a machine that is too busy."""
    try:
        yield
    except SourceUnavailableError as error:
        if "timed out during startup" not in str(error):
            raise
        family.is_incomplete = True
        pytest.skip(str(error))


def count_calls(folder: Path) -> Counter[int]:
    return Counter(int(line) for line in (folder / "calls").read_text().split())


def read_measured(path: Path) -> dict[str, Any]:
    """Read what a resume file holds, and check that no piece is in it twice."""
    entries = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    assert len({entry["piece"] for entry in entries}) == len(entries)
    return {entry["piece"]: entry["measured"] for entry in entries}


class Alone(NamedTuple):
    """What one process measured; how many calls of the selector, and steps of progress, each piece took."""

    profile: RankProfile
    measured: dict[str, Any]
    calls: int
    cells: int


@pytest.fixture
def alone(source: tuple[Path, Path], tmp_path: Path) -> Alone:
    folder, text = source
    model, tokenizer = load_model(folder)
    path = tmp_path / "alone.unfinished"
    selector = make_watched(tmp_path / "alone")
    steps: list[int] = []
    profile = calibrate(
        model,
        tokenizer,
        [text.read_text()],
        selector=selector,
        name=str(folder),
        resume_path=path,
        on_progress=lambda done, _: steps.append(done),
        **SIZES,
    )
    calls, rest = divmod(count_calls(tmp_path / "alone")[os.getpid()], PIECES)
    assert calls > 2
    assert rest == 0
    return Alone(profile, read_measured(path), calls, steps[-1] // PIECES)


def test_what_a_killed_worker_had_is_measured_by_another(
    source: tuple[Path, Path], alone: Alone, tmp_path: Path, family: Family
) -> None:
    folder, text = source
    calls = alone.calls
    steps, losses = [], []
    path = tmp_path / "ray.unfinished"

    def look(done: int, total: int) -> None:
        family.look()
        steps.append((done, total))
        # What has come is on the disk already.
        assert len(read_measured(path) if path.exists() else {}) * total == done * PIECES

    deadly = calls + calls // 2
    with may_not_start(family):
        profile = calibrate_on_ray(
            folder,
            [text.read_text()],
            selector=make_watched(tmp_path / "ray", deadly),
            workers=1,
            resume_path=path,
            on_progress=look,
            on_loss=losses.append,
            **SIZES,
        )
    assert profile == alone.profile
    assert read_measured(path) == alone.measured
    # One worker fell in the midst of a piece, and another did that piece from its beginning.
    fallen = int((tmp_path / "ray" / "fallen").read_text())
    made = count_calls(tmp_path / "ray")
    assert made.pop(fallen) == deadly
    assert os.getpid() not in made
    assert sum(made.values()) == (PIECES - 1) * calls
    assert len(losses) == 1
    assert "(attempt 2 of 6)" in losses[0]
    assert steps == [(number * alone.cells, PIECES * alone.cells) for number in range(PIECES + 1)]


def make_command(folder: Path, text: Path) -> list[str]:
    return [
        sys.executable,
        "-m",
        "rankkv",
        "calibrate",
        "--model",
        str(folder),
        "--texts",
        str(text),
        *OPTIONS,
    ]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["measured", "gradient"])
def test_the_command_measures_the_same_profile_as_without_ray(
    source: tuple[Path, Path], tmp_path: Path, family: Family, method: str
) -> None:
    folder, text = source
    command = [*make_command(folder, text), "--method", method]
    path = tmp_path / "profile.json"
    done = run([*command, "-o", str(path), "--engine", "ray", "--workers", "2", "--json"])
    assert [item.name for item in tmp_path.iterdir()] == ["profile.json"]
    profile = RankProfile.load(path)
    assert json.loads(done.stdout) == json.loads(path.read_text())
    shown = done.stderr.splitlines()
    assert [line for line in shown if line.startswith("Calibrating")] == [
        f"Calibrating: {share} %" for share in (20, 40, 60, 80, 100)
    ]
    # Of what Ray itself would say, nothing.
    assert shown[0] == "Reading the texts ..."
    assert [line for line in shown[2:] if not line.startswith("Calibrating")] == [
        "Starting Ray ...",
        f"5 text chunks, 2 layers. Written: {path}",
    ]
    run([*command, "-o", str(tmp_path / "alone.json")])
    assert RankProfile.load(tmp_path / "alone.json") == profile


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "dask"], "unknown engine 'dask'. Known: local, ray."),
        (["--address", "auto"], "--engine is 'local' but must be 'ray' for --address: give --engine ray"),
        (["--workers", "2"], "must be 'ray' for --workers"),
        (["--engine", "ray", "--workers", "0"], "workers is 0 but must be at least 1"),
        (["--engine", "ray", "--gpus-per-worker", "-1"], "gpus_per_worker is -1 but must be at least 0"),
        (["--engine", "ray", "--context-tokens", "1"], "context_tokens=1 must be an integer of at least 64"),
        (
            ["--engine", "ray", "--address", "127.0.0.1:9"],
            "no Ray cluster that can be joined at '127.0.0.1:9'",
        ),
        (
            ["--engine", "ray", "--address", "ray://127.0.0.1:9"],
            "(Connection refused): give the address of a",
        ),
        (["--engine", "ray", "--address", "nowhere"], "(it names no host and port)"),
        (["--engine", "ray", "--address", "127.0.0.1:many"], "no Ray cluster that can be joined at"),
    ],
)
def test_bad_options_end_in_one_sentence(source: tuple[Path, Path], options: list[str], message: str) -> None:
    folder, text = source
    command = ["calibrate", "--model", str(folder), "--texts", str(text), "-o", "never.json", *options]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert result.stderr.splitlines()[-1] == errors[0]


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_another_server_is_told_from_a_cluster(source: tuple[Path, Path], scheme: str) -> None:
    folder, text = source
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"{scheme}127.0.0.1:{server.server_port}"
        with pytest.raises(SourceUnavailableError, match="what answers there is not Ray"):
            calibrate_on_ray(folder, [text.read_text()], address=address, **SIZES)
        server.shutdown()


def test_without_ray_the_extra_is_named(source: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, text = source
    monkeypatch.setitem(sys.modules, "ray", None)
    result = CliRunner().invoke(
        app,
        ["calibrate", "--model", str(folder), "--texts", str(text), "-o", "never.json", "--engine", "ray"],
    )
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].endswith("install it with: pip install 'rankkv[ray]'")


@pytest.mark.slow
def test_a_killed_command_goes_on_without_ray(tiny_llama: Any, tmp_path: Path, family: Family) -> None:
    pieces = 40
    folder, text = write_model_and_text(tmp_path, tiny_llama(4), pieces)
    path = tmp_path / "profile.json"
    command = [sys.executable, "-m", "rankkv", "calibrate", "--model", str(folder), "--texts", str(text)]
    command += [*OPTIONS[:-1], str(pieces), "-o", str(path)]
    unfinished = tmp_path / "profile.json.unfinished"
    with subprocess.Popen([*command, "--engine", "ray", "--workers", "1"], stderr=subprocess.PIPE) as running:
        while not unfinished.exists():
            assert running.poll() is None, running.stderr.read().decode()
            time.sleep(0.01)
        family.look()
        running.kill()
    assert running.returncode == -signal.SIGKILL
    # Ray ends with the process that started it, however that ended; two of its helpers take a minute.
    assert len(family.seen) > 3
    assert family.wait(150) == []
    measured = read_measured(unfinished)
    assert 1 <= len(measured) < pieces, "the kill came too late to say anything"
    done = run(command)
    assert RankProfile.load(path).calibration["texts"] == pieces
    # The pieces that were there are told as done with the first that is measured.
    first = next(line for line in done.stderr.splitlines() if line.startswith("Calibrating"))
    assert int(first.split()[1]) >= 10 * (10 * len(measured) // pieces)
    assert not unfinished.exists()
    run([*command[:-1], str(tmp_path / "alone.json")])
    assert RankProfile.load(tmp_path / "alone.json") == RankProfile.load(path)


@pytest.mark.slow
def test_a_dead_worker_is_told_beside_the_results(tiny_llama: Any, tmp_path: Path, family: Family) -> None:
    pieces = 40
    folder, text = write_model_and_text(tmp_path, tiny_llama(4), pieces)
    command = [sys.executable, "-m", "rankkv", "calibrate", "--model", str(folder), "--texts", str(text)]
    command += [*OPTIONS[:-1], str(pieces), "-o", str(tmp_path / "profile.json"), "--json"]
    command += ["--engine", "ray", "--workers", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        workers: list[psutil.Process] = []
        while not workers:
            assert running.poll() is None, running.stderr.read()
            family.look()
            # Ray names a process after the task that it runs.
            workers = [process for process in family.seen.values() if _read_name(process) == "ray::_measure"]
            time.sleep(0.01)
        workers[0].kill()
        shown, told = running.communicate(timeout=900)
    assert running.returncode == 0
    assert json.loads(shown)["calibration"]["texts"] == pieces
    assert "(attempt 2 of 6)" in told


def _read_name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""


@pytest.mark.slow
def test_what_a_dead_machine_had_is_measured_by_another(
    source: tuple[Path, Path], alone: Alone, tmp_path: Path, family: Family
) -> None:
    from ray.cluster_utils import Cluster

    folder, text = source
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        losses = []

        def replace_machine(sentence: str) -> None:
            losses.append(sentence)
            cluster.add_node(num_cpus=1)

        profile = calibrate_on_ray(
            folder,
            [text.read_text()],
            selector=make_watched(tmp_path / "ray", alone.calls + alone.calls // 2, "machine"),
            address=cluster.address,
            on_progress=lambda *_: family.look(),
            on_loss=replace_machine,
            **SIZES,
        )
    finally:
        cluster.shutdown()
    assert len(losses) == 1
    assert len(count_calls(tmp_path / "ray")) == 2
    assert profile == alone.profile


@pytest.mark.slow
def test_a_cluster_is_joined_from_outside(source: tuple[Path, Path], tmp_path: Path, family: Family) -> None:
    pytest.importorskip("grpc", reason="Ray's client is not installed: pip install 'ray[client]'")
    from ray.cluster_utils import Cluster

    folder, text = source
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {"num_cpus": 1, "include_dashboard": False, "ray_client_server_port": port}
    cluster = Cluster(initialize_head=True, head_node_args=options)
    path = tmp_path / "profile.json"
    command = make_command(folder, text)
    try:
        address = f"ray://127.0.0.1:{port}"
        done = run([*command, "-o", str(path), "--engine", "ray", "--address", address])
    finally:
        family.look()
        cluster.shutdown()
    assert f"Joining the Ray cluster {address} ..." in done.stderr
    assert "Calibrating: 100 %" in done.stderr
    run([*command, "-o", str(tmp_path / "alone.json")])
    assert RankProfile.load(tmp_path / "alone.json") == RankProfile.load(path)


@pytest.mark.slow
def test_a_piece_that_kills_every_worker_ends_in_one_sentence(
    source: tuple[Path, Path], tmp_path: Path, family: Family
) -> None:
    import ray

    folder, text = source
    # A program's own Ray is used as it is, and left as it is.
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="error")
    options = {"selector": make_watched(tmp_path / "ray", 3, "each"), **SIZES}
    with pytest.raises(ConfigError, match="connected to Ray already, so address='auto' has no effect"):
        calibrate_on_ray(folder, [text.read_text()], address="auto", **options)
    losses = []
    with pytest.raises(
        ProcessGroupError, match="6 workers died on the same text chunk, most likely for lack of mem"
    ):
        calibrate_on_ray(folder, [text.read_text()], workers=1, on_loss=losses.append, **options)
    assert ray.is_initialized()
    assert [f"attempt {number} of 6" in loss for number, loss in enumerate(losses, start=2)] == [True] * 5
    assert len(count_calls(tmp_path / "ray")) == 6
    # What a worker says of its model is said here.
    with pytest.raises(SourceUnavailableError, match="has no config"):
        calibrate_on_ray(tmp_path, [text.read_text()], **SIZES)
