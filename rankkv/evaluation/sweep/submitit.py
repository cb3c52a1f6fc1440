"""Sweeps on a cluster: submitit jobs that each run `rankkv sweep` on a share of the samples."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import ConfigError, MissingDependencyError, UnknownNameError

#: "local" starts processes on this machine; "debug" runs the jobs one by one in this process.
CLUSTERS = ("slurm", "local", "debug")


def submit_sweep(
    config: str | Path,
    folder: str | Path,
    cluster: str,
    jobs: int = 1,
    options: Mapping[str, Any] | None = None,
) -> list[str]:
    """Submit a sweep as jobs that share its samples.

    Parameters
    ----------
    config : str or Path
        YAML file, readable by the jobs.
    folder : str or Path
        Results folder, shared by all jobs; their output goes to ``jobs/`` in it.
    cluster : {"slurm", "local", "debug"}
        Executor of submitit.
    jobs : int, default 1
        Number of jobs.
    options : mapping, optional
        Parameters of the executor, such as ``slurm_partition``, ``gpus_per_node`` or ``timeout_min``.

    Returns
    -------
    list of str
        Ids of the jobs.

    Raises
    ------
    ConfigError
        If ``jobs`` is below 1, or the executor refuses a parameter or its value.
    UnknownNameError
        If ``cluster`` is not one of the three.
    MissingDependencyError
        If submitit is not installed.
    """
    if cluster not in CLUSTERS:
        raise UnknownNameError.of("cluster", cluster, CLUSTERS)
    if jobs < 1:
        raise ConfigError(f"jobs is {jobs} but must be at least 1.")
    try:
        import submitit
    except ImportError as error:
        raise MissingDependencyError("cluster jobs need submitit: pip install 'rankkv[cluster]'.") from error
    folder = Path(folder).absolute()
    try:
        executor = submitit.AutoExecutor(folder=folder / "jobs", cluster=cluster)
        executor.update_parameters(name="rankkv-sweep", **(options or {}))
    except (AssertionError, NameError, TypeError, RuntimeError) as error:
        raise ConfigError(f"submitit refuses these jobs for the cluster {cluster!r}: {error}") from error
    program = [
        sys.executable,
        "-m",
        "rankkv",
        "sweep",
        str(Path(config).absolute()),
        "--output-dir",
        str(folder),
    ]
    with executor.batch():
        submitted = [
            executor.submit(
                submitit.helpers.CommandFunction([*program, "--share", f"{number}/{jobs}"], verbose=False)
            )
            for number in range(1, jobs + 1)
        ]
    if cluster == "debug":
        # A debug job runs only when its result is read.
        for job in submitted:
            job.result()
    return [str(job.job_id) for job in submitted]
