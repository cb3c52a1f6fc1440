"""`rankkv methods`: every selector and every budget strategy, with what it reads and where it comes from."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .checks import load_known
from .common import print_json, reports_errors

if TYPE_CHECKING:
    from ..budget.strategies import Strategy
    from ..selection import Selector


def describe_methods() -> dict[str, list[dict[str, Any]]]:
    """Describe all registered methods.

    Returns
    -------
    dict
        ``"selectors"`` and ``"strategies"``: lists of records with the keys ``name``, ``options`` (with their
        defaults), ``description`` (one sentence), ``needs`` (what the method reads of a layer), ``cost`` (operations
        for each head, up to a factor of head_dim) and ``source`` (the paper).

    Examples
    --------
    >>> methods = describe_methods()
    >>> [method["needs"] for method in methods["selectors"] if method["name"] == "h2o"]
    ['whole attention']
    """
    from ..budget.strategies import PROFILE_STRATEGIES, STRATEGIES
    from ..selection import SELECTORS

    return {
        "selectors": [describe_selector(selector) for selector in SELECTORS.values()],
        "strategies": [
            describe_strategy(name, strategy)
            for name, strategy in {**STRATEGIES, **PROFILE_STRATEGIES}.items()
        ],
    }


def describe_selector(selector: Selector) -> dict[str, Any]:
    """Describe one selector as :func:`describe_methods` does."""
    from ..selection import WrappingSelector

    parameters = inspect.signature(selector.score).parameters
    options = {name: parameters[name].default for name in selector.option_names if name in parameters}
    if isinstance(selector, WrappingSelector):
        options = {"base": str(selector.base), **options}
    if selector.recent_fraction is not None:
        options["recent_fraction"] = selector.recent_fraction
    return {
        "name": selector.name,
        "options": {**options, **{k: v for k, v in selector.options.items() if k != "base"}},
        "description": selector.description,
        "needs": selector.needs,
        "cost": selector.cost,
        "source": selector.source,
    }


def describe_strategy(name: str, strategy: Strategy) -> dict[str, Any]:
    """Describe one strategy as :func:`describe_methods` does."""
    return {
        "name": name,
        "options": strategy.defaults,
        "description": strategy.description,
        "needs": strategy.needs,
        "cost": strategy.cost,
        "source": strategy.source,
    }


@reports_errors
def methods(
    json: Annotated[bool, typer.Option("--json", help="Print the methods as JSON to stdout.")] = False,
) -> None:
    """List the token selection methods and the budget strategies: options, what they read, cost, source."""
    # The table that ships with the package: the registries need torch, which takes seconds to import.
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
                # As plain text: what stands in brackets is no markup.
                console.print(Padding(Text(line), (0, 0, 0, 4)))
    console.print()
