"""Selector and WrappingSelector: the description of a token selection method and of its options."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from torch import Tensor

from ..config import GLOBAL_RECENT_TOKENS
from ..errors import ConfigError
from ..observe.observation import Observation

#: Input of the methods that score the prompt while the model repeats it.
REPLAY = "a replay of the prompt"
#: Values of :attr:`Selector.needs`: inputs that a method may read.
NEEDS = ("window attention", "whole attention", "queries", "keys only", "keys and values", REPLAY, "nothing")


@dataclass(frozen=True)
class Selector:
    """Token selection method: a score for every key, and the number of protected newest tokens.

    Parameters
    ----------
    name : str
        Registry key, equal to the name of the method's module.
    score : callable
        ``score(observation, **options) -> Tensor [batch, kv_head or 1, key]``: higher is kept first. A head axis of
        1 means that all heads of the layer keep the same tokens.
    needs : str
        Input of the method, one of :data:`NEEDS`: attention weights of the observation window or of all queries, the
        queries themselves, keys alone, keys and values, a second pass in which the model repeats the prompt (then
        ``score`` gets an observation of that pass), or only the number of tokens ("nothing").
    source : str
        Paper of the method.
    cost : str
        Operations per head of a layer, up to a factor of head_dim, such as ``"O(window x keys)"``.
    options : mapping
        Options bound to ``score``.
    recent_fraction : float, optional
        Fraction of a layer's budget protected as its newest tokens; None protects ``min(window_size, budget // 2)``.
    past_queries : {"", "turned", "unturned"}
        Statistics of past queries that the method needs, of :data:`rankkv.observe.queries.PAST_QUERIES`; empty for
        none.
    fallback : (str, str), optional
        An option that the method should get, and a sentence on what replaces it if it is missing.
    step : {"decay", "mean", "sum", "max", "rescore"}
        Update of the scores by each new query. ``"sum"`` adds the query's attention. ``"decay"`` does so over an
        exponential window as long as the observation window. ``"mean"`` averages the scores that the new queries give
        over such a window. ``"max"`` keeps the larger of the old score and the one that the new queries give.
        ``"rescore"`` recomputes the scores from the keys.
    turns : bool
        True if the method turns queries or keys to other positions, so that it needs the layer's rotary embedding.
    whole_prompt : bool
        True if the method reads every query of the prompt, so that a prompt in chunks must keep its queries.
    comparable : bool
        True if scores compare over the heads and layers of a model, which strategy ``"global"`` needs.
    projection_option : str, optional
        Option without which the method does not read the layer's output projection, empty if it always does; None if it
        never does.
    strategy : str, optional
        Budget strategy that ``strategy=None`` stands for with this method; None leaves the usual default.
    required : str
        Option without which a cache cannot use the method, a file of calibrated values; empty for none.
    gradient : bool
        True if the replay also runs backward, so that the method gets ``observation.gradient``.
    recent_tokens : int, optional
        Number of newest tokens protected, whatever the budget, as long as it also holds the sinks.

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
    turns: bool = False
    whole_prompt: bool = False
    comparable: bool = False
    projection_option: str | None = None
    strategy: str | None = None
    recent_tokens: int | None = None
    required: str = ""
    gradient: bool = False

    def with_options(self, **options: Any) -> Selector:
        """Return this selector with ``options`` bound.

        Raises
        ------
        ConfigError
            If the method has no option of that name, or ``recent_fraction`` is outside [0, 1].
        """
        options = dict(options)
        recent_fraction = options.pop("recent_fraction", self.recent_fraction)
        if recent_fraction is not None and not 0.0 <= recent_fraction <= 1.0:
            raise ConfigError(
                f"recent_fraction={recent_fraction!r} of selector {self.name!r} is outside [0, 1]: give the fraction "
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
    def replays(self) -> bool:
        """True if the scores come from a replay of the prompt, a second pass over it."""
        return self.needs == REPLAY

    @property
    def replay_chunk(self) -> Any:
        """Value of the option ``chunk_size``: the number of prompt tokens in one replay."""
        return self.options.get("chunk_size", inspect.signature(self.score).parameters["chunk_size"].default)

    @property
    def option_names(self) -> list[str]:
        """Names of the options of ``score``."""
        return list(inspect.signature(self.score).parameters)[1:]

    @property
    def description(self) -> str:
        """One sentence, the first line of the docstring of ``score``."""
        return (inspect.getdoc(self.score) or "").partition("\n")[0]

    def check_complete(self) -> None:
        """Check that the option ``required`` is given.

        Raises
        ------
        ConfigError
            If it is not; the message says how to make the file.
        """
        if self.required and self.options.get(self.required) is None:
            raise ConfigError(
                f"selector {self.name!r} needs {self.required}, calibrated values of the model, and none are given: "
                f"run rankkv calibrate --queries, and give get_selector({self.name!r}, {self.required}=path)."
            )

    @property
    def remark(self) -> str:
        """Sentence on the fallback for a missing option; empty if none is missing."""
        if self.fallback is None or self.options.get(self.fallback[0]) is not None:
            return ""
        return f"selector {self.name}: {self.fallback[1]}"

    @property
    def projects(self) -> bool:
        """True if the method reads the layer's output projection; the cache's summary says where none is found."""
        option = self.projection_option
        return option is not None and bool(self.options.get(option, True))

    @property
    def needs_rotation(self) -> bool:
        """True if the method needs to know how the layer turns queries and keys with position."""
        return self.turns or self.past_queries == "unturned"

    def compute_scores(self, observation: Observation) -> Tensor:
        """Compute the scores that select tokens, ``[batch, kv_head or 1, key]``."""
        return self.refine(self.compute_lasting_scores(observation), observation)

    def compute_lasting_scores(self, observation: Observation) -> Tensor:
        """Compute the scores that later queries update (see ``step``), ``[batch, kv_head or 1, key]``."""
        if observation.replayed is not None:
            return observation.replayed
        return self.score(observation, **self.options)

    def refine(self, scores: Tensor, observation: Observation) -> Tensor:
        """Compute the scores that select tokens from lasting scores; here they are the same."""
        return scores

    def count_protected(self, budget: int, window_size: int, sink_size: int) -> tuple[int, int]:
        """Count the newest and the first tokens that a budget protects.

        Both are part of the budget: ``min(window_size, budget // 2)`` newest tokens (or ``recent_fraction`` of the
        budget) and ``min(sink_size, budget // 4)`` first ones.  With ``recent_tokens`` it is that many newest tokens.
        """
        sinks = min(sink_size, budget // 4)
        if self.recent_tokens is not None:
            sinks = min(sink_size, max(budget // 4, budget - self.recent_tokens))
            return min(self.recent_tokens, window_size, budget - sinks), sinks
        if self.recent_fraction is None:
            return min(window_size, budget // 2), sinks
        return min(max(1, int(self.recent_fraction * budget)), budget - sinks), sinks

    def __getstate__(self) -> dict[str, Any]:
        # Ray sends selectors to its workers, and a MappingProxyType cannot be pickled.
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
    """Token selection method that refines the scores of a base method.

    Its ``score`` is ``score(scores, observation, **options)``. Its inputs (``needs``, ``past_queries``), its ``step``
    and its ``recent_fraction`` are those of the base. While decoding, new queries update the base's scores, and each
    selection refines them again.

    Parameters
    ----------
    base : Selector
        Method whose scores are refined. The option ``base`` replaces it, by name or as a selector.
    wraps : tuple of str
        Inputs that a base may read, of :data:`rankkv.selection.NEEDS`; empty for any.

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
        """Build the wrapper ``name`` around ``base``; ``cost`` includes the base's."""
        return cls(
            name,
            score,
            base.needs,
            source,
            cost,
            recent_fraction=base.recent_fraction,
            step=base.step,
            past_queries=base.past_queries,
            turns=base.turns,
            whole_prompt=base.whole_prompt,
            gradient=base.gradient,
            base=base,
            **more,
        )

    @property
    def option_names(self) -> list[str]:
        """Names of the options: ``base`` and those of ``score``."""
        return ["base", *list(inspect.signature(self.score).parameters)[2:]]

    def with_options(self, **options: Any) -> Selector:
        """Return this selector with ``options`` bound.

        Raises
        ------
        ConfigError
            If the method has no option of that name, ``recent_fraction`` is outside [0, 1], or ``base`` is not a
            selector whose scores this method can refine.
        """
        changed = super().with_options(**options)
        if "base" not in options:
            return changed
        base = options["base"]
        if not isinstance(base, Selector):
            raise ConfigError(
                f"base={base!r} of selector {self.name!r} must be a Selector: use get_selector({self.name!r}, "
                f"base={base!r}), which accepts names."
            )
        if self.wraps and base.needs not in self.wraps:
            raise ConfigError(
                f"base={str(base)!r} of selector {self.name!r} reads {base.needs!r}, so its scores are not attention: "
                f"give a method that reads one of: {', '.join(self.wraps)}."
            )
        recent_fraction = options.get("recent_fraction", base.recent_fraction)
        return replace(
            changed,
            needs=base.needs,
            step=base.step,
            past_queries=base.past_queries,
            turns=base.turns,
            whole_prompt=base.whole_prompt,
            gradient=base.gradient,
            recent_fraction=recent_fraction,
            base=base,  # type: ignore[call-arg]
        )

    @property
    def projects(self) -> bool:
        """True if the method or its base reads the layer's output projection."""
        return super().projects or self._base.projects

    @property
    def replay_chunk(self) -> Any:
        """Value of the base's option ``chunk_size``."""
        return self._base.replay_chunk

    def compute_lasting_scores(self, observation: Observation) -> Tensor:
        """Compute the scores of the base, which later queries update."""
        return self._base.compute_lasting_scores(observation)

    def refine(self, scores: Tensor, observation: Observation) -> Tensor:
        """Compute the scores that select tokens from the base's lasting scores."""
        options = {name: value for name, value in self.options.items() if name != "base"}
        return self.score(self._base.refine(scores, observation), observation, **options)

    @property
    def _base(self) -> Selector:
        if self.base is None:
            raise ConfigError(
                f"selector {self.name!r} refines the scores of another selector: give it a base."
            )
        return self.base


# One top-k over all heads needs the same protected tokens in each of them, whatever their budgets.
#: Counts the protected tokens of strategy ``"global"``; it scores nothing.
GLOBAL_PROTECTION = Selector(
    "global", lambda observation: observation.keys, "nothing", "", recent_tokens=GLOBAL_RECENT_TOKENS
)
