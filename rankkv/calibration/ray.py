"""Calibration on Ray: text chunks as tasks on this machine or a cluster, repeated if their worker dies."""

from __future__ import annotations

import functools
import os
import socket
import warnings
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .._version import __version__
from ..errors import ConfigError, ProcessGroupError, RankKVError, SourceUnavailableError
from ..models.embedded import EMBEDDED
from ..models.loading import load_model
from ..profile.record import RankProfile
from ..utils.hub import require
from .calibrate import describe_subject, join_chunks, measure_chunk
from .gradient import check_differentiable
from .progress import DoneRecords
from .settings import CalibrationSettings

#: Times that a text chunk is measured again after its worker died; more deaths point to a cause other than chance.
RETRIES = 5
# More than any cluster runs at once. A bound is needed, because every result walks the list of running tasks.
_MOST_AT_ONCE = 1000
# Text chunks and measurements are small; Ray's own default is a third of the memory.
_OBJECT_STORE_BYTES = 128 * 2**20
_PROBE_SECONDS = 10.0
_STARTS = 2
# An HTTP/2 frame of type 4 (SETTINGS) without a payload.
_EMPTY_SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


@contextmanager
def connect(address: str | None, workers: int | None) -> Iterator[None]:
    """Join a cluster or start Ray on this machine, and shut it down at the end.

    A program that is connected to Ray already stays connected.

    Raises
    ------
    ConfigError
        If an address is given although the program is connected already.
    SourceUnavailableError
        If Ray cannot be started, or no cluster answers at the address.
    """
    import ray

    if ray.is_initialized():
        if address is not None:
            raise ConfigError(
                f"this program is connected to Ray already, so address={address!r} has no effect: leave it out, or "
                "call ray.shutdown() first."
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
    """Call ``ray.init``, a second time if Ray did not start on this machine.

    On a busy machine Ray's processes may start too slowly for its own time limits.
    """
    import ray

    for attempt in range(_STARTS if address is None else 1, 0, -1):
        try:
            ray.init(**options)
            return
        except Exception as error:
            # A failed connection raises different errors for different kinds of address.
            ray.shutdown()
            if attempt == 1:
                raise _explain(address, _shorten(error)) from error


def _explain(address: str | None, reason: str) -> SourceUnavailableError:
    if address is None:
        return SourceUnavailableError(
            f"Ray cannot be started on this machine ({reason}): calibrate without it, or give a cluster's address."
        )
    return SourceUnavailableError(
        f"there is no Ray cluster that can be joined at {address!r} ({reason}): give the address of a running one, "
        "such as host:6379 or ray://host:10001, or none to start Ray on this machine."
    )


def _check_address(address: str) -> None:
    """Raise if Ray does not answer at the address.

    Without this check Ray tries for minutes, or ends the process.
    """
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
            # Ray uses gRPC over HTTP/2. Such a server answers the client's preface with a SETTINGS frame.
            connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _EMPTY_SETTINGS)
            answer = connection.recv(len(_EMPTY_SETTINGS))
    except OSError as error:
        raise _explain(given, error.strerror or _shorten(error)) from error
    if answer[3:4] != _EMPTY_SETTINGS[3:4]:
        raise _explain(given, "what answers there is not Ray")


@contextmanager
def _environment(workers: int | None) -> Iterator[None]:
    """Set the environment variables that Ray and its workers read at their start, unless the user has set them."""
    import torch

    wanted = {
        "RAY_USAGE_STATS_ENABLED": "0",
        # With "0", a task that requests no GPU leaves CUDA_VISIBLE_DEVICES as it is. Unset, every start warns of it.
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
    """Return the first line of an error's message, or its type if the message is empty."""
    lines = str(error).strip().splitlines()
    return (lines[0].rstrip(".:") if lines else "") or type(error).__name__


def run_tasks(
    task: Any, arguments: Mapping[str, tuple[Any, ...]], at_once: int | None, on_loss: Callable[[str], None]
) -> Generator[tuple[str, Any], None, None]:
    """Run a Ray task for each of several arguments and yield (key, result) as results arrive.

    A task whose worker dies runs again, up to ``RETRIES`` times.

    Raises
    ------
    ProcessGroupError
        If workers die again and again on the same task, or Ray gives the task up.
    RankKVError
        If a task raises it.
    """
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
                        f"{deaths[key]} workers died on the same text chunk, most likely for lack of memory: lower the "
                        "number of workers or context_tokens, or use machines with more memory."
                    ) from error
                waiting.appendleft(key)
                on_loss(
                    "A worker died before it had measured its text chunk; another worker measures it again "
                    f"(attempt {deaths[key] + 1} of {RETRIES + 1})."
                )
            except exceptions.RayError as error:
                raise ProcessGroupError(
                    f"Ray gave up a text chunk ({_shorten(error)}): start the calibration again."
                ) from error
            else:
                yield key, result
    finally:
        for left in running:
            ray.cancel(left, force=True)


