"""A server in this process, and tokenizers of the kinds whose tokens are not text."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
from fastapi.testclient import TestClient
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

import anydepth
from anydepth import Draft
from anydepth.decoding.engines import open_engine
from anydepth.serve.api import Settings, create_app
from anydepth.serve.http import Listener, bind
from anydepth.serve.service import Service
from tiny import byte_tokenizer, tiny_llama

TEMPLATE = (
    "{{ bos_token or '' }}{% for turn in messages %}{{ turn.role }}: {{ turn.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
DRAFTS = {"exit_layers": [2], "adaptive": False, "lookup": False}
"""Options of drafting."""


@contextmanager
def serving(
    *methods: Any,
    draft: dict[str, Any] | None = None,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    strict: bool = False,
    hosts: Iterable[str] = (),
    origins: Iterable[str] = (),
    **limits: int,
) -> Iterator[TestClient]:
    """Yield a client of a server of a tiny model with these methods attached, which drafts with these options."""
    tokenizer = byte_tokenizer() if tokenizer is None else tokenizer
    if tokenizer.chat_template is None:
        tokenizer.chat_template = TEMPLATE
    adapted = anydepth.attach(tiny_llama() if model is None else model, list(methods)).eval()
    drafting = None if draft is None else Draft(adapted, draft)
    service = Service(open_engine(adapted, say=lambda _: None, draft=drafting), tokenizer, **limits)
    settings = Settings("tiny", is_strict=strict, hosts=frozenset(hosts), origins=tuple(origins))
    with TestClient(create_app(service, tokenizer, settings)) as client:
        yield client  # leaving it closes the service


@contextmanager
def listening(
    *,
    draft: dict[str, Any] | None = None,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    api_key: str | None = None,
    **limits: int,
) -> Iterator[tuple[str, Listener]]:
    """Yield the address of a server of a tiny model in a thread, and its listener, which `should_exit` ends."""
    tokenizer = byte_tokenizer() if tokenizer is None else tokenizer
    if tokenizer.chat_template is None:
        tokenizer.chat_template = TEMPLATE
    adapted = anydepth.attach(tiny_llama() if model is None else model, []).eval()
    drafting = None if draft is None else Draft(adapted, draft)
    service = Service(open_engine(adapted, say=lambda _: None, draft=drafting), tokenizer, **limits)
    bound = bind("127.0.0.1", 0)
    address = f"http://127.0.0.1:{bound.getsockname()[1]}"
    listener = Listener(create_app(service, tokenizer, Settings("tiny", api_key)), service, grace=600, say=print)
    bound.listen()
    thread = threading.Thread(target=listener.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        assert httpx.get(f"{address}/health", timeout=60).status_code == 200
        yield address, listener
    finally:
        listener.should_exit = True
        thread.join(60)
        assert not thread.is_alive(), "the server does not end"


def wait_until(holds: Any, seconds: float = 30) -> None:
    """Wait until a condition holds, for so many seconds at most."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


def complete(client: TestClient, prompt: Any = "the sea", **options: Any) -> dict[str, Any]:
    """Return the answer of a completion that is taken."""
    answer = client.post("/v1/completions", json={"model": "tiny", "prompt": prompt, "max_tokens": 24, **options})
    assert answer.status_code == 200, answer.text
    return answer.json()


def chat(client: TestClient, text: str = "the sea", **options: Any) -> dict[str, Any]:
    """Return the answer of a chat completion that is taken."""
    body = {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 24, **options}
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def refusal(client: TestClient, **body: Any) -> dict[str, Any]:
    """Return the error of a completion that is refused with 400."""
    answer = client.post("/v1/completions", json={"model": "tiny", "prompt": "a", **body})
    assert answer.status_code == 400, answer.text
    return answer.json()["error"]


def fallback_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer as Llama 2 has it: pieces with ▁ for spaces, a token for each byte, and a BOS in front."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz:"]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    vocab["▁a"] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("▁", "a")], byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>"
    )
