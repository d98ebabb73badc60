"""The trained drafter on the fast engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import anydepth
from anydepth import FastEngine
from anydepth.decoding.request import Request
from anydepth.decoding.sampler import Sampler, Stops
from anydepth.engine.session import FastSession
from anydepth.speculation.drafter_training import DraftTraining, collate
from anydepth.speculation.trained_drafter import TrainedDrafter
from drafts import network_of, texts_of, untrained_draft
from tiny import tiny_llama


def planted(engine: FastEngine, states: torch.Tensor, ids: list[int]) -> tuple[FastSession, Request]:
    """Return a session that has captured (N, taps, D) states, and the request that they are of."""
    session = engine.new_session(1)
    request = Request(ids, Sampler(), Stops.at(len(ids) + 9), sequence=session.open())
    session.states[request.kv] = list(states.unbind(1))
    return session, request


@torch.no_grad()
def test_training_computes_the_logits_of_the_engine(tmp_path: Path) -> None:
    """The guesses of a whole text at once are those that the drafter makes behind each of its tokens."""
    draft, adapted = untrained_draft(), anydepth.attach(tiny_llama(), []).eval()
    engine = FastEngine(adapted)
    text = max(texts_of(tmp_path), key=lambda one: len(one.ids))
    network = network_of(draft)
    torch.nn.init.normal_(network.join.weight, std=0.2, generator=torch.Generator().manual_seed(1))
    network.vocabulary.copy_(torch.arange(40, 100))
    seen: list[torch.Tensor] = []
    training = DraftTraining(network, adapted.backbone, num_drafted=3)
    own = torch.nn.functional.linear

    def noted(inputs: Any, weight: Any, *rest: Any) -> Any:
        output = own(inputs, weight, *rest)
        if weight is training.head:
            seen.append(output)
        return output

    torch.nn.functional.linear = noted
    try:
        training(*collate([text]))
    finally:
        torch.nn.functional.linear = own
    guesses = seen[1:]  # the first are the teacher's
    drafter = TrainedDrafter(engine.model, network)
    for end in range(2, len(text.ids) - 3):
        session, row = planted(engine, text.states[:end], text.ids[: end + 1].tolist())
        drafter.observe(session, [row])
        for number in range(3):
            found: list[torch.Tensor] = []

            def choose(rows: Any, logits: torch.Tensor, vocabulary: Any, found: Any = found) -> Any:
                found.append(logits[0])
                return [0], [0.5]

            drafter.propose(session, [row], choose)
            wanted = guesses[number][0, end - 1]
            assert torch.allclose(found[0], wanted, atol=1e-4, rtol=1e-4)
            row.draft.append(int(text.ids[end + 1 + number]))


@torch.no_grad()
def test_the_drafter_reads_every_token_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of different lengths as well: what it has read is what the model has seen."""
    adapted = anydepth.attach(tiny_llama(), []).eval()
    engine, seen = FastEngine(adapted, draft=untrained_draft()), []
    own = TrainedDrafter._inputs

    def recorded(self: TrainedDrafter, request: Request, cache: Any) -> Any:
        num_read, inputs = self._state(request).num_read, own(self, request, cache)
        if not request.draft:
            seen.append((request.kv, num_read, len(inputs), request.num_seen))
        return inputs

    monkeypatch.setattr(TrainedDrafter, "_inputs", recorded)
    ids = torch.randint(3, 200, (2, 14), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    engine.generate(input_ids=ids * mask, attention_mask=mask, **options)
    assert {slot: number for slot, before, number, _ in seen if not before} == {0: 14, 1: 9}
    assert all(before + number == known for _, before, number, known in seen)


@torch.no_grad()
def test_the_drafter_reads_the_end_of_a_long_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anydepth.speculation.trained_drafter.LOOK_BACK", 9)
    engine = FastEngine(anydepth.attach(tiny_llama(), []).eval())
    drafter, found = TrainedDrafter(engine.model, network_of(untrained_draft())), []
    ids = torch.randint(3, 200, (30,), generator=torch.Generator().manual_seed(0)).tolist()

    def choose(requests: Any, logits: torch.Tensor, vocabulary: Any) -> Any:
        found.append(logits)
        return [0], [0.5]

    size = engine.adapted.backbone.hidden_size
    states = torch.randn(29, 2, size, generator=torch.Generator().manual_seed(1))
    for own in (states, states * (torch.arange(29) >= 20)[:, None, None]):
        session, request = planted(engine, own, ids)
        drafter.observe(session, [request])
        drafter.propose(session, [request], choose)
    assert torch.equal(*found)


@torch.no_grad()
def test_tokens_of_a_wrong_draft_are_forgotten() -> None:
    """Tokens that were read ahead of the model leave nothing, whether the layer has run them or not."""
    engine = FastEngine(anydepth.attach(tiny_llama(), []).eval())
    drafter, found = TrainedDrafter(engine.model, network_of(untrained_draft())), []
    generator, size = torch.Generator().manual_seed(0), engine.adapted.backbone.hidden_size
    ids = torch.randint(3, 200, (21,), generator=generator).tolist()
    states = torch.randn(20, 2, size, generator=generator)

    def choose(requests: Any, logits: torch.Tensor, vocabulary: Any) -> Any:
        found.append(logits)
        return [0], [0.5]

    def read(session: FastSession, request: Request, start: int, end: int, states: torch.Tensor) -> None:
        request.ids, session.committed[request.kv] = ids[: end + 1], end
        session.states[request.kv] = list(states[start:end].unbind(1))
        drafter.observe(session, [request])

    last = []
    for wrong, runs in ((0, False), (4, False), (4, True)):
        session, request = planted(engine, states[:12], ids[:13])
        session.committed[request.kv] = 12
        read(session, request, 0, 12, states)
        drafter.propose(session, [request], choose)
        if wrong:
            read(session, request, 12, 12 + wrong, torch.randn(20, 2, size, generator=generator))
        if runs:
            drafter.propose(session, [request], choose)
        read(session, request, 12, 20, states)
        drafter.propose(session, [request], choose)
        last.append(found[-1])
    assert torch.equal(last[0], last[1]) and torch.equal(last[0], last[2])


@torch.no_grad()
def test_a_request_without_states_gets_no_draft() -> None:
    """A prompt that was read while the drafter slept, next to one that it knows."""
    engine = FastEngine(anydepth.attach(tiny_llama(), []).eval())
    drafter, asked = TrainedDrafter(engine.model, network_of(untrained_draft())), list[int]()
    states = torch.randn(9, 2, engine.adapted.backbone.hidden_size, generator=torch.Generator().manual_seed(0))
    session, known = planted(engine, states, list(range(3, 13)))
    unknown = Request(list(range(3, 13)), Sampler(), Stops.at(19), sequence=known.kv)

    def choose(requests: Any, logits: torch.Tensor, vocabulary: Any) -> Any:
        asked.append(len(logits))
        return [5] * len(requests), [0.5] * len(requests)

    drafter.observe(session, [known])
    first, second = drafter.propose(session, [unknown, known], choose)
    assert first is None and second is not None and second.token == 5 and asked == [1]


def test_it_does_not_draft_from_old_states(tmp_path: Path) -> None:
    """Tokens that were decoded without its states leave a gap, after which it waits for the next ones."""
    draft, adapted = untrained_draft(), anydepth.attach(tiny_llama(), []).eval()
    engine = FastEngine(adapted)
    text = max(texts_of(tmp_path), key=lambda one: len(one.ids))
    drafter = TrainedDrafter(engine.model, network_of(draft))
    session, row = planted(engine, text.states[:6], text.ids[:7].tolist())
    session.committed[row.kv] = 6
    drafter.observe(session, [row])
    assert drafter.next_bin(row) is None, "it may draft"
    session.committed[row.kv], session.states[row.kv] = 9, []
    row.ids = text.ids[:10].tolist()
    drafter.observe(session, [row])
    assert drafter.next_bin(row) == -1
    session.committed[row.kv], session.states[row.kv] = 10, list(text.states[9:10].unbind(1))
    row.ids = text.ids[:11].tolist()
    drafter.observe(session, [row])
    assert drafter.next_bin(row) is None
