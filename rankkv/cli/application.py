"""The typer application with all subcommands."""

from __future__ import annotations

from typing import Annotated

import typer

from .._version import __version__
from .analyze import analyze
from .calibrate import calibrate
from .check import check
from .demo import demo
from .evaluate import evaluate
from .export_generate import export_generate
from .generate import generate
from .lm_eval import PASS_ON, lm_eval
from .methods import methods
from .report import report
from .serve import serve
from .sweep import sweep

app = typer.Typer(
    name="rankkv",
    no_args_is_help=True,
    add_completion=False,
    # Only bugs end in a traceback, and Python's own is enough for them.
    pretty_exceptions_enable=False,
    help="KV cache compression: each layer's budget follows the effective rank of its attention.",
)
app.command()(demo)
app.command()(analyze)
app.command()(generate)
app.command()(calibrate)
app.command()(export_generate)
app.command("eval")(evaluate)
app.command("lm-eval", context_settings=PASS_ON)(lm_eval)
app.command()(methods)
app.command()(check)
app.command()(sweep)
app.command()(report)
app.command()(serve)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rankkv {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass
