"""The outermost layer of the server: keys, hosts, sizes, request ids, and one line of log for each request."""

from __future__ import annotations

import hmac
import logging
import re
import time
import traceback
import uuid
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .contexts import compute_namespace
from .errors import RequestError
from .metrics import Metrics
from .settings import ServeSettings

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_LOCAL_HOST = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:\d+)?")
#: Routes that ask for no key: whoever watches the server has none, and the page asks its user for it.
_OPEN = {"/health", "/"}
_ROUTES = re.compile(
    r"/(health|metrics|load_model|v1/(models|contexts|chat/completions|completions|responses))(?=/|$)"
)

log = logging.getLogger("rankkv.serving")


class Guard:
    """Refuse a request before its body is read, if its key, host or size is wrong.

    Parameters
    ----------
    app : ASGI application
        The application behind.
    settings : ServeSettings
        Keys and limits.
    metrics : Metrics
        Counter of requests.
    """

    def __init__(self, app: ASGIApp, settings: ServeSettings, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics
        self._keys = {key.encode(): compute_namespace(key) for key in settings.api_keys}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        status, start = 499, time.perf_counter()

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        scope["rankkv.id"] = request_id
        try:
            scope["rankkv.key"] = self._admit(scope, headers)
        except RequestError as error:
            response = JSONResponse(error.body(), error.status, headers=error.headers)
            await response(scope, receive, answer)
        else:
            try:
                await self._app(scope, receive, answer)
            except Exception as error:
                # The reply is sent. The message of the error may quote a prompt, so only the places are logged.
                places = "".join(traceback.format_tb(error.__traceback__))
                log.error("%s failed: %s\n%s", request_id, type(error).__name__, places)
        finally:
            found = _ROUTES.match(scope["path"])
            route = found[0] if found else "/" if scope["path"] == "/" else "other"
            self._metrics.note_request(route, status)
            seconds = time.perf_counter() - start
            log.info("%s %s %s %d %.3fs", request_id, scope["method"], route, status, seconds)

    def _admit(self, scope: Scope, headers: dict[bytes, bytes]) -> str:
        """Return the namespace of a request.

        Raises
        ------
        RequestError
            If it may not enter.
        """
        host = headers.get(b"host", b"").decode("latin-1")
        # A web page whose name points to this machine must not reach a server without a key.
        if not self._keys and not _LOCAL_HOST.fullmatch(host):
            raise RequestError(
                f"the host {host[:80]!r} is not this machine: ask http://127.0.0.1, or start the server with "
                "--api-key.",
                403,
                "wrong_host",
            )
        namespace = compute_namespace(None)
        if self._keys and scope["path"] not in _OPEN:
            namespace = self._find_namespace(headers)
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._settings.max_body:
            raise too_large(self._settings.max_body)
        return namespace

    def _find_namespace(self, headers: dict[bytes, bytes]) -> str:
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        found = None
        # Every key is compared, so that the time tells nothing.
        for key, namespace in self._keys.items():
            if hmac.compare_digest(key, given.strip()) and scheme.lower() == b"bearer":
                found = namespace
        if found is None:
            raise RequestError(
                "the API key is missing or wrong: send the header 'Authorization: Bearer KEY' with a key of this "
                "server.",
                401,
                "invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return found


def too_large(limit: int) -> RequestError:
    """Return the refusal of a body above the limit."""
    return RequestError(
        f"the body has more than {limit} bytes, the most that this server reads: send less, or start it with a larger "
        "--max-body.",
        413,
        "body_too_large",
    )


def get_key(request: Any) -> str:
    """Return the namespace that the guard found for a request."""
    return str(request.scope["rankkv.key"])
