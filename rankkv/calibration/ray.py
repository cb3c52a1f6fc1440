"""Calibration on Ray: pieces of text are tasks, on this machine or a cluster; what a dead worker had, another does."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from .._version import __version__
from ..errors import ConfigError, ProcessGroupError
from ..models.embedded import EMBEDDED
from ..models.loading import load_model
from ..profile.record import RankProfile
from ..ray_cluster import connect, run_tasks
from ..utils.hub import require
from .calibrate import describe_subject, join_pieces, measure_piece
from .gradient import check_differentiable
from .progress import DoneRecords
from .settings import CalibrationSettings


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
    """Measure a profile as `rankkv.calibration.calibrate.calibrate` does, its pieces of text shared out by Ray.

    Each worker loads the model once; this process loads none. A piece whose worker or machine dies is measured by
    another, and every piece is in the resume file as soon as it arrives, so that this process may be stopped too.
    Pieces are joined in their order: the profile does not depend on who measured what.

    Parameters
    ----------
    model : str or path
        What `rankkv.load_model` takes; on a cluster, a hub id, "embedded" or a path that every machine sees.
    texts : sequence of str
        Documents.
    dtype, device_map : optional
        Of `rankkv.load_model`. Without a ``device_map`` a worker takes the GPUs that Ray gives it, or the CPU.
    address : str, optional
        A cluster, as ``ray.init`` takes it: "host:6379" from one of its machines, "ray://host:10001" from elsewhere, or
        "auto". By default Ray is started on this machine and ends with the call. A program that has called ``ray.init``
        itself is left connected as it is.
    workers : int, optional
        Most pieces measured at once, by default as many as there are CPUs, or as the GPUs suffice for. Each worker
        holds the model. On this machine they share its threads.
    gpus_per_worker : int, optional
        By default 1 where the cluster has any, else 0; over several, the model's layers are spread.
    resume_path : str or Path, optional
        As in `calibrate`, which can go on with the same file.
    on_progress : callable, optional
        Called with (continuations done, in all) at the start and after each piece.
    on_loss : callable, optional
        Called with a sentence when a worker died; by default it is a warning.
    **settings
        Of `rankkv.calibration.settings.CalibrationSettings`.

    Returns
    -------
    RankProfile
        Means over the pieces.

    Raises
    ------
    MissingDependencyError
        If Ray is not installed.
    SourceUnavailableError
        If there is no cluster at the address.
    ConfigError
        If a number is out of range, or an address is given although the program is connected already.
    ProcessGroupError
        If workers die again and again on the same piece, or run another version of RankKV.
    RankKVError
        What `load_model` and `calibrate` raise, from a worker too.

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
    told = on_loss or functools.partial(warnings.warn, stacklevel=2)
    with connect(address, workers):
        import ray

        gpus = gpus_per_worker
        if gpus is None:
            gpus = 1 if ray.cluster_resources().get("GPU", 0) >= 1 else 0
        if device_map is None and gpus:
            device_map = "cuda" if gpus == 1 else "auto"
        source = (__version__, _locate(model), dtype, device_map)
        # Ray's own retries are off, because it tells of none.
        remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)
        asked = {"": (source, os.fspath(model), list(texts), chosen)}
        ((_, (subject, pieces)),) = run_tasks(remote(_prepare), asked, 1, told)
        done = DoneRecords(resume_path, chosen.describe(subject))
        keys = [chosen.make_key(ids) for ids in pieces]
        missing = {
            key: (source, ids, chosen) for key, ids in zip(keys, pieces, strict=True) if key not in done
        }
        cells = chosen.count_cells(subject)

        def report() -> None:
            if on_progress is not None:
                on_progress(sum(key in done for key in keys) * cells, len(keys) * cells)

        report()
        # Closed while Ray is still there, whatever ends this.
        with closing(run_tasks(remote(_measure), missing, workers, told)) as results:
            for key, record in results:
                done.add(key, record)
                report()
    return join_pieces([done[key] for key in keys], subject, chosen)


def _locate(model: str | os.PathLike[str]) -> str:
    # A worker's working directory may be another one.
    name = os.fspath(model)
    return os.path.abspath(name) if name != EMBEDDED and os.path.exists(name) else name


# -- in a worker --------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _load(version: str, name: str, dtype: str | None, device_map: Any) -> tuple[Any, Any]:
    """Load the model, once a worker process."""
    if version != __version__:
        raise ProcessGroupError(
            f"a worker runs RankKV {__version__} and this machine {version}: install the same version on all."
        )
    return load_model(name, dtype, device_map)


def _prepare(source: tuple[Any, ...], name: str, texts: list[str], settings: CalibrationSettings) -> Any:
    """Describe the model and cut the texts, which takes the model and its tokenizer."""
    model, tokenizer = _load(*source)
    if settings.method == "gradient":
        check_differentiable(model)
    return describe_subject(model, name), settings.cut(tokenizer, texts)


def _measure(source: tuple[Any, ...], ids: list[int], settings: CalibrationSettings) -> dict[str, Any]:
    model, _ = _load(*source)
    return measure_piece(model, ids, settings)
