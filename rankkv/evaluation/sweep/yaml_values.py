"""Checks of values from a YAML file; each error names the value, its place in the file and what it must be."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...errors import ConfigError, InputError, MissingDependencyError, RankKVError
from ...utils.files import shorten

#: Largest YAML text, in bytes of UTF-8, and its most values once all aliases are written out.
YAML_LIMIT, _MOST_VALUES = 2**20, 100_000
_MERGE = "tag:yaml.org,2002:merge"
_REASON = 300


def check_yaml_size(size: int, path: str) -> None:
    """Raise an InputError if a YAML text has more bytes than are parsed."""
    if size > YAML_LIMIT:
        raise InputError(
            f"{path} has {size:,} bytes but must have at most {YAML_LIMIT:,}: give a sweep file."
        )


def load_yaml(text: str, path: str) -> Any:
    """Parse a YAML text; merge keys ``<<`` are supported.

    Parameters
    ----------
    text : str
        YAML of at most 1,048,576 bytes and, with all aliases written out, 100,000 values.
    path : str
        Path of the file, for error messages.

    Raises
    ------
    InputError
        If the text is not YAML, is too large, or nested too deeply.
    ConfigError
        If a mapping has a key twice.
    MissingDependencyError
        If PyYAML is not installed.
    """
    try:
        import yaml
    except ImportError as error:
        raise MissingDependencyError("a sweep file needs PyYAML: pip install 'rankkv[eval]'.") from error
    check_yaml_size(len(text.encode()), path)
    try:
        loader = yaml.SafeLoader(text)
        try:
            root = loader.get_single_node()
            if root is None:
                return None
            _check_nodes(root, loader, path)
            return loader.construct_document(root)
        finally:
            loader.dispose()
    except RecursionError as error:
        raise InputError(f"{path} is nested too deeply: a sweep needs about six levels.") from error
    except (ConfigError, InputError):
        raise
    # PyYAML raises ValueError, KeyError and others for values that do not fit their tag, such as a 13th month.
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:_REASON]
        raise InputError(f"{path} is not valid YAML: {reason}.") from error


def _check_nodes(root: Any, loader: Any, path: str) -> None:
    """Check parsed YAML before its values are built: no doubled key, no cycle, not too many values."""
    import yaml

    # Values below each node, aliases written out; None while the node is being counted.
    counts: dict[int, int | None] = {}
    waiting = [(root, False)]
    while waiting:
        node, is_counted = waiting.pop()
        if isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
        else:
            children = node.value if isinstance(node, yaml.SequenceNode) else []
        if is_counted:
            total = 1 + sum(counts[id(child)] or 0 for child in children)
            if total > _MOST_VALUES:
                raise InputError(
                    f"{path} holds more than {_MOST_VALUES:,} values, with its aliases written out: shorten it."
                )
            counts[id(node)] = total
            continue
        if id(node) in counts:
            if counts[id(node)] is None:
                raise InputError(
                    f"{path} has a value inside itself (line {node.start_mark.line + 1}): remove the alias."
                )
            continue
        counts[id(node)] = None
        if isinstance(node, yaml.MappingNode):
            _check_keys(node, loader)
        waiting.append((node, True))
        waiting += [(child, False) for child in children]


def _check_keys(node: Any, loader: Any) -> None:
    """Raise a ConfigError if a mapping has a key twice; PyYAML would silently keep the last."""
    import yaml

    found = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        value = "<<" if key.tag == _MERGE else loader.construct_object(key)
        if value in found:
            raise ConfigError(
                f"the mapping at line {node.start_mark.line + 1} has {shorten(value)} twice: remove one."
            )
        found.add(value)


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
        raise ConfigError(f"{where} is {shorten(value)} but must be a mapping of names to values.")
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
        raise ConfigError(f"{where}{key} is {shorten(value)} but must be a list of at least one entry.")
    return value


def check_string(value: Any, where: str) -> str:
    """Return a string that is not blank.

    Raises
    ------
    ConfigError
        If the value is anything else; the message begins with ``where``.
    """
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{where} is {shorten(value)} but must be a text that is not empty.")
    return value


def check_integer(value: Any, where: str, least: int, most: int = 10**9) -> int:
    """Return an integer from ``least`` to ``most``.

    Raises
    ------
    ConfigError
        If the value is anything else; the message begins with ``where``.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{where} is {shorten(value)} but must be an integer of at least {least}.")
    if value > most:
        raise ConfigError(f"{where} is {shorten(value)} but must be an integer of at most {most}.")
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
            f"{where} is {shorten(value)} but must be a number in (0, 1], the fraction of the cache kept."
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
        raise ConfigError(f"{where} is {shorten(value)} but must be true or false.")
    return value
