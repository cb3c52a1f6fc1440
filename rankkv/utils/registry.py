"""Adding to a registry of methods, and taking out again what was added."""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeVar

from ..errors import ConfigError, UnknownNameError

Entry = TypeVar("Entry")


def add_entry(registry: dict[str, Entry], kind: str, name: str, entry: Entry) -> None:
    """Add an entry under a name that is free.

    Raises
    ------
    ConfigError
        The name is no Python name, or taken.

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
        raise ConfigError(f"a {kind} named {name!r} is registered already: choose another name.")
    registry[name] = entry


def remove_entry(registry: dict[str, Entry], kind: str, name: str, built_in: Collection[str]) -> None:
    """Take out an entry that was added.

    Raises
    ------
    UnknownNameError
        Nothing of that name was added; the message lists what was.
    """
    added = [key for key in registry if key not in built_in]
    if name not in added:
        raise UnknownNameError.of(f"registered {kind}", name, added)
    del registry[name]
