"""An OpenAI-compatible server of a scripted model, independent of anydepth's, in which one fault can be planted."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from fake_model import ScriptedModel
from fake_script import EARLY, Answered, Refusal, Script

SECONDS_A_TOKEN = 0.004
"""For prompts that ask to count."""


class Handler(BaseHTTPRequestHandler):
    script: Script
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        if self.path != "/v1/models":
            self.refuse(Refusal(404, "no such route"))
            return
        card = {"id": "fake"} | ({} if self.script.lacks.get("lossless") else {"anydepth": {"lossless": True}})
        self.send_json(200, {"object": "list", "data": [card]})

    def do_POST(self) -> None:
        script, text = self.script, self.rfile.read(int(self.headers["Content-Length"]))
        try:
            body = json.loads(text)
        except ValueError:
            body = None
        try:
            script.check(self.path, body)
        except Refusal as refusal:
            self.refuse(refusal)
            return
        if script.lacks.get("capacity") and script.running:
            self.refuse(Refusal(429, "the queue is full"))
            return
        time.sleep(max(script.busy_until - time.monotonic(), 0))
        is_chat = "chat" in self.path
        prompt = body["messages"][-1]["content"] if is_chat else body["prompt"]
        answers = script.answers(body, prompt)
        if body.get("stream"):
            self.send_stream(body, prompt, answers, is_chat=is_chat)
            return
        choices = [self.choice(body, prompt, number, found, is_chat) for number, found in enumerate(answers)]
        self.send_json(200, {"choices": choices, "usage": script.usage(prompt, answers, streamed=False)})

    def choice(self, body: dict[str, Any], prompt: str, number: int, found: Answered, is_chat: bool) -> dict[str, Any]:
        script, text = self.script, self.script.text(found)
        values = script.logprobs(body, found.ids, found.logits, chat=is_chat)
        if body.get("echo"):
            text, values = script.echo(body, prompt, found)
        said = {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
        return {"index": number, **said, "logprobs": values, "finish_reason": found.reason}

    def send_stream(self, body: dict[str, Any], prompt: str, answers: list[Answered], *, is_chat: bool) -> None:
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        events = list(self.events(body, prompt, answers, is_chat))
        seconds = SECONDS_A_TOKEN if prompt.startswith("Count") else 0.0
        for number, event in enumerate(events):
            try:
                self.wfile.write(f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n".encode())
                self.wfile.flush()
            except OSError:
                if self.script.has("a cancelled answer is finished"):
                    self.script.busy_until = time.monotonic() + seconds * (len(events) - number)
                return
            time.sleep(seconds)

    def events(self, body: dict[str, Any], prompt: str, answers: list[Answered], is_chat: bool) -> Iterator[Any]:
        script, (found, *_) = self.script, answers
        stops = body.get("stop", [])
        texts = script.chunks(found, [stops] if isinstance(stops, str) else stops)

        def chunk(text: str, reason: str | None, values: Any = None) -> dict[str, Any]:
            said = {"delta": {"content": text}} if is_chat else {"text": text}
            return {"choices": [{"index": 0, **said, "logprobs": values, "finish_reason": reason}]}

        for number, text in enumerate(texts):
            one = slice(number, number + 1)
            values = script.logprobs(body, found.ids[one], found.logits[one], chat=is_chat)
            is_early = script.has(EARLY) and number == 3
            yield chunk(text, found.reason if is_early else None, values)
        if not script.has("the stream has no finish_reason") and not script.has(EARLY):
            yield chunk("", found.reason)
        if script.has("the stream ends twice"):
            yield chunk("", found.reason)
        if body.get("stream_options", {}).get("include_usage"):
            yield {"choices": [], "usage": script.usage(prompt, answers, streamed=True)}
        if not script.has("the stream is not done"):
            yield "[DONE]"

    def refuse(self, refusal: Refusal) -> None:
        if self.script.has("errors are plain text"):
            self.send_text(refusal.status, "text/plain", str(refusal))
        else:
            self.send_json(refusal.status, {"error": {"message": str(refusal), "type": "invalid_request_error"}})

    def send_json(self, status: int, value: Any) -> None:
        self.send_text(status, "application/json", json.dumps(value))

    def send_text(self, status: int, kind: str, text: str) -> None:
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


class Quiet(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def handle_error(self, *_: Any) -> None:
        """Print nothing about clients that disconnected."""


@contextmanager
def fake_server(fault: str | None = None, model: ScriptedModel | None = None, **lacks: bool) -> Iterator[str]:
    """The address of a server with this fault, which lacks some options."""
    handler = type("Planted", (Handler,), {"script": Script(fault, model, **lacks)})
    server = Quiet(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
