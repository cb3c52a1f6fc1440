"""Checks of values from a YAML file; each error names the value, its place in the file and what it must be."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...errors import ConfigError, InputError, MissingDependencyError, RankKVError


def load_yaml(text: str, path: str) -> Any:
    """Parse a YAML text; ``path`` stands in error messages.

    Raises
    ------
    InputError
        If the text is not YAML.
    ConfigError
        If a mapping has a key twice.
    MissingDependencyError
        If PyYAML is not installed.
    """
    try:
        import yaml
    except ImportError as error:
        raise MissingDependencyError("a sweep file needs PyYAML: pip install 'rankkv[eval]'.") from error

    class Loader(yaml.SafeLoader):
        """Refuse a key that comes twice; PyYAML would silently keep the last."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for key in keys:
                if keys.count(key) > 1:
                    raise ConfigError(
                        f"the mapping at line {node.start_mark.line + 1} has {key!r} twice: remove one."
                    )
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error


def explain(where: str, call: Callable[..., Any], *arguments: Any) -> Any:
    """Return the result of a call; an error it raises becomes a ConfigError that begins with ``where``."""
    try:
        return call(*arguments)
    except (RankKVError, TypeError) as error:
        raise ConfigError(f"{where}: {error}") from error


def check_mapping(value: Any, where: str, known: Sequence[str] | None = None) -> Mapping[str, Any]:
    """Return a mapping with strings as keys, only the known ones if ``known`` is given.

    Raises
    ------
    ConfigError
        If the value is anything else; the message begins with ``where``.
    """
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{where} is {value!r} but must be a mapping of names to values.")
    unknown = [key for key in value if known is not None and key not in known]
    if unknown:
        raise ConfigError(f"{where} has the unknown key {unknown[0]!r}; known: {', '.join(known or ())}.")
    return value


def take_list(
    given: Mapping[str, Any], key: str, default: list[Any] | None = None, where: str = ""
) -> list[Any]:
    """Return the list under a key, or the default; it may be empty only if the default is empty.

    Raises
    ------
    ConfigError
        If the value is anything else; the message begins with ``where`` and the key.
    """
    value = given.get(key, default)
    if value is None and key not in given:
        raise ConfigError(f"{where}{key} is missing: give a list of at least one entry.")
    if not isinstance(value, list) or (not value and default != []):
        raise ConfigError(f"{where}{key} is {value!r} but must be a list of at least one entry.")
    return value


def check_string(value: Any, where: str) -> str:
    """Return a string that is not blank.

    Raises
    ------
    ConfigError
        If the value is anything else; the message begins with ``where``.
    """
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{where} is {value!r} but must be a text that is not empty.")
    return value


def check_integer(value: Any, where: str, least: int) -> int:
    """Return an integer of at least ``least``.

    Raises
    ------
    ConfigError
        If the value is anything else; the message begins with ``where``.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{where} is {value!r} but must be an integer of at least {least}.")
    return value


def check_ratio(value: Any, where: str) -> float:
    """Return a fraction of the cache in (0, 1].

    Raises
    ------
    ConfigError
        If the value is anything else; the message begins with ``where``.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value <= 1.0:
        raise ConfigError(
            f"{where} is {value!r} but must be a number in (0, 1], the fraction of the cache kept."
        )
    return float(value)


def check_bool(value: Any, where: str) -> bool:
    """Return a boolean.

    Raises
    ------
    ConfigError
        If the value is anything else; the message begins with ``where``.
    """
    if not isinstance(value, bool):
        raise ConfigError(f"{where} is {value!r} but must be true or false.")
    return value
