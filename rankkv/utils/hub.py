"""Access to the Hugging Face hub, and checks for optional packages, with one-sentence errors."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from ..errors import InputError, MissingDependencyError, RankKVError, SourceUnavailableError

PROBE_TIMEOUT_SECONDS = 10.0


def require(package: str, command: str, purpose: str) -> None:
    """Raise an error with the install command if ``package`` is not installed.

    Parameters
    ----------
    package : str
        Import name; it is looked up, not imported.
    command : str
        The one command that installs it.
    purpose : str
        The feature that needs it; begins the message.

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


def looks_like_path(name: str) -> bool:
    """Tell whether a model's name is a path: it begins with ``.``, ``/`` or ``~``, or ends in ``.gguf``, or exists.

    Examples
    --------
    >>> looks_like_path("./model"), looks_like_path("organisation/name")
    (True, False)
    """
    return name.startswith((".", "/", "~")) or name.lower().endswith(".gguf") or Path(name).exists()


def check_model_name(name: str) -> None:
    """Raise if a model's name is empty, or is a path where nothing is.

    Raises
    ------
    InputError
        If it is empty.
    SourceUnavailableError
        If nothing is at the path.
    """
    if not name.strip():
        raise InputError("the model's name is empty: give a hub id, a folder, a GGUF file or 'embedded'.")
    if looks_like_path(name) and not Path(name).expanduser().exists():
        raise SourceUnavailableError(
            f"no model at {name!r}: there is no such file or folder; check the path."
        )


def is_hub_reachable(name: str, kind: Literal["model", "dataset"], token: str | bool | None = None) -> bool:
    """Tell whether the hub answers for ``name``: one request, no retry, at most ten seconds.

    Call it before a loader, which would retry for minutes if the hub is unreachable.

    Parameters
    ----------
    name : str
        Hub id, "organisation/name".
    kind : {"model", "dataset"}
        Kind of repository.
    token : str or bool, optional
        Access token; None uses the logged-in user's.

    Returns
    -------
    bool
        True if the hub has ``name``. False if no answer came; then only the local cache can be used.

    Raises
    ------
    InputError
        If ``name`` cannot be a hub id.
    SourceUnavailableError
        If the hub answers that this user has no such repository.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    ask = HfApi(token=token).model_info if kind == "model" else HfApi(token=token).dataset_info
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
        # The type of a connection error depends on the client's HTTP library, which has changed before.
        return False
    return True


def push_file(repo_id: str, name: str, content: bytes, private: bool | None = None, **options: Any) -> str:
    """Upload one file to a model repository, creating it if needed, and return the commit's URL.

    Parameters
    ----------
    repo_id : str
        "organisation/name".
    name : str
        Path in the repository.
    content : bytes
        Content of the file.
    private : bool, optional
        Visibility of a repository that is created.
    **options
        Options of ``huggingface_hub.HfApi.upload_file``, such as ``token``, ``revision`` or ``create_pr``.

    Raises
    ------
    InputError
        If ``repo_id`` cannot be a hub id.
    SourceUnavailableError
        If the hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi

    token = options.pop("token", None)
    try:
        is_there = is_hub_reachable(repo_id, "model", token)
    except SourceUnavailableError:
        # The hub answers, but the repository does not exist yet.
        is_there = None
    if is_there is False:
        raise SourceUnavailableError(
            f"the hub cannot be reached to push {name} to {repo_id!r}; use save() to keep it in a file."
        )
    api = HfApi(token=token)
    with _shorten_errors(f"push {name} to {repo_id!r}", f"{name} was pushed to {repo_id!r}"):
        if is_there is None:
            api.create_repo(repo_id, private=private, exist_ok=True)
        done = api.upload_file(path_or_fileobj=content, path_in_repo=name, repo_id=repo_id, **options)
    return str(done.commit_url)


def pull_file(repo_id: str, name: str, **options: Any) -> str:
    """Download one file of a model repository, or find it in the local cache, and return its path.

    Parameters
    ----------
    repo_id : str
        "organisation/name".
    name : str
        Path in the repository.
    **options
        Options of ``huggingface_hub.hf_hub_download``, such as ``token`` or ``revision``.

    Raises
    ------
    InputError
        If ``repo_id`` cannot be a hub id.
    SourceUnavailableError
        If the file or repository does not exist, or the hub cannot be reached and the file is not in the local cache.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    reachable = is_hub_reachable(repo_id, "model", options.get("token"))
    offline = {} if reachable else {"local_files_only": True}
    with _shorten_errors(f"pull {name} from {repo_id!r}", f"{name} was pulled from {repo_id!r}"):
        try:
            return str(hf_hub_download(repo_id, name, **options, **offline))
        except LocalEntryNotFoundError as error:
            raise SourceUnavailableError(
                f"the hub cannot be reached to pull {name} from {repo_id!r}, which is not in the local cache."
            ) from error
        except EntryNotFoundError as error:
            raise SourceUnavailableError(
                f"{repo_id!r} has no file {name}: push one, or check the revision."
            ) from error


@contextlib.contextmanager
def _shorten_errors(purpose: str, doing: str) -> Iterator[None]:
    """Turn a refusal of the hub or a broken connection into a SourceUnavailableError of one sentence."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except HfHubHTTPError as error:
        raise SourceUnavailableError(_describe_refusal(error, purpose)) from error
    except (RankKVError, TypeError, ValueError):
        raise
    except Exception as error:
        # The type of this error depends on the client's HTTP library too.
        raise SourceUnavailableError(
            f"the connection to the hub broke off while {doing}: try again."
        ) from error


def _describe_refusal(error: Any, purpose: str) -> str:
    """Describe a refusal: status, reason, and for a missing permission the remedy."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    reason = getattr(error, "server_message", None) or str(error).splitlines()[0]
    remedy = " Log in with `hf auth login`, or pass a token that allows it." if status in (401, 403) else ""
    return f"the hub refused to {purpose} (status {status}: {reason.rstrip('.')}).{remedy}"
