"""What a token selection method is, and the one routine that turns its scores into kept tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..observe.observation import Observation
from ..spans import count_spanned

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
        What it needs of queries that are gone, of :data:`rankkv.query_moments.PAST_QUERIES`; empty for nothing.
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


def select_tokens(
    scores: Tensor,
    real_index: Tensor,
    lengths: Sequence[int],
    budgets: Sequence[int],
    selector: Selector,
    window_size: int,
    sink_size: int,
    *,
    protect: Sequence[tuple[int, int]] = (),
    protect_before: Sequence[int] | None = None,
    keep: Sequence[int] | None = None,
) -> Tensor:
    """Select the indices of the tokens to keep: the protected ones, then those of the highest score.

    Parameters
    ----------
    scores : Tensor
        ``[batch, kv_head or 1, key]``; ties go to the earlier token, a score that is not a number loses.
    real_index : Tensor
        ``[batch, kv_head or 1, key]`` int64, index of each key in its row's real tokens, -1 where there is none.
    lengths, budgets : sequence of int
        Real tokens seen and tokens to keep, one entry a row.
    selector : Selector
        Says how much of a budget is protected.
    window_size, sink_size : int
        See :meth:`Selector.count_protected`.
    protect : sequence of (start, stop)
        Spans of real tokens that are kept before any other.
    protect_before : sequence of int, optional
        Length of each row when its budget was made: tokens from there on have no place in it for a span of theirs.
    keep : sequence of int, optional
        Tokens to select in each row where that differs from ``min(budget, length)``: fewer where fewer are there, one
        more while budgets may still shrink, since the protected part shrinks with them.

    Returns
    -------
    Tensor
        Int64 ``[batch, kv_head or 1, width]``, ascending, with ``width = max(keep)``; a row that keeps fewer
        tokens starts with -1.

    Examples
    --------
    >>> from rankkv.selection import get_selector
    >>> scores = torch.tensor([[[0.1, 0.9, 0.2, 0.8, 0.3, 0.0]]])
    >>> index = torch.arange(6).view(1, 1, 6)
    >>> select_tokens(scores, index, [6], [3], get_selector("snapkv"), window_size=1, sink_size=0).tolist()
    [[[1, 3, 5]]]
    """
    if keep is None:
        keep = [min(budget, length) for budget, length in zip(budgets, lengths, strict=True)]
    width = max(keep)
    scores = raise_protected(
        scores,
        real_index,
        lengths,
        budgets,
        selector,
        window_size,
        sink_size,
        protect=protect,
        protect_before=protect_before,
    )
    # On a GPU the host would wait to learn where the kept tokens stand, which sorting needs not know.
    if min(keep) < width or scores.device.type != "cpu":
        order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :width]
        rank = torch.arange(width, device=order.device)
        order = order.masked_fill(rank >= torch.tensor(keep, device=order.device).view(-1, 1, 1), -1)
        return order.sort(dim=-1).values
    # Nothing has to be sorted to find what lies above the least score that is kept, and the first of those at it.
    least = scores.topk(width, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    above, level = scores > least, scores == least
    is_kept = above | (level & (level.cumsum(dim=-1) <= width - above.sum(dim=-1, keepdim=True)))
    return is_kept.nonzero()[:, -1].view(*scores.shape[:-1], width)


def raise_protected(
    scores: Tensor,
    real_index: Tensor,
    lengths: Sequence[int],
    budgets: Sequence[int],
    selector: Selector,
    window_size: int,
    sink_size: int,
    *,
    protect: Sequence[tuple[int, int]] = (),
    protect_before: Sequence[int] | None = None,
) -> Tensor:
    """Raise the scores of protected tokens to infinity and lower those of empty places to minus infinity.

    Parameters
    ----------
    scores, real_index, lengths, budgets, selector, window_size, sink_size, protect, protect_before
        See :func:`select_tokens`.

    Returns
    -------
    Tensor
        ``[batch, kv_head or 1, key]``; all other scores are finite.
    """
    device = scores.device
    spanned_in = lengths if protect_before is None else protect_before
    spans = [count_spanned(protect, length) for length in spanned_in]
    counts = [
        selector.count_protected(max(0, budget - spanned), window_size, sink_size)
        for budget, spanned in zip(budgets, spans, strict=True)
    ]
    newest_from = torch.tensor(
        [n - recent for n, (recent, _) in zip(lengths, counts, strict=True)], device=device
    )
    sinks = torch.tensor([first for _, first in counts], device=device)
    shape = torch.broadcast_shapes(scores.shape, real_index.shape)
    real_index = real_index.expand(shape)
    # The lowest finite number, so that a score that is not a number still ranks above padding.
    scores = torch.nan_to_num(scores, nan=torch.finfo(scores.dtype).min).expand(shape)
    is_protected = (real_index >= newest_from.view(-1, 1, 1)) | (real_index < sinks.view(-1, 1, 1))
    stops = torch.tensor(spanned_in, device=device).view(-1, 1, 1)
    for start, stop in protect:
        is_protected |= (real_index >= start) & (real_index < stops.clamp(max=stop))
    return scores.masked_fill(is_protected, float("inf")).masked_fill(real_index < 0, float("-inf"))
