"""`rankkv report`: one HTML page and figures of a results folder or of one record."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError, MissingDependencyError
from ..utils.files import write_text_atomically
from .common import check_output, print_json, reports_errors
from .display import make_console, show_step


@reports_errors
def report(
    folder: Annotated[
        Path,
        typer.Argument(
            help="Folder that rankkv sweep wrote, finished or not; or rows.parquet, bench.json, demo.json."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Page to write.",
            show_default="report.html in the folder; NAME.html beside a file",
        ),
    ] = None,
    bench: Annotated[
        Path | None, typer.Option(help="Benchmarks to show too, such as results/bench.json.")
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Where figures go.", show_default="figures/ in the folder")
    ] = None,
    prefix: Annotated[str, typer.Option(help="Beginning of the figures' names.")] = "",
    json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON to stdout.")] = False,
) -> None:
    """Make one self-contained HTML page and figures (PNG, PDF) of a results folder or of one record."""
    console = make_console()
    home = folder.parent if folder.is_file() else folder
    if output is None:
        output = folder.with_suffix(".html") if folder.is_file() else folder / "report.html"
    check_output(output)
    from ..report import build_page, collect_results, write_figures

    with show_step(console, f"Reading {folder}"):
        data = collect_results(folder, bench)
    with show_step(console, "Building the page"):
        page = build_page(data)
    try:
        write_text_atomically(output, page)
    except OSError as error:
        raise InputError(f"cannot write {str(output)!r}: {error.strerror or error}.") from error
    written = [output]
    try:
        with show_step(console, "Drawing figures"):
            written += write_figures(data, home / "figures" if figures is None else figures, prefix)
    except MissingDependencyError as error:
        console.print(f"No figures: {error}", markup=False, soft_wrap=True)
    console.print("Written: " + ", ".join(str(path) for path in written), markup=False, soft_wrap=True)
    if json:
        print_json({"written": [str(path) for path in written]})
