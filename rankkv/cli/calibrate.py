"""`rankkv calibrate`: measure the loss from compressing each layer of a model, and write it to a profile."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError, UnknownNameError
from ..utils.files import find_cache_folder
from ..utils.processes import find_own_device, find_process_rank, is_main_process
from .common import check_at_least_one, check_output, print_json, reports_errors
from .display import make_console, show_step
from .options import DeviceMap, DtypeName, ModelName

if TYPE_CHECKING:
    from rich.console import Console

    from ..profile.record import RankProfile

#: "local": this process, or those of accelerate launch or torchrun.  "ray": workers that Ray starts.
ENGINES = ("local", "ray")


@reports_errors
def calibrate(
    texts: Annotated[
        list[str], typer.Option(help="python-docs, wikitext, or a file or folder of texts; may be repeated.")
    ],
    model: ModelName = "embedded",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="File of the profile.", show_default="the cache folder, where it is found"
        ),
    ] = None,
    max_texts: Annotated[int, typer.Option(help="Maximum number of text chunks to measure.")] = 12,
    context_tokens: Annotated[int, typer.Option(help="Tokens of a text chunk to compress.")] = 1024,
    continuation_tokens: Annotated[
        int, typer.Option(help="Tokens of a text chunk to score, after the compressed ones.")
    ] = 256,
    selector: Annotated[str, typer.Option(help="Token selection method.")] = "snapkv",
    heads: Annotated[
        bool, typer.Option(help="Also measure each KV head, for head_budgets='profile'.")
    ] = True,
    method: Annotated[
        str,
        typer.Option(help="measured: one run per layer and head; gradient: a fast estimate of all of them."),
    ] = "measured",
    queries: Annotated[
        bool, typer.Option(help="Also measure the centres of the queries, for selector triattention.")
    ] = False,
    replay: Annotated[
        bool,
        typer.Option(
            help="Also replay the texts, to measure how much each head's scores count with selector echo (compress, "
            "pipeline, serve)."
        ),
    ] = False,
    losses: Annotated[
        bool, typer.Option(help="Also measure the loss of compressed caches, for max_loss on this model.")
    ] = False,
    dtype: DtypeName = None,
    device_map: DeviceMap = None,
    engine: Annotated[
        str, typer.Option(help="local, or ray for Ray workers on this machine or a cluster (extra ray).")
    ] = "local",
    address: Annotated[
        str | None,
        typer.Option(
            help="Address of the Ray cluster: host:6379, ray://host:10001 or auto.",
            show_default="this machine",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Text chunks that Ray measures at once, at most.", show_default="one per GPU, or per CPU"
        ),
    ] = None,
    gpus_per_worker: Annotated[
        int | None,
        typer.Option(help="GPUs per Ray worker.", show_default="1 if the cluster has GPUs"),
    ] = None,
    push_to: Annotated[
        str | None, typer.Option(help="Hub repository to upload the profile to as well.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the profile as JSON to stdout.")] = False,
) -> None:
    """Measure a profile of a model; repeat the command to resume. Also under accelerate launch or torchrun."""
    console = make_console()
    check_at_least_one("--max-texts", max_texts)
    check_output(output)
    for option, given in {"--queries": queries, "--replay": replay, "--losses": losses}.items():
        if given and engine != "local":
            raise ConfigError(
                f"{option} needs the model in this process, and --engine is {engine!r}: leave it out."
            )
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

        # One text per source, so that each source gives chunks in proportion to its length.
        documents = ["\n\n".join(load_texts(source)) for source in texts]
    if engine == "ray":
        from ..calibration.ray import calibrate_on_ray

        console.print("Starting Ray ..." if address is None else f"Joining the Ray cluster {address} ...")
        # Ray prints messages about dead workers to stdout, which is for results.
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
        if queries:
            with show_step(console, "Measuring the queries"):
                from ..calibration.query_centres import compute_query_centres, describe_query_centres

                centres = compute_query_centres(
                    language_model, cut_texts(tokenizer, documents, 2048, max_texts)
                )
            profile = replace(profile, query_centres=describe_query_centres(centres))
        if replay:
            with show_step(console, "Replaying the texts"):
                from ..calibration.score_weights import compute_score_weights

                chunks = cut_texts(tokenizer, documents, context_tokens, max_texts)
                weights = compute_score_weights(language_model, chunks, tokenizer, max_tokens=context_tokens)
            profile = replace(profile, score_weights=weights)
        if losses:
            profile = _add_loss_curves(
                console, profile, language_model, tokenizer, documents, context_tokens, max_texts
            )
    if main:
        _keep(console, profile, output, resume_path, push_to, json)


def _check_engine(engine: str, given: dict[str, Any]) -> None:
    """Raise if the engine is unknown, or options of Ray are given without it."""
    if engine not in ENGINES:
        raise UnknownNameError.of("engine", engine, ENGINES)
    named = [f"--{name}" for name, value in given.items() if value is not None]
    if engine != "ray" and named:
        raise ConfigError(
            f"--engine is {engine!r} but must be 'ray' for {', '.join(named)}: give --engine ray."
        )
    if engine == "ray" and find_process_rank().size > 1:
        raise ConfigError(
            f"--engine ray runs in {find_process_rank().size} launched processes but must run in one, because it "
            "starts workers itself: leave accelerate launch or torchrun out."
        )


def cut_texts(tokenizer: Any, documents: list[str], tokens: int, count: int) -> list[Any]:
    """Cut texts into chunks of token ids, and return at most ``count`` of them: an equal part of every text."""
    ids = [tokenizer(text, return_tensors="pt", verbose=False).input_ids[0] for text in documents]
    chunks = [chunk for text in ids for chunk in text.split(tokens) if len(chunk) > 1]
    return chunks[:: max(1, len(chunks) // count)][:count]


def _add_loss_curves(
    console: Console,
    profile: RankProfile,
    model: Any,
    tokenizer: Any,
    documents: list[str],
    context_tokens: int,
    max_texts: int,
) -> RankProfile:
    """Return the profile with the model's loss curves over the texts."""
    from ..calibration.loss_curves import cut_contexts, measure_loss_curves

    contexts = cut_contexts(tokenizer, documents, context_tokens, max_texts)
    with show_step(console, f"Measuring the loss of {len(contexts)} contexts"):
        curves = measure_loss_curves(model, contexts, name=profile.name)
    return replace(profile, loss_curves={selector: curve.to_dict() for selector, curve in curves.items()})


def _find_resume_path(model: str) -> Path:
    """Return the progress file of a calibration without an output file: one per model."""
    digest = hashlib.sha256(model.encode()).hexdigest()[:16]
    return find_cache_folder() / "profiles" / f"unfinished-{digest}.jsonl"


@contextmanager
def _show_progress(console: Console) -> Iterator[Callable[[int, int], None]]:
    """Yield a function that shows progress: a bar on a terminal, else a line every 10 %."""
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
    """Write the profile, upload it if `push_to` is given, and print its path."""
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