def calibrate_on_ray(
    model: str | os.PathLike[str],
    texts: Sequence[str],
    *,
    dtype: str | None = None,
    device_map: str | None = None,
    address: str | None = None,
    workers: int | None = None,
    gpus_per_worker: int | None = None,
    resume_path: str | Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    on_loss: Callable[[str], None] | None = None,
    **settings: Any,
) -> RankProfile:
    """Measure a profile as `rankkv.calibration.calibrate.calibrate` does, with text chunks as Ray tasks.

    Each worker loads the model once; this process does not load it. If a worker or its machine dies, another measures
    the text chunk. Every measurement is written to the resume file as soon as it arrives, so this process may be
    stopped too. Measurements are averaged in the order of the chunks: the profile does not depend on the workers.

    Parameters
    ----------
    model : str or path
        As in `rankkv.load_model`. On a cluster, a hub id, "embedded" or a path that every machine can read.
    texts : sequence of str
        Documents.
    dtype, device_map : optional
        As in `rankkv.load_model`. Without a ``device_map`` a worker uses the GPUs that Ray gives it, or the CPU.
    address : str, optional
        Address of a cluster for ``ray.init``: "host:6379" from one of its machines, "ray://host:10001" from elsewhere,
        or "auto". By default Ray is started on this machine and ends with the call. A program that has called
        ``ray.init`` itself stays connected.
    workers : int, optional
        Most text chunks measured at once; by default limited by the CPUs, or by the GPUs if workers use them. Each
        worker holds the model. On this machine the workers share its threads.
    gpus_per_worker : int, optional
        By default 1 if the cluster has GPUs, else 0. With several, the model's layers are spread over them.
    resume_path : str or Path, optional
        As in `calibrate`, which can resume from the same file.
    on_progress : callable, optional
        Called with (continuations done, all continuations) at the start and after each text chunk.
    on_loss : callable, optional
        Called with a sentence when a worker died; by default the sentence is a warning.
    **settings
        Fields of `rankkv.calibration.settings.CalibrationSettings`.

    Returns
    -------
    RankProfile
        Means over the text chunks.

    Raises
    ------
    MissingDependencyError
        If Ray is not installed.
    SourceUnavailableError
        If no cluster answers at the address, or Ray cannot be started on this machine.
    ConfigError
        If a number is out of range, or an address is given although the program is connected already.
    ProcessGroupError
        If workers die again and again on the same text chunk, or run another version of RankKV.
    RankKVError
        As `load_model` and `calibrate`, also from a worker.

    Examples
    --------
    >>> texts = load_texts("python-docs")  # doctest: +SKIP
    >>> calibrate_on_ray("embedded", texts, workers=2, max_texts=4).save("profile.json")  # doctest: +SKIP
    """
    require("ray", "pip install 'rankkv[ray]'", "calibration on Ray")
    for name, value, least in (("workers", workers, 1), ("gpus_per_worker", gpus_per_worker, 0)):
        if value is not None and value < least:
            raise ConfigError(f"{name} is {value} but must be at least {least}.")
    chosen = CalibrationSettings(**settings)
    on_loss = on_loss or functools.partial(warnings.warn, stacklevel=2)
    with connect(address, workers):
        import ray

        gpus = gpus_per_worker
        if gpus is None:
            gpus = 1 if ray.cluster_resources().get("GPU", 0) >= 1 else 0
        if device_map is None and gpus:
            device_map = "cuda" if gpus == 1 else "auto"
        source = (__version__, _locate(model), dtype, device_map)
        # Ray's own retries are off, because it does not report them.
        remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)
        preparation = {"": (source, os.fspath(model), list(texts), chosen)}
        ((_, (subject, chunks)),) = run_tasks(remote(_prepare), preparation, 1, on_loss)
        done = DoneRecords(resume_path, chosen.describe(subject))
        keys = [chosen.make_key(ids) for ids in chunks]
        missing = {
            key: (source, ids, chosen) for key, ids in zip(keys, chunks, strict=True) if key not in done
        }
        steps = chosen.count_steps(subject)

        def report() -> None:
            if on_progress is not None:
                on_progress(sum(key in done for key in keys) * steps, len(keys) * steps)

        report()
        # An error or a stop must cancel the running tasks before Ray is shut down.
        with closing(run_tasks(remote(_measure), missing, workers, on_loss)) as results:
            for key, record in results:
                done.add(key, record)
                report()
    return join_chunks([done[key] for key in keys], subject, chosen)


def _locate(model: str | os.PathLike[str]) -> str:
    """Make a path absolute, because a worker may have another working directory."""
    name = os.fspath(model)
    return os.path.abspath(name) if name != EMBEDDED and os.path.exists(name) else name


# -- functions that run in a worker ---------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _load(version: str, name: str, dtype: str | None, device_map: Any) -> tuple[Any, Any]:
    """Load the model, once per worker process."""
    if version != __version__:
        raise ProcessGroupError(
            f"a worker runs RankKV {__version__} but this machine runs {version}: install the same version on all."
        )
    return load_model(name, dtype, device_map)


def _prepare(source: tuple[Any, ...], name: str, texts: list[str], settings: CalibrationSettings) -> Any:
    """Describe the model and cut the texts; both need the loaded model or its tokenizer."""
    model, tokenizer = _load(*source)
    if settings.method == "gradient":
        check_differentiable(model)
    return describe_subject(model, name), settings.cut(tokenizer, texts)


def _measure(source: tuple[Any, ...], ids: list[int], settings: CalibrationSettings) -> dict[str, Any]:
    """Measure one text chunk."""
    model, _ = _load(*source)
    return measure_chunk(model, ids, settings)
