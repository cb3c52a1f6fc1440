"""Adding entries to a registry of methods, and removing them again."""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeVar

from ..errors import ConfigError, UnknownNameError

Entry = TypeVar("Entry")


def add_entry(registry: dict[str, Entry], kind: str, name: str, entry: Entry) -> None:
    """Add an entry under a free name.

    Raises
    ------
    ConfigError
        If the name is not a Python name, or is taken.

    Examples
    --------
    >>> registry = {}
    >>> add_entry(registry, "toy", "mine", 1)
    >>> registry
    {'mine': 1}
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise ConfigError(f"the {kind}'s name {name!r} must be a Python name, such as 'my_{kind}'.")
    if name in registry:
        raise ConfigError(f"a {kind} named {name!r} is already registered: choose another name.")
    registry[name] = entry


def remove_entry(registry: dict[str, Entry], kind: str, name: str, built_in: Collection[str]) -> None:
    """Remove an entry that was added.

    Raises
    ------
    UnknownNameError
        If no entry of that name was added; the message lists the added ones.
    """
    added = [key for key in registry if key not in built_in]
    if name not in added:
        raise UnknownNameError.of(f"registered {kind}", name, added)
    del registry[name]
