"""The application: routes, what each reads and answers, and the life of a request."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from jinja2 import TemplateError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ..config import RankKVConfig, check_max_loss, check_predicted
from ..errors import RankKVError
from ..models.checkpoints import get_context_length
from ..observe.hook import check_observable
from ..selection import get_selector
from ..utils.files import parse_json, shorten
from .batch import Batch
from .contexts import Context, ContextStore, check_name
from .errors import CLIENT_LEFT, RequestError, build_body, find_request_error
from .generation import ContextGenerateManager, PinnedGenerationState, PinnedModelManager
from .guard import Guard, get_key, too_large
from .handlers import build_handlers
from .metrics import CONTENT_TYPE, Metrics
from .options import check_fields, check_options
from .page import build_page, count_layers, list_pieces
from .prompts import check_messages, encode_context, join_messages, refuse_conversation
from .replies import add_cached_tokens, complete_stream, describe_failure
from .settings import ServeSettings
from .turns import Job, Turns

_CONTEXT_FIELDS = ("text", "messages", "compression_ratio", "max_loss", "selector", "name", "model")
_BODY_SECONDS = 60.0
_CLOSED = ("/reset", "/v1/systemone", "/v1/audio/transcriptions")

log = logging.getLogger("rankkv.serving")


class Service:
    """Everything that one server holds: model, store, queue, handlers and metrics.

    Parameters
    ----------
    settings : ServeSettings
        Options of the server.
    model, tokenizer
        As :func:`~rankkv.load_model` returns them.

    Raises
    ------
    UnsupportedModelError
        If the model's cache cannot be compressed.
    ConfigError
        If another server uses the folder of the contexts.
    """

    def __init__(self, settings: ServeSettings, model: Any, tokenizer: Any) -> None:
        check_observable(model)
        # The first call drops a truncation that the tokenizer's file may set; later ones only read.
        tokenizer("a", add_special_tokens=False)
        # Each answer brings its cache; transformers refuses one beside the kind that a model's file asks for.
        model.generation_config.cache_implementation = None
        self.settings, self.tokenizer, self.model = settings, tokenizer, model
        length = get_context_length(model)
        given = settings.max_context_tokens
        self.context_length = length if given is None else min(given, length or given)
        self.store = ContextStore(model, settings.folder, settings.cache_memory, settings.max_contexts)
        alone = Batch.check(model)
        if alone is not None:
            log.warning("one answer at a time: %s", alone)
        batch = Batch(model, settings.max_batch) if alone is None else None
        self.turns = Turns(settings.max_queue, settings.max_batch if batch else 1)
        self.metrics = Metrics(self.store, self.turns)
        self.models = PinnedModelManager(settings.model, model, tokenizer)
        self.manager = ContextGenerateManager(
            model, tokenizer, self.store, self.turns, settings.max_answer_tokens, self.context_length, batch
        )
        self.handlers = build_handlers(self.models, PinnedGenerationState(self.manager))

    def close(self) -> None:
        """Refuse what waits, stop what runs, and free the folder."""
        self.turns.close()
        self.manager.stop(self.settings.grace_seconds + 5.0)
        self.store.close()

    # -- answers -------------------------------------------------------------------------------------------------

    async def answer(self, kind: str, request: Request) -> Any:
        """Answer a request of the OpenAI API from the longest context that it begins with."""
        body = await read_body(request, self.settings.max_body)
        job = self._admit(kind, body, get_key(request))
        self.manager.jobs[job.id] = job
        try:
            response = await leave_with_client(request, job, self._generate(job, body))
        except BaseException:
            self.finish(job)
            raise
        return JobResponse(self, job, response)

    def _admit(self, kind: str, body: dict[str, Any], key: str) -> Job:
        """Check a body and return its job; a request that names a context then carries the whole conversation."""
        handler = self.handlers[kind]
        named, reuse = _read_own_field(body.pop("rankkv", None))
        check_fields(body, handler.list_fields() | {"rankkv"})
        self.models.check_model(body.get("model"))
        vocabulary = self.model.get_input_embeddings().num_embeddings
        limit = check_options(kind, body, vocabulary, self.settings.max_answer_tokens)
        context = None if named is None else self.store.get(key, named)
        self._check_prompt(kind, body, context)
        # transformers would seed the draws of all answers with it.
        seed = body.pop("seed", None)
        return Job(kind, key, None if context is None else context.id, reuse, limit, seed)

    def _check_prompt(self, kind: str, body: dict[str, Any], context: Context | None) -> None:
        if kind == "chat":
            messages = check_messages(body.get("messages"), may_be_empty=context is not None)
            if context is not None:
                messages = join_messages(context.content, messages)
            body["messages"] = messages
        elif kind == "completions":
            prompt = body.get("prompt")
            if not isinstance(prompt, str) or not (prompt or context):
                raise RequestError(
                    f"prompt must be one text that is not empty, got {shorten(prompt)}.", param="prompt"
                )
            if context is not None:
                if getattr(self.tokenizer, "chat_template", None):
                    raise RequestError(
                        "contexts of this model are parts of a chat: name them in /v1/chat/completions.",
                        param="rankkv.context",
                    )
                body["prompt"] = context.content["text"] + prompt
        else:
            if context is not None:
                raise RequestError(
                    "/v1/responses takes no context by name: send the whole conversation, or ask "
                    "/v1/chat/completions.",
                    param="rankkv.context",
                )
            if not isinstance(body.get("input"), str | list) or not body["input"]:
                raise RequestError("input must be a text or a list of messages.", param="input")
            try:
                messages = self.handlers[kind]._normalize_input(body)
            except (AttributeError, KeyError, TypeError) as error:
                raise RequestError(
                    f"input has an item that is neither a message nor a tool call ({shorten(str(error))}): give role "
                    "and content.",
                    param="input",
                ) from error
            # transformers drops the parts that are not text.
            check_messages(messages)

    async def _generate(self, job: Job, body: dict[str, Any]) -> Response:
        await self.turns.take(job.key, job.context)
        try:
            response: Response = await self.handlers[job.kind].handle_request(body, job.id)
        except (TemplateError, KeyError, TypeError, ValueError) as error:
            if not job.submitted and find_request_error(error) is None:
                log.warning("%s %s was refused by its template: %s", job.kind, job.id, type(error).__name__)
                raise refuse_conversation(error) from error
            raise
        finally:
            if not job.submitted:
                self.turns.give_back()
        if isinstance(response, StreamingResponse):
            response.body_iterator = complete_stream(job, response.body_iterator)  # type: ignore[arg-type]
        else:
            record = add_cached_tokens(json.loads(bytes(response.body)), job.cached_tokens)
            response = JSONResponse(record)
        if job.matched is not None:
            response.headers["x-rankkv-context"] = job.matched
        return response

    def finish(self, job: Job) -> None:
        """Forget a job; if its answer is still running, nobody waits for it."""
        if self.manager.jobs.pop(job.id, None) is not None:
            job.cancelled.set()
            self.metrics.note_job(job)

    # -- contexts ------------------------------------------------------------------------------------------------

    async def create_context(self, request: Request) -> JSONResponse:
        """Compress and store a context; the same context again is returned at once."""
        body, key = await read_body(request, self.settings.max_body), get_key(request)
        content, options, name = self._read_context(body)
        ids = await asyncio.to_thread(self._encode, content)
        if self.context_length is not None and len(ids) >= self.context_length:
            raise RequestError(
                f"the context has {len(ids)} tokens and {self.context_length - 1} are the most, since a question needs "
                "one too: send less text.",
                code="context_length_exceeded",
                param=next(iter(content)),
            )
        context_id = self.store.compute_id(key, ids, options, content)
        job = Job("contexts", key)
        return await leave_with_client(
            request, job, self._create(job, context_id, ids, content, options, name)
        )

    async def _create(
        self,
        job: Job,
        context_id: str,
        ids: Any,
        content: dict[str, Any],
        options: dict[str, Any],
        name: str | None,
    ) -> JSONResponse:
        await self.turns.take(job.key, context_id)
        try:
            # Checked now, since another request may have made it while this one waited.
            known = self.store.find(context_id)
            self.store.check_room(job.key, name, context_id)
            if known is not None:
                self.store.rename(known, name)
                return JSONResponse(known.describe())
            context = Context(context_id, job.key, ids, content, options, name)
            known = await self.manager.create_context(job, context)
            if known is not None:
                self.store.rename(known, name)
                return JSONResponse(known.describe())
        finally:
            if not job.submitted:
                self.turns.give_back()
        self.metrics.compression.observe(context.seconds)
        return JSONResponse(context.describe(), 201)

    def _read_context(self, body: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], str | None]:
        """Return content, options and name of a new context."""
        check_fields(body, _CONTEXT_FIELDS)
        self.models.check_model(body.get("model"))
        text, messages = body.get("text"), body.get("messages")
        if (text is None) == (messages is None):
            raise RequestError("give either text or messages of the context, one of them.", param="text")
        if messages is not None:
            content: dict[str, Any] = {"messages": check_messages(messages)}
        elif isinstance(text, str) and text.strip():
            content = {"text": text}
        else:
            raise RequestError(
                f"text must be a text with at least one character that is not white space, got {shorten(text)}.",
                param="text",
            )
        ratio, selector = body.get("compression_ratio"), body.get("selector")
        loss = body.get("max_loss")
        # A ratio in the request replaces the server's loss, and a loss the server's ratio.
        loss = self.settings.max_loss if loss is None and ratio is None else loss
        ratio = self.settings.compression_ratio if ratio is None and loss is None else ratio
        selector = self.settings.selector if selector is None else selector
        if ratio is not None and (isinstance(ratio, bool) or not isinstance(ratio, int | float)):
            raise RequestError(
                f"compression_ratio {shorten(ratio)} must be a number in (0, 1].", param="compression_ratio"
            )
        if not isinstance(selector, str):
            raise RequestError(
                f"selector {shorten(selector)} must be the name of a selector.", param="selector"
            )
        get_selector(selector)
        sizes: dict[str, Any] = {} if ratio is None else {"compression_ratio": float(ratio)}
        if loss is not None:
            sizes["max_loss"] = check_max_loss(loss)
            check_predicted(loss, selector)
        RankKVConfig(selector=selector, **sizes)
        name = body.get("name")
        options = {**sizes, "selector": selector}
        return content, options, None if name is None else check_name(name)

    def _encode(self, content: dict[str, Any]) -> Any:
        handler = self.handlers["chat"]
        modality = self.models.get_model_modality(self.model, processor=self.tokenizer)
        return encode_context(
            self.tokenizer,
            content,
            lambda messages: handler.get_processor_inputs_from_messages(messages, modality),
        )

    async def list_contexts(self, request: Request) -> JSONResponse:
        """List the stored contexts of a key."""
        found = [context.describe() for context in self.store.list(get_key(request))]
        return JSONResponse({"object": "list", "data": found})

    async def get_context(self, request: Request) -> JSONResponse:
        """Describe one context."""
        return JSONResponse(self.store.get(get_key(request), request.path_params["id"]).describe())

    async def list_tokens(self, request: Request) -> JSONResponse:
        """Return the text of a context token by token, each with the number of layers that keep it."""
        context = self.store.get(get_key(request), request.path_params["id"])

        def read() -> dict[str, Any]:
            cache, _ = self.store.borrow(context)
            pieces = list_pieces(self.tokenizer, context.ids.tolist(), count_layers(cache))
            return {"object": "context.tokens", "layers": len(cache.layer_indices), "pieces": pieces}

        return JSONResponse(await asyncio.to_thread(read))

    async def delete_context(self, request: Request) -> JSONResponse:
        """Delete one context, its conversations and its files."""
        context = self.store.get(get_key(request), request.path_params["id"])
        self.store.delete(context)
        return JSONResponse({"id": context.id, "object": "context", "deleted": True})

    # -- operations ----------------------------------------------------------------------------------------------

    async def show_page(self, request: Request) -> Response:
        """Return the page, for people."""
        return build_page(self.settings.compression_ratio, self.settings.max_loss)

    async def show_health(self, request: Request) -> JSONResponse:
        """Tell that the server runs; it listens only once the model is loaded."""
        if not self.manager.is_alive:
            return JSONResponse({"status": "unhealthy", "reason": "the thread of the model has ended"}, 503)
        return JSONResponse({"status": "ok", "model": self.settings.model})

    async def show_metrics(self, request: Request) -> Response:
        """Return the metrics in Prometheus' text format."""
        return Response(self.metrics.render(), media_type=CONTENT_TYPE)

    async def list_models(self, request: Request) -> JSONResponse:
        """List the one model."""
        return JSONResponse({"object": "list", "data": self.models.list_models()})

    async def load_model(self, request: Request) -> Response:
        """Tell a client that asks for the model to be loaded that it is, as `transformers chat` does first."""
        body = await read_body(request, self.settings.max_body)
        check_fields(body, ("model",))
        self.models.check_model(body.get("model"))
        event = {"status": "ready", "model": self.settings.model, "cached": True}
        return Response(f"data: {json.dumps(event)}\n\n", media_type="text/event-stream")


