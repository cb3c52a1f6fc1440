"""Descriptions of selectors, strategies, tasks and presets, from a shipped table or from the registries."""

from __future__ import annotations

import inspect
import json
import sys
from importlib import resources
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..budget.strategies import Strategy
    from ..selection import Selector


def load_known() -> dict[str, list[dict[str, Any]]]:
    """Load the descriptions of all selectors, strategies, tasks and presets.

    The registries need torch, whose import takes seconds.  If they are not imported yet, only built-in methods exist,
    and the shipped table describes them.  ``python tools/make_known_names.py`` writes that table.
    """
    text = resources.files("rankkv.cli").joinpath("known.json").read_text(encoding="utf-8")
    known: dict[str, list[dict[str, Any]]] = json.loads(text)
    if "rankkv.selection.registry" in sys.modules:
        known |= describe_methods()
    return known


def list_names(kind: str) -> list[str]:
    """List the names of one kind: "selectors", "strategies", "tasks" or "presets"."""
    return [entry["name"] for entry in load_known()[kind]]


def describe_methods() -> dict[str, list[dict[str, Any]]]:
    """Describe all registered methods.

    Returns
    -------
    dict
        Lists of records under ``"selectors"`` and ``"strategies"``.  A record has the keys ``name``, ``options``
        (with their defaults), ``description`` (one sentence), ``needs`` (data that the method reads of a layer),
        ``cost`` (operations per head, up to a factor of head_dim) and ``source`` (the paper).

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
