"""Listen for HTTP: a socket that is bound before a model is loaded, bounded requests, and refusals in JSON."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import urlsplit

import h11
import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from anydepth.errors import UserError
from anydepth.serve.refusals import INVALID, error
from anydepth.serve.service import Service

KEEP_ALIVE_SECONDS = 30
HEADER_SECONDS, BODY_SECONDS = 30, 30
"""Time that the headers of a request may take to arrive, and its body."""
BACKLOG = 2048
MAX_HEADER_BYTES = 1 << 16
MAX_BODY_BYTES = 1 << 20
HEADERS_TOO_LARGE = error(
    f"the request line and the headers are more than {MAX_HEADER_BYTES} bytes", INVALID, code="headers_too_large"
)
OTHER_HOST = error(
    "this server does not answer to that host name; start it with --allowed-host NAME", INVALID, code="host"
)
OTHER_ORIGIN = error(
    "pages of that origin may not use this server; start it with --cors-origin ORIGIN", INVALID, code="origin"
)
BODY_TOO_LARGE = error(f"the body is larger than {MAX_BODY_BYTES} bytes", INVALID, code="body_too_large")
HEADERS_TOO_SLOW = error("the headers did not arrive in time; send them at once", INVALID, code="headers_too_slow")
BODY_TOO_SLOW = error("the body did not arrive in time; send it at once", INVALID, code="body_too_slow")

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


def hosts_of(host: str, allowed: Iterable[str]) -> frozenset[str]:
    """Return the names that a server answers to, by the address it is bound to and those that are allowed.

    On loopback only those of this machine: a web page could else read it under a name that it lets resolve to
    127.0.0.1. An empty set is any name: of a server that others are to reach.
    """
    given = {name.lower() for name in allowed}
    is_loopback = host in LOOPBACK or host.startswith("127.")
    return LOOPBACK | {host.lower()} | given if is_loopback or given else frozenset()


def bind(host: str, port: int) -> socket.socket:
    """Bind a socket to an address of this machine, port 0 to any free port; raise `UserError` if that fails."""
    if not 0 <= port < 65536:
        raise UserError(f"--port is a number from 0 to 65535; got {port}")
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as failed:
        bound.close()
        reason = failed.strerror or os.strerror(failed.errno or 0)
        raise UserError(f"cannot bind {host}:{port} ({reason}); choose another --host or --port") from failed
    bound.set_inheritable(True)
    return bound


def listen(
    app: FastAPI,
    service: Service,
    bound: socket.socket,
    *,
    grace: float,
    ready: Callable[[], None],
    say: Callable[[str], None],
) -> None:
    """Call `ready`, and serve until a signal; requests that are running then have `grace` seconds to end.

    `say` is called with a line if there are any.
    """
    bound.listen(BACKLOG)
    ready()
    Listener(app, service, grace=grace, say=say).run(sockets=[bound])


class Listener(uvicorn.Server):
    """Serves an application until a signal, and then until the service has finished what it accepted.

    Meanwhile connections are accepted: `/health` is 503, and so is the refusal of further requests.
    """

    def __init__(self, app: FastAPI, service: Service, *, grace: float, say: Callable[[str], None]) -> None:
        config = uvicorn.Config(
            app,
            http=JSONRefusals,
            ws="none",
            log_level="error",
            access_log=False,
            server_header=False,
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            timeout_graceful_shutdown=max(int(grace), 1),
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
        )
        super().__init__(config)
        self.service, self.grace, self.say = service, grace, say
        self.deadline: float | None = None  # of the requests that run after a signal

    async def on_tick(self, counter: int) -> bool:
        """Return whether to shut down, which closes connections that have no request."""
        if not await super().on_tick(counter):
            return False
        if self.deadline is None:
            self.deadline = time.monotonic() + self.grace
            self.service.drain()
            if not self.service.is_idle:
                self.say(f"finishing what was accepted, for at most {self.grace:g} s; Ctrl-C again ends at once")
        left = self.deadline - time.monotonic()
        self.config.timeout_graceful_shutdown = max(int(left), 1)
        return self.force_exit or self.service.is_idle or left < 0


class JSONRefusals(H11Protocol):
    """The HTTP protocol with JSON refusals of invalid HTTP, and of headers that are too long or too slow."""

    due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:  # of a request, only a part of the headers is here
            self._await_headers()
        else:
            self._end_waiting()

    def _await_headers(self) -> None:
        if self.due is None:
            self.due = self.loop.call_later(HEADER_SECONDS, self._refuse_slow_headers)

    def _end_waiting(self) -> None:
        if self.due is not None:
            self.due.cancel()
            self.due = None

    def _refuse_slow_headers(self) -> None:
        if not self.transport.is_closing():
            self._refuse(408, b"Request Timeout", HEADERS_TOO_SLOW)

    def send_400_response(self, msg: str) -> None:
        if getattr(sys.exception(), "error_status_hint", 400) == 431:
            self._refuse(431, b"Request Header Fields Too Large", HEADERS_TOO_LARGE)
        else:
            self._refuse(400, b"Bad Request", error("the request is not valid HTTP", INVALID))

    def _refuse(self, status: int, reason: bytes, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        answer = h11.Response(status_code=status, headers=[*headers, (b"connection", b"close")], reason=reason)
        for event in (answer, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))
        self.transport.close()


class HostCheck:
    """Refuses requests to names that the server does not answer to, and those of pages of other origins."""

    def __init__(self, app: ASGIApp, hosts: frozenset[str], origins: Iterable[str] = ()) -> None:
        self.app, self.hosts, self.origins = app, hosts, frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self.hosts:
            sent = {name: value.decode("latin-1").lower() for name, value in scope["headers"]}
            asked, origin = sent.get(b"host", ""), sent.get(b"origin")
            name = asked[1:].partition("]")[0] if asked.startswith("[") else asked.partition(":")[0]
            if name not in self.hosts:
                await JSONResponse(OTHER_HOST, 403)(scope, receive, send)
                return
            if origin is not None and not self._is_own(origin):
                await JSONResponse(OTHER_ORIGIN, 403)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _is_own(self, origin: str) -> bool:
        """Return whether an origin is of the server's own host, at any port, an allowed one, or no page of the web."""
        if origin in self.origins or "*" in self.origins:
            return True
        try:
            parts = urlsplit(origin)
            return parts.hostname in self.hosts or bool(parts.scheme and parts.scheme not in ("http", "https"))
        except ValueError:
            return False


