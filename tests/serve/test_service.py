"""What stands between the server's requests and the engine."""

from __future__ import annotations

import queue
from typing import Any

import pytest
import torch

import anydepth
from anydepth.inference.engine.batching import Request
from anydepth.inference.engine.decode import FastEngine
from anydepth.inference.targets import EngineTarget
from anydepth.serve.service import Job, Piece, Service
from anydepth.serve.text import TextStream
from tiny import byte_tokenizer, tiny_llama

NETWORK: dict[str, Any] = {"taps": [2, 6], "vocabulary_size": 100}


@pytest.mark.parametrize("options", [{"network": NETWORK}, {"exit_layers": [2], "lookup": False}])
def test_long_prompts_of_lossless_requests_are_read_in_parts_too(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted = anydepth.attach(tiny_llama(max_position_embeddings=512), {"name": "self_speculation", **options})
    engine = FastEngine(adapted)
    generator = torch.Generator().manual_seed(3)
    short, long = (torch.randint(1, 257, (length,), generator=generator).tolist() for length in (9, 400))
    parts: list[int | None] = []
    read = EngineTarget.read

    def noted(self: EngineTarget, row: Any, num_tokens: int | None = None) -> torch.Tensor:
        parts.append(num_tokens)
        return read(self, row, num_tokens)

    monkeypatch.setattr(EngineTarget, "read", noted)
    service = Service(engine, byte_tokenizer(), max_batch_size=2)
    try:
        pieces: queue.Queue[Piece] = queue.Queue()
        first = Job(Request(short, 200), TextStream(service.tokenizer, short), put=lambda piece: None)
        second = Job(Request(long, 12), TextStream(service.tokenizer, long), put=pieces.put, lossless=True)
        service.submit(first)
        while not first.num_said:
            pass
        service.submit(second)
        while pieces.get(timeout=60).finish_reason is None:
            pass
        assert not first.is_over
    finally:
        service.cancel(first)
        service.close()
    assert parts == [128, 128, None]  # 144 are left
    with adapted.deciding():
        wanted = engine.generate(torch.tensor([long]), max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert second.request.output == wanted[0, len(long) :].tolist()
    assert second.counts is not None and second.counts.num_drafted
