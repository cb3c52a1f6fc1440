"""Errors of requests, and their JSON bodies in the form of the OpenAI API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import (
    BudgetError,
    CacheStateError,
    ConfigError,
    InputError,
    OutputError,
    RankKVError,
    UnknownNameError,
    UnsupportedModelError,
)

#: The error that a client closed the connection; no one reads it.
CLIENT_LEFT = 499

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
}


class RequestError(InputError):
    """A request that is refused, with its HTTP status.

    Parameters
    ----------
    message : str
        One sentence: value, bound, remedy.
    status : int, default 400
        HTTP status.
    code : str, optional
        Short name of the error, for programs.
    param : str, optional
        Field of the body that is wrong.
    headers : mapping, optional
        Headers of the response, such as ``Retry-After``.

    Examples
    --------
    >>> RequestError("no", 404, "unknown_context").body()["error"]["code"]
    'unknown_context'
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Return the JSON body."""
        return build_body(str(self), self.status, self.code, self.param)


def build_body(
    message: str, status: int, code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    """Build the JSON body of an error, in the form of the OpenAI API."""
    default = "server_error" if status >= 500 else "invalid_request_error"
    kind = _TYPES.get(status, default)
    return {"error": {"message": message, "type": kind, "param": param, "code": code or kind}}


def find_request_error(error: Exception) -> RequestError | None:
    """Return the refusal that an error of the library means to a client; None for a fault of the server."""
    if isinstance(error, RequestError):
        return error
    text = " ".join(str(error).split())
    if isinstance(error, OutputError):
        return RequestError(f"the context cannot be stored: {text}", 507, "storage_error")
    if isinstance(error, ConfigError | UnknownNameError | BudgetError | InputError):
        return RequestError(text)
    if isinstance(error, CacheStateError | UnsupportedModelError):
        return RequestError(text, 422, "unsupported")
    return RequestError(text, 500) if isinstance(error, RankKVError) else None
