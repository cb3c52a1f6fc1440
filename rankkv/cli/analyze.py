"""`rankkv analyze`: rank and budget of every layer for one or several prompts, without compression."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..config import AGGREGATIONS
from ..utils.processes import find_own_device, is_main_process
from .checks import check_aggregation, check_cache_options, check_model
from .common import (
    check_at_least_one,
    check_output,
    parse_options,
    print_json,
    read_prompts,
    reports_errors,
    write_json,
)
from .display import make_console, make_layer_table, make_loss_table, make_spread_table, show_step
from .options import (
    AverageBudget,
    DeviceMap,
    DtypeName,
    KeptFraction,
    ModelName,
    RankedAttention,
    StrategyOptions,
)

if TYPE_CHECKING:
    from rich.console import Console

    from ..pipeline import RankKVResult

#: Tokens of a data set that are analyzed without --max-length.
_DATASET_TOKENS = 2048


@reports_errors
def analyze(
    model: ModelName = "embedded",
    prompt: Annotated[str | None, typer.Option(help="Text of the prompt.")] = None,
    prompt_file: Annotated[
        list[Path] | None,
        typer.Option(help="UTF-8 text file with one prompt, or .jsonl file with several; may be repeated."),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="python-docs, wikitext, or a file or folder of texts; its beginning is the prompt."
        ),
    ] = None,
    compression_ratio: KeptFraction = 0.3,
    budget: AverageBudget = None,
    strategy: Annotated[str | None, typer.Option(help="Budget strategy.", show_default="distortion")] = None,
    strategy_option: StrategyOptions = None,
    scope: RankedAttention = "evictable",
    aggregation: Annotated[
        str, typer.Option(help=f"Way to join the heads of a layer: {', '.join(AGGREGATIONS)}.")
    ] = "concat",
    losses: Annotated[
        bool,
        typer.Option(
            "--losses",
            help="Also predict the loss at several shares kept, of the first prompt, and mark the knee.",
        ),
    ] = False,
    max_length: Annotated[
        int | None,
        typer.Option(
            help="Use at most this many tokens, the first ones.",
            show_default=f"all, or {_DATASET_TOKENS} of a data set",
        ),
    ] = None,
    dtype: DtypeName = None,
    device_map: DeviceMap = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON to stdout.")] = False,
    output: Annotated[Path | None, typer.Option(help="Also write the result as JSON to this file.")] = None,
) -> None:
    """Show the effective rank and the budget of every layer; of several prompts, mean and spread.

    Under accelerate launch or torchrun each process analyzes its share of the prompts.
    """
    console = make_console()
    console.quiet = not is_main_process()
    check_at_least_one("--max-length", max_length)
    check_at_least_one("--budget", budget)
    check_output(output)
    check_aggregation(aggregation)
    options = parse_options(strategy_option, "--strategy-option")
    check_cache_options(
        compression_ratio=compression_ratio,
        budget=budget,
        strategy=strategy,
        scope=scope,
        strategy_options=options,
    )
    texts = read_prompts(prompt, prompt_file, dataset)
    check_model(model, dtype, device_map)

    with show_step(console, f"Loading {model}"):
        from ..budget.plan import BudgetPlan
        from ..cache.cache import RankKVCache
        from ..config import RankKVConfig
        from ..models.loading import load_model
        from ..pipeline import RankKVAnalyzer, analyze_samples, summarize_layers

        config = RankKVConfig(
            compression_ratio, budget=budget, strategy=strategy, scope=scope, strategy_options=options
        )
        language_model, tokenizer = load_model(model, dtype, device_map or find_own_device())

    limit = max_length or (_DATASET_TOKENS if dataset is not None else None)
    samples = [tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][:, :limit] for text in texts]
    lengths = [ids.shape[1] for ids in samples]
    from ..models.checkpoints import get_context_length

    context = get_context_length(language_model)
    if context is not None and max(lengths) > context:
        console.print(
            f"Note: {'the' if len(samples) == 1 else 'a'} prompt has {max(lengths):,} tokens, "
            f"more than the {context:,} the model was made for.",
            soft_wrap=True,
        )
    name, resolved = config.resolve_strategy()
    analyzer = RankKVAnalyzer(
        language_model, model, strategy=name, scope=scope, aggregation=aggregation, strategy_options=resolved
    )
    total_budgets = None
    if budget is not None and all(lengths):
        layers = RankKVCache(language_model).layer_indices
        # A budget below the floor raises here, before any forward.
        total_budgets = [BudgetPlan(config, length, layers).total_budget for length in lengths]
    many = len(samples) > 1
    what = f"{len(samples)} prompts, {sum(lengths):,} tokens" if many else f"{lengths[0]:,} tokens"
    with show_step(console, f"Analyzing {what}") as step:
        results = analyze_samples(
            analyzer,
            samples,
            compression_ratio,
            total_budgets,
            lambda done, count: step.advance(done, count, f"{done:.1f}/{count} prompts"),
        )
    if not is_main_process():
        return
    points = []
    if losses:
        from ..analysis.predicted_loss import predict_losses
        from ..models.placement import find_input_device

        with show_step(console, "Predicting the loss"):
            points = predict_losses(language_model, samples[0].to(find_input_device(language_model)))
    rows = summarize_layers(results)
    record = results[0].to_dict()
    if many:
        listed = [{"sample": place, **result.to_dict()} for place, result in enumerate(results)]
        record = {"layers": rows, "samples": listed}
    if points:
        record["predicted_losses"] = [point.to_dict() for point in points]
    if output is not None:
        write_json(output, record)
    if json:
        print_json(record)
        return
    _show(console, results, rows)
    if points:
        console.print()
        console.print(make_loss_table(points))
        console.print(
            "Loss: KL divergence from the full cache over the 128 tokens that follow, nats per token, with selector "
            "snapkv and no profile. Bars are logarithmic. `--max-loss` of `rankkv generate` takes the second number.",
            markup=False,
            soft_wrap=True,
        )
    if output is not None:
        console.print(f"Written: {output}", markup=False, soft_wrap=True)


def _show(console: Console, results: list[RankKVResult], rows: list[dict[str, float]]) -> None:
    """Print a table of all layers, then the model, the options and the tokens kept."""
    from ..budget_allocation import get_strategy

    result = results[0]
    ranked = get_strategy(result.strategy).uses_ranks or not result.layer_measures
    console.print()
    if len(results) == 1:
        shown = (result.layer_ranks, "rank") if ranked else (result.layer_measures, result.strategy)
        console.print(make_layer_table(result.layer_indices, shown[0], result.budgets, shown[1]))
        tokens = f"{result.seq_len:,} tokens"
    else:
        console.print(make_spread_table(rows, None if ranked else result.strategy))
        lengths = [one.seq_len for one in results]
        tokens = f"mean ± standard deviation over {len(results)} prompts of {min(lengths):,} to {max(lengths):,} tokens"
    kept = sum(one.total_budget for one in results)
    slots = sum(one.seq_len * len(one.budgets) for one in results)
    listed = ", ".join(f"{option} {value}" for option, value in result.strategy_options.items())
    console.print(
        f"\n{result.model_name}: {tokens}, {kept:,} of {slots:,} slots kept ({kept / slots:.1%}); "
        f"strategy {result.strategy}{f' ({listed})' if listed else ''}, scope {result.scope}, "
        f"heads {result.aggregation}",
        markup=False,
        soft_wrap=True,
    )
    console.print(
        "These budgets treat all heads alike and use no profile. `rankkv generate` also divides budgets over heads "
        "(--head-budgets), so its layers keep other numbers; its --explain shows what a cache keeps.",
        markup=False,
        soft_wrap=True,
    )
    for note in dict.fromkeys(note.strip() for one in results for note in one.notes):
        console.print(note, markup=False, soft_wrap=True)
