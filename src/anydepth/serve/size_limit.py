"""Bounds on the size of requests: of the headers and of the body."""

from __future__ import annotations

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from anydepth.serve.protocol import INVALID, error

MAX_HEADER_BYTES = 1 << 16
TOO_LONG = f"the request line and the headers are more than {MAX_HEADER_BYTES} bytes"


class SizeLimit:
    """Refuses headers and bodies that are too large, bodies before they are read completely."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if head_size(scope) > MAX_HEADER_BYTES:
            refusal = JSONResponse(error(TOO_LONG, INVALID, code="headers_too_large"), 431, {"Connection": "close"})
            await refusal(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self.most:
            await self._refuse(scope, receive, send)
            return
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body, more = body + message.get("body", b""), message.get("more_body", False)
            if len(body) > self.most:
                await self._refuse(scope, receive, send)
                return
        given = False

        async def again() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, again, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        text = f"the body is larger than {self.most} bytes"
        await JSONResponse(error(text, INVALID, code="body_too_large"), 413)(scope, receive, send)


def head_size(scope: Scope) -> int:
    """Return the size in bytes of a request's line and headers; h11 limits incomplete ones alone."""
    line = len(scope["method"]) + len(scope.get("raw_path") or b"") + len(scope["query_string"]) + len("  HTTP/1.1\r\n")
    return line + sum(len(name) + len(value) + len(": \r\n") for name, value in scope["headers"])
