"""The one thread that runs the model: transformers' managers, pinned to one model and fed with stored contexts."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessorList
from transformers.cli.serving.model_manager import ModelManager, TimedModel
from transformers.cli.serving.utils import (
    DirectStreamer,
    GenerateManager,
    GenerationState,
    _GenerationCancelled,
    _StreamError,
)

from ..cache.cache import RankKVCache
from ..cache.prefill import compress
from ..errors import RankKVError
from ..models.compat import cache_argument
from ..selection import get_selector
from .answers import Answer, FiniteLogits
from .batch import WHOLE, Batch, Row
from .contexts import Context, ContextStore
from .errors import RequestError
from .tails import Tail
from .turns import Job, Turns

#: Text in a stream at the place of an error; `rankkv.serving.replies` writes the error there.
STREAM_ERROR = "rankkv-stream-error"
# What is told when an answer ends: its tokens, or the error.
_End = Callable[[Any, BaseException | None], None]

log = logging.getLogger("rankkv.serving")


class PinnedModelManager(ModelManager):
    """Hold one model that is loaded already; no request loads or drops another.

    Parameters
    ----------
    name : str
        Name of the model for clients.
    model, tokenizer
        As :func:`~rankkv.load_model` returns them.
    """

    def __init__(self, name: str, model: Any, tokenizer: Any) -> None:
        super().__init__()
        self.force_model, self.model_timeout = name, -1
        self.loaded_models[name] = TimedModel(model, timeout_seconds=-1, processor=tokenizer)

    def process_model_name(self, model_id: str) -> str:
        """Return the name unchanged: the pinned model has no revision."""
        return model_id

    def load_model_and_processor(
        self, model_id_and_revision: str, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Return the pinned model and its tokenizer.

        Raises
        ------
        RequestError
            404 for any other name.
        """
        self.check_model(model_id_and_revision)
        held = self.loaded_models[self.force_model]
        return held.model, held.processor

    def check_model(self, name: object) -> None:
        """Raise a RequestError (404) if a client names another model; None is the pinned one."""
        if name is not None and name != self.force_model:
            raise RequestError(
                f"this server has only the model {self.force_model!r}, not {str(name)[:80]!r}: name that one, or none.",
                404,
                "model_not_found",
                "model",
            )


class TokenCounter:
    """Count the tokens of an answer as they come, and stop it when nobody waits for it.

    ``model.generate`` calls it like a streamer.

    Parameters
    ----------
    job : Job
        Job of the answer.
    """

    def __init__(self, job: Job) -> None:
        self._job, self._is_prompt = job, True

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, then each new token."""
        if self._job.cancelled.is_set():
            raise _GenerationCancelled
        if self._is_prompt:
            self._is_prompt = False
        else:
            self._job.note_tokens(value.numel())

    def end(self) -> None:
        """Do nothing: the answer is complete."""


class CountingStreamer(DirectStreamer):
    """transformers' streamer, which also counts tokens for the metrics and stops with its job.

    Parameters
    ----------
    job : Job
        Job of the answer.
    *args, **kwargs
        As for the base class.
    """

    def __init__(self, job: Job, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._counter, self._job = TokenCounter(job), job

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, then each new token."""
        self._counter.put(value)
        super().put(value)

    def cancel(self) -> None:
        """Stop the answer at the next layer or token."""
        self._job.cancelled.set()
        super().cancel()


@dataclass(eq=False)
class _Running:
    """One answer in the batch, and what to do when it ends."""

    job: Job
    answer: Answer
    row: Row
    context: Context | None
    end: Callable[[Any, BaseException | None], None]


