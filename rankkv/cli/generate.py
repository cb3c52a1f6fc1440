"""`rankkv generate`: an answer from a compressed cache, its cost, and the tokens that the cache kept."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..config import DEFAULT_RATIO
from .checks import check_cache_options, check_model, parse_choice, parse_spans
from .common import (
    build_question_prompt,
    check_at_least_one,
    collect_versions,
    cut_text,
    parse_options,
    print_json,
    read_prompt,
    reports_errors,
)
from .display import AnswerStream, draw_bar, make_console, show_step, watch_layers
from .options import (
    AverageBudget,
    DeviceMap,
    DtypeName,
    KeptFractionOrNone,
    MaxLoss,
    ModelName,
    RankedAttention,
    SelectorOptions,
    StrategyOptions,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from ..cache.kept_tokens import KeptTokens

# Least share of the heads that keep a token, and its style. The terminal's own palette suits its background.
_STYLES = ((1.0, "bold reverse"), (0.75, "magenta"), (0.5, "yellow"), (0.25, "cyan"), (0.0, ""))
_EVICTED_STYLE = "bright_black"
_BAR_WIDTH, _MIN_WIDTH = 4, 40
_LEVELS = " ▁▂▃▄▅▆▇█"


@reports_errors
def generate(
    model: ModelName = "embedded",
    prompt: Annotated[str | None, typer.Option(help="Text of the prompt, or document of --question.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="UTF-8 text file, or .jsonl file with one text, instead of --prompt.")
    ] = None,
    question: Annotated[
        str | None, typer.Option(help="Question after the document, in the model's chat template if any.")
    ] = None,
    compression_ratio: KeptFractionOrNone = None,
    budget: AverageBudget = None,
    max_loss: MaxLoss = None,
    selector: Annotated[str, typer.Option(help="Token selection method.")] = "snapkv",
    selector_option: SelectorOptions = None,
    strategy: Annotated[
        str | None,
        typer.Option(help="Budget strategy.", show_default="distortion; blend if the model has a profile"),
    ] = None,
    strategy_option: StrategyOptions = None,
    scope: RankedAttention = "evictable",
    min_budget: Annotated[
        int | None,
        typer.Option(
            help="Tokens per layer, at least.", show_default="16, or half the average budget if that is more"
        ),
    ] = None,
    head_budgets: Annotated[
        str, typer.Option(help="Budgets of heads: auto, none, distortion, profile or adaptive.")
    ] = "auto",
    profile: Annotated[
        str, typer.Option(help="Measured sensitivity of the model: auto, none, or the path of a profile.")
    ] = "auto",
    protect: Annotated[
        list[str] | None, typer.Option(help="Tokens that every layer keeps, start:stop; may be repeated.")
    ] = None,
    decode: Annotated[
        str, typer.Option(help="Generated tokens: grow keeps all; bounded and periodic compress them too.")
    ] = "grow",
    storage: Annotated[
        str, typer.Option(help="Storage of kept tokens: full, int8 or offload (to CPU memory).")
    ] = "full",
    max_length: Annotated[
        int | None,
        typer.Option(
            help="Use at most this many tokens of the document, the first ones.", show_default="all"
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate, at most.")] = 64,
    dtype: DtypeName = None,
    device_map: DeviceMap = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show the parts of the prompt that the cache kept.")
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print answer and measurements as JSON to stdout.")
    ] = False,
) -> None:
    """Generate from a compressed KV cache: the answer on stdout, its cost on stderr."""
    console = make_console()
    check_at_least_one("--max-new-tokens", max_new_tokens)
    check_at_least_one("--budget", budget)
    check_at_least_one("--max-length", max_length)
    text = read_prompt(prompt, prompt_file)
    selector_options = parse_options(selector_option, "--selector-option")
    options = {
        "compression_ratio": DEFAULT_RATIO if compression_ratio is None else compression_ratio,
        "budget": budget,
        "max_loss": max_loss,
        "strategy": strategy,
        "scope": scope,
        "strategy_options": parse_options(strategy_option, "--strategy-option"),
        "min_budget": min_budget,
        "head_budgets": parse_choice(head_budgets),
        "profile": parse_choice(profile),
        "protect": parse_spans(protect),
        "decode": decode,
        "storage": storage,
    }
    check_cache_options(selector, selector_options, **options)
    check_model(model, dtype, device_map)

    with show_step(console, f"Loading {model}"):
        from ..analysis.generation import analyze_generation
        from ..cache.prefill import build_cache
        from ..cache.report import describe_loss
        from ..config import RankKVConfig
        from ..models.loading import load_model
        from ..models.placement import find_input_device
        from ..selection import get_selector

        config = RankKVConfig(selector=get_selector(selector, **selector_options), **options)
        language_model, tokenizer = load_model(model, dtype, device_map)

    if max_length is not None:
        text = cut_text(tokenizer, text, max_length)
    input_ids = build_question_prompt(tokenizer, text, question).to(find_input_device(language_model))
    from ..models.checkpoints import get_context_length

    context = get_context_length(language_model)
    if context is not None and input_ids.shape[1] + max_new_tokens > context:
        console.print(
            f"Note: prompt and answer may reach {input_ids.shape[1] + max_new_tokens:,} tokens, "
            f"more than the {context:,} the model was made for.",
            soft_wrap=True,
        )
    cache = build_cache(language_model, input_ids, tokenizer, config=config)
    step_name = f"Prefilling {input_ids.shape[1]:,} tokens"
    with show_step(console, step_name) as step, watch_layers(language_model, step.advance) as stop_watching:

        def write(text: str) -> None:
            if not json:
                sys.stdout.write(text)
                sys.stdout.flush()

        stream = AnswerStream(tokenizer, write)

        def on_token(token_id: int) -> None:
            stop_watching()
            step.finish()
            stream.put(token_id)

        record = analyze_generation(language_model, input_ids, cache, max_new_tokens, on_token=on_token)
        answer = stream.end()
    kept, token_texts = None, []
    if explain and not cache.layer_indices:
        console.print("Nothing to explain: no layer of this model is compressed.")
    elif explain:
        from ..cache.kept_tokens import analyze_kept_tokens, decode_each_token

        kept, token_texts = analyze_kept_tokens(cache), decode_each_token(tokenizer, input_ids[0].tolist())
    if json:
        explained = {} if kept is None else {"kept_tokens": {"pieces": token_texts, **kept.to_dict()}}
        print_json(
            {
                "answer": answer,
                "model": model,
                "question": question,
                "config": config.to_dict(),
                "layer_indices": cache.layer_indices,
                **record.to_dict(),
                "predicted_loss": cache.predicted_loss,
                "loss_bound": cache.loss_bounds[0] if cache.plans else None,
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
    for line in describe_loss(cache):
        console.print(line, markup=False, soft_wrap=True)
    if kept is not None:
        print_kept_tokens(console, token_texts, kept)


def print_kept_tokens(console: Console, token_texts: Sequence[str], kept: KeptTokens) -> None:
    """Print the prompt and the share of heads that keep each part of it.

    On a terminal the colour of a token shows its share.  Elsewhere only the mean share of each line is printed.

    Parameters
    ----------
    console : Console
        Console to print to.
    token_texts : sequence of str
        Text of each token.
    kept : KeptTokens
        Record of the same tokens.
    """
    from rich.text import Text

    shares = kept.compute_shares().tolist()
    fates = kept.count_fates()
    layers, heads = len(kept.layer_indices), sum(kept.kv_heads)
    console.print(
        f"\nKept of the {kept.tokens:,} prompt tokens: {fates['all']:,} by every head of every layer, "
        f"{fates['some']:,} by some, {fates['none']:,} by none ({layers} layers, {heads} heads; on average "
        f"{sum(shares) / len(shares):.1%} of the heads keep a token). The number before each line is its average.",
        soft_wrap=True,
    )
    width = max(_MIN_WIDTH, console.width)
    console.print(Text("beginning to end ") + Text(_draw_strip(shares, min(width - 18, 100)), style="cyan"))
    if console.is_terminal:
        console.print(_make_legend())
    gutter = _BAR_WIDTH + 6
    for line in _break_lines(token_texts, width - gutter):
        own = [shares[index] for index, _ in line]
        mean = sum(own) / len(own)
        # Never round to 0 % or 100 %: these mean that a line is evicted or kept entirely.
        shown = mean if mean in (0.0, 1.0) else min(max(mean, 0.01), 0.99)
        bar = f"{draw_bar(mean, 1.0, _BAR_WIDTH):<{_BAR_WIDTH}} "
        text = Text(f"{shown:4.0%} ") + Text(bar, style="cyan")
        for index, text_of_token in line:
            text.append(text_of_token, style=_choose_style(shares[index]))
        console.print(text, no_wrap=True, overflow="ignore", crop=False)


def _choose_style(share: float) -> str:
    return _EVICTED_STYLE if share == 0.0 else next(style for least, style in _STYLES if share >= least)


def _make_legend() -> Text:
    from rich.text import Text

    legend = Text("kept by ")
    names = [("no head", _EVICTED_STYLE)]
    names += [(f"{least:.0%} or more" if least else "fewer", style) for least, style in reversed(_STYLES[1:])]
    for name, style in [*names, ("all", _STYLES[0][1])]:
        legend.append(name, style=style).append("  ")
    return legend


def _draw_strip(shares: Sequence[float], width: int) -> str:
    """Draw the share kept from the prompt's beginning to its end, one character per stretch of tokens."""
    width = min(width, len(shares))
    bounds = [round(place * len(shares) / width) for place in range(width + 1)]
    means = [sum(shares[a:b]) / (b - a) for a, b in pairwise(bounds)]
    # Only an evicted stretch is blank: any other shows at least the lowest level.
    return "".join(_LEVELS[0 if mean == 0.0 else max(1, round(8 * mean))] for mean in means)


def _break_lines(token_texts: Sequence[str], width: int) -> Iterator[list[tuple[int, str]]]:
    """Yield lines of (token index, text), broken at newlines of the text and at the width."""
    from rich.cells import cell_len

    line: list[tuple[int, str]] = []
    used = 0
    for index, text_of_token in enumerate(token_texts):
        parts = text_of_token.expandtabs(4).split("\n")
        for number, part in enumerate(parts):
            if number and line:
                yield line
                line, used = [], 0
            # A document may contain control characters, which must not reach the terminal.
            text = "".join(sign if sign.isprintable() else "\ufffd" for sign in part)
            if line and used + cell_len(text) > width:
                yield line
                line, used = [], 0
                text = text.removeprefix(" ")
            # A newline token belongs to the line that it ends. Blank lines are left out.
            if text or (line and number == 0):
                line.append((index, text))
                used += cell_len(text)
    if line:
        yield line
