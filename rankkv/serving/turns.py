"""Jobs, and the bounded fair queue in which they wait for the one thread that runs the model."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections import deque
from dataclasses import dataclass, field

from .errors import RequestError

# Service times that the estimate of the waiting time remembers.
_REMEMBERED = 32
_LONGEST_WAIT = 600


@dataclass(eq=False)
class Job:
    """One request on its way through the model.

    Attributes
    ----------
    kind : str
        Name of the route, such as ``"chat"``.
    key : str
        Namespace of the client's key.
    context : str, optional
        Id of the stored context that the request names.
    reuse : bool
        False if the request asks for a full prefill.
    token_limit : int, optional
        Largest answer that the client asks for.
    cancelled : threading.Event
        Set as soon as nobody waits for the answer.
    submitted : bool
        True once the model's thread has the job, which then gives the turn back.
    matched : str, optional
        Id of the context that the answer continues.
    error : Exception, optional
        Failure after the response has begun.
    """

    kind: str
    key: str
    context: str | None = None
    reuse: bool = True
    token_limit: int | None = None
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    arrived: float = field(default_factory=time.perf_counter)
    cancelled: threading.Event = field(default_factory=threading.Event)
    submitted: bool = False
    matched: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    answer_tokens: int = 0
    first_token: float | None = None
    last_token: float | None = None
    error: Exception | None = None

    def note_tokens(self, count: int) -> None:
        """Count new tokens of the answer, and note when they came."""
        self.answer_tokens += count
        self.last_token = time.perf_counter()
        if self.first_token is None:
            self.first_token = self.last_token


class Turns:
    """Hand one turn at a time to waiting requests, the keys in rotation.

    All methods run on the event loop.

    Parameters
    ----------
    limit : int
        Most requests that wait, for each key: one client cannot fill the queue of another.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        self._taken: float | None = None
        self._times: deque[float] = deque(maxlen=_REMEMBERED)
        self._closed = False

    @property
    def waiting(self) -> int:
        """Number of requests that wait."""
        return sum(len(queue) for queue in self._waiting.values())

    @property
    def running(self) -> int:
        """1 if a request has the turn, else 0."""
        return int(self._taken is not None)

    async def take(self, key: str) -> None:
        """Wait for the turn of a key.

        Raises
        ------
        RequestError
            If as many requests of this key wait as may (429), or the server stops (503).
        """
        if self._closed:
            raise RequestError("the server is stopping: ask again when it is back.", 503, "stopping")
        if self._taken is None:
            self._taken = time.perf_counter()
            return
        queue = self._waiting.setdefault(key, deque())
        if len(queue) >= self._limit:
            seconds = self._estimate_wait(len(queue))
            raise RequestError(
                f"{len(queue)} requests of this key wait already, and {self._limit} are the most: ask again in "
                f"{seconds} s.",
                429,
                "queue_full",
                headers={"Retry-After": str(seconds)},
            )
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                # The turn came at the moment the client left.
                self.give_back()
            elif turn in queue:
                queue.remove(turn)
                self._drop_if_empty(key)
            raise

    def give_back(self) -> None:
        """End the current turn, and give the next one to another key if one waits."""
        if self._taken is not None:
            self._times.append(time.perf_counter() - self._taken)
        self._taken = None
        while self._waiting:
            key = next(iter(self._waiting))
            queue = self._waiting.pop(key)
            turn = queue.popleft()
            if queue:
                # Last in line, behind the other keys.
                self._waiting[key] = queue
            if not turn.done():
                self._taken = time.perf_counter()
                turn.set_result(None)
                return

    def close(self) -> None:
        """Refuse all that wait and all that come."""
        self._closed = True
        for queue in self._waiting.values():
            for turn in queue:
                if not turn.done():
                    turn.set_exception(
                        RequestError("the server is stopping: ask again when it is back.", 503, "stopping")
                    )
        self._waiting.clear()

    def _drop_if_empty(self, key: str) -> None:
        if not self._waiting.get(key, True):
            del self._waiting[key]

    def _estimate_wait(self, ahead: int) -> int:
        mean = sum(self._times) / len(self._times) if self._times else 1.0
        return max(1, min(_LONGEST_WAIT, round(mean * ahead)))
