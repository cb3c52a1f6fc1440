"""Ask the hub once before a loader starts: an unreachable hub is one sentence, not minutes of retries."""

from __future__ import annotations

import importlib.util
from typing import Literal

from rankkv.errors import InputError, MissingDependencyError, SourceUnavailableError

PROBE_TIMEOUT_SECONDS = 10.0


def require(package: str, command: str, purpose: str) -> None:
    """Raise the error that carries the install command where ``package`` is missing.

    Parameters
    ----------
    package : str
        Import name; it is looked up, not imported.
    command : str
        The one command that installs it.
    purpose : str
        What needs it; begins the message.

    Raises
    ------
    MissingDependencyError
        If the package is not installed.

    Examples
    --------
    >>> require("json", "pip install json", "reading JSON")
    """
    if importlib.util.find_spec(package) is None:
        raise MissingDependencyError(f"{purpose} needs the package {package!r}; install it with: {command}")


def is_hub_reachable(name: str, kind: Literal["model", "dataset"]) -> bool:
    """Say whether the hub answers for ``name``; one request, no retry, at most ten seconds.

    Parameters
    ----------
    name : str
        Hub id, "organisation/name".
    kind : {"model", "dataset"}
        What the id names.

    Returns
    -------
    bool
        True where the hub has ``name``; False where no answer came, so that only its local cache can serve.

    Raises
    ------
    InputError
        If ``name`` cannot be a hub id.
    SourceUnavailableError
        If the hub answers that it has no such repository for this user.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    ask = HfApi().model_info if kind == "model" else HfApi().dataset_info
    try:
        ask(name, timeout=PROBE_TIMEOUT_SECONDS)
    except HFValidationError as error:
        raise InputError(
            f"{name!r} is neither a path that exists nor a hub id of the form 'organisation/name'."
        ) from error
    except RepositoryNotFoundError as error:
        raise SourceUnavailableError(
            f"the hub has no {kind} {name!r} that this user may read: check the spelling, "
            "or log in with `hf auth login`."
        ) from error
    except Exception:
        # What a failed connection raises depends on the client's HTTP library, which has changed before.
        return False
    return True
