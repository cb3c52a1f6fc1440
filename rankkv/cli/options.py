"""Options that several subcommands share, as annotations of their parameters."""

from __future__ import annotations

from typing import Annotated

import typer

ModelName = Annotated[str, typer.Option(help="Hub id, local folder, GGUF file, or embedded.")]
DtypeName = Annotated[
    str | None,
    typer.Option(help="Data type of the weights, such as bfloat16.", show_default="the checkpoint's own"),
]
DeviceMap = Annotated[
    str | None, typer.Option(help="Device of the model, such as auto or cuda; needs accelerate.")
]
KeptFraction = Annotated[float, typer.Option(help="Fraction of the KV cache kept, in (0, 1].")]
KeptFractionOrNone = Annotated[
    float | None,
    typer.Option(help="Fraction of the KV cache kept, in (0, 1].", show_default="0.3; 1 with --max-loss"),
]
AverageBudget = Annotated[
    int | None, typer.Option(help="Tokens kept per layer on average; overrides --compression-ratio.")
]
MaxLoss = Annotated[
    float | None,
    typer.Option(
        help="Loss to stay below, in nats per token: the smallest such cache is kept. --compression-ratio and --budget "
        "are upper bounds then.",
        show_default="keep --compression-ratio",
    ),
]
StrategyOptions = Annotated[
    list[str] | None, typer.Option(help="Option of the strategy, name=value; may be repeated.")
]
SelectorOptions = Annotated[
    list[str] | None, typer.Option(help="Option of the selector, name=value; may be repeated.")
]
RankedAttention = Annotated[
    str, typer.Option(help="Attention whose rank is measured: evictable, window or full.")
]
