"""Values of a YAML file, checked so that every error says where the value stands and what it must be."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...errors import ConfigError, InputError, MissingDependencyError, RankKVError


def load_yaml(text: str, path: str) -> Any:
    """Return what a YAML text holds; ``path`` is for the error.

    Raises
    ------
    InputError, ConfigError
        If it is no YAML, or a key comes twice.
    """
    try:
        import yaml
    except ImportError as error:
        raise MissingDependencyError("a sweep is read with PyYAML: pip install 'rankkv[eval]'.") from error

    class Loader(yaml.SafeLoader):
        """Refuses a key that comes twice, of which YAML would keep the last."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for key in keys:
                if keys.count(key) > 1:
                    raise ConfigError(
                        f"line {node.start_mark.line + 1} begins a mapping that has {key!r} twice."
                    )
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise InputError(f"{path} is no YAML: {' '.join(str(error).split())}.") from error


def explain(where: str, call: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a call returns; an error of it says where in the file its cause stands."""
    try:
        return call(*arguments)
    except (RankKVError, TypeError) as error:
        raise ConfigError(f"{where}: {error}") from error


def check_mapping(value: Any, where: str, known: Sequence[str] | None = None) -> Mapping[str, Any]:
    """Return a mapping of names, of the known ones only where they are given.

    Raises
    ------
    ConfigError
        If it is anything else; the message says where.
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
    """Return the list under a key; it may be empty only if an empty one is the default.

    Raises
    ------
    ConfigError
        If it is anything else; the message says where.
    """
    value = given.get(key, default)
    if value is None and key not in given:
        raise ConfigError(f"{where}{key} is missing: give a list of at least one entry.")
    if not isinstance(value, list) or (not value and default != []):
        raise ConfigError(f"{where}{key} is {value!r} but must be a list of at least one entry.")
    return value


def check_string(value: Any, where: str) -> str:
    """Return a text that is not empty.

    Raises
    ------
    ConfigError
        If it is anything else; the message says where.
    """
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{where} is {value!r} but must be a text that is not empty.")
    return value


def check_integer(value: Any, where: str, least: int) -> int:
    """Return an integer that is not too small.

    Raises
    ------
    ConfigError
        If it is anything else; the message says where.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{where} is {value!r} but must be an integer of at least {least}.")
    return value


def check_ratio(value: Any, where: str) -> float:
    """Return a fraction of the cache in (0, 1].

    Raises
    ------
    ConfigError
        If it is anything else; the message says where.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value <= 1.0:
        raise ConfigError(
            f"{where} is {value!r} but must be a number in (0, 1], the fraction of the cache kept."
        )
    return float(value)


def check_bool(value: Any, where: str) -> bool:
    """Return true or false.

    Raises
    ------
    ConfigError
        If it is anything else; the message says where.
    """
    if not isinstance(value, bool):
        raise ConfigError(f"{where} is {value!r} but must be true or false.")
    return value
