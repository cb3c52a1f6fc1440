"""`rankkv calibrate`: measure what compressing each layer of a model costs, once, into a profile."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import check_at_least_one, check_output, print_json, reports_errors
from .display import make_console, show_step


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
    max_texts: Annotated[int, typer.Option(help="Most pieces of text measured.")] = 12,
    context_tokens: Annotated[int, typer.Option(help="Tokens of a piece that are compressed.")] = 1024,
    continuation_tokens: Annotated[int, typer.Option(help="Tokens after them that are scored.")] = 256,
    selector: Annotated[str, typer.Option(help="Token selection method.")] = "snapkv",
    dtype: Annotated[
        str | None,
        typer.Option(help="Weights' dtype, such as bfloat16.", show_default="the checkpoint's own"),
    ] = None,
    device_map: Annotated[
        str | None, typer.Option(help="Where the model goes, such as auto or cuda; needs accelerate.")
    ] = None,
    push_to: Annotated[
        str | None, typer.Option(help="Also upload the profile to this repository of the hub.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the profile as JSON to stdout.")] = False,
) -> None:
    """Measure a profile of a model; started again after an interruption, it goes on where it was."""
    console = make_console()
    check_at_least_one("--max-texts", max_texts)
    check_output(output)
    with show_step(console, f"Loading {model}"):
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        from ..calibration import calibrate as run
        from ..files import find_cache_folder
        from ..known_profiles import save_known_profile
        from ..models import load_model
        from ..texts import load_texts

        # One text a source, so that each source gives pieces in proportion to its length.
        documents = ["\n\n".join(load_texts(source)) for source in texts]
        language_model, tokenizer = load_model(model, dtype, device_map)

    resume_path = (
        find_cache_folder() / "profiles" / "unfinished.json"
        if output is None
        else output.with_name(f"{output.name}.unfinished")
    )
    columns = (TextColumn("Calibrating"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None)
        profile = run(
            language_model,
            tokenizer,
            documents,
            context_tokens=context_tokens,
            continuation_tokens=continuation_tokens,
            max_texts=max_texts,
            selector=selector,
            name=model,
            resume_path=resume_path,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    path = save_known_profile(profile) if output is None else profile.save(output)
    resume_path.unlink(missing_ok=True)
    if push_to is not None:
        profile.push_to_hub(push_to)
    if json:
        print_json(profile.to_dict())
    console.print(
        f"{profile.calibration['texts']} pieces, {len(profile.layer_indices)} layers. Written: {path}",
        markup=False,
        soft_wrap=True,
    )