class JobResponse:
    """A response whose job ends with it, also where the client leaves before the first byte.

    Parameters
    ----------
    service : Service
        Service that holds the job.
    job : Job
        The job.
    response : Response
        The response itself.
    """

    def __init__(self, service: Service, job: Job, response: Response) -> None:
        self._service, self._job, self._response = service, job, response

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        try:
            await self._response(scope, receive, send)
        finally:
            self._service.finish(self._job)


def build_app(service: Service) -> Any:
    """Build the ASGI application of a service."""

    def answer(kind: str) -> Callable[[Request], Awaitable[Any]]:
        async def endpoint(request: Request) -> Any:
            return await service.answer(kind, request)

        return endpoint

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    routes = [
        Route("/", service.show_page, methods=["GET"]),
        Route("/health", service.show_health, methods=["GET"]),
        Route("/metrics", service.show_metrics, methods=["GET"]),
        Route("/load_model", service.load_model, methods=["POST"]),
        Route("/v1/models", service.list_models, methods=["GET"]),
        Route("/v1/chat/completions", answer("chat"), methods=["POST"]),
        Route("/v1/completions", answer("completions"), methods=["POST"]),
        Route("/v1/responses", answer("responses"), methods=["POST"]),
        Route("/v1/contexts", service.list_contexts, methods=["GET"]),
        Route("/v1/contexts", service.create_context, methods=["POST"]),
        Route("/v1/contexts/{id}/tokens", service.list_tokens, methods=["GET"]),
        Route("/v1/contexts/{id}", service.get_context, methods=["GET"]),
        Route("/v1/contexts/{id}", service.delete_context, methods=["DELETE"]),
        *(Route(path, _refuse_closed, methods=["GET", "POST"]) for path in _CLOSED),
    ]
    handlers: Any = {
        HTTPException: _answer_http_error,
        RankKVError: _answer_refusal,
        Exception: _answer_refusal,
    }
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)
    return Guard(app, service.settings, service.metrics)


