"""Drafters that run a copy of the model in fewer bits, on the fast engine.

The copy reads the model's own K/V and leaves its own for draft tokens; verification overwrites those.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from anydepth.decoding.int4 import kept_blocks
from anydepth.decoding.request import Request, draft_tokens
from anydepth.decoding.session import Session
from anydepth.engine.model import EngineModel
from anydepth.engine.session import FastSession
from anydepth.engine.weights import BFloat16, Int4, Int8
from anydepth.gating.plan import FULL_DEPTH
from anydepth.methods._base.method import Method
from anydepth.speculation.drafters import Choose, Drafter, Proposal, PrunedDrafter, proposals
from anydepth.speculation.drafting import DraftedSteps, Drafting

NUM_TOKENS, TEMPERATURE, ENOUGH = 128, 0.5, 0.88
"""Sampled tokens that a copy in int4 is compared with the model on, and the agreement at which it is better than int8.

At 0.97 of int8, and with draft tokens in half and 0.6 of the time of the model's, the two give the same speed at 0.9.
"""


@dataclass(eq=False)
class Ahead(Request):
    """A request with the tokens that the copy has decoded ahead of the model.

    Attributes:
        ready: tokens that are not proposed yet.
    """

    ready: deque[Proposal] = field(default_factory=deque[Proposal])

    @classmethod
    def of(cls, request: Request) -> Ahead:
        options = request.num_padding, request.row
        return cls(request.prompt, request.sampler, request.stops, *options, sequence=request.kv)


class QuantisedDrafter(Drafter):
    """Drafts with a copy in int8 or int4 (QuantSpec); the copy verifies the drafts of other drafters (ML-SpecQD).

    Args:
        drafting: the drafters for the copy, with a policy of their own.
    """

    def __init__(self, copy: EngineModel, drafting: Drafting) -> None:
        self.name, self.copy, self.drafting = _name(copy), copy, drafting
        self.captures = drafting.captures

    def observe(self, session: Session, requests: Sequence[Request]) -> None:
        steps = session.memory.get(self)
        if steps is None:
            steps = session.memory[self] = CopySteps(_session(session, self.copy, self.captures), self.drafting)
        steps.follow(session, [(request, self._ahead(request)) for request in requests])

    def needs_states(self, num_rows: int) -> bool:
        policy = self.drafting.policy
        return any(one.needs_states(num_rows) and not policy.sleeps(one, num_rows) for one in self.drafting.drafters)

    def propose(self, session: Session, requests: Sequence[Request], choose: Choose) -> list[Proposal | None]:
        ahead = [self._ahead(request) for request in requests]
        session.memory[self].decode([one for one in ahead if not one.ready])
        return [one.ready.popleft() if one.ready else None for one in ahead]

    def next_bin(self, request: Request) -> int | None:
        ready = self._ahead(request).ready
        return ready[0].bin if ready else None

    def is_ready(self, request: Request) -> bool:
        return bool(self._ahead(request).ready)

    def _ahead(self, request: Request) -> Ahead:
        known = request.memory.get(self)
        if known is None:
            known = request.memory[self] = Ahead.of(request)
        return known


class CopySteps(DraftedSteps):
    """Decodes requests ahead of the model; tokens are chosen as drafts, with the noise of the model's own tokens."""

    session: FastSession

    def follow(self, session: Session, requests: Sequence[tuple[Request, Ahead]]) -> None:
        """Take over the tokens of the model's requests, and forget what was ahead of them."""
        assert isinstance(session, FastSession)
        for request, ahead in requests:
            ahead.ids = list(request.ids)
            ahead.ready.clear()
            self.session.follow(session, request.kv)
        self.observe([ahead for _, ahead in requests])

    def decode(self, requests: Sequence[Ahead]) -> None:
        """Decode at least one token of each request, if the logits processors leave any."""
        if requests:
            self.round(requests)
            self.observe(requests)

    def _take_one(self, request: Request, logits: Tensor) -> int:
        assert isinstance(request, Ahead)
        drafted, taken = request.draft, list[Proposal]()
        for position, own in enumerate(logits):
            request.draft = drafted[:position]
            (proposal,) = proposals(*draft_tokens([request], own[None], None))
            if proposal is not None:
                taken.append(proposal)
            if proposal is None or position == len(drafted) or proposal.token != drafted[position]:
                break
        request.draft = drafted
        request.ids += [one.token for one in taken]
        request.ready.extend(taken)
        return len(taken)


class PrunedCopyDrafter(PrunedDrafter):
    """Drafts with a copy that methods prune as well."""

    def __init__(self, copy: EngineModel, methods: Sequence[Method]) -> None:
        super().__init__(methods)
        self.name, self.copy = _name(copy), copy

    def propose(self, session: Session, requests: Sequence[Request], choose: Choose) -> list[Proposal | None]:
        own = session.memory.get(self)
        if own is None:
            own = session.memory[self] = _session(session, self.copy)
        return super().propose(own, requests, choose)


def copy_of(model: EngineModel) -> EngineModel | None:
    """Return the copy that drafts best for an engine's model without preparation; None: no copy is faster.

    int4 is read in half the time of int8, and is chosen if it agrees with the model nearly as often.
    """
    if model.why_not_native is not None or model.weights != BFloat16.name:
        return None
    copy = EngineModel(model.backbone, Int4.name, blocks=kept_blocks(model.backbone))
    return copy if agreement(model, copy) >= ENOUGH else EngineModel(model.backbone, Int8.name)


@torch.no_grad()
def agreement(model: EngineModel, copy: EngineModel) -> float:
    """Return the fraction of `NUM_TOKENS` sampled tokens after which the copy has the same most likely next token."""
    config: Any = model.backbone.model.config
    ids = [config.bos_token_id if isinstance(config.bos_token_id, int) else 0]
    session, own, generator = FastSession(copy, 1), list[Tensor](), torch.Generator().manual_seed(0)
    sequence = session.open()
    for _ in range(min(NUM_TOKENS, config.max_position_embeddings - 1)):
        logits, _ = session.step([sequence], ids[-1:], FULL_DEPTH)
        own.append(logits[0].argmax())
        ids.append(int(torch.multinomial((logits[0].float() / TEMPERATURE).softmax(-1).cpu(), 1, generator=generator)))
    other = FastSession(model, 1)
    logits, _ = other.read(other.open(), ids[:-1], FULL_DEPTH, num_logits=len(own))
    assert logits is not None
    return (logits.argmax(-1) == torch.stack(own)).float().mean().item()


def _name(copy: EngineModel) -> str:
    return f"{copy.weights} copy"


def _session(session: Session, copy: EngineModel, captures: Sequence[int] = ()) -> FastSession:
    """Return a session of the copy on the K/V of the model's."""
    assert isinstance(session, FastSession)
    return FastSession(copy, session.num_sequences, session.max_length, captures, session.cache)
