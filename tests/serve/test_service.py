"""What stands between the server's requests and the engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import anydepth
from anydepth.decoding.scheduler import Request
from anydepth.engine.fast import FastEngine
from anydepth.serve.service import Drafted, Job
from anydepth.serve.text_stream import TextStream
from anydepth.speculation.counts import Counts
from anydepth.speculation.targets import EngineTarget
from tiny import byte_tokenizer, tiny_llama

NETWORK: dict[str, Any] = {"taps": [2, 6], "vocabulary_size": 100}


def drafted(engine: FastEngine, prompt: list[int], *, at_once: bool) -> tuple[list[int], Counts]:
    """What a lossless request says, and what was drafted."""
    request = Request(prompt, 12)
    run = Drafted(engine, Job(request, TextStream(byte_tokenizer(), prompt), put=lambda piece: None, lossless=True))
    while len(request.output) < 12:
        run.step(at_once=at_once)
    run.end()
    return request.output, run.counts


@pytest.mark.parametrize("options", [{"network": NETWORK}, {"exit_layers": [2], "lookup": False}])
def test_long_prompts_of_lossless_requests_are_read_in_parts_too(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While others wait, and the text is the same."""
    adapted = anydepth.attach(tiny_llama(max_position_embeddings=512), {"name": "self_speculation", **options})
    engine = FastEngine(adapted)
    prompt = torch.randint(1, 257, (400,), generator=torch.Generator().manual_seed(3)).tolist()
    parts: list[int | None] = []
    read = EngineTarget.read

    def noted(self: EngineTarget, row: Any, num_tokens: int | None = None) -> torch.Tensor:
        parts.append(num_tokens)
        return read(self, row, num_tokens)

    monkeypatch.setattr(EngineTarget, "read", noted)
    said, counts = drafted(engine, prompt, at_once=False)
    assert parts == [128, 128, None]  # 144 are left
    assert drafted(engine, prompt, at_once=True)[0] == said and parts[3:] == [None]
    with adapted.deciding():
        wanted = engine.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert said == wanted[0, len(prompt) :].tolist() and counts.num_drafted