async def read_body(request: Request, limit: int) -> dict[str, Any]:
    """Read the JSON object of a request, at most ``limit`` bytes of it.

    Raises
    ------
    RequestError
        If it is not JSON by its header or content, not an object, too large, or too slow.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # A web page can send other types to a local server without being asked.
    if kind != "application/json":
        raise RequestError(
            f"the content type is {shorten(kind)}: send JSON with the header 'Content-Type: application/json'.",
            415,
            "unsupported_media_type",
        )
    data = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for chunk in request.stream():
                data += chunk
                if len(data) > limit:
                    raise too_large(limit)
    except TimeoutError as error:
        raise RequestError(
            f"the body did not arrive within {_BODY_SECONDS:.0f} s: send it faster.", 408, "timeout"
        ) from error
    try:
        body = parse_json(bytes(data))
    except ValueError as error:
        raise RequestError(f"the body is not JSON ({shorten(str(error))}): send one object.") from error
    if not isinstance(body, dict):
        raise RequestError(f"the body is a JSON {type(body).__name__}: send one object.")
    return body


async def leave_with_client(request: Request, job: Job, work: Any) -> Any:
    """Run a coroutine until it is done or the client leaves, which frees the job's place at once."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_wait_for_end(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise RequestError("the client closed the connection.", CLIENT_LEFT, "client_left")
        return task.result()
    except BaseException:
        job.cancelled.set()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        raise
    finally:
        gone.cancel()


