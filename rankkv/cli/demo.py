"""`rankkv demo`: a question about a fact in a long document, answered with three caches side by side."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError, MissingDependencyError
from .common import (
    build_question_prompt,
    check_at_least_one,
    collect_versions,
    print_json,
    reports_errors,
    write_json,
)
from .display import Step, make_console, make_layer_table, show_step, watch_layers
from .options import KeptFraction, ModelName

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

# Fixed before the first run and never changed since, so that they do not favour a method.
CODE = "4829173"
FACT = f"The access code for the archive room is {CODE}."
QUESTION = "What is the access code for the archive room?"
DEPTH = 0.5
SEED = 0

_FULL, _UNIFORM, _RANKKV = _RUN_NAMES = ("full cache", "uniform SnapKV", "RankKV")

_WARM_UP_TOKENS = 256
# Tokens for the chat template and the question, on top of the document.
_ROOM_FOR_QUESTION = 128


@reports_errors
def demo(
    model: ModelName = "embedded",
    tokens: Annotated[int, typer.Option(help="Tokens of the document.")] = 4096,
    compression_ratio: KeptFraction = 0.3,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer, at most.")] = 32,
    output_dir: Annotated[Path, typer.Option(help="Folder for demo.json and figures/.")] = Path("build/demo"),
    json: Annotated[bool, typer.Option("--json", help="Also print the record as JSON to stdout.")] = False,
) -> None:
    """Hide a fact in a long document and ask for it: full cache, uniform SnapKV and RankKV side by side."""
    console = make_console()
    check_at_least_one("--tokens", tokens)
    check_at_least_one("--max-new-tokens", max_new_tokens)

    with show_step(console, f"Loading {model}"):
        from ..config import check_compression_ratio

        check_compression_ratio(compression_ratio)
        import torch

        from ..models.loading import load_model

        torch.manual_seed(SEED)
        language_model, tokenizer = load_model(model)
    from ..models.checkpoints import get_context_length

    context = get_context_length(language_model)
    if context is not None and tokens + max_new_tokens + _ROOM_FOR_QUESTION > context:
        raise ConfigError(
            f"--tokens {tokens} with question and answer does not fit the model's {context} positions: give at most "
            f"{context - max_new_tokens - _ROOM_FOR_QUESTION}."
        )

    from ..evaluation.results import describe_origin

    busy = _measure_load()
    input_ids, document = _build_prompt(tokenizer, tokens)
    input_ids = input_ids.to(language_model.device)
    console.print(
        f"\nDocument: {document['tokens']:,} tokens of the Python language reference; hidden in its middle: "
        f'"{FACT}"\nQuestion: "{QUESTION}" ({input_ids.shape[1]:,} tokens with the chat template)\n',
        markup=False,
        soft_wrap=True,
    )
    with show_step(console, f"Warming up on {_WARM_UP_TOKENS} tokens, because first calls are slower"):
        for name in _RUN_NAMES:
            _generate(language_model, input_ids[:, -_WARM_UP_TOKENS:], name, compression_ratio, 2)

    runs: list[dict[str, Any]] = []
    for place, name in enumerate(_RUN_NAMES, start=1):
        title = f"Run {place} of {len(_RUN_NAMES)}, {name}"
        with show_step(console, title) as step:
            run = _generate(language_model, input_ids, name, compression_ratio, max_new_tokens, step)
            run["answer"] = tokenizer.decode(run["token_ids"], skip_special_tokens=True).strip()
            run["has_fact"] = CODE in run["answer"]
            runs.append(run)

    record = {
        **describe_origin(),
        "versions": collect_versions(),
        "machine": {
            "cpus": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "load_average_at_start": busy,
        },
        "seed": SEED,
        "model": model,
        "compression_ratio": compression_ratio,
        "max_new_tokens": max_new_tokens,
        "document": document,
        "order": [run["name"] for run in runs],
        "runs": runs,
    }
    _print_results(console, runs)
    if busy is not None and busy > 0.75 * (os.cpu_count() or 1):
        console.print(
            f"Warning: the machine was busy before the first run (load average {busy:.1f} on {os.cpu_count()} "
            "cores), so do not compare these times.",
            soft_wrap=True,
        )
    written = [write_json(output_dir / "demo.json", record)]
    try:
        written += _draw_figures(runs, model, output_dir / "figures")
    except MissingDependencyError as error:
        console.print(f"No figures: {error}", markup=False, soft_wrap=True)
    console.print("\nWritten: " + ", ".join(str(path) for path in written), markup=False, soft_wrap=True)
    if json:
        print_json(record)


def _measure_load() -> float | None:
    """Return the load average of the last minute, or None if the system does not have one."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _build_prompt(tokenizer: Any, tokens: int) -> tuple[Any, dict[str, Any]]:
    """Return the prompt's ids, ``[1, token]``, and a record of its document, fact and question."""
    from ..models.texts import insert_fact, python_docs_text, take_tokens

    document = insert_fact(take_tokens(tokenizer, python_docs_text(), tokens), FACT, DEPTH)
    length = len(tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"])
    account = {
        "source": "pydoc_data.topics",
        "tokens": length,
        "fact": FACT,
        "depth": DEPTH,
        "question": QUESTION,
    }
    return build_question_prompt(tokenizer, document, QUESTION), account


def _generate(
    model: Any,
    input_ids: Any,
    name: str,
    compression_ratio: float,
    max_new_tokens: int,
    step: Step | None = None,
) -> dict[str, Any]:
    """Generate with one of the three caches and return its record."""
    from transformers import DynamicCache

    from ..analysis.generation import analyze_generation
    from ..cache.cache import RankKVCache

    if name == _FULL:
        cache: Any = DynamicCache(config=model.config)
    else:
        cache = RankKVCache(model, compression_ratio, strategy="uniform" if name == _UNIFORM else None)
    on_layer = step.advance if step is not None else lambda *_: None
    with watch_layers(model, on_layer) as stop_watching:
        record = analyze_generation(
            model, input_ids, cache, max_new_tokens, on_token=lambda _: stop_watching()
        )
    run = {"name": name, "config": None, "layer_indices": [], "total_budget": None, **record.to_dict()}
    if name != _FULL:
        run["config"] = cache.config.to_dict()
        run["layer_indices"] = cache.layer_indices
        run["total_budget"] = sum(record.budgets)
    return run


def _print_results(console: Console, runs: list[dict[str, Any]]) -> None:
    full, rankkv = runs[0], runs[-1]
    console.print("\nRank and budget of each layer under RankKV:\n")
    console.print(make_layer_table(rankkv["layer_indices"], rankkv["layer_ranks"], rankkv["budgets"]))
    console.print()
    console.print(_make_comparison_table(runs))
    console.print(
        f"\nRuns in this order, after a warm-up; uniform SnapKV and RankKV keep the same "
        f"{rankkv['total_budget']:,} prompt tokens over {len(rankkv['budgets'])} layers. "
        "One run each: small differences in time are noise.",
        soft_wrap=True,
    )
    if not full["has_fact"]:
        console.print(
            f"Warning: the full cache does not give the fact within {len(full['token_ids'])} tokens, "
            "so the answers of the compressed caches say nothing about compression.",
            soft_wrap=True,
        )


def _make_comparison_table(runs: list[dict[str, Any]]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("cache", no_wrap=True)
    for name in ("KV MB", "of full", "TTFT s", "TPOT ms"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("fact", no_wrap=True)
    table.add_column("answer")
    for run in runs:
        table.add_row(
            run["name"],
            f"{run['cache_bytes'] / 1e6:.1f}",
            f"{run['cache_bytes'] / run['full_cache_bytes']:.0%}",
            f"{run['ttft_seconds']:.2f}",
            f"{1e3 * run['tpot_seconds']:.0f}",
            "[green]yes[/]" if run["has_fact"] else "[red]no[/]",
            # The model's output may contain square brackets, which rich would read as markup.
            escape(" ".join(run["answer"].split())),
        )
    return table


def _draw_figures(runs: list[dict[str, Any]], model_name: str, folder: Path) -> list[Path]:
    from ..pipeline import RankKVResult
    from ..plots import plot_cache_comparison, plot_ranks_and_budgets, save_figure

    rankkv = runs[-1]
    result = RankKVResult(
        budgets=rankkv["budgets"],
        layer_ranks=rankkv["layer_ranks"],
        layer_indices=rankkv["layer_indices"],
        total_budget=rankkv["total_budget"],
        seq_len=rankkv["prompt_tokens"],
        compression_ratio=rankkv["total_budget"] / (rankkv["prompt_tokens"] * len(rankkv["budgets"])),
        strategy=rankkv["config"]["strategy"],
        scope=rankkv["config"]["scope"],
        aggregation=rankkv["config"]["aggregation"],
        model_name=model_name,
        strategy_options=rankkv["config"]["strategy_options"],
    )
    return [
        *save_figure(plot_ranks_and_budgets(result), folder / "demo_ranks_and_budgets"),
        *save_figure(plot_cache_comparison(runs), folder / "demo_cache_comparison"),
    ]
