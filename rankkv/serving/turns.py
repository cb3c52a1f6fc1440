"""Jobs, and the bounded fair queue in which they wait for a place among those that the model works on."""

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
    seed : int, optional
        Seed of a sampled answer.
    loop : AbstractEventLoop, optional
        Event loop of the request, once the job is submitted.
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
    seed: int | None = None
    loop: asyncio.AbstractEventLoop | None = None
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
    """Hand a bounded number of turns to waiting requests: keys in rotation, and the contexts of a key in rotation.

    All methods run on the event loop.

    Parameters
    ----------
    limit : int
        Most requests that wait, for each key: one client cannot fill the queue of another.
    slots : int
        Most requests that have a turn at the same time.
    """

    def __init__(self, limit: int, slots: int = 1) -> None:
        self._limit, self._slots = limit, slots
        # By key, then by context.
        self._waiting: dict[str, dict[str | None, deque[asyncio.Future[None]]]] = {}
        self._running = 0
        # When the last turn ended, or the first one began after a pause.
        self._since: float | None = None
        # Seconds from one end of a turn to the next.
        self._times: deque[float] = deque(maxlen=_REMEMBERED)
        self._closed = False

    @property
    def waiting(self) -> int:
        """Number of requests that wait."""
        return sum(map(self._count, self._waiting))

    @property
    def running(self) -> int:
        """Number of requests that have a turn."""
        return self._running

    async def take(self, key: str, context: str | None = None) -> None:
        """Wait for the turn of a key and a context.

        Raises
        ------
        RequestError
            If as many requests of this key wait as may (429), or the server stops (503).
        """
        if self._closed:
            raise RequestError("the server is stopping: ask again when it is back.", 503, "stopping")
        if self._running < self._slots:
            self._begin()
            return
        waiting = self._count(key)
        if waiting >= self._limit:
            seconds = self._estimate_wait(waiting)
            raise RequestError(
                f"{waiting} requests of this key wait already, and {self._limit} are the most: ask again in "
                f"{seconds} s.",
                429,
                "queue_full",
                headers={"Retry-After": str(seconds)},
            )
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key, {}).setdefault(context, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                # The turn came at the moment the client left.
                self.give_back()
            else:
                self._remove(key, context, turn)
            raise

    def give_back(self) -> None:
        """End a turn, and give the next one to another key, or another context, if one waits."""
        now = time.perf_counter()
        if self._since is not None:
            self._times.append(now - self._since)
        self._running = max(0, self._running - 1)
        self._since = now if self._running else None
        while self._waiting and self._running < self._slots:
            key = next(iter(self._waiting))
            queues = self._waiting.pop(key)
            context = next(iter(queues))
            queue = queues.pop(context)
            turn = queue.popleft()
            # Last in line, behind the other contexts and the other keys.
            if queue:
                queues[context] = queue
            if queues:
                self._waiting[key] = queues
            if not turn.done():
                self._begin()
                turn.set_result(None)

    def close(self) -> None:
        """Refuse all that wait and all that come."""
        self._closed = True
        for queues in self._waiting.values():
            for turn in (turn for queue in queues.values() for turn in queue):
                if not turn.done():
                    turn.set_exception(
                        RequestError("the server is stopping: ask again when it is back.", 503, "stopping")
                    )
        self._waiting.clear()

    def _begin(self) -> None:
        self._running += 1
        if self._since is None:
            self._since = time.perf_counter()

    def _count(self, key: str) -> int:
        return sum(map(len, self._waiting.get(key, {}).values()))

    def _remove(self, key: str, context: str | None, turn: asyncio.Future[None]) -> None:
        queues = self._waiting.get(key, {})
        queue = queues.get(context, deque())
        if turn in queue:
            queue.remove(turn)
        if not queue:
            queues.pop(context, None)
        if not queues:
            self._waiting.pop(key, None)

    def _estimate_wait(self, ahead: int) -> int:
        mean = sum(self._times) / len(self._times) if self._times else 1.0
        return max(1, min(_LONGEST_WAIT, round(mean * ahead)))
