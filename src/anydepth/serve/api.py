"""OpenAI's API on a `Service`: completions, chat completions, models, health, metrics and the playground."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from functools import partial
from importlib.resources import files
from typing import Annotated, Any

from anyio import CapacityLimiter, to_thread
from fastapi import Depends, FastAPI, HTTPException, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException as StarletteHTTPException
from transformers import PreTrainedTokenizerBase

from anydepth import __version__
from anydepth.errors import UserError
from anydepth.serve.http import HostCheck, SizeLimit
from anydepth.serve.jobs import DEFAULT_NEW_TOKENS, MAX_NEW_TOKENS, Jobs, Settings
from anydepth.serve.metrics import Metrics
from anydepth.serve.protocol import ChatCompletion, Completion, Sampling
from anydepth.serve.refusals import INVALID, Error, error, explained
from anydepth.serve.service import Busy, Closing, Job, Piece, Service
from anydepth.serve.shapes import ChatShape, CompletionShape, Shape, usage_of
from anydepth.serve.text_stream import TokenText
from anydepth.serve.tools import format_of

log = logging.getLogger("anydepth.serve")
BROKEN = "decoding failed; the server's log says why"  # the error itself may contain parts of a prompt
REFUSALS = (400, 401, 403, 404, 408, 413, 429, 431, 503)
KINDS = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "server_error",
}
STREAMED = {200: {"description": "The answer, complete or as events.", "content": {"text/event-stream": {}}}}


def create_app(service: Service, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> FastAPI:
    """Return the ASGI application, which closes the service at shutdown after its accepted requests."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.get_running_loop().run_in_executor(None, service.close)

    app = FastAPI(
        title="anydepth",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        responses={code: {"model": Error} for code in REFUSALS},
    )
    app.add_middleware(HostCheck, hosts=settings.hosts, origins=settings.origins)
    app.add_middleware(SizeLimit)
    if settings.origins:  # the outermost, so that pages can read refusals too
        allowed: Any = {"allow_origins": settings.origins, "allow_methods": ["GET", "POST"], "allow_headers": ["*"]}
        app.add_middleware(CORSMiddleware, **allowed)
    _errors(app)
    server = Server(service, tokenizer, settings)
    keyed = [Depends(_key_check(settings.api_key))]
    app.add_api_route("/v1/models", server.models, methods=["GET"], dependencies=keyed)
    app.add_api_route("/v1/models/{name:path}", server.model, methods=["GET"], dependencies=keyed)
    posted: dict[str, Any] = {"methods": ["POST"], "dependencies": keyed, "response_model": None, "responses": STREAMED}
    app.add_api_route("/v1/completions", server.complete, **posted)
    app.add_api_route("/v1/chat/completions", server.chat, **posted)
    app.add_api_route("/metrics", Metrics(service).page, methods=["GET"], dependencies=keyed)
    app.add_api_route("/health", server.health, methods=["GET"])
    app.add_api_route("/", playground(), methods=["GET"], include_in_schema=False)
    _remove_422(app)
    return app