class ContextGenerateManager(GenerateManager):
    """Answer each request from the longest stored context that it begins with, many of them together.

    Parameters
    ----------
    model, tokenizer
        The pinned model.
    store : ContextStore
        Contexts of all keys.
    turns : Turns
        Queue; a job that the thread took gives its turn back there.
    most_tokens : int
        Most tokens of one answer.
    context_length : int, optional
        Most tokens of prompt and answer together.
    batch : Batch, optional
        Answers that decode together; None lets ``model.generate`` make one answer after the other.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        store: ContextStore,
        turns: Turns,
        most_tokens: int,
        context_length: int | None,
        batch: Batch | None = None,
    ) -> None:
        super().__init__()
        self.jobs: dict[str, Job] = {}
        self._model, self._tokenizer, self._store, self._turns = model, tokenizer, store, turns
        self._most_tokens, self._context_length = most_tokens, context_length
        self._batch = batch
        self._current: Job | None = None
        self._stopping = threading.Event()
        self._idle = threading.Event()
        self._idle.set()
        self._busy = 0
        # True while a step is in the thread's queue, and while one runs.
        self._is_due = self._is_stepping = False
        # End and duration of the last step, in seconds.
        self._stepped, self._step_seconds = 0.0, 0.0
        self._may_step_between = True
        self._hooks = [
            module.register_forward_pre_hook(self._between_layers)
            for module in model.modules()
            if isinstance(getattr(module, "layer_idx", None), int)
        ]

    # -- called by transformers' handlers ------------------------------------------------------------------------

    def generate_streaming(
        self,
        model: Any,
        processor: Any,
        inputs: Any,
        gen_config: Any,
        request_id: str,
        response_parser: Any = None,
    ) -> tuple[asyncio.Queue[Any], CountingStreamer]:
        """Begin an answer and return the queue of its pieces."""
        job = self.jobs[request_id]
        context = self._prepare(job, inputs, gen_config)
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Any]()
        rust_tokenizer = getattr(processor, "tokenizer", processor)._tokenizer
        streamer = CountingStreamer(job, rust_tokenizer, loop, queue, response_parser=response_parser)

        def end(result: Any, error: BaseException | None) -> None:
            if error is None:
                # The streamer has said so.
                return
            last = None
            if isinstance(error, Exception) and not isinstance(error, _GenerationCancelled):
                job.error, last = error, _StreamError(STREAM_ERROR)
            _call(loop, queue.put_nowait, last)

        self._submit(job, lambda: self._begin(job, context, inputs, gen_config, streamer, end), end, loop)
        return queue, streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> tuple[str, int, Any]:
        """Generate a whole answer and return its text, the length of the prompt, and its tokens."""
        job = self.jobs[request_id]
        context = self._prepare(job, inputs, gen_config)
        counter = TokenCounter(job)
        sequence = await self._run_job(
            job, lambda end: self._begin(job, context, inputs, gen_config, counter, end)
        )
        length = inputs["input_ids"].shape[-1]
        generated = sequence[length:]
        return processor.decode(generated, skip_special_tokens=True), length, generated

    # -- contexts ------------------------------------------------------------------------------------------------

    async def create_context(self, job: Job, context: Context) -> Context | None:
        """Prefill, compress and store a context; its numbers are filled in.

        Return the stored one instead if another request made it meanwhile.

        Raises
        ------
        RankKVError
            If the model or the options do not allow it, or the disk refuses it.
        """

        def run(end: _End) -> bool:
            # Requests with a turn each may ask for the same at once; here they come one by one.
            known = self._store.find(context.id)
            self._store.check_room(context.key, context.name, context.id)
            if known is not None:
                end(known, None)
                return False
            start = time.perf_counter()
            ids = torch.from_numpy(context.ids)[None]
            # A replay watches every forward of the model, those of other answers too.
            self._may_step_between = not get_selector(context.options["selector"]).replays
            try:
                cache = compress(self._model, ids, tokenizer=self._tokenizer, **context.options)
            finally:
                self._may_step_between = True
            context.seconds = time.perf_counter() - start
            context.bytes, context.full_bytes = cache.cache_bytes(), cache.full_cache_bytes()
            loss = cache.predicted_loss
            context.predicted_loss = None if loss is None else round(loss, 5)
            if cache.layer_indices:
                lengths = [cache.kept_lengths[index] for index in cache.layer_indices]
                context.kept = sum(lengths) / (len(lengths) * context.tokens)
            self._check_wanted(job)
            self._store.add(context, cache)
            end(None, None)
            return False

        known: Context | None = await self._run_job(job, run)
        return known

    # -- life ----------------------------------------------------------------------------------------------------

    @property
    def is_alive(self) -> bool:
        """True as long as the thread takes jobs."""
        return self._thread._thread.is_alive()

    @property
    def batched(self) -> int:
        """Number of answers that decode together now."""
        return 0 if self._batch is None else len(self._batch.rows)

    @property
    def _running(self) -> list[_Running]:
        """The answers that decode together, in the order of the batch's rows."""
        return [] if self._batch is None else [row.owner for row in self._batch.rows]

    def stop(self, seconds: float = 10.0) -> None:
        """Stop the answers that run, wait until the thread is idle, and free the model."""
        self._stopping.set()
        self._idle.wait(seconds)
        for hook in self._hooks:
            hook.remove()

    def _check_wanted(self, job: Job) -> None:
        if job.cancelled.is_set() or self._stopping.is_set():
            raise _GenerationCancelled

    async def _run_job(self, job: Job, begin: Callable[[_End], bool]) -> Any:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()

        def settle(result: Any, error: BaseException | None) -> None:
            if future.done():
                return
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

        def end(result: Any, error: BaseException | None) -> None:
            if isinstance(error, _GenerationCancelled):
                error = RequestError("the server is stopping: ask again when it is back.", 503, "stopping")
            _call(loop, settle, result, error)

        self._submit(job, lambda: begin(end), end, loop)
        return await future

    def _submit(
        self, job: Job, begin: Callable[[], bool], end: _End, loop: asyncio.AbstractEventLoop
    ) -> None:
        """Hand a job to the model's thread; its turn is given back when it is done.

        ``begin`` returns True if the answer goes on in the batch, which then ends it.
        """

        def work() -> None:
            goes_on, error = False, None
            self._current = job
            try:
                self._check_wanted(job)
                goes_on = begin()
            except Exception as failure:
                error = failure
            finally:
                self._current = None
            if error is not None:
                if not isinstance(error, _GenerationCancelled):
                    _log_failure(job, error)
                end(None, error)
            if not goes_on:
                self._give_back(job)
            self._order_step()

        job.submitted = True
        job.loop = loop
        self._busy += 1
        self._idle.clear()
        self.submit(work)

    def _give_back(self, job: Job) -> None:
        def note() -> None:
            self._busy -= 1
            if not self._busy:
                self._idle.set()
            self._turns.give_back()

        if job.loop is not None and not _call(job.loop, note):
            self._idle.set()

    # -- one answer ----------------------------------------------------------------------------------------------

    def _prepare(self, job: Job, inputs: Any, gen_config: Any) -> Context | None:
        """Check the length of a prompt, set the length of its answer, and find the context it begins with."""
        ids = inputs["input_ids"][0].cpu().numpy().astype(np.int64)
        job.prompt_tokens = len(ids)
        if not len(ids):
            raise RequestError("the prompt has no tokens: give some text.", param="prompt")
        self._limit_answer(job, gen_config)
        context = self._store.match(job.key, ids, job.context) if job.reuse or job.context else None
        if job.context is not None:
            # Another request may have deleted it while this one waited.
            self._store.get(job.key, job.context)
        if job.context is not None and context is None:
            raise RequestError(
                f"the conversation does not begin with the tokens of context {job.context}: tools and options of the "
                "chat template that change its beginning are not possible with a stored context.",
                code="context_mismatch",
                param="rankkv.context",
            )
        if context is not None:
            job.cached_tokens, job.matched = context.tokens, context.root or context.id
        return context

    def _limit_answer(self, job: Job, gen_config: Any) -> None:
        wanted = job.token_limit or min(gen_config.max_new_tokens or self._most_tokens, self._most_tokens)
        if self._context_length is not None:
            room = self._context_length - job.prompt_tokens
            if room < 1 or (job.token_limit is not None and job.token_limit > room):
                asked = f" and an answer of {job.token_limit}" if job.token_limit else ""
                raise RequestError(
                    f"the prompt has {job.prompt_tokens} tokens{asked}, and {self._context_length} are the most for "
                    "both: shorten the prompt or the answer.",
                    code="context_length_exceeded",
                    param="messages",
                )
            wanted = min(wanted, room)
        gen_config.max_new_tokens, gen_config.max_length = wanted, None

    def _begin(
        self, job: Job, context: Context | None, inputs: Any, gen_config: Any, streamer: Any, end: _End
    ) -> bool:
        """Prefill a request and choose its first token; return True if it goes on in the batch."""
        if self._batch is None:
            end(self._generate(job, context, inputs, gen_config, streamer), None)
            return False
        answer = Answer.prepare(self._model, self._tokenizer, inputs, gen_config, job.seed, streamer)
        ids = answer.ids[0]
        context, cache, tail = self._open(job, context, ids)
        if context is None:
            row, logits = self._batch.prefill(cache, ids)
        else:
            row = self._batch.open(cache, tail)
            logits = self._batch.fill(row, ids[row.seen :])
        row.owner = _Running(job, answer, row, context, end)
        if answer.choose(logits):
            self._complete(row.owner)
            return False
        self._batch.join(row)
        return True

    def _complete(self, running: _Running) -> None:
        """Keep the conversation of a complete answer, whose next turn begins with it, then say that it is complete."""
        job, row, sequence = running.job, running.row, running.answer.ids[0]
        ids = sequence[: row.seen].cpu().numpy().astype(np.int64)
        parent = running.context
        shares = parent is not None and (parent.is_stored or parent.root is not None)
        self._store.add_conversation(job.key, ids, None if shares else row.base.cache, parent, row.own)
        running.answer.end()
        running.end(sequence, None)

    # -- steps ---------------------------------------------------------------------------------------------------

    def _order_step(self) -> None:
        """Put one step behind the jobs that wait for the thread, if there are answers to go on with."""
        if self.batched and not self._is_due:
            self._is_due = True
            self.submit(self._take_step)

    def _take_step(self) -> None:
        self._is_due = False
        try:
            self._step()
        finally:
            self._order_step()

    def _between_layers(self, *_: Any) -> None:
        """Stop a prefill that nobody waits for, or let the answers that run have their share of the time."""
        if threading.current_thread() is not self._thread._thread or self._is_stepping:
            return
        if self._current is not None:
            # A prefill takes minutes, so the layers ask too, not the tokens alone.
            self._check_wanted(self._current)
        if (
            self.batched
            and self._may_step_between
            and time.perf_counter() - self._stepped >= self._step_seconds
        ):
            self._step()

    def _step(self) -> None:
        """Compute one token of every answer in the batch; those that end leave it."""
        start = time.perf_counter()
        self._is_stepping, batch = True, self._batch
        try:
            for running in self._running:
                # Nobody waits for it: its place is free before the next token.
                if running.job.cancelled.is_set() or self._stopping.is_set():
                    self._leave(running, _GenerationCancelled())
            if batch is None or not batch.rows:
                return
            try:
                logits = batch.step([running.answer.newest for running in self._running])
            except Exception as error:
                for running in self._running:
                    self._leave(running, error)
                return
            for running, scores in zip(self._running, logits.split(1), strict=True):
                try:
                    if running.answer.choose(scores):
                        self._leave(running, None)
                except Exception as error:
                    self._leave(running, error)
        finally:
            self._is_stepping = False
            self._stepped = time.perf_counter()
            self._step_seconds = self._stepped - start

    def _leave(self, running: _Running, error: BaseException | None) -> None:
        """Take an answer out of the batch: it is complete, or it failed."""
        try:
            if self._batch is not None:
                self._batch.leave(running.row)
            if error is None:
                self._complete(running)
        except Exception as failure:
            error = failure
        if error is not None:
            if isinstance(error, Exception) and not isinstance(error, _GenerationCancelled):
                _log_failure(running.job, error)
            running.end(None, error)
        self._give_back(running.job)

    # -- one answer alone ----------------------------------------------------------------------------------------

    def _generate(
        self, job: Job, context: Context | None, inputs: Any, gen_config: Any, streamer: Any
    ) -> torch.Tensor:
        """Let ``model.generate`` make a whole answer, for models whose answers cannot decode together."""
        context, cache, _ = self._open(job, context, inputs["input_ids"][0])
        if context is not None:
            cache = cache.copy()
        if job.seed is not None:
            torch.manual_seed(job.seed)
        output = self._model.generate(
            **inputs,
            generation_config=gen_config,
            logits_processor=LogitsProcessorList([FiniteLogits()]),
            tokenizer=self._tokenizer,
            streamer=streamer,
            **cache_argument(cache),
        )
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        self._keep(job, sequences[0], cache, context)
        return sequences[0]

    def _open(
        self, job: Job, context: Context | None, ids: torch.Tensor
    ) -> tuple[Context | None, RankKVCache, Tail | None]:
        """Return the context of an answer, its cache, which others use too, and the tokens behind it; or a new one."""
        while context is not None:
            try:
                cache, tail = self._store.borrow(context)
            except RequestError as error:
                if context.is_stored and job.context is not None:
                    raise
                # A conversation that left memory since the request came: its context is still there.
                # A client that named no context did not ask for this one.
                _log_failure(job, error)
                known = (
                    None if context.is_stored else self._store.match(job.key, ids.cpu().numpy(), job.context)
                )
                context = None if known is context else known
                job.cached_tokens = 0 if context is None else context.tokens
                job.matched = None if context is None else context.root or context.id
                continue
            return context, cache, tail
        if job.context is not None:
            # It was deleted: say so.
            self._store.get(job.key, job.context)
        return None, RankKVCache(self._model, config=WHOLE), None

    def _keep(self, job: Job, sequence: torch.Tensor, cache: RankKVCache, parent: Context | None) -> None:
        """Keep the conversation, whose next turn begins with it."""
        try:
            cache.finish()
            seen = cache.seen_tokens
            ids = sequence[:seen].cpu().numpy().astype(np.int64)
            self._store.add_conversation(job.key, ids, cache, parent)
        except RankKVError as error:
            # The answer stands; its next turn begins from the stored context.
            _log_failure(job, error)


class PinnedGenerationState(GenerationState):
    """Hand out the one manager of the pinned model.

    Parameters
    ----------
    manager : ContextGenerateManager
        The manager.
    """

    def __init__(self, manager: ContextGenerateManager) -> None:
        super().__init__(continuous_batching=False, compile=False)
        self._manager = manager

    def get_manager(self, model_id: str, use_cb: bool = False) -> ContextGenerateManager:
        """Return the manager, whatever the name: the handlers have checked it."""
        return self._manager


def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., Any], *args: Any) -> bool:
    """Call a function on the event loop; return False, and do nothing, if the loop has ended."""
    try:
        loop.call_soon_threadsafe(function, *args)
    except RuntimeError:
        log.debug("the event loop has ended")
        return False
    return True


def _log_failure(job: Job, error: Exception) -> None:
    # The message may quote the prompt, so it is not logged.
    log.error("%s %s failed: %s", job.kind, job.id, type(error).__name__)
