"""Checks of arguments before heavy imports: names, numbers, data types, devices and paths."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..config import AGGREGATIONS, RankKVConfig, check_predicted
from ..errors import ConfigError, UnknownNameError
from ..utils.hub import check_model_name
from .known import list_names, load_known

_DTYPES = ("auto", "bfloat16", "float16", "float32", "float64")
_DEVICE_MAP = re.compile(
    r"(auto|balanced|balanced_low_0|sequential|cpu|disk|(cuda|mps|xpu|npu|hpu)(:\d+)?|\d+)"
)


def check_method(kind: str, name: str, options: Mapping[str, Any], flag: str) -> None:
    """Raise if a method or one of its options is unknown.

    Parameters
    ----------
    kind : {"selectors", "strategies"}
        Kind of the method.
    name : str
        Name of the method.
    options : mapping
        Options given for it.
    flag : str
        Command line flag of the options, for the message.

    Raises
    ------
    UnknownNameError
        If the method is unknown.
    ConfigError
        If the method has no such option.
    """
    singular = {"selectors": "selector", "strategies": "strategy"}[kind]
    entry = next((entry for entry in load_known()[kind] if entry["name"] == name), None)
    if entry is None:
        raise UnknownNameError.of(singular, name, list_names(kind))
    known = [*entry["options"], *(["recent_fraction"] if kind == "selectors" else [])]
    for option in options:
        if option not in known:
            raise ConfigError(
                f"{singular} {name!r} has no option {option!r} ({flag}); its options are: {', '.join(known) or 'none'}."
            )


def check_cache_options(
    selector: str = "snapkv", selector_options: Mapping[str, Any] | None = None, **options: Any
) -> None:
    """Raise if an option of a cache is unknown or outside its range, without an import of torch."""
    from ..budget.plan import BudgetPlan

    check_method("selectors", selector, selector_options or {}, "--selector-option")
    config = RankKVConfig(selector=selector, **options)
    check_predicted(config.max_loss, selector)
    name, strategy_options = config.resolve_strategy()
    check_method("strategies", name, strategy_options, "--strategy-option")
    BudgetPlan.check(config)


def check_aggregation(name: str) -> None:
    """Raise an UnknownNameError if a way to join heads is unknown."""
    if name not in AGGREGATIONS:
        raise UnknownNameError.of("aggregation", name, AGGREGATIONS)


def check_model(model: str, dtype: str | None, device_map: str | None) -> None:
    """Raise if a model's path does not exist or a data type or device is unknown, before anything loads."""
    check_model_name(model)
    if dtype is not None and dtype.removeprefix("torch.") not in _DTYPES:
        raise UnknownNameError.of("dtype", dtype, _DTYPES)
    if device_map is not None and not _DEVICE_MAP.fullmatch(device_map):
        raise ConfigError(
            f"--device-map {device_map!r} is not a device: give auto, cpu, cuda, cuda:0, mps or another map of "
            "accelerate."
        )


def parse_spans(given: list[str] | None) -> list[tuple[int, int]] | None:
    """Parse spans of tokens, each ``start:stop``; None if there are none.

    Raises
    ------
    ConfigError
        If a span has another form.

    Examples
    --------
    >>> parse_spans(["0:40", "100:120"])
    [(0, 40), (100, 120)]
    """
    spans = []
    for text in given or []:
        start, colon, stop = text.partition(":")
        if not (colon and start.strip().isdecimal() and stop.strip().isdecimal()):
            raise ConfigError(
                f"--protect {text!r} must be start:stop in tokens, stop excluded: give for example 0:40."
            )
        spans.append((int(start), int(stop)))
    return spans or None


def parse_choice(text: str) -> Any:
    """Return None for "none", and the text otherwise."""
    return None if text.lower() == "none" else text