class SizeLimit:
    """Refuses headers and bodies that are too large, before they are read completely, and bodies that are too slow."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if _head_size(scope) > MAX_HEADER_BYTES:
            await JSONResponse(HEADERS_TOO_LARGE, 431, {"Connection": "close"})(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > MAX_BODY_BYTES:
            await JSONResponse(BODY_TOO_LARGE, 413)(scope, receive, send)
            return
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await _body(receive)
        except TimeoutError:
            await JSONResponse(BODY_TOO_SLOW, 408, {"Connection": "close"})(scope, receive, send)
            return
        if body is None:
            return
        if len(body) > MAX_BODY_BYTES:
            await JSONResponse(BODY_TOO_LARGE, 413)(scope, receive, send)
            return
        unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Message:
            return unread.pop() if unread else await receive()

        await self.app(scope, again, send)


async def _body(receive: Receive) -> bytes | None:
    """Return a body, of one that is too large the beginning; None: the client disconnected."""
    body, more = b"", True
    while more and len(body) <= MAX_BODY_BYTES:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body, more = body + message.get("body", b""), message.get("more_body", False)
    return body


def _head_size(scope: Scope) -> int:
    """Return the size in bytes of a request's line and headers; h11 limits incomplete ones alone."""
    line = len(scope["method"]) + len(scope.get("raw_path") or b"") + len(scope["query_string"]) + len("  HTTP/1.1\r\n")
    return line + sum(len(name) + len(value) + len(": \r\n") for name, value in scope["headers"])
