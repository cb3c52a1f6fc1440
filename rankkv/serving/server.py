"""Running the server: load the model, listen, and stop without a loose end."""

from __future__ import annotations

import logging
import math
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from transformers.utils import logging as transformers_logging

from ..models.loading import load_model
from .app import Service, build_app
from .settings import ServeSettings

log = logging.getLogger("rankkv.serving")


class Server(uvicorn.Server):
    """uvicorn's server, which says when it listens and takes a stop signal as a clean end.

    Parameters
    ----------
    config : uvicorn.Config
        What to serve.
    on_ready : callable
        Called with the port once the server listens.
    on_stop : callable
        Called on the event loop when the server begins to stop.
    """

    def __init__(
        self, config: uvicorn.Config, on_ready: Callable[[int], None], on_stop: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._on_ready, self._on_stop = on_ready, on_stop

    async def startup(self, sockets: Any = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        if self.started:
            self._on_ready(self.servers[0].sockets[0].getsockname()[1])

    async def shutdown(self, sockets: Any = None) -> None:
        """Refuse what waits, and give what runs its time."""
        self._on_stop()
        await super().shutdown(sockets)


def serve(
    settings: ServeSettings,
    dtype: str | None = None,
    device_map: str | None = None,
    on_ready: Callable[[int], None] = lambda port: None,
) -> None:
    """Load the model and serve it until a stop signal comes.

    Parameters
    ----------
    settings : ServeSettings
        Options of the server.
    dtype, device_map : str, optional
        As for :func:`~rankkv.load_model`.
    on_ready : callable
        Called with the port once the server listens.

    Raises
    ------
    RankKVError
        If the model cannot be loaded or served.
    """
    # transformers writes a line for each request, and warns of options that clients may give.
    transformers_logging.set_verbosity_error()
    model, tokenizer = load_model(settings.model, dtype, device_map)
    service = Service(settings, model, tokenizer)
    server = build_server(service, on_ready)
    before = None
    if threading.current_thread() is threading.main_thread():
        # uvicorn raises the signal again after its own end; by then everything is closed.
        before = signal.signal(signal.SIGTERM, _ignore)
    try:
        server.run()
    except KeyboardInterrupt:
        log.info("stopped")
    finally:
        service.close()
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def build_server(service: Service, on_ready: Callable[[int], None] = lambda port: None) -> Server:
    """Build the server of a service; its ``run()`` blocks until a stop signal comes."""
    settings = service.settings
    config = uvicorn.Config(
        build_app(service),
        host=settings.host,
        port=settings.port,
        log_config=None,
        # The guard writes one line for each request.
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=math.ceil(settings.grace_seconds),
    )
    return Server(config, on_ready, service.turns.close)


def _ignore(number: int, frame: FrameType | None) -> None:
    log.info("stopped by signal %d", number)
