"""Ask the hub once before a loader starts: an unreachable hub is one sentence, not minutes of retries."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Any, Literal

from rankkv.errors import InputError, MissingDependencyError, RankKVError, SourceUnavailableError

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


def is_hub_reachable(name: str, kind: Literal["model", "dataset"], token: str | bool | None = None) -> bool:
    """Say whether the hub answers for ``name``; one request, no retry, at most ten seconds.

    Parameters
    ----------
    name : str
        Hub id, "organisation/name".
    kind : {"model", "dataset"}
        What the id names.
    token : str or bool, optional
        The user's, where it is not the one that is logged in.

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
        # What a failed connection raises depends on the client's HTTP library, which has changed before.
        return False
    return True


def push_file(repo_id: str, name: str, content: bytes, private: bool | None = None, **options: Any) -> str:
    """Upload one file to a model repository, which is made if there is none, and return the commit's address.

    Parameters
    ----------
    repo_id : str
        "organisation/name".
    name : str
        Path in the repository.
    content : bytes
        What stands in the file.
    private : bool, optional
        For a repository that is made.
    **options
        Of ``huggingface_hub.HfApi.upload_file``, such as ``token``, ``revision`` or ``create_pr``.

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
        is_there = None
    if is_there is False:
        raise SourceUnavailableError(
            f"the hub cannot be reached to push {name} to {repo_id!r}: save() keeps it in a file."
        )
    api = HfApi(token=token)
    with _told_in_a_sentence(f"push {name} to {repo_id!r}", f"{name} was pushed to {repo_id!r}"):
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
        Of ``huggingface_hub.hf_hub_download``, such as ``token`` or ``revision``.

    Raises
    ------
    InputError
        If ``repo_id`` cannot be a hub id.
    SourceUnavailableError
        If the hub cannot be reached and the file was not downloaded before, or there is no such file or repository.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    reachable = is_hub_reachable(repo_id, "model", options.get("token"))
    offline = {} if reachable else {"local_files_only": True}
    with _told_in_a_sentence(f"pull {name} from {repo_id!r}", f"{name} was pulled from {repo_id!r}"):
        try:
            return str(hf_hub_download(repo_id, name, **options, **offline))
        except LocalEntryNotFoundError as error:
            raise SourceUnavailableError(
                f"the hub cannot be reached to pull {name} from {repo_id!r}, and it was not downloaded before."
            ) from error
        except EntryNotFoundError as error:
            raise SourceUnavailableError(
                f"{repo_id!r} holds no {name}: push one, or check the revision."
            ) from error


@contextlib.contextmanager
def _told_in_a_sentence(purpose: str, doing: str) -> Iterator[None]:
    """Turn what the hub refuses, and a connection that breaks off, into one sentence."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except HfHubHTTPError as error:
        raise SourceUnavailableError(_explain(error, purpose)) from error
    except (RankKVError, TypeError, ValueError):
        raise
    except Exception as error:
        # What a broken connection raises depends on the client's HTTP library too.
        raise SourceUnavailableError(
            f"the connection to the hub broke off while {doing}: try again."
        ) from error


def _explain(error: Any, purpose: str) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    reason = getattr(error, "server_message", None) or str(error).splitlines()[0]
    remedy = " Log in with `hf auth login`, or give a token that may do it." if status in (401, 403) else ""
    return f"the hub refused to {purpose} (status {status}: {reason.rstrip('.')}).{remedy}"
