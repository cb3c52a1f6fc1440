"""RankKVCache: goes into ``model.generate()`` and keeps of each layer what its rank and its budget allow."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer

from . import attention
from .budget_plan import BudgetPlan
from .cache_layer import RankKVLayer
from .compat import check_transformers
from .config import RankKVConfig
from .errors import CacheStateError, ConfigError, UnsupportedModelError
from .observation import Observation, observe
from .layer_rank import compute_layer_ranks
from .selection import get_selector

# Slots that may stand over the budget while the prefill goes on, as a share of (total budget + one layer): earlier
# layers are not gathered anew for every layer that arrives.
_CASCADE_SLACK = 0.04


class RankKVCache(DynamicCache):
    """A KV cache that is compressed once, at the end of the prefill, layer by layer.

    Pass it to the ordinary ``model.generate(..., cache=RankKVCache(model))`` (``past_key_values=`` before transformers
    5.24).  The first forward on the empty cache is the prefill: after each layer's own attention its effective rank is
    computed, budgets follow from the ranks of the layers so far, and the tokens the selector scores lowest are
    released; later tokens are kept whole.  Positions continue from the tokens *seen*, so the first generated token
    always equals the one of the uncompressed model.

    Parameters
    ----------
    model : PreTrainedModel
        The model the cache is for; only its config and attention backend are read, nothing is stored on it.
    compression_ratio : float, default 0.3
        Fraction of the KV cache kept, in (0, 1].  kvpress gives this name to the fraction *removed*.
    budget : int, optional
        Average number of tokens a layer keeps; overrides ``compression_ratio``.
    selector : str or Selector, default "snapkv"
        Token selection method (:data:`rankkv.selection.SELECTORS`).
    strategy : str, optional
        Budget strategy; None is the measured default (``"power"``, exponent 4).
    scope : {"evictable", "window", "full"}, default "evictable"
        Part of the attention whose effective rank is taken.
    aggregation : str, default "concat"
        How the heads of a layer are joined for its rank.
    strategy_options : mapping, optional
        Options of the strategy.
    window_size : int, default 32
        Number of last queries observed.
    sink_size : int, default 4
        Number of first tokens protected as attention sinks.
    decode, positions, prefill : str
        See :class:`~rankkv.RankKVConfig`.
    min_budget : int, optional
        Fewest tokens a layer keeps; None means ``max(16, average budget // 2)``.
    config : RankKVConfig, optional
        All options in one frozen object, instead of the single ones.

    Raises
    ------
    ConfigError, UnknownNameError
        If an option lies outside its range or is not registered.
    UnsupportedModelError
        If the model's attention cannot be observed, or it has no KV cache.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
    ...     num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8)).eval()
    >>> cache = RankKVCache(model, compression_ratio=0.5)
    >>> with torch.no_grad():
    ...     output = model(torch.arange(60)[None], past_key_values=cache)
    >>> sum(cache.kept_lengths), cache.seen_tokens
    (60, 60)
    """

    def __init__(
        self,
        model: Any,
        compression_ratio: float = 0.3,
        *,
        budget: int | None = None,
        selector: Any = "snapkv",
        strategy: str | None = None,
        scope: str = "evictable",
        aggregation: str = "concat",
        strategy_options: Mapping[str, Any] | None = None,
        window_size: int = 32,
        sink_size: int = 4,
        decode: str = "grow",
        positions: str = "original",
        prefill: str = "single",
        min_budget: int | None = None,
        config: RankKVConfig | None = None,
    ) -> None:
        given = RankKVConfig(
            compression_ratio=compression_ratio,
            budget=budget,
            selector=selector,
            strategy=strategy,
            scope=scope,
            aggregation=aggregation,
            strategy_options=strategy_options,
            window_size=window_size,
            sink_size=sink_size,
            decode=decode,
            positions=positions,
            prefill=prefill,
            min_budget=min_budget,
        )
        if config is not None and given != RankKVConfig():
            raise ConfigError("give either config=RankKVConfig(...) or single options, not both: one would be ignored.")
        check_transformers()
        attention.check_observable(model)
        self.config = config or given
        self.selector = get_selector(self.config.selector)
        BudgetPlan.check(self.config)
        text_config = model.config.get_text_config(decoder=True)
        super().__init__(config=text_config)
        self.layers = [RankKVLayer() if type(layer) is DynamicLayer else layer for layer in self.layers]
        self.layer_indices = [i for i, layer in enumerate(self.layers) if isinstance(layer, RankKVLayer)]
        if not self.layer_indices:
            _report_nothing_to_compress(model, self.layers)
        self._text_config = text_config
        self._plans: list[BudgetPlan] | None = None
        self._compressed = False
        attention.install()

    # -- what transformers asks ---------------------------------------------------------------------------------

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append new keys and values, and let this layer's next attention call be observed."""
        if isinstance(self.layers[layer_idx], RankKVLayer):
            attention.hand_off(self, layer_idx)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def reset(self) -> None:
        """Forget everything: the next forward is a prefill."""
        super().reset()
        self._plans, self._compressed = None, False

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times, its budgets included."""
        super().batch_repeat_interleave(repeats)
        if self._plans is not None:
            self._plans = [plan for plan in self._plans for _ in range(repeats)]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices`` only, with their budgets."""
        super().batch_select_indices(indices)
        if self._plans is not None:
            self._plans = [self._plans[i] for i in indices.tolist()]

    @property
    def is_compileable(self) -> bool:
        """False: lengths differ by layer and change with every prompt."""
        return False

    # -- what the attention hook asks ---------------------------------------------------------------------------

    def attend(
        self,
        layer_idx: int,
        inner: Callable[..., Any],
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        options: dict[str, Any],
    ) -> Any:
        """Run the layer's attention with its own mask; in the prefill, compress the layer afterwards."""
        layer = self.layers[layer_idx]
        mask = attention_mask
        # With nothing to mask, the one query of a decode step sees every slot, and no position is asked for.
        unmasked_step = attention_mask is None and query.shape[-2] == 1 and layer.kept_valid is None
        if layer.kept_positions is not None and not unmasked_step:
            mask = attention.project_mask(
                attention_mask,
                layer.compute_positions(),
                layer.compute_slot_valid(),
                query.shape[-2],
                query.shape[1],
                self._text_config._attn_implementation,
                query.dtype,
            )
        output = inner(module, query, key, value, mask, **options)
        if not self._compressed and layer.seen == query.shape[-2]:
            with torch.no_grad():
                self._compress_layer(layer_idx, module, query, key, value, attention_mask, options)
        return output

    def _compress_layer(
        self,
        layer_idx: int,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        options: dict[str, Any],
    ) -> None:
        config, layer = self.config, self.layers[layer_idx]
        observation = observe(
            layer_idx,
            module,
            query,
            key,
            value,
            attention_mask,
            options,
            kv_heads=layer.keys.shape[1],
            window_size=config.window_size,
            sink_size=config.sink_size,
        )
        if self._plans is None or layer_idx == self.layer_indices[0]:
            self._plans = [BudgetPlan(config, n, self.layer_indices) for n in observation.lengths]
        ranks: list[float | None] = [None] * len(self._plans)
        if self._plans[0].needs_ranks:
            ranks = compute_layer_ranks(observation, config.scope, config.aggregation).tolist()
        for plan, rank in zip(self._plans, ranks, strict=True):
            plan.add_layer(rank)
        layer.begin_compression(
            self.selector.compute_scores(observation), observation.real_index, observation.lengths
        )
        done = self.layer_indices[: self.layer_indices.index(layer_idx) + 1]
        if layer_idx == self.layer_indices[-1]:
            self._shrink(done, [plan.finish() for plan in self._plans], slack=0)
            for index in done:
                self.layers[index].end_compression()
            self._compressed = True
            return
        ceilings = [plan.compute_ceilings() for plan in self._plans]
        self._shrink(done[-1:], [row[-1:] for row in ceilings], slack=1)
        self._release_excess(done, ceilings)

    def _release_excess(self, done: list[int], ceilings: list[list[int]]) -> None:
        """Shrink the layers with most to release until what is held fits the total, and no further."""
        widths = [max(row[place] for row in ceilings) + 1 for place in range(len(done))]
        excess = {place: self.layers[index].width - widths[place] for place, index in enumerate(done)}
        total = max(plan.total_budget for plan in self._plans or [])
        limit = total + _CASCADE_SLACK * (total + self.layers[done[-1]].seen)
        over = sum(self.layers[index].width for index in done) - limit
        for place in sorted(excess, key=lambda place: -excess[place]):
            if over <= 0:
                return
            self._shrink(done[place : place + 1], [row[place : place + 1] for row in ceilings], slack=1)
            over -= excess[place]

    def _shrink(self, layer_indices: list[int], budgets: list[list[int]], slack: int) -> None:
        config = self.config
        for place, layer_idx in enumerate(layer_indices):
            row_budgets = [row[place] for row in budgets]
            self.layers[layer_idx].shrink(row_budgets, self.selector, config.window_size, config.sink_size, slack)

    # -- what users ask -----------------------------------------------------------------------------------------

    @property
    def seen_tokens(self) -> int:
        """Tokens seen so far, evicted ones included (a padded batch: its padded width)."""
        return self.get_seq_length()

    @property
    def kept_lengths(self) -> list[int]:
        """Slots each model layer holds, one entry a layer (a layer without keys: 0)."""
        return [_count_slots(layer) for layer in self.layers]

    @property
    def budgets_per_row(self) -> list[list[int]]:
        """Tokens kept of the prompt, ``[row][compressible layer]``; empty before the prefill."""
        return [list(plan.budgets) for plan in self._finished_plans()]

    @property
    def layer_ranks_per_row(self) -> list[list[float]]:
        """Effective ranks, ``[row][compressible layer]``; empty lists where the strategy needs none."""
        return [list(plan.layer_ranks) for plan in self._finished_plans()]

    @property
    def budgets(self) -> list[int]:
        """Tokens kept of the prompt by each compressible layer (row 0)."""
        rows = self.budgets_per_row
        return rows[0] if rows else []

    @property
    def layer_ranks(self) -> list[float]:
        """Effective rank of each compressible layer (row 0)."""
        rows = self.layer_ranks_per_row
        return rows[0] if rows else []

    def cache_bytes(self) -> int:
        """Return the bytes of all keys and values held, each distinct storage counted once."""
        return compute_cache_bytes(self)

    def full_cache_bytes(self) -> int:
        """Return the bytes the model's plain cache would hold after the same tokens."""
        total = 0
        for layer in self.layers:
            for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
                if isinstance(tensor, Tensor) and tensor.numel():
                    slots = layer.seen if isinstance(layer, RankKVLayer) else tensor.shape[-2]
                    total += tensor.numel() // tensor.shape[-2] * slots * tensor.element_size()
        return total

    def copy(self) -> RankKVCache:
        """Return an independent copy: what is generated on one does not reach the other."""
        attention.check_not_pending(self)
        twin = copy.copy(self)
        twin.layers = copy.deepcopy(self.layers)
        twin._plans = None if self._plans is None else list(self._plans)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> RankKVCache:
        return self.copy()

    def rewind(self, seen_tokens: int) -> RankKVCache:
        """Drop the newest tokens until ``seen_tokens`` have been seen, and return the cache.

        Raises
        ------
        CacheStateError
            If that would need tokens that were evicted, or more tokens than were seen.
        """
        if not 0 < seen_tokens <= self.seen_tokens:
            raise CacheStateError(
                f"cannot rewind to {seen_tokens} tokens: the cache has seen {self.seen_tokens}; give 1 to that many."
            )
        if seen_tokens < self.seen_tokens:
            self.crop(seen_tokens - self.seen_tokens)
        return self

    def finish(self) -> RankKVCache:
        """Check that the prefill was compressed, and return the cache."""
        attention.check_not_pending(self)
        if self.layer_indices and self.seen_tokens and not self._compressed:
            raise CacheStateError("the prefill did not reach the last layer; build a new cache and run it again.")
        return self

    def summary(self) -> str:
        """Return a short account: tokens and bytes kept, and rank and budget of each layer (row 0)."""
        return summarize(self)

    def _finished_plans(self) -> list[BudgetPlan]:
        return self._plans if self._plans is not None and self._compressed else []


