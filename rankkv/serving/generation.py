"""The one thread that runs the model: transformers' managers, pinned to one model and fed with stored contexts."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
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
from ..config import RankKVConfig
from ..errors import RankKVError
from ..models.compat import cache_argument
from .contexts import Context, ContextStore
from .errors import RequestError
from .turns import Job, Turns

#: Text in a stream at the place of an error; `rankkv.serving.replies` writes the error there.
STREAM_ERROR = "rankkv-stream-error"
# Plain prompts are not compressed: the answer is that of `transformers serve`.
_WHOLE = RankKVConfig(
    compression_ratio=1.0, selector="streaming_llm", strategy="uniform", head_budgets=None, profile=None
)

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


class ContextGenerateManager(GenerateManager):
    """Answer each request from the longest stored context that it begins with.

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
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        store: ContextStore,
        turns: Turns,
        most_tokens: int,
        context_length: int | None,
    ) -> None:
        super().__init__()
        self.jobs: dict[str, Job] = {}
        self._model, self._tokenizer, self._store, self._turns = model, tokenizer, store, turns
        self._most_tokens, self._context_length = most_tokens, context_length
        self._current: Job | None = None
        self._stopping = threading.Event()
        self._idle = threading.Event()
        self._idle.set()
        self._hooks = [
            module.register_forward_pre_hook(self._stop_if_cancelled)
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

        def run() -> None:
            last: Any = None
            try:
                self._check_wanted(job)
                self._generate(job, context, inputs, gen_config, streamer)
                return
            except _GenerationCancelled:
                pass
            except Exception as error:
                job.error, last = error, _StreamError(STREAM_ERROR)
                _log_failure(job, error)
            _call(loop, queue.put_nowait, last)

        self._submit(job, run, loop)
        return queue, streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> tuple[str, int, Any]:
        """Generate a whole answer and return its text, the length of the prompt, and its tokens."""
        job = self.jobs[request_id]
        context = self._prepare(job, inputs, gen_config)
        sequences = await self._run_job(
            job, lambda: self._generate(job, context, inputs, gen_config, TokenCounter(job))
        )
        length = inputs["input_ids"].shape[-1]
        generated = sequences[0, length:]
        return processor.decode(generated, skip_special_tokens=True), length, generated

    # -- contexts ------------------------------------------------------------------------------------------------

    async def create_context(self, job: Job, context: Context) -> None:
        """Prefill, compress and store a context; its numbers are filled in.

        Raises
        ------
        RankKVError
            If the model or the options do not allow it, or the disk refuses it.
        """

        def run() -> None:
            start = time.perf_counter()
            ids = torch.from_numpy(context.ids)[None]
            cache = compress(self._model, ids, tokenizer=self._tokenizer, **context.options)
            context.seconds = time.perf_counter() - start
            context.bytes, context.full_bytes = cache.cache_bytes(), cache.full_cache_bytes()
            if cache.layer_indices:
                lengths = [cache.kept_lengths[index] for index in cache.layer_indices]
                context.kept = sum(lengths) / (len(lengths) * context.tokens)
            self._check_wanted(job)
            self._store.add(context, cache)

        await self._run_job(job, run)

    # -- life ----------------------------------------------------------------------------------------------------

    @property
    def is_alive(self) -> bool:
        """True as long as the thread takes jobs."""
        return self._thread._thread.is_alive()

    def stop(self, seconds: float = 10.0) -> None:
        """Stop the answer that runs, wait until the thread is idle, and free the model."""
        self._stopping.set()
        self._idle.wait(seconds)
        for hook in self._hooks:
            hook.remove()

    def _stop_if_cancelled(self, *_: Any) -> None:
        # A prefill takes minutes, so the layers ask too, not the tokens alone.
        job = self._current
        if job is not None and threading.current_thread() is self._thread._thread:
            self._check_wanted(job)

    def _check_wanted(self, job: Job) -> None:
        if job.cancelled.is_set() or self._stopping.is_set():
            raise _GenerationCancelled

    async def _run_job(self, job: Job, work: Callable[[], Any]) -> Any:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()

        def settle(result: Any, error: BaseException | None) -> None:
            if future.done():
                return
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

        def run() -> None:
            result: Any = None
            error: Exception | None = None
            try:
                self._check_wanted(job)
                result = work()
            except _GenerationCancelled:
                error = RequestError("the server is stopping: ask again when it is back.", 503, "stopping")
            except Exception as failure:
                error = failure
                _log_failure(job, failure)
            _call(loop, settle, result, error)

        self._submit(job, run, loop)
        return await future

    def _submit(self, job: Job, run: Callable[[], None], loop: asyncio.AbstractEventLoop) -> None:
        """Hand a job to the model's thread, which gives the turn back when it is done."""

        def work() -> None:
            self._current = job
            try:
                run()
            finally:
                self._current = None
                self._idle.set()
                _call(loop, self._turns.give_back)

        job.submitted = True
        self._idle.clear()
        self.submit(work)

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

    def _generate(
        self, job: Job, context: Context | None, inputs: Any, gen_config: Any, streamer: Any
    ) -> torch.Tensor:
        context, cache = self._open(job, context)
        output = self._model.generate(
            **inputs,
            generation_config=gen_config,
            tokenizer=self._tokenizer,
            streamer=streamer,
            **cache_argument(cache),
        )
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        self._keep(job, sequences[0], cache, context)
        return sequences

    def _open(self, job: Job, context: Context | None) -> tuple[Context | None, RankKVCache]:
        """Return a cache for an answer, and the context that it is a copy of."""
        if context is not None:
            try:
                return context, self._store.check_out(context)
            except RequestError as error:
                # A client that named no context did not ask for it.
                if job.context is not None:
                    raise
                _log_failure(job, error)
                job.cached_tokens, job.matched = 0, None
        return None, RankKVCache(self._model, config=_WHOLE)

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


def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., Any], *args: Any) -> None:
    """Call a function on the event loop; nothing happens if the loop has ended."""
    try:
        loop.call_soon_threadsafe(function, *args)
    except RuntimeError:
        log.debug("the event loop has ended")


def _log_failure(job: Job, error: Exception) -> None:
    # The message may quote the prompt, so it is not logged.
    log.error("%s %s failed: %s", job.kind, job.id, type(error).__name__)
