"""Listen for HTTP: a socket that is bound before a model is loaded, and a server with JSON refusals."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from anydepth.errors import UserError
from anydepth.serve.protocol import INVALID, error
from anydepth.serve.size_limit import MAX_HEADER_BYTES, TOO_LONG

KEEP_ALIVE_SECONDS = 30
BACKLOG = 2048


def bind(host: str, port: int) -> socket.socket:
    """Bind a socket to an address of this machine; port 0 is any free port.

    Raises:
        UserError: the port does not exist or is in use.
    """
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


def listen(app: FastAPI, bound: socket.socket, *, grace: float, ready: Callable[[], None]) -> None:
    """Serve until a signal; requests that are running then have `grace` seconds to end.

    Args:
        ready: called as soon as clients can connect.
    """
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
    bound.listen(BACKLOG)
    ready()
    uvicorn.Server(config).run(sockets=[bound])


class JSONRefusals(H11Protocol):
    """The HTTP protocol with JSON refusals of invalid HTTP and of endless headers."""

    def send_400_response(self, msg: str) -> None:
        too_long = getattr(sys.exception(), "error_status_hint", 400) == 431
        refusal = (
            error(TOO_LONG, INVALID, code="headers_too_large")
            if too_long
            else error("the request is not valid HTTP", INVALID)
        )
        body = json.dumps(refusal).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        status, reason = (431, b"Request Header Fields Too Large") if too_long else (400, b"Bad Request")
        answer = h11.Response(status_code=status, headers=[*headers, (b"connection", b"close")], reason=reason)
        for event in (answer, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))
        self.transport.close()
