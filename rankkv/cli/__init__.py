"""The command `rankkv`: one module per subcommand; torch and transformers load inside the commands."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from .._version import __version__

if TYPE_CHECKING:
    from .application import app

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line and exit: code 0, 2 for bad input, 130 if interrupted."""
    # Scripts ask for the version: answer before the imports of the command line.
    if sys.argv[1:] == ["--version"]:
        print(f"rankkv {__version__}")
        return
    from .application import app

    app(prog_name="rankkv")


def __getattr__(name: str) -> Any:
    """Import the application on first use."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .application import app

    return app
