"""Several prompts analyzed, shared by launched processes: ranks and budgets of every layer, and how they spread."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

from torch import Tensor

from ..errors import InputError
from ..models.tensor_parallel import find_head_shards
from ..pipeline import RankKVAnalyzer, RankKVResult
from ..utils.processes import gather, split_samples


def analyze_samples(
    analyzer: RankKVAnalyzer,
    samples: Sequence[Tensor],
    compression_ratio: float = 0.3,
    total_budgets: Sequence[int] | None = None,
    on_progress: Callable[[float, int], None] | None = None,
) -> list[RankKVResult]:
    """Analyze prompts one by one, each on one of the processes that ``accelerate launch`` or ``torchrun`` started.

    All processes must call this with the same arguments, and each gets the results of all prompts; they are those of
    one process, bit by bit where every process computes on the same kind of machine with as many threads.

    Parameters
    ----------
    analyzer : RankKVAnalyzer
        Of the model; one that is itself split over the processes (tensor parallelism) sees every prompt in all of them.
    samples : sequence of Tensor
        Token ids, ``[1, token]`` or ``[token]`` each.
    compression_ratio : float, default 0.3
        Fraction of the cache kept.
    total_budgets : sequence of int, optional
        Tokens over all compressible layers, one for each prompt; overrides ``compression_ratio``.
    on_progress : callable, optional
        Called with (prompts done, in all), those of this process; a prompt under way counts by its layers.

    Returns
    -------
    list of RankKVResult
        In the order of the samples.

    Raises
    ------
    InputError
        If there is no prompt, one is empty, or the total budgets are not as many as the prompts.
    BudgetError
        If a total budget lies below the sum of the layers' floors.

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
            f"{len(totals)} total budgets are given for {len(samples)} prompts: give one for each."
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
    """Compute mean and sample standard deviation of each layer's rank and budget over several prompts.

    Parameters
    ----------
    results : sequence of RankKVResult
        Of one model and one strategy.

    Returns
    -------
    list of dict
        One for each compressible layer: ``layer``, ``rank_mean``, ``rank_std``, ``budget_mean``, ``budget_std`` and,
        where the strategy measures something else than ranks, ``measure_mean`` and ``measure_std``. The deviation of a
        single prompt is 0.

    Raises
    ------
    InputError
        If there is no result, or not all are of the same layers.

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
            "results of the same layers are needed, and at least one: analyze one model at a time."
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
