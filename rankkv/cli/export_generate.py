"""`rankkv export-generate`: a folder for `model.generate(custom_generate=...)`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .common import parse_options, reports_errors
from .display import make_console
from .options import AverageBudget, SelectorOptions, StrategyOptions


@reports_errors
def export_generate(
    folder: Annotated[Path, typer.Argument(help="Folder to write; files of the same names are replaced.")],
    compression_ratio: Annotated[
        float | None, typer.Option(help="Fraction of the KV cache kept, in (0, 1].", show_default="0.3")
    ] = None,
    budget: AverageBudget = None,
    selector: Annotated[
        str | None, typer.Option(help="Token selection method.", show_default="snapkv")
    ] = None,
    selector_option: SelectorOptions = None,
    strategy: Annotated[
        str | None,
        typer.Option(help="Budget strategy.", show_default="distortion; blend if the model has a profile"),
    ] = None,
    strategy_option: StrategyOptions = None,
    option: Annotated[
        list[str] | None, typer.Option(help="Any other option of RankKVConfig, name=value; may be repeated.")
    ] = None,
) -> None:
    """Write a folder for model.generate(custom_generate=FOLDER, trust_remote_code=True)."""
    selector_options = parse_options(selector_option, "--selector-option")
    given: dict[str, Any] = {
        **parse_options(option, "--option"),
        "compression_ratio": compression_ratio,
        "budget": budget,
        "selector": selector,
        "strategy": strategy,
        "strategy_options": parse_options(strategy_option, "--strategy-option") or None,
    }
    from ..integrations.generate import export_generate as export
    from ..selection import get_selector

    if selector_options:
        given["selector"] = get_selector(selector or "snapkv", **selector_options)
    export(folder, **{name: value for name, value in given.items() if value is not None})
    make_console().print(
        f"Written: {folder}. Use it with model.generate(..., custom_generate={str(folder)!r}, trust_remote_code=True).",
        markup=False,
        soft_wrap=True,
    )
