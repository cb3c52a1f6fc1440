"""Methods that wrap another one: they make new scores of its scores."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..errors import ConfigError
from ..observe.observation import Observation
from .base import Selector


@dataclass(frozen=True)
class WrappingSelector(Selector):
    """A method whose ``score`` is ``score(scores, observation, **options)``: it refines the scores of a base.

    What it reads, how its scores go on from query to query and what it protects follow from the base.  While decoding,
    the scores of the base are continued, and refined again for each selection.

    Parameters
    ----------
    base : Selector
        The method whose scores are refined; the option ``base`` exchanges it, by name or as a selector.
    wraps : tuple of str
        What a base may read, of :data:`rankkv.selection.NEEDS`; empty for any.

    Examples
    --------
    >>> from rankkv.selection import get_selector
    >>> chunks = get_selector("chunkkv", base="h2o", chunk_length=16)
    >>> str(chunks), chunks.needs
    ("chunkkv(base='h2o', chunk_length=16)", 'whole attention')
    """

    base: Selector | None = None
    wraps: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, base: Selector, name: str, score: Any, source: str, cost: str, **more: Any
    ) -> WrappingSelector:
        """Build the wrapper ``name`` around ``base``; ``cost`` comes on top of the base's."""
        return cls(
            name,
            score,
            base.needs,
            source,
            cost,
            recent_fraction=base.recent_fraction,
            step=base.step,
            past_queries=base.past_queries,
            base=base,
            **more,
        )

    @property
    def option_names(self) -> list[str]:
        """``base``, and the names of the options of ``score``."""
        return ["base", *list(inspect.signature(self.score).parameters)[2:]]

    def with_options(self, **options: Any) -> Selector:
        """Return this selector with ``options`` bound.

        Raises
        ------
        ConfigError
            If the method has no option of that name, a value is outside its range, or the base has no scores that
            this method can refine.
        UnknownNameError
            If no selector has the name that ``base`` gives.
        """
        changed = super().with_options(**options)
        if "base" not in options:
            return changed
        from . import get_selector

        base = get_selector(options["base"])
        if self.wraps and base.needs not in self.wraps:
            raise ConfigError(
                f"base={str(base)!r} of selector {self.name!r} reads {base.needs!r}: its scores are no attention; "
                f"give a method that reads one of: {', '.join(self.wraps)}."
            )
        recent_fraction = options.get("recent_fraction", base.recent_fraction)
        return replace(
            changed,
            needs=base.needs,
            step=base.step,
            past_queries=base.past_queries,
            recent_fraction=recent_fraction,
            base=base,  # type: ignore[call-arg]
        )

    def compute_lasting_scores(self, observation: Observation) -> Tensor:
        """Compute the scores of the base, which later queries continue."""
        return self._base.compute_lasting_scores(observation)

    def refine(self, scores: Tensor, observation: Observation) -> Tensor:
        """Make of the base's scores those by which tokens are selected."""
        options = {name: value for name, value in self.options.items() if name != "base"}
        return self.score(self._base.refine(scores, observation), observation, **options)

    @property
    def _base(self) -> Selector:
        if self.base is None:
            raise ConfigError(f"selector {self.name!r} wraps another one: give it a base.")
        return self.base
