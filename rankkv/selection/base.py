"""What a token selection method is, and the one routine that turns its scores into kept tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from torch import Tensor

from ..errors import ConfigError
from ..observe.observation import Observation

#: What a method may read, as :attr:`Selector.needs` says it.
NEEDS = ("window attention", "whole attention", "queries", "keys only", "keys and values", "nothing")


@dataclass(frozen=True)
class Selector:
    """A token selection method: scores for every key, and how many of the newest tokens it protects.

    Parameters
    ----------
    name : str
        Registry key, equal to the file's name.
    score : callable
        ``score(observation, **options) -> Tensor [batch, kv_head or 1, key]``: higher is kept first.  A head axis of
        1 means that all heads of the layer keep the same tokens.
    needs : str
        What it reads, one of :data:`NEEDS`: attention weights of the observation window or of all queries, the queries
        themselves, keys alone, keys and values, or nothing but the number of tokens.
    source : str
        Paper of the method.
    cost : str
        Operations for each head of a layer, up to a factor of head_dim: ``"O(window x keys)"`` and the like.
    options : mapping
        Options bound to ``score``.
    recent_fraction : float, optional
        Fraction of a layer's budget protected as its newest tokens; None protects ``min(window_size, budget // 2)``.
    past_queries : {"", "turned", "unturned"}
        What it needs of queries that are gone, of :data:`rankkv.observe.queries.PAST_QUERIES`; empty for nothing.
    fallback : (str, str), optional
        An option the method is meant to have, and what is done where it is not given.
    step : {"decay", "sum", "rescore"}
        How scores go on from query to query: ``"sum"`` adds the attention each new query pays, ``"decay"`` does so over
        an exponential window as long as the observation window, ``"rescore"`` computes them anew from the keys.

    Examples
    --------
    >>> from rankkv.selection import get_selector
    >>> str(get_selector("snapkv", pooling="avg"))
    "snapkv(pooling='avg')"
    """

    name: str
    score: Callable[..., Tensor]
    needs: str
    source: str
    cost: str = ""
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    recent_fraction: float | None = None
    step: str = "decay"
    past_queries: str = ""
    fallback: tuple[str, str] | None = None

    def with_options(self, **options: Any) -> Selector:
        """Return this selector with ``options`` bound.

        Raises
        ------
        ConfigError
            If the method has no option of that name, or the value is outside its range.
        """
        options = dict(options)
        recent_fraction = options.pop("recent_fraction", self.recent_fraction)
        if recent_fraction is not None and not 0.0 <= recent_fraction <= 1.0:
            raise ConfigError(
                f"recent_fraction={recent_fraction!r} of selector {self.name!r} is outside [0, 1]: it is the fraction "
                "of a layer's budget that is kept for the newest tokens."
            )
        for name in options:
            if name not in self.option_names:
                listed = ", ".join([*self.option_names, "recent_fraction"])
                raise ConfigError(
                    f"selector {self.name!r} has no option {name!r}; its options are: {listed}."
                )
        bound = MappingProxyType({**self.options, **options})
        return replace(self, options=bound, recent_fraction=recent_fraction)

    @property
    def option_names(self) -> list[str]:
        """Names of the options of ``score``."""
        return list(inspect.signature(self.score).parameters)[1:]

    @property
    def description(self) -> str:
        """One sentence: the first line of the docstring of ``score``."""
        return (inspect.getdoc(self.score) or "").partition("\n")[0]

    @property
    def remark(self) -> str:
        """What is done in place of an option that is not given; empty where there is nothing to say."""
        if self.fallback is None or self.options.get(self.fallback[0]) is not None:
            return ""
        return f"selector {self.name}: {self.fallback[1]}"

    def compute_scores(self, observation: Observation) -> Tensor:
        """Compute the scores by which tokens are selected, ``[batch, kv_head or 1, key]``."""
        return self.refine(self.compute_lasting_scores(observation), observation)

    def compute_lasting_scores(self, observation: Observation) -> Tensor:
        """Compute the scores that later queries continue (see ``step``), ``[batch, kv_head or 1, key]``."""
        return self.score(observation, **self.options)

    def refine(self, scores: Tensor, observation: Observation) -> Tensor:
        """Make of lasting scores those by which tokens are selected; here they are the same."""
        return scores

    def count_protected(self, budget: int, window_size: int, sink_size: int) -> tuple[int, int]:
        """Return how many of the newest and of the first tokens a budget of ``budget`` tokens protects.

        Both lie inside the budget: ``min(window_size, budget // 2)`` newest (or ``recent_fraction`` of the budget) and
        ``min(sink_size, budget // 4)`` first ones.
        """
        sinks = min(sink_size, budget // 4)
        if self.recent_fraction is None:
            return min(window_size, budget // 2), sinks
        return min(max(1, int(self.recent_fraction * budget)), budget - sinks), sinks

    def __getstate__(self) -> dict[str, Any]:
        # A view of a mapping cannot be sent to another process, as Ray sends selectors to its workers.
        return {**vars(self), "options": dict(self.options)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, options=MappingProxyType(state["options"]))

    def __str__(self) -> str:
        options = dict(self.options)
        if self.recent_fraction is not None:
            options["recent_fraction"] = self.recent_fraction
        listed = ", ".join(f"{name}={value!r}" for name, value in options.items())
        return f"{self.name}({listed})" if listed else self.name


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
        base = options["base"]
        if not isinstance(base, Selector):
            raise ConfigError(
                f"base={base!r} of selector {self.name!r} must be a Selector: use get_selector({self.name!r}, "
                f"base={base!r}), which looks names up."
            )
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
