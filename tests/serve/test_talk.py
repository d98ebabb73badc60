"""Conversations: each answer is the model's text after the turns before it, also through pipes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import anydepth
from anydepth.errors import UserError
from anydepth.serve.service import Service
from anydepth.serve.talk import Talk
from drafts import ALONE, drafting
from tiny import byte_tokenizer, tiny_llama

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}a:"


@pytest.fixture
def service() -> Iterator[Service]:
    router = {"name": "layer_router", "always_keep": 2, "router": "random", "rates": [0.5] * 4}
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    service = Service(anydepth.FastEngine(anydepth.attach(tiny_llama(), router).eval()), tokenizer, max_batch_size=1)
    yield service
    service.close()


def alone(service: Service, text: str, new_tokens: int) -> str:
    ids = service.tokenizer(text, return_tensors="pt")["input_ids"]
    output = service.engine.generate(ids, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)  # type: ignore[arg-type]
    return str(service.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))  # type: ignore[union-attr]


def test_each_answer_follows_the_conversation(service: Service) -> None:
    talk = Talk(service, service.tokenizer, "be brief", 8, 0.0)
    pieces = list(talk.answer("hi"))
    first = "".join(text for text, _ in pieces)
    assert first == alone(service, "s:be brief;u:hi;a:", 8)
    assert all(2 <= depth <= 6 for _, depth in pieces)
    second = "".join(text for text, _ in talk.answer("so?"))
    assert second == alone(service, f"s:be brief;u:hi;a:{first};u:so?;a:", 8)


def test_a_closed_answer_ends_and_is_part_of_the_conversation(service: Service) -> None:
    talk = Talk(service, service.tokenizer, None, 60, 0.0)
    answer = talk.answer("hi")
    text, _ = next(answer)
    answer.close()
    assert talk.turns[-1] == {"role": "assistant", "content": text}
    assert list(talk.answer("go on"))


def test_a_conversation_longer_than_the_window_is_refused(service: Service) -> None:
    talk = Talk(service, service.tokenizer, "x" * 140, 8, 0.0)
    with pytest.raises(UserError, match="begin a new one"):
        list(talk.answer("hi"))


def test_the_command_works_through_pipes(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tiny_llama().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    command = [
        sys.executable,
        "-m",
        "anydepth.cli",
        "chat",
        str(tmp_path),
        "--max-new-tokens",
        "6",
        "--temperature",
        "0",
    ]
    done = subprocess.run(
        [*command, "--dtype", "float32"], input="hi\nso?\n\n", capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "layers run" not in done.stdout and "\x1b" not in done.stdout  # no colours, so no legend of them
    assert len(done.stdout.rstrip("\n").split("\n")) >= 2


def test_the_smallest_temperature_is_greedy(service: Service) -> None:
    talks = [Talk(service, service.tokenizer, None, 9, temperature) for temperature in (0.0, 1e-300)]
    said = ["".join(text for text, _ in talk.answer("hi")) for talk in talks]
    assert said[0] == said[1]


def test_sampled_conversations_are_the_same_whatever_is_drafted() -> None:
    """Drafts draw noise ahead; no later answer depends on how far they went."""
    tokenizer, conversations = byte_tokenizer(), []
    tokenizer.chat_template = TEMPLATE
    for max_draft in (1, 5):
        engine = drafting("fast", ({**ALONE, "exit_layers": [3], "max_draft": max_draft}, []))
        service = Service(engine, tokenizer, max_batch_size=1)
        service.end_ids = frozenset(range(0, 257, 8))  # so that answers end inside a draft
        said = []
        for seed in range(4):
            talk = Talk(service, tokenizer, None, 30, 1.0, lossless=True, seed=seed)
            said += ["".join(text for text, _ in talk.answer(line)) for line in ("hi", "hi", "so?")]
        conversations.append(said)
        service.close()
    assert conversations[0] == conversations[1]
    assert conversations[0][0] != conversations[0][1]


def test_sampled_answers_depend_on_the_seed(service: Service) -> None:
    said = []
    for seed in (1, 1, 2):
        talk = Talk(service, service.tokenizer, None, 12, 1.0, seed=seed)
        said.append("".join(text for text, _ in talk.answer("hi")))
    assert said[0] == said[1] != said[2]
    assert torch.is_grad_enabled()
