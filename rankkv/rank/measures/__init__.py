"""Registry of the layer measures that strategies use; each measure has a file of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError, UnknownNameError
from ...observe.observation import Observation
from ...utils.devices import Reader
from ...utils.registry import add_entry, remove_entry
from ..observed_layer import begin_layer_ranks, compute_layer_ranks
from ..spectrum import round_ranks
from .cake import compute_layer_preference
from .distortion import begin_eviction_errors, begin_head_errors, compute_eviction_errors, compute_head_errors
from .dynamickv import compute_best_scores
from .lava import compute_layer_entropy
from .zigzagkv import compute_layer_uncertainty

#: ``function(observation, **options) -> Tensor [batch] or [batch, ...]``, non-negative, NaN where the attention is not
#: finite.  A function gets the options that it has a parameter for.
MEASURES: dict[str, Callable[..., Tensor]] = {
    "rank": compute_layer_ranks,
    "cake": compute_layer_preference,
    "lava": compute_layer_entropy,
    "zigzagkv": compute_layer_uncertainty,
    "dynamickv": compute_best_scores,
    "distortion": compute_eviction_errors,
    "head_distortion": compute_head_errors,
}

#: Measures that a GPU begins and the host finishes later: ``function(observation, reader, **options)`` returns another
#: function, which returns what the measure returns.
BEGINNINGS: dict[str, Callable[..., Callable[[], Tensor]]] = {
    "rank": begin_layer_ranks,
    "distortion": begin_eviction_errors,
    "head_distortion": begin_head_errors,
}

_BUILT_IN = frozenset(MEASURES)


def get_measure(name: str) -> Callable[..., Tensor]:
    """Look up a measure by name.

    Raises
    ------
    UnknownNameError
        If there is no such measure; the message lists the known ones.
    """
    if name not in MEASURES:
        raise UnknownNameError.of("measure", name, MEASURES)
    return MEASURES[name]


def register_measure(name: str, function: Callable[..., Tensor]) -> None:
    """Register a measure of your own, for a :class:`rankkv.budget_allocation.Strategy` that names it.

    Parameters
    ----------
    name : str
        Name of the measure.
    function : callable
        ``function(observation, **options) -> Tensor [batch]``, one non-negative number per row.

    Raises
    ------
    ConfigError
        If ``function`` is not callable, or the name is taken.

    Examples
    --------
    >>> register_measure("tokens", lambda observation: observation.valid.sum(dim=-1))
    >>> unregister_measure("tokens")
    """
    if not callable(function):
        raise ConfigError(f"{function!r} is not callable; give a function of an observation.")
    add_entry(MEASURES, "measure", name, function)


def unregister_measure(name: str) -> None:
    """Remove a measure that :func:`register_measure` added.

    Raises
    ------
    UnknownNameError
        If no measure of that name was registered.
    """
    remove_entry(MEASURES, "measure", name, _BUILT_IN)


def compute_measures(observation: Observation, measure: str, **options: Any) -> Tensor:
    """Compute a measure of one layer.

    Parameters
    ----------
    observation : Observation
        The layer's queries, keys and values.
    measure : str
        A key of :data:`MEASURES`.
    **options
        Options; the measure gets those that it has a parameter for.

    Returns
    -------
    Tensor
        ``[batch]`` or ``[batch, ...]`` float64 on the CPU.  One number per layer is rounded to 6 significant digits, so
        that float noise cannot change a token's layer.
    """
    return begin_measures(observation, measure, Reader(observation.keys.device), **options)()


def begin_measures(
    observation: Observation, measure: str, reader: Reader, **options: Any
) -> Callable[[], Tensor]:
    """Begin a measure of one layer, and return a function that returns what :func:`compute_measures` returns.

    What the host must know is sent through ``reader``: the caller starts it after all measures of the layer.  The
    function may be called much later, and does not keep the observation.
    """
    function = get_measure(measure)
    known = inspect.signature(function).parameters
    taken = {name: value for name, value in options.items() if name in known}
    key = (measure, repr(sorted(taken.items())))
    memory = observation.memory
    if memory is not None and key in memory:
        return lambda: memory[key]
    if measure in BEGINNINGS:
        find = BEGINNINGS[measure](observation, reader, **taken)
    else:
        at_once = function(observation, **taken)
        find = lambda: at_once  # noqa: E731

    def finish() -> Tensor:
        measured = find().to("cpu", torch.float64)
        measured = round_ranks(measured) if measured.dim() == 1 else measured
        if memory is not None:
            memory[key] = measured
        return measured

    return finish


__all__ = [
    "MEASURES",
    "begin_measures",
    "compute_measures",
    "get_measure",
    "register_measure",
    "unregister_measure",
]
