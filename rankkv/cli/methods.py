"""`rankkv methods`: all selectors and budget strategies, with the data they read, their cost and source."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .common import print_json, reports_errors
from .known import load_known


@reports_errors
def methods(
    json: Annotated[bool, typer.Option("--json", help="Print the methods as JSON to stdout.")] = False,
) -> None:
    """List the token selection methods and budget strategies: options, data they read, cost, source."""
    known = load_known()
    record = {kind: known[kind] for kind in ("selectors", "strategies")}
    if json:
        print_json(record)
    else:
        for kind, described in record.items():
            _print_methods(kind, described)


def _print_methods(kind: str, described: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console(highlight=False)
    console.print(f"{kind.capitalize()}:")
    for method in described:
        facts = f"reads {method['needs']}; {method['cost']}; {method['source']}"
        options = ", ".join(f"{name}={value!r}" for name, value in method["options"].items())
        console.print(Text(f"  {method['name']}", style="bold"))
        for line in (method["description"], facts, options and f"options: {options}"):
            if line:
                # As Text, because rich would read square brackets in a string as markup.
                console.print(Padding(Text(line), (0, 0, 0, 4)))
    console.print()
