"""Sweeps on a cluster: jobs of submitit, each of which is `rankkv sweep` for its share of the samples."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import ConfigError, MissingDependencyError, UnknownNameError

#: "local" starts processes of this machine, "debug" runs the jobs one by one in this process.
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
        YAML file, where the jobs can read it.
    folder : str or Path
        Where results go, a folder that all jobs share; what they print goes to ``jobs/`` in it.
    cluster : {"slurm", "local", "debug"}
        An executor of submitit.
    jobs : int, default 1
        How many.
    options : mapping, optional
        Parameters of the executor, such as ``slurm_partition``, ``gpus_per_node`` or ``timeout_min``.

    Returns
    -------
    list of str
        The jobs' ids.

    Raises
    ------
    ConfigError
        If ``jobs`` is below 1, or the executor knows no such parameter or does not take its value.
    UnknownNameError
        If there is no such cluster.
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
        raise MissingDependencyError(
            "jobs are submitted with submitit: pip install 'rankkv[cluster]'."
        ) from error
    folder = Path(folder).absolute()
    try:
        executor = submitit.AutoExecutor(folder=folder / "jobs", cluster=cluster)
        executor.update_parameters(name="rankkv-sweep", **(options or {}))
    except (AssertionError, NameError, TypeError, RuntimeError) as error:
        raise ConfigError(f"submitit does not take these jobs for {cluster!r}: {error}") from error
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
        # A debug job runs when its result is asked for.
        for job in submitted:
            job.result()
    return [str(job.job_id) for job in submitted]
