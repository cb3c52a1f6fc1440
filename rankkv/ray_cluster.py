"""Joining a Ray cluster or starting Ray on this machine, and running tasks whose workers may die."""

from __future__ import annotations

import os
import socket
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from .errors import ConfigError, ProcessGroupError, RankKVError, SourceUnavailableError

#: So often a piece is measured again after its worker died; more deaths than that are no accident.
RETRIES = 5
# More than any cluster works on at once; the list of what runs is walked at every result.
_MOST_AT_ONCE = 1000
# Pieces and measurements are small; Ray's own default is a third of the memory.
_OBJECT_STORE_BYTES = 128 * 2**20
_PROBE_SECONDS = 10.0
_STARTS = 2
_EMPTY_SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


@contextmanager
def connect(address: str | None, workers: int | None) -> Iterator[None]:
    """Join a cluster, or start Ray on this machine; leave it again unless the user's program was in it already."""
    import ray

    if ray.is_initialized():
        if address is not None:
            raise ConfigError(
                f"this program is connected to Ray already, so address={address!r} has no effect: leave it out, or "
                "call ray.shutdown() before."
            )
        yield
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if address is None:
        options |= {
            "address": "local",
            "num_cpus": workers,
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
        }
    else:
        _check_address(address)
        options["address"] = address
    with _environment(workers):
        _initialize(options, address)
    try:
        yield
    finally:
        ray.shutdown()


def _initialize(options: dict[str, Any], address: str | None) -> None:
    """Call ``ray.init``; again where Ray did not start, since on a busy machine its processes miss its own limits."""
    import ray

    for attempt in range(_STARTS if address is None else 1, 0, -1):
        try:
            ray.init(**options)
            return
        except Exception as error:
            # What a failed connection raises depends on the way in; it is none of the errors of this library.
            ray.shutdown()
            if attempt == 1:
                raise _explain(address, _shorten(error)) from error


def _explain(address: str | None, reason: str) -> SourceUnavailableError:
    if address is None:
        return SourceUnavailableError(f"Ray cannot be started on this machine ({reason}).")
    return SourceUnavailableError(
        f"there is no Ray cluster that can be joined at {address!r} ({reason}): give the address of a running one, "
        "such as host:6379 or ray://host:10001, or none to start Ray on this machine."
    )


def _check_address(address: str) -> None:
    """Raise where nothing answers, or something else: Ray itself would try for minutes, or end the process."""
    given = os.environ.get("RAY_ADDRESS") or address if address == "auto" else address
    if given == "auto":
        return
    try:
        parts = urlsplit(given if "://" in given else f"//{given}")
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise _explain(given, _shorten(error)) from error
    if not host or port is None:
        raise _explain(given, "it names no host and port")
    try:
        with socket.create_connection((host, port), timeout=_PROBE_SECONDS) as connection:
            if os.environ.get("RAY_USE_TLS", "0") != "0":
                return
            # Ray speaks gRPC, so HTTP/2, whose server answers the client's greeting with a frame of settings.
            connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _EMPTY_SETTINGS)
            answer = connection.recv(len(_EMPTY_SETTINGS))
    except OSError as error:
        raise _explain(given, error.strerror or _shorten(error)) from error
    if answer[3:4] != _EMPTY_SETTINGS[3:4]:
        raise _explain(given, "what answers there is not Ray")


@contextmanager
def _environment(workers: int | None) -> Iterator[None]:
    """Set what Ray and its workers read as they start, unless the user has set it."""
    import torch

    wanted = {
        "RAY_USAGE_STATS_ENABLED": "0",
        # Its new way with GPUs, which it else announces on every start: none asked for leaves them as they are.
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // workers) if workers else 1),
    }
    added = [name for name in wanted if name not in os.environ]
    os.environ.update({name: wanted[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _shorten(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0].rstrip(".:") if lines else "") or type(error).__name__


def run_tasks(
    task: Any, arguments: Mapping[str, tuple[Any, ...]], at_once: int | None, on_loss: Callable[[str], None]
) -> Generator[tuple[str, Any], None, None]:
    """Run a task for each of several arguments and yield results as they come; what dies with its worker runs again."""
    import ray
    from ray import exceptions

    lost = (
        exceptions.WorkerCrashedError,
        exceptions.NodeDiedError,
        exceptions.OutOfMemoryError,
        exceptions.ObjectLostError,
    )
    waiting, deaths = deque(arguments), Counter[str]()
    running: dict[Any, str] = {}
    try:
        while waiting or running:
            while waiting and len(running) < (at_once or _MOST_AT_ONCE):
                key = waiting.popleft()
                running[task.remote(*arguments[key])] = key
            (ready,), _ = ray.wait(list(running), num_returns=1)
            key = running.pop(ready)
            try:
                result = ray.get(ready)
            except exceptions.RayTaskError as error:
                if isinstance(error.cause, RankKVError):
                    raise error.cause from error
                raise
            except lost as error:
                deaths[key] += 1
                if deaths[key] > RETRIES:
                    raise ProcessGroupError(
                        f"{deaths[key]} workers died on the same piece, most likely for lack of memory: lower the "
                        "number of workers or context_tokens, or use machines with more memory."
                    ) from error
                waiting.appendleft(key)
                on_loss(
                    "A worker died before it had done its piece of text; another measures that piece again "
                    f"(attempt {deaths[key] + 1} of {RETRIES + 1})."
                )
            except exceptions.RayError as error:
                raise ProcessGroupError(f"Ray gave a piece up ({_shorten(error)}).") from error
            else:
                yield key, result
    finally:
        for left in running:
            ray.cancel(left, force=True)
