"""`rankkv sweep`: every model, task, method, ratio and seed of a YAML file; a stopped sweep resumes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from .common import parse_options, print_json, reports_errors
from .display import format_seconds, make_console, show_step

if TYPE_CHECKING:
    from rich.console import Console

    from ..evaluation.sweep.config import SweepConfig
    from ..evaluation.sweep.sweep import ModelSweep, Sweep
    from ..utils.processes import ProcessRank


@reports_errors
def sweep(
    config: Annotated[Path, typer.Argument(help="YAML file; experiments/sweep.yaml is an example.")],
    output_dir: Annotated[
        Path | None, typer.Option(help="Folder for results.", show_default="results/ and the file's name")
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Print the plan and a time estimate, then stop.")
    ] = False,
    share: Annotated[
        str | None,
        typer.Option(help="Run only this share of the samples, such as 2/4.", show_default="the launcher's"),
    ] = None,
    submitit: Annotated[
        str | None,
        typer.Option(
            help="Submit jobs with submitit instead: slurm, or local for processes on this machine."
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(help="Jobs to submit; each runs a share of the samples.")] = 1,
    submitit_option: Annotated[
        list[str] | None,
        typer.Option(help="Parameter of submitit's executor, name=value; may be repeated."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print a summary as JSON to stdout.")] = False,
) -> None:
    """Run a sweep; repeat the command to resume. Also under accelerate launch or torchrun."""
    console = make_console()
    folder = Path("results") / config.stem if output_dir is None else output_dir
    own_share = _parse_share(share)

    from ..evaluation.sweep.config import read_sweep_config

    settings = read_sweep_config(config)
    if submitit is not None:
        _submit(
            console, config, folder, submitit, jobs, parse_options(submitit_option, "--submitit-option"), json
        )
        return
    if submitit_option or jobs != 1:
        raise ConfigError(
            "--jobs and --submitit-option need --submitit: give --submitit slurm or --submitit local too."
        )

    from ..evaluation.sweep.sweep import Sweep

    run = Sweep(settings, folder, own_share)
    if run.share.rank == 0 or share is not None:
        _print_plan(console, settings, run)
    done = 0
    for model in settings.models:
        with show_step(console, f"Loading {model.name}"):
            part = run.load(model)
        done += _run_model(console, run, part, only_plan=plan)
        del part
    rows = None if plan else run.finish()
    if rows is not None:
        console.print(f"Written: {rows}. Show it with: rankkv report {folder}", markup=False, soft_wrap=True)
    elif not plan:
        console.print("This process is done, but other processes still have samples to measure.")
    if json:
        print_json({"folder": str(folder), "measured": done, "rows": None if rows is None else str(rows)})


def _parse_share(text: str | None) -> ProcessRank | None:
    """Parse a share such as ``2/4``: the second of four."""
    if text is None:
        return None
    from ..utils.processes import ProcessRank

    number, slash, size = text.partition("/")
    if not (slash and number.isdecimal() and size.isdecimal() and 1 <= int(number) <= int(size)):
        raise ConfigError(f"--share is {text!r} but must be number/count, such as 2/4 (from 1/4 to 4/4).")
    return ProcessRank(int(number) - 1, int(size))


def _print_plan(console: Console, config: SweepConfig, run: Sweep) -> None:
    """Print the sweep's tasks, models, methods, ratios and seeds."""
    from rich.table import Table

    from ..evaluation.sweep.sweep import count_samples

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("task", "lengths", "samples", "caches each"):
        table.add_column(name, justify="left" if name == "task" else "right")
    counts = count_samples(config)
    for task in config.tasks:
        lengths = ", ".join(f"{length:,}" for length in task.lengths)
        table.add_row(task.label, lengths, str(counts[task.label]), f"{config.setting_count} + full")
    console.print(table)
    console.print(
        f"{len(config.models)} model(s): {', '.join(model.name for model in config.models)}\n"
        f"{len(config.methods)} methods: {', '.join(method.name for method in config.methods)}\n"
        f"{len(config.ratios)} ratios: {', '.join(f'{ratio:g}' for ratio in config.ratios)}; seeds: "
        f"{', '.join(map(str, config.seeds))}; results in {run.folder}",
        markup=False,
        soft_wrap=True,
    )


def _run_model(console: Console, run: Sweep, part: ModelSweep, only_plan: bool) -> int:
    """Measure the waiting samples of one model and show the time left; return their number."""
    whose = "" if run.share.size == 1 else f" (process {run.share.rank + 1} of {run.share.size})"
    done = sum(run.store.is_done(unit.name) for unit in part.units)
    if not part.waiting:
        console.print(f"Nothing to measure{whose}: {done} of {len(part.units)} samples are done.")
        return 0
    with show_step(console, "Estimating"):
        estimates = part.estimate_seconds()
    console.print(
        f"{len(part.waiting)} of {len(part.units)} samples to measure{whose}, {done} are done; about "
        f"{format_seconds(sum(estimates))} if the load of the machine stays the same."
    )
    if only_plan:
        return 0
    progress = Remaining(estimates)
    with show_step(console, f"Measuring {len(part.waiting)} samples") as step:
        for number, unit in enumerate(part.run(), start=1):
            left = format_seconds(progress.advance())
            total = len(part.waiting)
            step.advance(number, total, f"{number}/{total} samples, {left} left (last: {unit.task.label})")
    return len(part.waiting)


class Remaining:
    """Estimate the seconds left: the estimate of the rest, times actual over estimated seconds so far.

    Parameters
    ----------
    estimates : list of float
        Estimated seconds of each step, in order.
    """

    def __init__(self, estimates: list[float]) -> None:
        self._estimates = estimates
        self._start, self._done = time.perf_counter(), 0

    def advance(self) -> float:
        """Count one more step as done and return the seconds left."""
        self._done += 1
        past = sum(self._estimates[: self._done])
        spent = time.perf_counter() - self._start
        return sum(self._estimates[self._done :]) * (spent / past if past > 0.0 else 1.0)


def _submit(
    console: Console, config: Path, folder: Path, cluster: str, jobs: int, options: dict[str, Any], json: bool
) -> None:
    from ..evaluation.sweep.submitit import submit_sweep

    submitted = submit_sweep(config, folder, cluster, jobs, options)
    console.print(
        f"Submitted {len(submitted)} jobs to {cluster}: {', '.join(submitted)}. Their output is in "
        f"{folder / 'jobs'}. The last job writes the rows. If a job stops early, repeat this command to resume.",
        markup=False,
        soft_wrap=True,
    )
    if json:
        print_json({"folder": str(folder), "jobs": submitted})
