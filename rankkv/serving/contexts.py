"""The store of contexts: compressed caches in memory within a budget of bytes, and on disk for restarts."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import re
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from ..cache.cache import RankKVCache
from ..errors import ConfigError, InputError, OutputError, RankKVError
from ..models.fingerprint import compute_fingerprint
from ..utils.files import read_json, replace_atomically, shorten
from .errors import RequestError
from .tails import Tail

FORMAT = "rankkv-context-1"
#: Namespace of a server without keys.
PUBLIC = "public"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_FILE = re.compile(r"ctx_[0-9a-f]{32}")
_NAMESPACE = re.compile(r"public|[0-9a-f]{16}")
_DIGITS = 16
# Records are written by the server itself, from bodies that may be larger than the JSON files that others give.
_RECORD_LIMIT = 2**32

log = logging.getLogger("rankkv.serving")


@dataclass(eq=False)
class Context:
    """One context: the tokens that a cache has seen, and the cache itself while it is in memory.

    Attributes
    ----------
    id : str
        Name of its files; depends on key, model, tokens and options.
    key : str
        Namespace of the client's key.
    ids : ndarray
        ``[token]``: the tokens that the cache has seen.
    content : dict
        ``{"text": str}`` or ``{"messages": list}``; empty for a conversation.
    root : str, optional
        Stored context that a conversation continues; None for a conversation without one.
    kept : float
        Share of the keys and values that the cache keeps.
    seconds : float
        Time that prefill and compression took.
    predicted_loss : float, optional
        Loss to expect of the cache, nats per token; None where it is not predicted.
    cache : RankKVCache, optional
        None while it is on disk only, and for a conversation that shares the cache of its root.
    tail : Tail, optional
        Of a conversation: its own tokens behind the cache that others share.
    """

    id: str
    key: str
    ids: np.ndarray
    content: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    name: str | None = None
    root: str | None = None
    created: float = field(default_factory=time.time)
    bytes: int = 0
    full_bytes: int = 0
    kept: float = 1.0
    seconds: float = 0.0
    predicted_loss: float | None = None
    cache: RankKVCache | None = None
    tail: Tail | None = None
    used: int = 0

    @property
    def is_stored(self) -> bool:
        """True for a context on disk, False for a conversation."""
        return bool(self.content)

    @property
    def in_memory(self) -> bool:
        """True if its keys and values are in memory, those apart that it shares with its root."""
        return self.cache is not None or self.tail is not None

    @property
    def tokens(self) -> int:
        """Number of tokens that the cache has seen."""
        return len(self.ids)

    def describe(self) -> dict[str, Any]:
        """Return what the API tells about the context."""
        return {
            "id": self.id,
            "object": "context",
            "name": self.name,
            "created": int(self.created),
            "tokens": self.tokens,
            "bytes": self.bytes,
            "full_bytes": self.full_bytes,
            "kept": round(self.kept, 4),
            "seconds": round(self.seconds, 3),
            "predicted_loss": self.predicted_loss,
            "compression_ratio": self.options.get("compression_ratio"),
            "max_loss": self.options.get("max_loss"),
            "selector": self.options.get("selector"),
            "in_memory": self.in_memory,
        }


class ContextStore:
    """Keep contexts by key: find them, give out copies of their caches, and hold a budget of bytes.

    Methods are safe to call from the event loop and from the model's thread.

    Parameters
    ----------
    model : PreTrainedModel
        The model of all caches; contexts of another model or adapter are not seen.
    folder : Path
        Folder of all contexts; the store takes a folder of its own in it for the model.
    memory : int
        Bytes of caches held in memory.
    limit : int
        Most stored contexts for each key.

    Raises
    ------
    ConfigError
        If another server uses the folder for this model.
    OutputError
        If the folder cannot be written.
    """

    def __init__(self, model: Any, folder: Path, memory: int, limit: int) -> None:
        self._model, self._memory, self._limit = model, memory, limit
        self.fingerprint = compute_fingerprint(model)
        self._folder = folder / self.fingerprint[:_DIGITS]
        self._lock = threading.RLock()
        self._clock = itertools.count(1)
        self._contexts: dict[str, Context] = {}
        self.evicted = self.loaded = 0
        self._owner = self._take_folder()
        self._read_folder()

    # -- find ----------------------------------------------------------------------------------------------------

    def get(self, key: str, name: object) -> Context:
        """Return the stored context with this id or name.

        Raises
        ------
        RequestError
            404 if this key has none.
        """
        with self._lock:
            for context in self._contexts.values():
                if context.key == key and context.is_stored and name in (context.id, context.name):
                    return context
        raise RequestError(
            f"there is no context {shorten(name)}: GET /v1/contexts lists those of this key, POST /v1/contexts makes "
            "one.",
            404,
            "unknown_context",
            "rankkv.context",
        )

    def list(self, key: str) -> list[Context]:
        """Return the stored contexts of a key, the oldest first."""
        with self._lock:
            found = [c for c in self._contexts.values() if c.key == key and c.is_stored]
        return sorted(found, key=lambda context: context.created)

    def match(self, key: str, ids: np.ndarray, root: str | None = None) -> Context | None:
        """Return the context that holds the longest beginning of some tokens, at least one token left.

        Of contexts with the same tokens it is the one that keeps most, then the one used last.

        Parameters
        ----------
        key : str
            Namespace.
        ids : ndarray
            ``[token]``: the request's tokens.
        root : str, optional
            Take only this stored context or a conversation about it.
        """
        with self._lock:
            found = [
                context
                for context in self._contexts.values()
                if context.key == key
                and context.tokens < len(ids)
                and (root is None or root in (context.id, context.root))
            ]
            found.sort(key=lambda context: (context.tokens, context.kept, context.used), reverse=True)
        return next((c for c in found if np.array_equal(c.ids, ids[: c.tokens])), None)

    def compute_id(
        self, key: str, ids: np.ndarray, options: Mapping[str, Any], content: Mapping[str, Any]
    ) -> str:
        """Compute the id of a context from key, model, content, tokens and options."""
        told = json.dumps([key, self.fingerprint, dict(options), dict(content)], sort_keys=True)
        digest = hashlib.sha256(told.encode() + b"\0" + np.asarray(ids, dtype="<i8").tobytes())
        return f"ctx_{digest.hexdigest()[:32]}"

    def find(self, context_id: str) -> Context | None:
        """Return the context with an id of :meth:`compute_id`, or None."""
        with self._lock:
            return self._contexts.get(context_id)

    # -- change --------------------------------------------------------------------------------------------------

    def check_room(self, key: str, name: str | None, context_id: str) -> None:
        """Raise, before anything is computed, if a new context cannot be stored.

        Raises
        ------
        RequestError
            If the key has as many contexts as it may, or the name belongs to another one.
        """
        with self._lock:
            own = self.list(key)
            for context in own:
                if name is not None and context.name == name and context.id != context_id:
                    raise RequestError(
                        f"the name {name!r} belongs to context {context.id}: DELETE that one first, or give another "
                        "name.",
                        409,
                        "name_taken",
                        "name",
                    )
            if len(own) >= self._limit and context_id not in self._contexts:
                raise RequestError(
                    f"this key has {len(own)} contexts and {self._limit} are the most: DELETE one first.",
                    409,
                    "too_many_contexts",
                )

    def rename(self, context: Context, name: str | None) -> None:
        """Give a stored context a name, on disk too."""
        if name is None or context.name == name:
            return
        with self._lock:
            self.check_room(context.key, name, context.id)
            before, context.name = context.name, name
            try:
                self._write_record(context)
            except OutputError:
                context.name = before
                raise

    def add(self, context: Context, cache: RankKVCache) -> None:
        """Store a context on disk, then in memory; when this returns, a restart finds it.

        Raises
        ------
        OutputError
            If the files cannot be written; nothing is stored then.
        CacheStateError
            If the model has layers that cannot be saved.
        """
        tensors = self._place(context, "safetensors")
        # The tensors come first: only a record makes them a context.
        cache.save(tensors)
        with self._lock:
            try:
                self.check_room(context.key, context.name, context.id)
                self._write_record(context)
            except RankKVError:
                if context.id not in self._contexts:
                    tensors.unlink(missing_ok=True)
                raise
            context.cache = cache
            self._contexts[context.id] = context
            self._touch(context)
            self._shrink()

    def add_conversation(
        self,
        key: str,
        ids: np.ndarray,
        cache: RankKVCache | None,
        parent: Context | None,
        tail: Tail | None = None,
    ) -> None:
        """Keep a conversation in memory, until others need the room.

        Parameters
        ----------
        key : str
            Namespace.
        ids : ndarray
            ``[token]``: the tokens seen.
        cache : RankKVCache, optional
            Cache of the conversation; None if it shares that of its stored context.
        parent : Context, optional
            Context that the conversation goes on with.
        tail : Tail, optional
            Tokens behind the cache.
        """
        root = None if parent is None else (parent.id if parent.is_stored else parent.root)
        own = 0 if tail is None else tail.nbytes
        size = own + (0 if cache is None else cache.cache_bytes())
        if size > self._memory or (cache is None and tail is None):
            return
        full = own + (0 if cache is None else cache.full_cache_bytes())
        context = Context(
            id=self.compute_id(key, ids, {"root": root}, {}).replace("ctx_", "conv_"),
            key=key,
            ids=ids,
            content={},
            root=root,
            bytes=size,
            full_bytes=full,
            kept=parent.kept if cache is None and parent is not None else size / full if full else 1.0,
            cache=cache,
            tail=tail,
        )
        with self._lock:
            if root is not None and root not in self._contexts:
                # Its context was deleted meanwhile.
                return
            self._contexts[context.id] = context
            self._touch(context)
            if parent is not None and parent.id in self._contexts:
                # A document serves more questions than one conversation about it.
                self._touch(parent)
            if root is not None:
                self._touch(self._contexts[root])
            self._shrink()

    def delete(self, context: Context) -> None:
        """Delete a context, its conversations and its files."""
        with self._lock:
            gone = [c for c in self._contexts.values() if context.id in (c.id, c.root)]
            # The record first: tensors without one are no context.
            for ending in ("json", "safetensors"):
                with contextlib.suppress(FileNotFoundError):
                    self._place(context, ending).unlink()
            for other in gone:
                del self._contexts[other.id]
                other.cache = other.tail = None

    def borrow(self, context: Context) -> tuple[RankKVCache, Tail | None]:
        """Return the cache of a context, read from disk where it is not in memory, and the tokens behind it.

        Others use the cache too: it must not be changed.

        Raises
        ------
        RequestError
            If the context was deleted meanwhile, or its file is damaged.
        """
        with self._lock:
            is_known = context.id in self._contexts
            holder = context
            if context.tail is not None and context.root is not None:
                holder = self._contexts.get(context.root, context)
            cache, tail = holder.cache, context.tail
        if not is_known or (cache is None and not holder.is_stored):
            raise _build_deleted(context)
        if cache is None:
            try:
                cache = RankKVCache.load(self._place(holder, "safetensors"), self._model)
            except InputError as error:
                with self._lock:
                    was_deleted = holder.id not in self._contexts
                if was_deleted:
                    raise _build_deleted(context) from error
                log.error("context %s cannot be read from disk", holder.id)
                raise RequestError(
                    f"the file of context {holder.id} cannot be read: DELETE it and POST it again.",
                    500,
                    "damaged_context",
                ) from error
            with self._lock:
                if holder.id in self._contexts:
                    self.loaded += 1
                    holder.cache = cache
        with self._lock:
            for used in (context, holder):
                if used.id in self._contexts:
                    self._touch(used)
            self._shrink()
        return cache, tail

    def check_out(self, context: Context) -> RankKVCache:
        """Return a copy of a stored context's cache; raises as :meth:`borrow` does."""
        return self.borrow(context)[0].copy()

    def close(self) -> None:
        """Let another server use the folder."""
        self._owner.release()

    # -- measure -------------------------------------------------------------------------------------------------

    def count(self, *, stored: bool) -> int:
        """Count stored contexts, or conversations."""
        with self._lock:
            return sum(context.is_stored is stored for context in self._contexts.values())

    def held_bytes(self) -> int:
        """Return the bytes of all caches in memory; what several conversations share counts once."""
        with self._lock:
            return self._count_bytes(self._contexts.values())

    def saved_bytes(self) -> int:
        """Return the bytes that uncompressed caches of those in memory would take in addition."""
        with self._lock:
            held = [context for context in self._contexts.values() if context.cache is not None]
            return sum(context.full_bytes - context.bytes for context in held)

    @staticmethod
    def _count_bytes(contexts: Collection[Context]) -> int:
        tails = {id(context.tail): context.tail.nbytes for context in contexts if context.tail is not None}
        caches = {
            id(context.cache): context.bytes - (0 if context.tail is None else context.tail.nbytes)
            for context in contexts
            if context.cache is not None
        }
        return sum(tails.values()) + sum(caches.values())

    # -- memory and disk -----------------------------------------------------------------------------------------

    def _touch(self, context: Context) -> None:
        context.used = next(self._clock)

    def _shrink(self) -> None:
        """Drop the least recently used caches until the rest fits; those of stored contexts stay on disk."""
        held = sorted((c for c in self._contexts.values() if c.in_memory), key=lambda context: context.used)
        for place, context in enumerate(held):
            if self._count_bytes(held[place:]) <= self._memory:
                return
            context.cache = context.tail = None
            self.evicted += 1
            if not context.is_stored:
                del self._contexts[context.id]

    def _place(self, context: Context, ending: str) -> Path:
        return self._folder / context.key / f"{context.id}.{ending}"

    def _write_record(self, context: Context) -> None:
        record = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "id": context.id,
            "key": context.key,
            "name": context.name,
            "created": context.created,
            "content": context.content,
            "options": context.options,
            "bytes": context.bytes,
            "full_bytes": context.full_bytes,
            "kept": context.kept,
            "seconds": context.seconds,
            "predicted_loss": context.predicted_loss,
            "ids": context.ids.tolist(),
        }
        with replace_atomically(self._place(context, "json")) as temporary:
            temporary.write_text(json.dumps(record), encoding="utf-8")

    def _take_folder(self) -> FileLock:
        try:
            # Documents of users: no one else reads them.
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            owner = FileLock(self._folder / ".lock", timeout=0, thread_local=False)
            owner.acquire()
        except Timeout as error:
            raise ConfigError(
                f"another server uses {str(self._folder)!r}: stop it, or give this one another --cache-dir."
            ) from error
        except OSError as error:
            raise OutputError(
                f"cannot write {str(self._folder)!r}: {error.strerror or error}; give another --cache-dir."
            ) from error
        return owner

    def _read_folder(self) -> None:
        """Take up what an earlier server stored for this model, and remove what it did not complete."""
        for folder in sorted(self._folder.iterdir()):
            if not folder.is_dir() or not _NAMESPACE.fullmatch(folder.name):
                continue
            for path in sorted(folder.iterdir()):
                if path.name.startswith(".ctx_"):
                    # A temporary file of a server that was killed.
                    path.unlink(missing_ok=True)
                elif path.suffix == ".safetensors" and _FILE.fullmatch(path.stem):
                    if not path.with_suffix(".json").exists():
                        path.unlink(missing_ok=True)
                elif path.suffix == ".json" and _FILE.fullmatch(path.stem):
                    self._take_up(path)

    def _take_up(self, path: Path) -> None:
        try:
            context = self._read_record(path)
        except (InputError, AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            log.warning("%s is left out: %s", path, type(error).__name__)
            return
        if not path.with_suffix(".safetensors").is_file():
            log.warning("%s is left out: its tensors are gone", path)
            return
        self._touch(context)
        self._contexts[context.id] = context

    def _read_record(self, path: Path) -> Context:
        record = read_json(path, _RECORD_LIMIT)
        if record["format"] != FORMAT or record["fingerprint"] != self.fingerprint:
            raise ValueError("another format or model")
        ids = np.asarray(record["ids"], dtype=np.int64)
        options, key = dict(record["options"]), str(record["key"])
        # The id covers key, model, content, tokens and options: a record that was changed has another one.
        if key != path.parent.name or record["id"] != path.stem or ids.ndim != 1 or not len(ids):
            raise ValueError("not the record of this file")
        content, name = dict(record["content"]), record["name"]
        if self.compute_id(key, ids, options, content) != path.stem:
            raise ValueError("the content does not fit the id")
        if not (isinstance(content.get("text"), str) or isinstance(content.get("messages"), list)):
            raise ValueError("no content")
        if name is not None:
            check_name(name)
        return Context(
            id=path.stem,
            key=key,
            ids=ids,
            content=content,
            options=options,
            name=name,
            created=float(record["created"]),
            bytes=int(record["bytes"]),
            full_bytes=int(record["full_bytes"]),
            kept=float(record["kept"]),
            seconds=float(record["seconds"]),
            # Records of before have none.
            predicted_loss=None if record.get("predicted_loss") is None else float(record["predicted_loss"]),
        )


def _build_deleted(context: Context) -> RequestError:
    return RequestError(
        f"context {context.id} was deleted before its turn came: POST it again.", 404, "unknown_context"
    )


def check_name(name: object) -> str:
    """Return the name of a context if it is one.

    Raises
    ------
    RequestError
        If it has other characters, or more than 64.

    Examples
    --------
    >>> check_name("manual-2.1")
    'manual-2.1'
    """
    # An id names its own context only.
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name.startswith(("ctx_", "conv_")):
        raise RequestError(
            f"name {shorten(name)} must have 1 to 64 letters, digits, '.', '_' or '-', begin with a letter or digit, "
            "and not with ctx_ or conv_.",
            param="name",
        )
    return name


def compute_namespace(api_key: str | None) -> str:
    """Return the namespace of a key: a digest, so that no key is written anywhere.

    Examples
    --------
    >>> compute_namespace(None), len(compute_namespace("secret-key"))
    ('public', 16)
    """
    return PUBLIC if api_key is None else hashlib.sha256(api_key.encode()).hexdigest()[:_DIGITS]
