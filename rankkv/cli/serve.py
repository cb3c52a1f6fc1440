"""`rankkv serve`: an OpenAI-compatible server whose contexts are compressed once and asked many times."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Annotated

import typer

from .checks import check_cache_options, check_model
from .common import reports_errors
from .display import make_console
from .options import DeviceMap, DtypeName

_LEVELS = ("debug", "info", "warning", "error")
KEYS_VARIABLE = "RANKKV_API_KEYS"


@reports_errors
def serve(
    model: Annotated[str, typer.Argument(help="Hub id, local folder, GGUF file, or embedded.")],
    host: Annotated[
        str, typer.Option(help="Address to listen on; another than loopback needs a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8000,
    compression_ratio: Annotated[
        float, typer.Option(help="Fraction of a new context's KV cache kept, in (0, 1].")
    ] = 0.3,
    max_loss: Annotated[
        float | None,
        typer.Option(
            help="Loss of a new context to stay below, in nats per token, instead of --compression-ratio.",
            show_default="keep --compression-ratio",
        ),
    ] = None,
    selector: Annotated[str, typer.Option(help="Token selection method of new contexts.")] = "auto",
    cache_memory: Annotated[str, typer.Option(help="Memory for contexts; others wait on disk.")] = "2GB",
    cache_dir: Annotated[
        Path | None,
        typer.Option(help="Folder of stored contexts.", show_default="a folder of RankKV's cache"),
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Key that clients send; may be repeated, each key has its own contexts. Or ${KEYS_VARIABLE}, "
            "separated by commas, which other users of the machine cannot see.",
            show_default=False,
        ),
    ] = None,
    max_batch: Annotated[int, typer.Option(help="Answers that decode together, at most.")] = 16,
    max_queue: Annotated[int, typer.Option(help="Requests that wait for each key, at most.")] = 32,
    max_body: Annotated[str, typer.Option(help="Size of a request, at most.")] = "4MiB",
    max_answer_tokens: Annotated[int, typer.Option(help="Tokens of an answer, at most.")] = 4096,
    max_context_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens of prompt and answer together, at most.", show_default="what the model has"
        ),
    ] = None,
    max_contexts: Annotated[int, typer.Option(help="Stored contexts of each key, at most.")] = 1000,
    grace_seconds: Annotated[
        float, typer.Option(help="Time for running answers after a stop signal.")
    ] = 10.0,
    dtype: DtypeName = None,
    device_map: DeviceMap = None,
    log_level: Annotated[
        str, typer.Option(help="debug, info, warning or error; no level logs prompts.")
    ] = "info",
) -> None:
    """Serve a model over the OpenAI API: contexts are compressed once, stored, and asked by many."""
    from ..errors import UnknownNameError
    from ..serving.settings import ServeSettings, check_address, check_requirements, parse_bytes

    if log_level not in _LEVELS:
        raise UnknownNameError.of("log level", log_level, _LEVELS)
    keys = [*(api_key or []), *(key for key in os.environ.get(KEYS_VARIABLE, "").split(",") if key.strip())]
    settings = ServeSettings(
        model=model,
        host=host,
        port=port,
        compression_ratio=compression_ratio,
        max_loss=max_loss,
        selector=selector,
        cache_memory=parse_bytes(cache_memory, "--cache-memory"),
        cache_dir=None if cache_dir is None else cache_dir.expanduser(),
        api_keys=tuple(key.strip() for key in keys),
        max_batch=max_batch,
        max_queue=max_queue,
        max_body=parse_bytes(max_body, "--max-body"),
        max_answer_tokens=max_answer_tokens,
        max_context_tokens=max_context_tokens,
        max_contexts=max_contexts,
        grace_seconds=grace_seconds,
    )
    if selector != "auto":
        check_cache_options(selector, compression_ratio=compression_ratio, max_loss=max_loss)
    check_model(model, dtype, device_map)
    check_requirements()
    check_address(host, port)
    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s")
    # Libraries log every request of their own, some with its text.
    for name in ("httpx", "httpcore", "openai", "uvicorn", "asyncio", "filelock"):
        logging.getLogger(name).setLevel(logging.WARNING)
    console = make_console()
    console.print(f"Loading {model} ...", markup=False, soft_wrap=True)

    from ..serving.server import serve as run

    def say_ready(found: int) -> None:
        shown = f"[{host}]" if ":" in host else host
        console.print(
            f"Serving {model} at http://{shown}:{found}/v1 (Ctrl-C stops).", markup=False, soft_wrap=True
        )

    run(settings, dtype, device_map, say_ready)