def _remove_422(app: FastAPI) -> None:
    """Remove FastAPI's 422 from the OpenAPI document: an invalid body is a 400 here, as with OpenAI."""
    schema = app.openapi()
    for path in schema["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(name, None)


def playground() -> Callable[[], Awaitable[Response]]:
    """Return the handler of `GET /`: the page, which may load nothing and run its own script alone."""
    page = files("anydepth.serve").joinpath("playground.html").read_text(encoding="utf-8")

    def allowed(tag: str) -> str:
        inner = page[page.index(f"<{tag}>") + len(tag) + 2 : page.index(f"</{tag}>")]
        return f"'sha256-{base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()}'"

    policy = (
        f"default-src 'none'; script-src {allowed('script')}; style-src {allowed('style')}; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}

    async def show() -> Response:
        return HTMLResponse(page, headers=headers)

    return show


def _key_check(wanted: str | None) -> Callable[[Any], None]:
    def check(sent: Annotated[HTTPAuthorizationCredentials | None, Security(HTTPBearer(auto_error=False))]) -> None:
        given = "" if sent is None else sent.credentials
        if wanted is not None and not hmac.compare_digest(given.encode(), wanted.encode()):
            raise HTTPException(
                401, "the API key is missing or wrong; send Authorization: Bearer KEY", {"WWW-Authenticate": "Bearer"}
            )

    return check


def _errors(app: FastAPI) -> None:
    """Make every refusal a JSON object that repeats nothing from the request but names of fields and of a schema."""

    def invalid(_: Request, raised: Any) -> Response:
        return JSONResponse(explained(raised.errors()), 400)

    def refused(_: Request, raised: Any) -> Response:
        kind = KINDS.get(raised.status_code, INVALID)
        return JSONResponse(error(str(raised.detail), kind), raised.status_code, raised.headers)

    def failed(_: Request, raised: Exception) -> Response:
        return JSONResponse(error(BROKEN, "server_error"), 500)

    app.add_exception_handler(Exception, failed)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(StarletteHTTPException, refused)


class Server:
    """The endpoints."""

    def __init__(self, service: Service, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> None:
        self.service, self.tokenizer, self.settings = service, tokenizer, settings
        self.jobs, self.tokens = Jobs(service, tokenizer, settings), TokenText(tokenizer)
        self.logged, self.one_schema = set[str](), CapacityLimiter(1)

    async def models(self) -> dict[str, Any]:
        """List the models, of which there is one."""
        return {"object": "list", "data": [self._card()]}

    async def model(self, name: str) -> dict[str, Any]:
        """Describe the model."""
        self._check_model(name)
        return self._card()

    async def health(self) -> Response:
        """Answer 200 while requests are accepted, else 503."""
        alive = self.service.thread.is_alive() and not self.service.is_closing
        return JSONResponse({"status": "ok" if alive else "closing"}, 200 if alive else 503)

    def _card(self) -> dict[str, Any]:
        adapted, budgets = self.service.engine.adapted, self.service.budgets
        own = {
            "num_layers": adapted.backbone.num_layers,
            "attached": ", ".join(method.name for method in adapted.attached) or "nothing that skips",
            "skips": bool(adapted.attached),
            "depth_budget": budgets is not None,
            "max_risk": budgets is not None and budgets.tested is not None,
            "lossless": self.service.engine.drafting is not None,
        }
        return {"id": self.settings.name, "object": "model", "created": 0, "owned_by": "anydepth", "anydepth": own}

    def _check_model(self, name: str) -> None:
        if name != self.settings.name:
            raise HTTPException(404, f"this server has no such model; use {self.settings.name}, see GET /v1/models")

    async def complete(self, body: Completion, request: Request) -> Response:
        """Answer `POST /v1/completions`."""
        self._check_model(body.model)
        return await self._answer(body, request, *await self._made(self._completion, body))

    def _completion(self, body: Completion) -> tuple[list[Job], Shape]:
        # With max_tokens 0 one token is decoded, which the answer leaves out.
        wanted = DEFAULT_NEW_TOKENS if body.max_tokens is None else max(body.max_tokens, 1)
        jobs, texts = list[Job](), list[str]()
        for place, prompt in enumerate(self.jobs.prompts(body)):
            for number in range(body.n or 1):
                jobs.append(self.jobs.job(body, prompt, wanted, number, body.logprobs))
                jobs[-1].request.scores_prompt = bool(body.echo) and body.logprobs is not None
                texts.append(self.jobs.text_of(body, place, prompt) if body.echo else "")
        return jobs, CompletionShape(self.tokens, self.settings.name, body, list(zip(texts, jobs, strict=True)))

    async def chat(self, body: ChatCompletion, request: Request) -> Response:
        """Answer `POST /v1/chat/completions`."""
        self._check_model(body.model)
        return await self._answer(body, request, *await self._made(self._chat, body))

    async def _made(self, make: Callable[[Any], tuple[list[Job], Shape]], body: Sampling) -> tuple[list[Job], Shape]:
        """Make the jobs of a body that fits, in a thread: templates and tokenizers would keep every stream waiting."""
        with _refusals():
            self.service.check_count(body.num_answers)
        # One schema at a time, so that those of one client keep neither all threads nor all cores.
        limiter = self.one_schema if body.form is not None else None
        return await to_thread.run_sync(make, body, limiter=limiter)

    def _chat(self, body: ChatCompletion) -> tuple[list[Job], Shape]:
        if self.tokenizer.chat_template is None:
            raise HTTPException(400, "this model has no chat template; use /v1/completions")
        tools = format_of(self.tokenizer.chat_template) if body.offered else None
        if body.offered and tools is None:
            raise HTTPException(
                400, "tools: the chat template of this model has none, or a format that is not known here"
            )
        prompt = self.jobs.chat_prompt(body)
        wanted = body.max_completion_tokens or body.max_tokens or MAX_NEW_TOKENS
        num_logprobs = (body.top_logprobs or 0) if body.logprobs else None
        jobs = [self.jobs.job(body, prompt, wanted, number, num_logprobs) for number in range(body.n or 1)]
        return jobs, ChatShape(self.tokens, self.settings.name, body, tools)

    def _log_ignored(self, body: Sampling) -> None:
        """Log the name of each field that changes nothing here, once."""
        for name in body.ignored:
            if name not in self.logged:
                self.logged.add(name)
                log.info("requests have %s, which changes nothing here", name)

    async def _answer(self, body: Sampling, request: Request, jobs: list[Job], shape: Shape) -> Response:
        self._log_ignored(body)
        queue: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def put(number: int, piece: Piece) -> None:
            with suppress(RuntimeError):  # the event loop has ended, so that no client reads the answer
                loop.call_soon_threadsafe(queue.put_nowait, (number, piece))

        for number, job in enumerate(jobs):
            job.put = partial(put, number)
        with _refusals():
            self.service.submit(*jobs)
        if body.stream:
            events = self._events(body, jobs, queue, shape)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        return await self._response(body, request, jobs, queue, shape)

    async def _events(self, body: Sampling, jobs: list[Job], queue: Any, shape: Shape) -> AsyncIterator[str]:
        """Yield server-sent events; an error is an event as well, since the status has been sent."""
        try:
            async for number, piece in _pieces(jobs, queue):
                if failure := _failure_of(piece):
                    yield _event(failure[0])
                    return
                for part in _chunks(piece):
                    yield _event(shape.answer([shape.part(number, part)], stream=True))
            if body.stream_options is not None and body.stream_options.include_usage:
                yield _event(shape.answer([], stream=True, usage=usage_of(jobs, body)))
            yield "data: [DONE]\n\n"
        except Exception as failed:
            log.error("an answer could not be written", exc_info=failed)
            yield _event(error(BROKEN, "server_error"))
        finally:  # also when the client disconnects
            self._cancel(jobs)

    async def _response(self, body: Sampling, request: Request, jobs: list[Job], queue: Any, shape: Shape) -> Response:
        async def complete() -> Response:
            pieces: list[list[Piece]] = [[] for _ in jobs]
            async for number, piece in _pieces(jobs, queue):
                if failure := _failure_of(piece):
                    return JSONResponse(*failure)
                pieces[number].append(piece)
            choices = [shape.choice(number, parts) for number, parts in enumerate(pieces)]
            return JSONResponse(shape.answer(choices, stream=False, usage=usage_of(jobs, body)))

        answer, disconnected = asyncio.ensure_future(complete()), asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({answer, disconnected}, return_when=asyncio.FIRST_COMPLETED)
            return answer.result() if answer.done() else Response(status_code=499)
        finally:
            answer.cancel()
            disconnected.cancel()
            self._cancel(jobs)

    def _cancel(self, jobs: list[Job]) -> None:
        for job in jobs:
            self.service.cancel(job)


@contextmanager
def _refusals() -> Iterator[None]:
    """Turn the service's errors into refusals."""
    try:
        yield
    except Busy as busy:
        raise HTTPException(429, str(busy), {"Retry-After": str(busy.retry_after)}) from busy
    except Closing as closing:
        raise HTTPException(503, str(closing), {"Retry-After": "5"}) from closing
    except UserError as invalid:
        raise HTTPException(400, str(invalid)) from invalid


async def _pieces(jobs: list[Job], queue: Any) -> AsyncIterator[tuple[int, Piece]]:
    """Yield the pieces of all answers, each with the number of its answer."""
    left = len(jobs)
    while left:
        number, piece = await queue.get()
        left -= piece.finish_reason is not None
        yield number, piece


def _chunks(piece: Piece) -> list[Piece]:
    """Return a piece of a stream; the reason why an answer ends is on a chunk of its own, as with OpenAI."""
    if piece.finish_reason is None or not (piece.text or piece.tokens):
        return [piece]
    return [replace(piece, finish_reason=None), Piece("", [], piece.finish_reason)]


async def _disconnected(request: Request) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(0.1)


def _event(fields: dict[str, Any]) -> str:
    return f"data: {json.dumps(fields)}\n\n"


def _failure_of(piece: Piece) -> tuple[dict[str, Any], int] | None:
    """Return the body and the status of a refusal if a piece reports a failure."""
    if piece.finish_reason == "timeout":
        return error("the request exceeded the server's --timeout; ask for fewer tokens", "timeout_error"), 408
    return (error(BROKEN, "server_error"), 500) if piece.finish_reason == "error" else None
