"""OpenAI's API on a `Service`: completions, chat completions, models, health, metrics and the playground."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import inspect
import json
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.resources import files
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException as StarletteHTTPException
from transformers import LogitsProcessor, MinNewTokensLengthLogitsProcessor, PreTrainedTokenizerBase

from anydepth import __version__
from anydepth.decoding import request as decoding
from anydepth.decoding.sampler import Stops
from anydepth.decoding.sampling_options import LogitBias, Penalties, SamplingOptions
from anydepth.errors import UserError
from anydepth.models.tokens import encode_batch
from anydepth.serve.http import HostCheck, SizeLimit
from anydepth.serve.metrics import Metrics
from anydepth.serve.protocol import INVALID, ChatCompletion, Completion, Error, Sampling, error, explained, is_text
from anydepth.serve.service import Busy, Job, Piece, Service
from anydepth.serve.shapes import ChatShape, CompletionShape, Shape, usage_of
from anydepth.serve.text_stream import TextStream, TokenText
from anydepth.serve.tools import format_of

log = logging.getLogger("anydepth.serve")
BROKEN = "decoding failed; the server's log says why"  # the error itself may contain parts of a prompt
TEMPLATE_OPTIONS = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
MAX_NEW_TOKENS = 4096  # of an answer
REFUSALS = (400, 401, 404, 408, 413, 429, 431)
STREAMED = {200: {"description": "The answer, complete or as events.", "content": {"text/event-stream": {}}}}


@dataclass(frozen=True)
class Settings:
    """Settings of a server.

    Attributes:
        name: that of the model. seed: of requests without one; None: a new one each.
        is_strict: refuse a `max_tokens` that does not fit, which is cut to what fits otherwise.
        hosts: names that it answers to; empty: any.
        origins: web pages that may read it.
    """

    name: str
    api_key: str | None = None
    request_seconds: float = 600.0
    seed: int | None = None
    is_strict: bool = False
    hosts: frozenset[str] = frozenset()
    origins: tuple[str, ...] = ()


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
    app.add_middleware(HostCheck, hosts=settings.hosts)
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
    """Make every refusal a JSON object that repeats nothing from the request except the name of an unknown field."""

    def invalid(_: Request, raised: Any) -> Response:
        return JSONResponse(explained(raised.errors()), 400)

    def refused(_: Request, raised: Any) -> Response:
        kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(
            raised.status_code, INVALID
        )
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
        self.seeds, self.tokens = random.Random(settings.seed), TokenText(tokenizer)
        self.logged = set[str]()

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
        adapted = self.service.engine.adapted
        own = {
            "num_layers": adapted.backbone.num_layers,
            "attached": ", ".join(method.name for method in adapted.attached) or "nothing that skips",
            "skips": bool(adapted.attached),
            "depth_budget": self.service.budgets is not None,
            "lossless": self.service.engine.drafting is not None,
        }
        return {"id": self.settings.name, "object": "model", "created": 0, "owned_by": "anydepth", "anydepth": own}

    def _check_model(self, name: str) -> None:
        if name != self.settings.name:
            raise HTTPException(404, f"this server has no such model; use {self.settings.name}, see GET /v1/models")

    async def complete(self, body: Completion, request: Request) -> Response:
        """Answer `POST /v1/completions`."""
        self._check_model(body.model)
        prompts = self._prompts(body)
        wanted = (
            16 if body.max_tokens is None else max(body.max_tokens, 1)
        )  # 0: the prompt alone, and one that is left out
        jobs, texts = list[Job](), list[str]()
        for place, prompt in enumerate(prompts):
            for number in range(body.n or 1):
                jobs.append(self._job(body, prompt, wanted, number, body.logprobs))
                jobs[-1].request.scores_prompt = bool(body.echo) and body.logprobs is not None
                texts.append(self._text_of(body, place, prompt) if body.echo else "")
        shape = CompletionShape(self.tokens, self.settings.name, body, list(zip(texts, jobs, strict=True)))
        return await self._answer(body, request, jobs, shape)

    def _text_of(self, body: Completion, place: int, prompt: list[int]) -> str:
        """Return the text of a prompt as it was sent, or that of its token ids."""
        sent: Any = body.prompt if isinstance(body.prompt, str) else body.prompt[place]
        if isinstance(sent, str):
            return sent
        return str(self.tokenizer.decode(prompt, skip_special_tokens=body.skip_special_tokens is not False))

    async def chat(self, body: ChatCompletion, request: Request) -> Response:
        """Answer `POST /v1/chat/completions`."""
        self._check_model(body.model)
        if self.tokenizer.chat_template is None:
            raise HTTPException(400, "this model has no chat template; use /v1/completions")
        tools = format_of(self.tokenizer.chat_template) if body.offered else None
        if body.offered and tools is None:
            raise HTTPException(
                400, "tools: the chat template of this model has none, or a format that is not known here"
            )
        prompt = self._chat_prompt(body)
        wanted = body.max_completion_tokens or body.max_tokens or MAX_NEW_TOKENS
        num_logprobs = (body.top_logprobs or 0) if body.logprobs else None
        jobs = [self._job(body, prompt, wanted, number, num_logprobs) for number in range(body.n or 1)]
        return await self._answer(body, request, jobs, ChatShape(self.tokens, self.settings.name, body, tools))

    def _chat_prompt(self, body: ChatCompletion) -> list[int]:
        """Return the token ids of a conversation, by the model's template."""
        turns = [message.as_turn() for message in body.messages]
        own = body.chat_template_kwargs or {}
        if taken := sorted(own.keys() & TEMPLATE_OPTIONS):  # a template of the client's could run for ever
            raise HTTPException(400, f"chat_template_kwargs: {taken[0]} is not an input of a template; leave it out")
        options: dict[str, Any] = {
            **own,
            "add_generation_prompt": body.add_generation_prompt is not False and not body.continue_final_message,
            "continue_final_message": bool(body.continue_final_message),
            **({"tools": body.offered} if body.offered else {}),
        }
        try:
            text = str(self.tokenizer.apply_chat_template(turns, tokenize=False, **options))
        except Exception as failed:  # templates raise errors of any type about the order of roles
            raise HTTPException(400, "the chat template does not support these roles in this order") from failed
        if not is_text(text):  # JSON within JSON, such as arguments of a call, can spell one
            raise HTTPException(400, "messages: half of a surrogate pair is not a character; send the whole character")
        (prompt,) = encode_batch(self.tokenizer, [text], special=bool(body.add_special_tokens))
        return prompt

    def _prompts(self, body: Completion) -> list[list[int]]:
        prompt: Any = [body.prompt] if isinstance(body.prompt, str) or isinstance(body.prompt[0], int) else body.prompt
        if isinstance(prompt[0], str):
            return encode_batch(self.tokenizer, prompt, special=body.add_special_tokens is not False)
        size = self.service.engine.adapted.config.vocab_size
        if max(map(max, prompt)) >= size:
            raise HTTPException(400, f"prompt: token ids must be below {size}")
        return prompt

    def _capacity(self, prompt: list[int]) -> int:
        """Return the number of new tokens that fit after a prompt."""
        most = self.service.max_length
        if not prompt:
            raise HTTPException(400, "the prompt is empty; give at least one token")
        if len(prompt) >= most:
            raise HTTPException(
                400,
                f"the prompt has {len(prompt)} tokens; at most {most - 1} fit here (the model's window, or "
                "the server's --max-tokens divided by --max-batch-size)",
            )
        return most - len(prompt)

    def _job(self, body: Sampling, prompt: list[int], wanted: int, number: int, num_logprobs: int | None) -> Job:
        capacity = min(self._capacity(prompt), MAX_NEW_TOKENS)
        is_asked = bool(getattr(body, "max_completion_tokens", None) or body.max_tokens)  # type: ignore[attr-defined]
        if wanted > capacity and is_asked and self.settings.is_strict:
            raise HTTPException(
                400, f"{wanted} new tokens do not fit after a prompt of {len(prompt)}; ask for at most {capacity}"
            )
        wanted = min(wanted, capacity)
        if body.anydepth.depth_budget is not None and self.service.budgets is None:
            raise HTTPException(
                400,
                "anydepth.depth_budget: no attached method has a threshold to set, as routers and exit gates have; "
                "leave it out",
            )
        config = self.service.engine.adapted.generation_config
        chosen = {name: getattr(body, name) for name in ("temperature", "top_p", "min_p", "repetition_penalty")}
        options = SamplingOptions.of(config, **chosen, top_k=None if body.top_k is None else max(body.top_k, 0))
        end_ids = [*([] if body.ignore_eos else self.service.end_ids), *(body.stop_token_ids or [])]
        penalties: list[LogitsProcessor] = []
        if body.bias:
            size = self.service.engine.adapted.config.vocab_size
            if max(body.bias) >= size:
                raise HTTPException(400, f"logit_bias: token ids must be below {size}")
            penalties.append(LogitBias(body.bias))
        if body.presence_penalty or body.frequency_penalty:
            penalties.append(Penalties(len(prompt), body.presence_penalty or 0.0, body.frequency_penalty or 0.0))
        if body.min_tokens and end_ids:
            device: Any = self.service.engine.adapted.device
            penalties.append(MinNewTokensLengthLogitsProcessor(len(prompt), body.min_tokens, end_ids, device=device))
        seed = self.seeds.getrandbits(63) if body.seed is None else body.seed + number
        request = decoding.Request(
            prompt,
            self.service.sampler(options, seed, *penalties),
            Stops.at(len(prompt) + wanted, end_ids),
            full_depth=body.anydepth.full_depth,
            budget=body.anydepth.depth_budget,
            num_logprobs=num_logprobs,
            is_traced=body.anydepth.depth,
        )
        # The marks of calls are special tokens in some tokenizers.
        shows_special = body.skip_special_tokens is False or bool(getattr(body, "offered", None))
        stream = TextStream(self.tokenizer, prompt, body.stops, shows_special=shows_special)
        return Job(
            request,
            stream,
            put=lambda piece: None,
            lossless=self._is_lossless(body),
            seconds=self.settings.request_seconds,
        )

    def _log_ignored(self, body: Sampling) -> None:
        """Log the name of each field that changes nothing here, once."""
        for name in body.ignored:
            if name not in self.logged:
                self.logged.add(name)
                log.info("requests have %s, which changes nothing here", name)

    def _is_lossless(self, body: Sampling) -> bool:
        own = body.anydepth
        if own.lossless is None:
            return self.service.is_lossless and own.depth_budget is None and not own.full_depth
        return own.lossless

    async def _answer(self, body: Sampling, request: Request, jobs: list[Job], shape: Shape) -> Response:
        self._log_ignored(body)
        queue: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def put(number: int, piece: Piece) -> None:
            with suppress(RuntimeError):  # the event loop has ended, so that no client reads the answer
                loop.call_soon_threadsafe(queue.put_nowait, (number, piece))

        for number, job in enumerate(jobs):
            job.put = partial(put, number)
        try:
            self.service.submit(*jobs)
        except Busy as busy:
            raise HTTPException(429, str(busy), {"Retry-After": str(busy.retry_after)}) from busy
        except UserError as invalid:
            raise HTTPException(400, str(invalid)) from invalid
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