def compute_cache_bytes(cache: Any) -> int:
    """Compute the bytes of all keys and values a cache holds, each distinct storage counted once.

    Parameters
    ----------
    cache : Cache
        Any of transformers' caches.
    """
    storages = {}
    for layer in cache.layers:
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _count_slots(layer: Any) -> int:
    keys = getattr(layer, "keys", None)
    return keys.shape[-2] if isinstance(keys, Tensor) and keys.dim() == 4 else 0


def _report_nothing_to_compress(model: Any, layers: list[Any]) -> None:
    name = type(model).__name__
    if not any(isinstance(layer, CacheLayerMixin) for layer in layers):
        raise UnsupportedModelError(f"{name} has no KV cache: there is nothing RankKV could compress.")
    warnings.warn(
        f"no layer of {name} has a full-attention KV cache, so nothing is compressed and the model runs unchanged.",
        stacklevel=3,
    )


def summarize(cache: RankKVCache) -> str:
    """Write the account of :meth:`RankKVCache.summary`."""
    kept, full = cache.cache_bytes(), cache.full_cache_bytes()
    lines = [
        f"RankKVCache: {cache.seen_tokens} tokens seen, {kept:,} of {full:,} bytes kept"
        + (f" ({kept / full:.1%})" if full else ""),
        f"selector {cache.selector}, strategy {cache.config.resolve_strategy()[0]}, scope {cache.config.scope}",
    ]
    others = len(cache.layers) - len(cache.layer_indices)
    if others:
        lines.append(f"{others} of {len(cache.layers)} layers hold no full-attention cache and are left alone")
    for plan in cache._finished_plans()[:1]:
        lines += plan.notes
        ranks = plan.layer_ranks or [None] * len(plan.budgets)
        for layer_idx, rank, budget in zip(cache.layer_indices, ranks, plan.budgets, strict=True):
            shown = "      -" if rank is None else f"{rank:7.2f}"
            lines.append(f"  layer {layer_idx:3d}  rank {shown}  keeps {budget:6d} of {plan.length}")
    return "\n".join(lines)
