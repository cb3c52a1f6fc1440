"""`rankkv calibrate`: measure what compressing each layer of a model costs, once, into a profile."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError, UnknownNameError
from ..utils.files import find_cache_folder
from ..utils.processes import find_own_device, find_process_rank, is_main_process
from .common import check_at_least_one, check_output, print_json, reports_errors
from .display import make_console, show_step

if TYPE_CHECKING:
    from rich.console import Console

    from ..profile.record import RankProfile

#: This process and those of accelerate launch or torchrun, or workers that Ray starts.
ENGINES = ("local", "ray")


@reports_errors
def calibrate(
    texts: Annotated[
        list[str], typer.Option(help="python-docs, wikitext, or a .txt or .jsonl file; may be repeated.")
    ],
    model: Annotated[str, typer.Option(help="Hub id, local folder, GGUF file, or embedded.")] = "embedded",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="File of the profile.", show_default="where the model finds it by itself"
        ),
    ] = None,
    max_texts: Annotated[int, typer.Option(help="Most text chunks measured.")] = 12,
    context_tokens: Annotated[int, typer.Option(help="Tokens of a text chunk that are compressed.")] = 1024,
    continuation_tokens: Annotated[int, typer.Option(help="Tokens after them that are scored.")] = 256,
    selector: Annotated[str, typer.Option(help="Token selection method.")] = "snapkv",
    heads: Annotated[
        bool, typer.Option(help="Also measure each key/value head, for head_budgets='profile'.")
    ] = True,
    method: Annotated[
        str,
        typer.Option(help="measured: a run for each layer and head; gradient: a fast estimate of them all."),
    ] = "measured",
    dtype: Annotated[
        str | None,
        typer.Option(help="Weights' dtype, such as bfloat16.", show_default="the checkpoint's own"),
    ] = None,
    device_map: Annotated[
        str | None, typer.Option(help="Where the model goes, such as auto or cuda; needs accelerate.")
    ] = None,
    engine: Annotated[
        str, typer.Option(help="local, or ray for workers of Ray (extra ray): here, or a cluster's.")
    ] = "local",
    address: Annotated[
        str | None,
        typer.Option(help="Ray cluster: host:6379, ray://host:10001 or auto.", show_default="this machine"),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Most text chunks that Ray measures at once.", show_default="one per GPU, or per CPU"
        ),
    ] = None,
    gpus_per_worker: Annotated[
        int | None,
        typer.Option(help="GPUs that a worker of Ray takes.", show_default="1 where there are any"),
    ] = None,
    push_to: Annotated[
        str | None, typer.Option(help="Also upload the profile to this repository of the hub.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the profile as JSON to stdout.")] = False,
) -> None:
    """Measure a profile of a model; started again, it goes on where it was. Also under accelerate launch, torchrun."""
    console = make_console()
    check_at_least_one("--max-texts", max_texts)
    check_output(output)
    _check_engine(engine, {"address": address, "workers": workers, "gpus-per-worker": gpus_per_worker})
    main = is_main_process()
    console.quiet = not main
    resume_path = (
        _find_resume_path(model) if output is None else output.with_name(f"{output.name}.unfinished")
    )
    options: dict[str, Any] = {
        "context_tokens": context_tokens,
        "continuation_tokens": continuation_tokens,
        "max_texts": max_texts,
        "selector": selector,
        "heads": heads,
        "method": method,
        "resume_path": resume_path,
    }
    with show_step(console, "Reading the texts"):
        from ..models.texts import load_texts

        # One text a source, so that each source gives chunks in proportion to its length.
        documents = ["\n\n".join(load_texts(source)) for source in texts]
    if engine == "ray":
        from ..calibration.ray import calibrate_on_ray

        console.print("Starting Ray ..." if address is None else f"Joining the Ray cluster {address} ...")
        # Ray prints what it knows of a dead worker to stdout, which is for results.
        with _show_progress(console) as on_progress, redirect_stdout(sys.stderr):
            profile = calibrate_on_ray(
                model,
                documents,
                dtype=dtype,
                device_map=device_map,
                address=address,
                workers=workers,
                gpus_per_worker=gpus_per_worker,
                on_progress=on_progress,
                on_loss=lambda sentence: console.print(sentence, markup=False, soft_wrap=True),
                **options,
            )
    else:
        with show_step(console, f"Loading {model}"):
            from ..calibration import calibrate as run
            from ..models.loading import load_model

            language_model, tokenizer = load_model(model, dtype, device_map or find_own_device())
        with _show_progress(console) as on_progress:
            profile = run(
                language_model,
                tokenizer,
                documents,
                name=model,
                on_progress=on_progress,
                share_processes=True,
                **options,
            )
    if main:
        _keep(console, profile, output, resume_path, push_to, json)


def _check_engine(engine: str, given: dict[str, Any]) -> None:
    if engine not in ENGINES:
        raise UnknownNameError.of("engine", engine, ENGINES)
    named = [f"--{name}" for name, value in given.items() if value is not None]
    if engine != "ray" and named:
        raise ConfigError(f"{', '.join(named)}: only Ray takes this, so give --engine ray too.")
    if engine == "ray" and find_process_rank().size > 1:
        raise ConfigError(
            "--engine ray starts workers itself: run it as one process, without accelerate launch or torchrun."
        )


def _find_resume_path(model: str) -> Path:
    """Return the progress file of a calibration without an output file: one per model."""
    digest = hashlib.sha256(model.encode()).hexdigest()[:16]
    return find_cache_folder() / "profiles" / f"unfinished-{digest}.jsonl"


@contextmanager
def _show_progress(console: Console) -> Iterator[Callable[[int, int], None]]:
    """Show how much is measured: a bar on a terminal, a line every tenth elsewhere."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("Calibrating"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    tenths = 0
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None)

        def report(done: int, total: int) -> None:
            nonlocal tenths
            progress.update(task, completed=done, total=total)
            if not console.is_terminal and 10 * done // total > tenths:
                tenths = 10 * done // total
                console.print(f"Calibrating: {10 * tenths} %")

        yield report


def _keep(
    console: Console,
    profile: RankProfile,
    output: Path | None,
    resume_path: Path,
    push_to: str | None,
    json: bool,
) -> None:
    """Write the profile, upload it where asked to, and say so."""
    from ..calibration.progress import forget_done
    from ..profile.known import save_known_profile

    path = save_known_profile(profile) if output is None else profile.save(output)
    forget_done(resume_path)
    if push_to is not None:
        profile.push_to_hub(push_to)
    if json:
        print_json(profile.to_dict())
    console.print(
        f"{profile.calibration['texts']} text chunks, {len(profile.layer_indices)} layers. Written: {path}",
        markup=False,
        soft_wrap=True,
    )
