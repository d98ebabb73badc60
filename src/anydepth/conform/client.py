"""A client of one server over HTTP, which can also read a stream of events and disconnect in the midst of it."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from anydepth.errors import UserError

RETRY_SECONDS = 0.5
"""Pause between two tries of a request that a full server refuses with 429."""


class CheckError(Exception):
    """An answer with which a check cannot continue; the message says what came."""


class NoAnswer(CheckError):
    """The server did not answer in time, or closed the connection."""


class Malformed(CheckError):
    """An answer that is not an object of OpenAI's API."""


class Refused(CheckError):
    """A status other than 200."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"came status {status}, {message}; right is 200")
        self.status, self.message = status, message

    @property
    def is_mistake(self) -> bool:
        """Whether the server says that the request is wrong, as for a field that it does not have."""
        return 400 <= self.status < 500


@dataclass(frozen=True)
class Reply:
    """A status and a body: the value of its JSON, or its text."""

    status: int
    body: Any

    @property
    def message(self) -> str:
        """The reason of a refusal, in one line."""
        inner = self.body.get("error", self.body) if isinstance(self.body, dict) else self.body
        message = inner.get("message", inner) if isinstance(inner, dict) else inner
        return " ".join(str(message).split())[:160] or "an empty body"


@dataclass
class Stream:
    """The events of an answer; `is_done` says whether `[DONE]` came."""

    response: http.client.HTTPResponse
    line: socket.socket
    is_done: bool = field(default=False, init=False)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        try:
            for raw in self.response:
                name, _, data = raw.decode("utf-8").partition(":")
                if name != "data":
                    continue
                if data.strip() == "[DONE]":
                    self.is_done = True
                    return
                yield self._event(data)
        except (OSError, http.client.HTTPException) as error:
            raise NoAnswer(f"the stream broke: {reason_of(error)}") from error

    def _event(self, text: str) -> dict[str, Any]:
        try:
            event = json.loads(text)
        except ValueError as error:
            raise Malformed(f"an event of the stream is not JSON: {text[:80]}") from error
        if not isinstance(event, dict):
            raise Malformed(f"an event of the stream is not an object: {text[:80]}")
        if event.get("error"):
            raise Malformed(f"the stream has an error: {Reply(200, event).message}")
        return event

    def close(self) -> None:
        """Disconnect, also in the midst of the answer."""
        with suppress(OSError):
            self.line.shutdown(socket.SHUT_RDWR)
        self.response.close()
        self.line.close()


class Client:
    """Sends requests to one server, each on a connection of its own, from any thread.

    Args:
        url: address of the server, with or without `/v1` at its end.
        key: API key; None: no header for it.
        timeout: seconds without a byte after which an answer is given up.

    Raises:
        UserError: a URL that is no address of a server.
    """

    def __init__(self, url: str, key: str | None = None, timeout: float = 120.0) -> None:
        url = url if "://" in url else f"http://{url}"
        try:
            parts = urlsplit(url)
            self.host, self.port = parts.hostname, parts.port
        except ValueError as error:
            raise UserError(f"'{url}' is not a URL ({error}); give one such as http://127.0.0.1:8000") from error
        if parts.scheme not in ("http", "https") or not self.host:
            raise UserError(f"'{url}' is not the URL of a server; give one such as http://127.0.0.1:8000")
        self.url, self.scheme, self.timeout = url, parts.scheme, timeout
        self.root = parts.path.rstrip("/").removesuffix("/v1")
        self.headers = {"Content-Type": "application/json", "Accept": "*/*"}
        if key is not None:
            self.headers["Authorization"] = f"Bearer {key}"

    def get(self, path: str) -> Reply:
        return _read(*self._open("GET", path, None))

    def post(self, path: str, body: Any) -> Reply:
        """Send a body, which is text as it is or a value to write as JSON; try again while the server is full."""
        return _read(*self._open_free(path, body))

    def stream(self, path: str, body: dict[str, Any]) -> Stream:
        """Begin an answer in events.

        Raises:
            Refused: a status other than 200. Malformed: an answer that is no stream.
        """
        response, line = self._open_free(path, body)
        if response.status != 200:
            reply = _read(response, line)
            raise Refused(reply.status, reply.message)
        kind = response.getheader("Content-Type", "")
        if not kind.startswith("text/event-stream"):
            response.close()
            line.close()
            raise Malformed(f"stream: true came as '{kind}'; right is text/event-stream")
        return Stream(response, line)

    def _open_free(self, path: str, body: Any) -> tuple[http.client.HTTPResponse, socket.socket]:
        ends = time.monotonic() + self.timeout
        while True:
            response, line = self._open("POST", path, body)
            if response.status != 429 or time.monotonic() > ends:
                return response, line
            _read(response, line)
            time.sleep(RETRY_SECONDS)

    def _open(self, method: str, path: str, body: Any) -> tuple[http.client.HTTPResponse, socket.socket]:
        assert self.host is not None
        if self.scheme == "https":
            secured = ssl.create_default_context()
            connection = http.client.HTTPSConnection(self.host, self.port, timeout=self.timeout, context=secured)
        else:
            connection = http.client.HTTPConnection(self.host, self.port, timeout=self.timeout)
        content = body if body is None or isinstance(body, str) else json.dumps(body)
        try:
            connection.request(method, self.root + path, content and content.encode(), self.headers)
            line: Any = connection.sock  # the response takes it over
            return connection.getresponse(), line
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise NoAnswer(f"{method} {path}: {reason_of(error)}") from error


def _read(response: http.client.HTTPResponse, line: socket.socket) -> Reply:
    try:
        text = response.read().decode("utf-8", "replace")
    except (OSError, http.client.HTTPException) as error:
        raise NoAnswer(f"the answer broke: {reason_of(error)}") from error
    finally:
        response.close()
        line.close()
    try:
        return Reply(response.status, json.loads(text))
    except ValueError:
        return Reply(response.status, text)


def reason_of(error: Exception) -> str:
    """Return why a connection failed, in a few words."""
    if isinstance(error, TimeoutError):
        return "no answer in time; give a larger --timeout if the server is only slow"
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).lower()
