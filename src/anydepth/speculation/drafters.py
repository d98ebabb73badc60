"""Drafters: what proposes the next tokens, cheaply, for `drafting.py` to verify.

A drafter is asked for one token of each request at a time, so that drafting can stop where it no longer pays, and says
with each token in which confidence bin it is; how often tokens of a bin are right is measured meanwhile.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from anydepth.decoding.request import Request
from anydepth.decoding.session import Session
from anydepth.gating.plan import Plan
from anydepth.methods._base.method import Method
from anydepth.speculation.draft_policy import NUM_BINS


@dataclass(frozen=True)
class Proposal:
    """A draft token and its confidence bin, below `NUM_BINS`."""

    token: int
    bin: int


Choose = Callable[[Sequence[Request], Tensor, Tensor | None], tuple[list[int], list[float]]]
"""Choose draft tokens of requests from (R, V') logits of all tokens or of a vocabulary (V',); with probabilities."""


class Drafter(ABC):
    """Base of all drafters. What it keeps of a request is in `request.memory`, of a session in `session.memory`.

    Attributes:
        name: key of its statistics.
        is_free: whether a token costs no pass of a model.
        exit_layer: first layers of the model that a draft runs and a verification does not run again; one such drafter
            a round.
        plan: the pruned model that it drafts with. pool_tokens: first tokens that decisions of the plan depend on.
        captures: layers, counted from 1, whose output states it reads.
    """

    name: str
    is_free: bool = False
    exit_layer: int = 0
    plan: Plan | None = None
    pool_tokens: int = 0
    captures: Sequence[int] = ()

    @abstractmethod
    def propose(self, session: Session, requests: Sequence[Request], choose: Choose) -> list[Proposal | None]:
        """Return the token after `request.last` for each request; None: it has none."""

    def next_bin(self, request: Request) -> int | None:
        """Return the bin of its next token, where it is known before drafting; −1: it has no token."""
        return None

    def observe(self, session: Session, requests: Sequence[Request]) -> None:  # noqa: B027 (most have nothing to do)
        """Take in what requests have read or taken since the last round."""

    def refresh(self) -> None:  # noqa: B027
        """Take in what attached methods decide now."""


def proposals(tokens: list[int], probabilities: list[float]) -> list[Proposal | None]:
    """Return proposals of tokens; None where no token of the drafter's vocabulary is allowed: a probability of nan."""
    return [
        Proposal(token, min(int(probability * NUM_BINS), NUM_BINS - 1)) if probability >= 0 else None
        for token, probability in zip(tokens, probabilities, strict=True)
    ]


class EarlyExitDrafter(Drafter):
    """Drafts with the first layers of the model, and its norm and head on their state (Elhoushi et al. 2024)."""

    def __init__(self, num_layers: int, head: Callable[[Tensor], Tensor], vocabulary: Tensor | None = None) -> None:
        self.exit_layer, self.head, self.vocabulary = num_layers, head, vocabulary
        self.name = f"first {num_layers} layers"

    def propose(self, session: Session, requests: Sequence[Request], choose: Choose) -> list[Proposal | None]:
        """Return the token after `request.last` for each request."""
        sequences, last = [request.kv for request in requests], [request.last for request in requests]
        logits = self.head(torch.cat(session.draft_exits(sequences, last, self.exit_layer)))
        return proposals(*choose(requests, logits, self.vocabulary))


class PrunedDrafter(Drafter):
    """Drafts with the model as methods prune it: a skip set, a router, exits."""

    name = "pruned model"
    plan: Plan

    def __init__(self, methods: Sequence[Method]) -> None:
        self.methods = list(methods)
        self.pool_tokens = max((method.pool_tokens for method in self.methods), default=0)
        self.refresh()

    def refresh(self) -> None:
        """Take in what the methods decide now."""
        self.plan = Plan.of(self.methods)

    def propose(self, session: Session, requests: Sequence[Request], choose: Choose) -> list[Proposal | None]:
        """Return the token after `request.last` for each request."""
        sequences, last = [request.kv for request in requests], [request.last for request in requests]
        return proposals(*choose(requests, session.draft(sequences, last, self.plan), None))


@dataclass
class _Index:
    """Where n-grams of a request's tokens ended last, and what a draft goes on with.

    Attributes:
        num_tokens: tokens that are in the index.
        next: position of the next draft token, and its bin; None: nothing was found.
    """

    ends: dict[tuple[int, ...], int] = field(default_factory=dict)
    num_tokens: int = 0
    next: tuple[int, int] | None = None


class PromptLookupDrafter(Drafter):
    """Drafts what followed the last tokens where they occurred before in the text (prompt lookup, Saxena 2023)."""

    name = "lookup"
    is_free = True

    def __init__(self, longest: int = 4, shortest: int = 2) -> None:
        self.sizes = range(longest, shortest - 1, -1)

    def next_bin(self, request: Request) -> int:
        """Return the bin of its next token, which is the size of the n-gram that was found; −1: it has no token."""
        index = request.memory.setdefault(self, _Index(num_tokens=request.num_padding))
        if not request.draft:
            self._find(request, index)
        return -1 if index.next is None or index.next[0] >= len(request.ids) else index.next[1]

    def propose(self, session: Session, requests: Sequence[Request], choose: Choose) -> list[Proposal | None]:
        """Return the token after `request.last` for each request; None: the last tokens are new."""
        return [self._propose(request) for request in requests]

    def _propose(self, request: Request) -> Proposal | None:
        number = self.next_bin(request)
        if number < 0:
            return None
        index = request.memory[self]
        position, _ = index.next
        index.next = position + 1, min(number + 1, NUM_BINS - 1)
        return Proposal(request.ids[position], number)

    def _find(self, request: Request, index: _Index) -> None:
        ids = request.ids
        for end in range(index.num_tokens + 1, len(ids)):  # n-grams that end before the last token
            for size in self.sizes:
                if end - size >= request.num_padding:
                    index.ends[tuple(ids[end - size : end])] = end
        index.num_tokens = max(len(ids) - 1, index.num_tokens)
        index.next = None
        for size in self.sizes:
            end = index.ends.get(tuple(ids[-size:])) if len(ids) - size >= request.num_padding else None
            if end is not None:
                index.next = end, size
                return
