"""Analysis of prompts without compression: rank and budget of every layer, and their spread over prompts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from .analysis.measuring_cache import MeasuringCache
from .budget.plan import BudgetPlan
from .budget_allocation import BudgetAllocation, BudgetAllocator, get_strategy
from .cache.prefill import check_input_ids, run_prefill
from .config import RankKVConfig
from .errors import ConfigError, InputError, UnsupportedModelError
from .models.compat import check_transformers
from .models.tensor_parallel import find_head_shards
from .observe import hook
from .utils.files import dump_json, write_text_atomically
from .utils.processes import gather, split_samples


class RankKVAnalyzer:
    """Compute the ranks and budgets of prompts without compressing anything.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model, or the name of one for :func:`rankkv.load_model`.
    model_name : str, optional
        Name of the model in results.
    strategy : str, default "proportional"
        Budget strategy, a key of :data:`rankkv.budget_allocation.STRATEGIES`.
    scope, aggregation, window_size, sink_size, strategy_options
        As in :class:`~rankkv.RankKVConfig`, with the same defaults.

    Raises
    ------
    UnsupportedModelError, ConfigError, UnknownNameError
        If the model cannot be observed, or an option is outside its range.

    Examples
    --------
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
    ...     num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8)).eval()
    >>> result = RankKVAnalyzer(model).analyze(torch.arange(60), compression_ratio=0.5)
    >>> sum(result.budgets)
    60
    """

    def __init__(
        self,
        model: Any,
        model_name: str | None = None,
        *,
        strategy: str = "proportional",
        scope: str = "evictable",
        aggregation: str = "concat",
        window_size: int = 32,
        sink_size: int = 4,
        strategy_options: Mapping[str, Any] | None = None,
    ) -> None:
        if isinstance(model, str):
            from .models.loading import load_model

            model_name = model_name or model
            model, _ = load_model(model)
        self.config = RankKVConfig(
            strategy=strategy,
            scope=scope,
            aggregation=aggregation,
            window_size=window_size,
            sink_size=sink_size,
            strategy_options=strategy_options,
        )
        BudgetPlan.check(self.config)
        check_transformers()
        hook.check_observable(model)
        self.model = model
        self.model_name = model_name or getattr(model.config, "_name_or_path", "") or type(model).__name__

    def analyze(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        compression_ratio: float = 0.3,
        total_budget: int | None = None,
        on_layer: Callable[[int, int], None] | None = None,
    ) -> RankKVResult:
        """Run one forward over the prompt; return the rank and the budget of every layer.

        Parameters
        ----------
        input_ids : Tensor
            ``[1, token]`` or ``[token]``: one prompt.
        attention_mask : Tensor, optional
            Same shape, 0 at padding.
        compression_ratio : float, default 0.3
            Fraction of the cache kept.
        total_budget : int, optional
            Tokens over all compressible layers; overrides ``compression_ratio``.
        on_layer : callable, optional
            Called with (layers done, all layers) after each layer.

        Returns
        -------
        RankKVResult

        Raises
        ------
        InputError
            If the prompt is empty or a batch of several.
        BudgetError
            If ``total_budget`` is below the sum of the layers' floors.
        """
        input_ids = check_input_ids(input_ids, attention_mask)
        if input_ids.shape[0] != 1:
            raise InputError(
                f"analyze takes one prompt, got a batch of {input_ids.shape[0]}: call it once per row."
            )
        config = RankKVConfig(**{**self._options(), "compression_ratio": compression_ratio})
        probe = MeasuringCache(self.model, config, on_layer, total_budget)
        if not probe.layer_indices:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} has no full-attention layer to analyze: use a model that has one."
            )
        hook.watch_for(probe, self.model)
        run_prefill(self.model, probe, input_ids, attention_mask)
        hook.check_not_pending(probe)
        plan = probe.finish_plan()
        budgets = plan.budgets
        return RankKVResult(
            budgets=budgets,
            layer_ranks=[probe.ranks[layer_idx] for layer_idx in probe.layer_indices],
            layer_indices=probe.layer_indices,
            total_budget=plan.total_budget,
            seq_len=plan.length,
            compression_ratio=plan.total_budget / (plan.length * len(budgets)),
            strategy=plan.strategy,
            scope=config.scope,
            aggregation=config.aggregation,
            model_name=self.model_name,
            strategy_options=plan.strategy_options,
            notes=plan.notes,
            layer_measures=[] if plan.measure == "rank" else list(plan.layer_measures),
        )

    def compare_with_baselines(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        compression_ratio: float = 0.3,
        total_budget: int | None = None,
        baselines: tuple[str, ...] = ("uniform", "pyramid"),
    ) -> dict[str, BudgetAllocation]:
        """Return the budgets of this strategy and of baselines, for one prompt and total.

        Returns
        -------
        dict
            A :class:`~rankkv.BudgetAllocation` for ``"rankkv"`` and for each baseline.

        Raises
        ------
        ConfigError
            If a baseline does not weigh layers by rank.
        """
        for name in baselines:
            if get_strategy(name).measure not in ("rank", None):
                raise ConfigError(
                    f"baseline {name!r} does not weigh layers by rank: use it as the strategy instead."
                )
        result = self.analyze(input_ids, attention_mask, compression_ratio, total_budget)
        count = len(result.budgets)
        floor = BudgetPlan(self.config, result.seq_len, result.layer_indices, result.total_budget).floor
        bounds = {"min_budget": min(floor, result.total_budget // count), "max_budget": result.seq_len}
        options = {result.strategy: result.strategy_options}
        rows = {"rankkv": result.strategy, **{name: name for name in baselines}}
        allocations = {}
        for row, name in rows.items():
            measures = result.layer_measures if row == "rankkv" else []
            # Such a strategy measures several numbers per layer; `measures` holds the weight made from them.
            if not get_strategy(name).scalar:
                name = "proportional"
            allocator = BudgetAllocator(name, **bounds, **options.get(name, {}))
            allocations[row] = allocator.allocate(measures or result.layer_ranks, result.total_budget)
        # Report the analyzed budgets, with the strategy's own name and options.
        own = replace(allocations["rankkv"], strategy=result.strategy, budgets=list(result.budgets))
        allocations["rankkv"] = replace(own, strategy_options=dict(result.strategy_options))
        return allocations

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self.config, name) for name in self.config.__dataclass_fields__}


@dataclass(frozen=True)
class RankKVResult:
    """Hold the ranks and budgets of one prompt.

    Attributes
    ----------
    budgets : list of int
        Tokens each compressible layer keeps with equal heads (``head_budgets=None``); they sum to ``total_budget``.
    layer_ranks : list of float
        Effective rank of each compressible layer.
    layer_indices : list of int
        Model indices of these layers.
    total_budget : int
        Tokens over all compressible layers.
    seq_len : int
        Number of real tokens of the prompt.
    compression_ratio : float
        Fraction of the cache kept, ``total_budget / (seq_len * layers)``.
    strategy : str
        Budget strategy.
    scope, aggregation : str
        Part of the attention that was ranked, and the way its heads were joined.
    model_name : str
        Name of the model.
    strategy_options : dict
        Options of the strategy.
    notes : list of str
        Remarks for the reader, such as a total raised to the floor.
    layer_measures : list of float
        Measure of each layer if it is not the rank, such as a CAKE preference or an entropy; else empty.
    """

    budgets: list[int]
    layer_ranks: list[float]
    layer_indices: list[int]
    total_budget: int
    seq_len: int
    compression_ratio: float
    strategy: str
    scope: str
    aggregation: str
    model_name: str
    strategy_options: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    layer_measures: list[float] = field(default_factory=list)

    def summary(self) -> str:
        """Return a plain-text table, one line per layer, with a bar for its budget."""
        widest = max(self.budgets)
        lines = [
            f"{self.model_name}: {self.seq_len} tokens, {len(self.budgets)} layers compressed, "
            f"{self.total_budget} of {self.seq_len * len(self.budgets)} slots kept ({self.compression_ratio:.1%})",
            f"strategy {self.strategy}, scope {self.scope}, heads {self.aggregation}",
            *self.notes,
        ]
        measured = [f"  {self.strategy} {number:9.4g}" for number in self.layer_measures]
        for place, (layer_idx, budget) in enumerate(zip(self.layer_indices, self.budgets, strict=True)):
            bar = "#" * max(1, round(30 * budget / widest))
            shown = f"rank {self.layer_ranks[place]:8.2f}{measured[place] if measured else ''}"
            lines.append(f"  layer {layer_idx:3d}  {shown}  budget {budget:6d}  {bar}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON-ready values."""
        return asdict(self)

    def save(self, path: str | Path) -> Path:
        """Write the result as JSON, atomically, and return the path."""
        return write_text_atomically(path, dump_json(self.to_dict()))

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw rank and budget per layer, and save the figure if a path is given; needs ``rankkv[plots]``."""
        from .plots.figures import plot_ranks_and_budgets

        return plot_ranks_and_budgets(self, path)


def quick_analyze(
    model: Any, input_ids: Tensor, compression_ratio: float = 0.3, strategy: str = "proportional"
) -> tuple[list[int], list[float]]:
    """Return the budgets and the effective ranks of the layers for one prompt.

    Parameters
    ----------
    model : PreTrainedModel or str
        A causal language model, or the name of one.
    input_ids : Tensor
        ``[1, token]`` or ``[token]``.
    compression_ratio : float, default 0.3
        Fraction of the cache kept.
    strategy : str, default "proportional"
        Budget strategy.

    Returns
    -------
    budgets : list of int
        Tokens each compressible layer keeps.
    ranks : list of float
        Effective ranks of these layers.
    """
    result = RankKVAnalyzer(model, strategy=strategy).analyze(input_ids, compression_ratio=compression_ratio)
    return result.budgets, result.layer_ranks


def analyze_samples(
    analyzer: RankKVAnalyzer,
    samples: Sequence[Tensor],
    compression_ratio: float = 0.3,
    total_budgets: Sequence[int] | None = None,
    on_progress: Callable[[float, int], None] | None = None,
) -> list[RankKVResult]:
    """Analyze prompts one by one, spread over the processes of ``accelerate launch`` or ``torchrun``.

    All processes must call this with the same arguments, and each gets the results of all prompts.  The results equal
    those of one process, bit for bit if all processes use the same kind of machine and number of threads.

    Parameters
    ----------
    analyzer : RankKVAnalyzer
        The analyzer; if its model is split over the processes (tensor parallelism), each one runs every prompt.
    samples : sequence of Tensor
        Token ids of each prompt, ``[1, token]`` or ``[token]``.
    compression_ratio : float, default 0.3
        Fraction of the cache kept.
    total_budgets : sequence of int, optional
        Tokens over all compressible layers, one number per prompt; overrides ``compression_ratio``.
    on_progress : callable, optional
        Called with (prompts done, all prompts) of this process; an unfinished prompt counts by its layers.

    Returns
    -------
    list of RankKVResult
        In the order of the samples.

    Raises
    ------
    InputError
        If there is no prompt, a prompt is empty, or the number of total budgets differs from that of prompts.
    BudgetError
        If a total budget is below the sum of the layers' floors.

    Examples
    --------
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
    ...     num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8)).eval()
    >>> results = analyze_samples(RankKVAnalyzer(model), [torch.arange(60), torch.arange(50)])
    >>> [result.seq_len for result in results]
    [60, 50]
    """
    if not len(samples):
        raise InputError("there is no prompt to analyze: give at least one.")
    totals: Sequence[int | None] = [None] * len(samples) if total_budgets is None else total_budgets
    if len(totals) != len(samples):
        raise InputError(
            f"{len(totals)} total budgets are given for {len(samples)} prompts: give one per prompt."
        )
    jobs = list(zip(samples, totals, strict=True))
    shared = find_head_shards(analyzer.model) is None
    own = split_samples(jobs) if shared else jobs
    records = []
    for number, (input_ids, total) in enumerate(own):
        report = None if on_progress is None else _count_from(on_progress, number, len(own))
        result = analyzer.analyze(
            input_ids, compression_ratio=compression_ratio, total_budget=total, on_layer=report
        )
        records.append(result.to_dict())
    return [RankKVResult(**record) for record in (gather(records) if shared else records)]


def summarize_layers(results: Sequence[RankKVResult]) -> list[dict[str, float]]:
    """Compute mean and sample standard deviation of each layer's rank and budget over prompts.

    Parameters
    ----------
    results : sequence of RankKVResult
        Results of one model and one strategy.

    Returns
    -------
    list of dict
        One per compressible layer: ``layer``, ``rank_mean``, ``rank_std``, ``budget_mean``, ``budget_std``.  If the
        strategy measures something other than ranks, also ``measure_mean`` and ``measure_std``.  The deviation of a
        single prompt is 0.

    Raises
    ------
    InputError
        If there is no result, or the results are of different layers.

    Examples
    --------
    >>> of = {"layer_indices": [0], "compression_ratio": 0.5, "strategy": "uniform", "scope": "evictable",
    ...     "aggregation": "concat", "model_name": "a model"}
    >>> summarize_layers([RankKVResult([8], [2.0], total_budget=8, seq_len=16, **of),
    ...     RankKVResult([10], [4.0], total_budget=10, seq_len=20, **of)])[0]["rank_mean"]
    3.0
    """
    if not results or any(result.layer_indices != results[0].layer_indices for result in results):
        raise InputError(
            "the results are empty or of different layers: give at least one, all of the same model."
        )
    rows = []
    for place, layer in enumerate(results[0].layer_indices):
        row: dict[str, float] = {"layer": layer}
        columns: dict[str, list[float]] = {
            "rank": [result.layer_ranks[place] for result in results],
            "budget": [result.budgets[place] for result in results],
        }
        if results[0].layer_measures:
            columns["measure"] = [result.layer_measures[place] for result in results]
        for name, values in columns.items():
            row[f"{name}_mean"], row[f"{name}_std"] = _compute_spread(values)
        rows.append(row)
    return rows


def _compute_spread(values: Sequence[float]) -> tuple[float, float]:
    mean = statistics.fmean(values)
    squares = math.fsum((value - mean) ** 2 for value in values)
    return mean, math.sqrt(squares / max(1, len(values) - 1))


def _count_from(
    on_progress: Callable[[float, int], None], number: int, count: int
) -> Callable[[int, int], None]:
    return lambda done, layers: on_progress(number + done / layers, count)
