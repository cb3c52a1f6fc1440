"""Settings of the server, and the checks that need neither torch nor a web framework."""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..config import AUTO_SELECTOR, RankKVConfig
from ..errors import ConfigError, MissingDependencyError
from ..utils.files import find_cache_folder
from ..utils.hub import require

#: Versions of transformers whose serving code the tests of this package pin, as "major.minor".
TESTED_TRANSFORMERS = ("5.24",)
#: Packages of the extra `serve`, by import name.
PACKAGES = ("fastapi", "starlette", "uvicorn", "openai", "prometheus_client")

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")
# Fewer characters are guessed in minutes.
_SHORTEST_KEY = 8


@dataclass(frozen=True)
class ServeSettings:
    """Hold the options of one server; wrong ones are refused when it is built.

    Parameters
    ----------
    model : str
        Name of the model as in :func:`~rankkv.load_model`; clients use the same name.
    host, port : str, int
        Address to listen on.  Port 0 takes a free one.
    compression_ratio, selector : float, str
        Defaults of a new context.
    max_loss : float, optional
        Loss that a new context stays below, instead of the ratio.
    cache_memory : int
        Bytes of compressed contexts held in memory.
    cache_dir : Path, optional
        Folder of stored contexts; None is a folder of RankKV's cache folder.
    api_keys : tuple of str
        Accepted keys.  Each key has contexts of its own.
    max_batch : int
        Most answers that decode together.
    max_queue : int
        Most requests that wait, for each key.
    max_body : int
        Largest request body in bytes.
    max_answer_tokens : int
        Most tokens of an answer.
    max_context_tokens : int, optional
        Most tokens of prompt and answer together; None is what the model was made for.
    max_contexts : int
        Most stored contexts for each key.
    grace_seconds : float
        Time that running answers get after a stop signal.

    Raises
    ------
    ConfigError
        If an option is outside its range, or the address is public and there is no key.

    Examples
    --------
    >>> ServeSettings("embedded").port
    8000
    """

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    compression_ratio: float = 0.3
    max_loss: float | None = None
    selector: str = AUTO_SELECTOR
    cache_memory: int = 2 * 10**9
    cache_dir: Path | None = None
    api_keys: tuple[str, ...] = ()
    max_batch: int = 16
    max_queue: int = 32
    max_body: int = 4 * 2**20
    max_answer_tokens: int = 4096
    max_context_tokens: int | None = None
    max_contexts: int = 1000
    grace_seconds: float = 10.0

    def __post_init__(self) -> None:
        RankKVConfig(compression_ratio=self.compression_ratio, selector=self.selector, max_loss=self.max_loss)
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port {self.port} must be from 0 to 65535.")
        for name in (
            "max_batch",
            "max_queue",
            "max_body",
            "max_answer_tokens",
            "max_context_tokens",
            "max_contexts",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {value} must be at least 1.")
        if self.cache_memory < 0:
            raise ConfigError(
                f"--cache-memory {self.cache_memory} must not be negative: give for example 2GB."
            )
        if not 0 <= self.grace_seconds <= 3600:
            raise ConfigError(f"--grace-seconds {self.grace_seconds} must be from 0 to 3600.")
        for key in self.api_keys:
            if len(key) < _SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
                raise ConfigError(
                    f"an API key has {len(key)} characters; it must have at least {_SHORTEST_KEY}, all of them ASCII "
                    "without spaces: `openssl rand -hex 24` makes one."
                )
        if not self.is_loopback and not self.api_keys:
            raise ConfigError(
                f"--host {self.host!r} can be reached by others and there is no API key: give --api-key, or "
                "--host 127.0.0.1."
            )
        if self.cache_dir is not None and self.cache_dir.exists() and not self.cache_dir.is_dir():
            raise ConfigError(f"--cache-dir {str(self.cache_dir)!r} is a file: give a folder.")

    @property
    def is_loopback(self) -> bool:
        """True if only programs of this machine can reach the server."""
        return self.host in _LOOPBACK

    @property
    def folder(self) -> Path:
        """Folder of stored contexts."""
        return self.cache_dir or find_cache_folder() / "contexts"


def parse_bytes(text: str, flag: str) -> int:
    """Parse a size such as ``2GB``, ``512MiB`` or ``1000000`` (bytes).

    Parameters
    ----------
    text : str
        A number, and a unit or none.
    flag : str
        Command line flag, for the message.

    Raises
    ------
    ConfigError
        If it is not a size.

    Examples
    --------
    >>> parse_bytes("2GB", "--cache-memory"), parse_bytes("1.5KiB", "--cache-memory")
    (2000000000, 1536)
    """
    match = _SIZE.fullmatch(text.strip())
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise ConfigError(
            f"{flag} {text!r} is not a size: give a number with KB, MB, GB, KiB, MiB or GiB, like 2GB."
        )
    return int(float(match[1]) * unit)


def check_address(host: str, port: int) -> None:
    """Raise, before a model is loaded, if the server cannot listen there.

    Raises
    ------
    ConfigError
        If the port is taken, or the address is not one of this machine.
    """
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port} ({error.strerror or error}): give another --port or --host."
        ) from error


def check_requirements() -> None:
    """Raise if a package of the extra is missing, or transformers' serving code is untested.

    Raises
    ------
    MissingDependencyError
        With the one command that installs what is needed.
    """
    for package in PACKAGES:
        require(package, 'pip install "rankkv[serve]"', "rankkv serve")
    try:
        found = version("transformers")
    except PackageNotFoundError:
        found = "none"
    if not is_tested(found):
        wanted = " or ".join(TESTED_TRANSFORMERS)
        raise MissingDependencyError(
            f"rankkv serve builds on the serving code of transformers {wanted} and this is transformers {found}: "
            f"pip install 'transformers=={TESTED_TRANSFORMERS[-1]}.*'."
        )


def is_tested(found: str) -> bool:
    """Tell whether the serving code of a transformers version is pinned by tests.

    Examples
    --------
    >>> is_tested("5.24.0"), is_tested("5.2.4")
    (True, False)
    """
    return ".".join(found.split(".")[:2]) in TESTED_TRANSFORMERS