async def _wait_for_end(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _read_own_field(given: object) -> tuple[object, bool]:
    """Return the context that a request names, and whether stored contexts may be used."""
    if given is None:
        return None, True
    if not isinstance(given, dict) or set(given) - {"context", "reuse"}:
        raise RequestError(
            f'rankkv is {shorten(given)}: give {{"context": id}}, or {{"reuse": false}} for a full prefill.',
            param="rankkv",
        )
    named, reuse = given.get("context"), given.get("reuse", True)
    if not isinstance(named, str | None) or not isinstance(reuse, bool) or (named is not None and not reuse):
        raise RequestError(
            "rankkv.context must be the id or name of a context, and rankkv.reuse true or false; a named context is "
            "always used.",
            param="rankkv",
        )
    return named, reuse


async def _refuse_closed(request: Request) -> JSONResponse:
    path = request.url.path
    body = build_body(
        f"{path} is closed on this server: the model is fixed when it starts.", 403, "closed_route"
    )
    return JSONResponse(body, 403)


async def _answer_refusal(request: Request, error: Exception) -> JSONResponse:
    status, body = describe_failure(error, request.scope["rankkv.id"])
    headers = error.headers if isinstance(error, RequestError) else None
    return JSONResponse(body, status, headers=headers)


async def _answer_http_error(request: Request, error: Exception) -> JSONResponse:
    status = error.status_code if isinstance(error, HTTPException) else 500
    detail = str(error.detail) if isinstance(error, HTTPException) else ""
    texts = {
        404: "there is no such route: GET /v1/models, POST /v1/chat/completions, /v1/completions, /v1/responses and "
        "/v1/contexts are there.",
        405: f"{request.method} is not possible here: the documentation lists the methods of each route.",
    }
    body = build_body(texts.get(status, detail), status)
    return JSONResponse(body, status, headers=getattr(error, "headers", None))
