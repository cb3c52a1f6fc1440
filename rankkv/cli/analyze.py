"""`rankkv analyze`: rank and budget of every layer for one prompt, without compressing anything."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import (
    check_at_least_one,
    check_output,
    get_context_length,
    parse_options,
    print_json,
    read_prompt,
    reports_errors,
    write_json,
)
from .display import make_console, make_layer_table, show_step

#: Tokens of a data set that are analyzed where --max-length does not say.
_DATASET_TOKENS = 2048


@reports_errors
def analyze(
    model: Annotated[str, typer.Option(help="Hub id, local folder, GGUF file, or embedded.")] = "embedded",
    prompt: Annotated[str | None, typer.Option(help="The prompt itself.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A UTF-8 text file with the prompt.")] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="python-docs, wikitext, or a .txt or .jsonl file: its start is the prompt."),
    ] = None,
    compression_ratio: Annotated[float, typer.Option(help="Fraction of the KV cache kept, in (0, 1].")] = 0.3,
    budget: Annotated[
        int | None, typer.Option(help="Average tokens a layer keeps; overrides --compression-ratio.")
    ] = None,
    strategy: Annotated[str | None, typer.Option(help="Budget strategy.", show_default="distortion")] = None,
    strategy_option: Annotated[
        list[str] | None, typer.Option(help="Option of the strategy, name=value; may be repeated.")
    ] = None,
    scope: Annotated[str, typer.Option(help="Attention ranked: evictable, window or full.")] = "evictable",
    aggregation: Annotated[str, typer.Option(help="How the heads of a layer are joined.")] = "concat",
    max_length: Annotated[
        int | None,
        typer.Option(
            help=f"Use at most so many tokens, the first ones (a data set: {_DATASET_TOKENS}).",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Weights' dtype, such as bfloat16.", show_default="the checkpoint's own"),
    ] = None,
    device_map: Annotated[
        str | None, typer.Option(help="Where the model goes, such as auto or cuda; needs accelerate.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON to stdout.")] = False,
    output: Annotated[Path | None, typer.Option(help="Also write the result as JSON to this file.")] = None,
) -> None:
    """Show the effective rank and the budget of every layer for one prompt."""
    console = make_console()
    check_at_least_one("--max-length", max_length)
    check_at_least_one("--budget", budget)
    check_output(output)
    text = read_prompt(prompt, prompt_file, dataset, hint=" or --dataset")
    options = parse_options(strategy_option, "--strategy-option")

    with show_step(console, f"Loading {model}"):
        from ..budget_allocation import get_strategy
        from ..budget_plan import BudgetPlan
        from ..cache import RankKVCache
        from ..config import RankKVConfig
        from ..models import load_model
        from ..pipeline import RankKVAnalyzer
        from ..rank_aggregation import get_aggregation

        # Checked here, so that a misspelt name does not wait for the model.
        config = RankKVConfig(
            compression_ratio, budget=budget, strategy=strategy, scope=scope, strategy_options=options
        )
        BudgetPlan.check(config)
        get_aggregation(aggregation)
        language_model, tokenizer = load_model(model, dtype, device_map)

    limit = max_length or (_DATASET_TOKENS if dataset is not None else None)
    input_ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][:, :limit]
    context = get_context_length(language_model)
    if context is not None and input_ids.shape[1] > context:
        console.print(
            f"Note: the prompt has {input_ids.shape[1]:,} tokens, "
            f"more than the {context:,} the model was made for.",
            soft_wrap=True,
        )
    name, resolved = config.resolve_strategy()
    analyzer = RankKVAnalyzer(
        language_model, model, strategy=name, scope=scope, aggregation=aggregation, strategy_options=resolved
    )
    total_budget = None
    if budget is not None and input_ids.numel():
        layers = RankKVCache(language_model).layer_indices
        # Raises, before the forward, if the budget lies below the floor.
        total_budget = BudgetPlan(config, input_ids.shape[1], layers).total_budget
    with show_step(console, f"Analyzing {input_ids.shape[1]:,} tokens") as step:
        result = analyzer.analyze(
            input_ids, compression_ratio=compression_ratio, total_budget=total_budget, on_layer=step.advance
        )
    if output is not None:
        write_json(output, result.to_dict())
    if json:
        print_json(result.to_dict())
        return
    console.print()
    ranked = get_strategy(result.strategy).uses_ranks or not result.layer_measures
    shown = (result.layer_ranks, "rank") if ranked else (result.layer_measures, result.strategy)
    console.print(make_layer_table(result.layer_indices, shown[0], result.budgets, shown[1]))
    listed = ", ".join(f"{option} {value}" for option, value in result.strategy_options.items())
    console.print(
        f"\n{result.model_name}: {result.seq_len:,} tokens, {result.total_budget:,} of "
        f"{result.seq_len * len(result.budgets):,} slots kept ({result.compression_ratio:.1%}); "
        f"strategy {result.strategy}{f' ({listed})' if listed else ''}, scope {result.scope}, "
        f"heads {result.aggregation}",
        markup=False,
        soft_wrap=True,
    )
    for note in result.notes:
        console.print(note.strip(), markup=False, soft_wrap=True)
    if output is not None:
        console.print(f"Written: {output}", markup=False, soft_wrap=True)
