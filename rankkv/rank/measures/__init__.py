"""What strategies measure of a layer: one measure a file, one line of the registry below each."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError, UnknownNameError
from ...observe.observation import Observation
from ...utils.registry import add_entry, remove_entry
from ..observed_layer import compute_layer_ranks
from ..spectrum import round_ranks
from .cake import compute_layer_preference
from .distortion import compute_eviction_errors, compute_head_errors
from .dynamickv import compute_best_scores
from .lava import compute_layer_entropy
from .zigzagkv import compute_layer_uncertainty

#: ``function(observation, **options) -> Tensor [batch] or [batch, ...]``, non-negative, NaN where the attention is not
#: finite. A function takes those of the options offered to it that it has a parameter for.
MEASURES: dict[str, Callable[..., Tensor]] = {
    "rank": compute_layer_ranks,
    "cake": compute_layer_preference,
    "lava": compute_layer_entropy,
    "zigzagkv": compute_layer_uncertainty,
    "dynamickv": compute_best_scores,
    "distortion": compute_eviction_errors,
    "head_distortion": compute_head_errors,
}

_BUILT_IN = frozenset(MEASURES)


def get_measure(name: str) -> Callable[..., Tensor]:
    """Look a measure up by name.

    Raises
    ------
    UnknownNameError
        No such measure; the message lists the known ones.
    """
    if name not in MEASURES:
        raise UnknownNameError.of("measure", name, MEASURES)
    return MEASURES[name]


def register_measure(name: str, function: Callable[..., Tensor]) -> None:
    """Add a measure of your own, for a :class:`rankkv.budget_allocation.Strategy` that names it.

    Parameters
    ----------
    name : str
        What the strategy calls it.
    function : callable
        ``function(observation, **options) -> Tensor [batch]``, one non-negative number a row.

    Raises
    ------
    ConfigError
        It is no function, or the name is taken.

    Examples
    --------
    >>> register_measure("tokens", lambda observation: observation.valid.sum(dim=-1))
    >>> unregister_measure("tokens")
    """
    if not callable(function):
        raise ConfigError(f"{function!r} is no function of an observation.")
    add_entry(MEASURES, "measure", name, function)


def unregister_measure(name: str) -> None:
    """Take a measure out of the registry that :func:`register_measure` put there.

    Raises
    ------
    UnknownNameError
        No measure of that name was registered.
    """
    remove_entry(MEASURES, "measure", name, _BUILT_IN)


def compute_measures(observation: Observation, measure: str, **options: Any) -> Tensor:
    """Measure one layer.

    Parameters
    ----------
    observation : Observation
        The layer's queries, keys and values.
    measure : str
        A key of :data:`MEASURES`.
    **options
        Offered to the measure, which takes those it knows.

    Returns
    -------
    Tensor
        ``[batch]`` or ``[batch, ...]`` float64 on the CPU; one number a layer is rounded to 6 significant digits, so
        that float noise does not move a token.
    """
    function = get_measure(measure)
    known = inspect.signature(function).parameters
    taken = {name: value for name, value in options.items() if name in known}
    key = (measure, repr(sorted(taken.items())))
    memory = observation.memory
    if memory is not None and key in memory:
        return memory[key]
    measured = function(observation, **taken).to("cpu", torch.float64)
    measured = round_ranks(measured) if measured.dim() == 1 else measured
    if memory is not None:
        memory[key] = measured
    return measured


__all__ = ["MEASURES", "compute_measures", "get_measure", "register_measure", "unregister_measure"]
