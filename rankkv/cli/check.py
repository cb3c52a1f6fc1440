"""`rankkv check`: versions, and a self-test that compresses a tiny model."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .common import print_json, reports_errors

EXIT_FAILED = 1


@reports_errors
def check(
    json: Annotated[
        bool, typer.Option("--json", help="Print versions and results as JSON to stdout.")
    ] = False,
) -> None:
    """Show the versions in use and compress a tiny random model; the exit code is 1 if anything fails."""
    from ..analysis.selfcheck import run_selfcheck

    record = run_selfcheck()
    if json:
        print_json(record)
    else:
        _print_tables(record)
    if not record["ok"]:
        raise typer.Exit(EXIT_FAILED)


def _print_tables(record: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, version in record["versions"].items():
        table.add_row(name.replace("_", " "), version)
    console.print(table)
    console.print()
    table = Table(box=None, pad_edge=False)
    for title in ("check", "result", "found"):
        table.add_column(title)
    for row in record["checks"]:
        table.add_row(row["name"], "ok" if row["passed"] else "FAILED", row["detail"])
    console.print(table)
