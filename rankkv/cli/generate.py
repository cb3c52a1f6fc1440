"""`rankkv generate`: an answer from a compressed cache, with what it cost."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from .common import (
    build_question_prompt,
    check_at_least_one,
    collect_versions,
    get_context_length,
    parse_options,
    print_json,
    read_prompt,
    reports_errors,
)
from .display import AnswerStream, make_console, show_step, watch_layers
from .explain import print_kept_tokens


@reports_errors
def generate(
    model: Annotated[str, typer.Option(help="Hub id, local folder, GGUF file, or embedded.")] = "embedded",
    prompt: Annotated[
        str | None, typer.Option(help="The prompt, or the document that --question is about.")
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A UTF-8 text file with it.")] = None,
    question: Annotated[
        str | None, typer.Option(help="Asked after the document, through the chat template if there is one.")
    ] = None,
    compression_ratio: Annotated[float, typer.Option(help="Fraction of the KV cache kept, in (0, 1].")] = 0.3,
    budget: Annotated[
        int | None, typer.Option(help="Average tokens a layer keeps; overrides --compression-ratio.")
    ] = None,
    selector: Annotated[str, typer.Option(help="Token selection method.")] = "snapkv",
    selector_option: Annotated[
        list[str] | None, typer.Option(help="Option of the selector, name=value; may be repeated.")
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(help="Budget strategy.", show_default="distortion, with a known profile blend"),
    ] = None,
    strategy_option: Annotated[
        list[str] | None, typer.Option(help="Option of the strategy, name=value; may be repeated.")
    ] = None,
    scope: Annotated[str, typer.Option(help="Attention ranked: evictable, window or full.")] = "evictable",
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 64,
    dtype: Annotated[
        str | None,
        typer.Option(help="Weights' dtype, such as bfloat16.", show_default="the checkpoint's own"),
    ] = None,
    device_map: Annotated[
        str | None, typer.Option(help="Where the model goes, such as auto or cuda; needs accelerate.")
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show which parts of the prompt were kept for this answer.")
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print answer and measurements as JSON to stdout.")
    ] = False,
) -> None:
    """Generate from a compressed KV cache: the answer to stdout, what it cost to stderr."""
    console = make_console()
    check_at_least_one("--max-new-tokens", max_new_tokens)
    check_at_least_one("--budget", budget)
    text = read_prompt(prompt, prompt_file)
    selector_options = parse_options(selector_option, "--selector-option")
    strategy_options = parse_options(strategy_option, "--strategy-option")

    with show_step(console, f"Loading {model}"):
        from ..budget.plan import BudgetPlan
        from ..cache.cache import RankKVCache
        from ..cache.prefill import analyze_generation
        from ..config import RankKVConfig
        from ..models.loading import load_model
        from ..models.placement import find_input_device
        from ..selection import get_selector

        # Checked here, so that a misspelt name does not wait for the model.
        config = RankKVConfig(
            compression_ratio,
            budget=budget,
            selector=get_selector(selector, **selector_options),
            strategy=strategy,
            scope=scope,
            strategy_options=strategy_options,
        )
        BudgetPlan.check(config)
        language_model, tokenizer = load_model(model, dtype, device_map)

    input_ids = build_question_prompt(tokenizer, text, question).to(find_input_device(language_model))
    context = get_context_length(language_model)
    if context is not None and input_ids.shape[1] + max_new_tokens > context:
        console.print(
            f"Note: prompt and answer may reach {input_ids.shape[1] + max_new_tokens:,} tokens, "
            f"more than the {context:,} the model was made for.",
            soft_wrap=True,
        )
    cache = RankKVCache(language_model, config=config)
    step_name = f"Prefilling {input_ids.shape[1]:,} tokens"
    with show_step(console, step_name) as step, watch_layers(language_model, step.advance) as stop_watching:

        def write(piece: str) -> None:
            if not json:
                sys.stdout.write(piece)
                sys.stdout.flush()

        stream = AnswerStream(tokenizer, write)

        def on_token(token_id: int) -> None:
            stop_watching()
            step.finish()
            stream.put(token_id)

        record = analyze_generation(language_model, input_ids, cache, max_new_tokens, on_token=on_token)
        answer = stream.end()
    kept, pieces = None, []
    if explain and not cache.layer_indices:
        console.print("Nothing to explain: no layer of this model is compressed.")
    elif explain:
        from ..cache.kept_tokens import analyze_kept_tokens
        from ..token_pieces import split_pieces

        kept, pieces = analyze_kept_tokens(cache), split_pieces(tokenizer, input_ids[0].tolist())
    if json:
        explained = {} if kept is None else {"kept_tokens": {"pieces": pieces, **kept.to_dict()}}
        print_json(
            {
                "answer": answer,
                "model": model,
                "question": question,
                "config": config.to_dict(),
                "layer_indices": cache.layer_indices,
                **record.to_dict(),
                **explained,
                "versions": collect_versions(),
            }
        )
        return
    sys.stdout.write("\n")
    sys.stdout.flush()
    tpot = f", {1e3 * record.tpot_seconds:.0f} ms per token after it" if record.tpot_seconds else ""
    console.print(
        f"\n{record.prompt_tokens:,} prompt tokens, {len(record.token_ids)} generated; KV cache "
        f"{record.cache_bytes / 1e6:.2f} of {record.full_cache_bytes / 1e6:.2f} MB "
        f"({record.cache_bytes / record.full_cache_bytes:.1%}); "
        f"{record.ttft_seconds:.2f} s to the first token{tpot}",
        markup=False,
        soft_wrap=True,
    )
    if kept is not None:
        print_kept_tokens(console, pieces, kept)
