"""Drafters, which propose next tokens cheaply; `drafting.py` verifies them.

A drafter proposes one token for each request at a time, so that drafting can stop where it no longer pays. Each token
comes with a confidence bin; `draft_policy.py` measures how often tokens of a bin are right.
"""

# The types of torch and safetensors are not complete; a file alone can relax rules of `strict`.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from anydepth.decoding.request import Request
from anydepth.decoding.session import Session
from anydepth.draft_sections import OnlineSearchConfig
from anydepth.gating.plan import FULL_DEPTH, Plan
from anydepth.hf.adapted import AdaptedModel
from anydepth.methods._base.method import Method
from anydepth.methods.skip_set import SkipSet, SkipSetConfig
from anydepth.search.bayesian import Proposals, inner
from anydepth.search.skip_search import STRATEGIES, Candidate, Problem, by_knapsack, candidates

NUM_BINS = 10
"""Confidence bins of draft tokens."""
LOOKUP_SIZES = (4, 3, 2)
"""Sizes of n-grams that prompt lookup searches for, in order."""
NUM_SEARCHES = 60
"""Searches after which a searched skip set is fixed."""


@dataclass(frozen=True)
class Proposal:
    """A draft token and its confidence bin, below `NUM_BINS`."""

    token: int
    bin: int


Choose = Callable[[Sequence[Request], Tensor, Tensor | None], tuple[list[int], list[float]]]
"""Chooses a draft token for each request, with its probability, from (R, V) logits or (R, V') of a vocabulary (V',)."""
Head = Callable[[Tensor, Tensor | None], Tensor]
"""Returns (R, V) logits of (R, D) states, or (R, V') of a vocabulary (V',)."""


class Drafter(ABC):
    """Base of all drafters; state of a request is in `request.memory`, state of a session in `session.memory`.

    Attributes:
        name: key of its statistics.
        is_free: whether a token costs no pass of a model.
        exit_layer: number of first layers that a draft runs and its verification does not run again; a round has at
            most one such drafter.
        plan: plan of the pruned model. pool_tokens: first tokens of a prompt that the plan's decisions depend on.
        captures: layers, counted from 1, of which it reads the output states.
    """

    name: str
    is_free: bool = False
    exit_layer: int = 0
    plan: Plan = FULL_DEPTH
    pool_tokens: int = 0
    captures: Sequence[int] = ()

    @abstractmethod
    def propose(self, session: Session, requests: Sequence[Request], choose: Choose) -> list[Proposal | None]:
        """Propose the token after `request.last` for each request; None: it has no proposal."""

    def next_bin(self, request: Request) -> int | None:
        """Return the bin of the next token, or −1 if there is none; None: the bin is not known before drafting."""
        return None

    def needs_states(self, num_rows: int) -> bool:
        """Return whether it reads captured states in the next rounds of so many sequences."""
        return bool(self.captures)

    def is_ready(self, request: Request) -> bool:
        """Return whether the next token has been computed already, so that it costs nothing."""
        return False

    def observe(self, session: Session, requests: Sequence[Request]) -> None:  # noqa: B027 (most have nothing to do)
        """Process the tokens that requests have read or got since the last round."""

    def catch_up(self, session: Session, requests: Sequence[Request]) -> None:  # noqa: B027
        """Prepare for draft tokens of this round, after rounds without any; not timed as a draft token."""

    def refresh(self) -> None:  # noqa: B027
        """Update to the current decisions of the attached methods."""


def proposals(tokens: list[int], probabilities: list[float]) -> list[Proposal | None]:
    """Return a proposal for each token; None where the probability is nan: no token of the vocabulary is allowed."""
    return [
        Proposal(token, min(int(probability * NUM_BINS), NUM_BINS - 1)) if probability >= 0 else None
        for token, probability in zip(tokens, probabilities, strict=True)
    ]


class EarlyExitDrafter(Drafter):
    """Drafts with the first layers of the model, then its norm and head (Elhoushi et al. 2024)."""

    def __init__(self, num_layers: int, head: Head, vocabulary: Tensor | None) -> None:
        self.exit_layer, self.head, self.vocabulary = num_layers, head, vocabulary
        self.name = f"first {num_layers} layers"

    def propose(self, session: Session, requests: Sequence[Request], choose: Choose) -> list[Proposal | None]:
        sequences, last = [request.kv for request in requests], [request.last for request in requests]
        states = torch.cat(session.draft_exits(sequences, last, self.exit_layer))
        return proposals(*choose(requests, self.head(states, self.vocabulary), self.vocabulary))


class PrunedDrafter(Drafter):
    """Drafts with the model as methods prune it, by a skip set, a router or exits."""

    name = "pruned model"

    def __init__(self, methods: Sequence[Method]) -> None:
        self.methods = list(methods)
        self.pool_tokens = max((method.pool_tokens for method in self.methods), default=0)
        self.refresh()

    def refresh(self) -> None:
        self.plan = Plan.of(self.methods)

    def propose(self, session: Session, requests: Sequence[Request], choose: Choose) -> list[Proposal | None]:
        sequences, last = [request.kv for request in requests], [request.last for request in requests]
        return proposals(*choose(requests, session.draft(sequences, last, self.plan), None))


@dataclass
class _Index:
    """The n-grams of a request's first `num_tokens` tokens, with the position after their last occurrence."""

    ends: dict[tuple[int, ...], int] = field(default_factory=dict[tuple[int, ...], int])
    num_tokens: int = 0
    next: tuple[int, int] | None = None  # position of the next draft token, and its bin; None: no n-gram was found


class PromptLookupDrafter(Drafter):
    """Drafts the tokens that followed an earlier occurrence of the last tokens (prompt lookup, Saxena 2023)."""

    name = "lookup"
    is_free = True

    def next_bin(self, request: Request) -> int:  # starts at the size of the n-gram found
        index = request.memory.setdefault(self, _Index(num_tokens=request.num_padding))
        if not request.draft:
            self._find(request, index)
        return -1 if index.next is None or index.next[0] >= len(request.ids) else index.next[1]

    def propose(self, session: Session, requests: Sequence[Request], choose: Choose) -> list[Proposal | None]:
        return [self._propose(request) for request in requests]

    def _propose(self, request: Request) -> Proposal | None:
        number = self.next_bin(request)
        if number < 0:
            return None
        index: _Index = request.memory[self]
        assert index.next is not None
        position, _ = index.next
        index.next = position + 1, min(number + 1, NUM_BINS - 1)
        return Proposal(request.ids[position], number)

    def _find(self, request: Request, index: _Index) -> None:
        ids = request.ids
        for end in range(index.num_tokens + 1, len(ids)):  # n-grams that end before the last token
            for size in LOOKUP_SIZES:
                if end - size >= request.num_padding:
                    index.ends[tuple(ids[end - size : end])] = end
        index.num_tokens = max(len(ids) - 1, request.num_padding)
        index.next = None
        for size in LOOKUP_SIZES:
            end = index.ends.get(tuple(ids[-size:])) if len(ids) - size >= request.num_padding else None
            if end is not None and ids[end - size : end] == ids[-size:]:  # else it was in tokens that were removed
                index.next = end, size
                return


# --- searched skip sets ----------------------------------------------------------------------------------------------


class SearchedDrafter(PrunedDrafter):
    """Base of drafters that search their skip set on the text being generated, every few tokens on the latest ones.

    All requests share the skip set, which is kept between generations.
    """

    name = "searched skip set"

    def __init__(self, method: SkipSet, config: OnlineSearchConfig) -> None:
        super().__init__([method])
        self.method, self.config, self.number = method, config, 0
        self.num_out = min(max(round(config.budget * method.num_layers), 1), method.num_layers - 1)

    def observe(self, session: Session, requests: Sequence[Request]) -> None:
        """Search on the last tokens of each request that got `every` tokens since its last search."""
        for request in requests:
            searched_at = request.memory.setdefault(self, request.num_seen)
            if request.num_seen < self.config.window or request.num_seen - searched_at < self.config.every:
                continue
            if self.number < NUM_SEARCHES:
                request.memory[self] = request.num_seen
                self.number += 1
                self.search(session, request)

    def skip(self, layers: Iterable[int]) -> None:
        self.method.choose(layers)
        self.refresh()

    @abstractmethod
    def search(self, session: Session, request: Request) -> None:
        """Choose the skip set by the last `config.window` tokens of a request that have K/V."""


class ProposedSkipSet(SearchedDrafter):
    """Tries one more proposal at each search, and compares its choices with the target tokens (SWIFT)."""

    def __init__(self, method: SkipSet, config: OnlineSearchConfig) -> None:
        super().__init__(method, config)
        layers = list(range(method.num_layers))
        self.proposals = Proposals(inner(layers, self.num_out), self.num_out, len(layers), config.seed)
        self.skip(self.proposals.next())

    def search(self, session: Session, request: Request) -> None:
        window, proposal = self.config.window, self.proposals.next()
        self.skip(proposal)
        ids = request.ids[-1 - window : -1]
        chosen = session.score(request.kv, ids, self.plan).argmax(-1).tolist()
        targets = request.ids[-window:]  # the token after each of `ids`
        self.proposals.seen[proposal] = sum(a == b for a, b in zip(chosen, targets, strict=True)) / window
        self.skip(self.proposals.best or proposal)


class FoundSkipSet(SearchedDrafter):
    """Runs a strategy of `search/skip_search.py` at each search (CLaSp, Chen et al. 2025, is `dynamic`).

    Attributes:
        seconds: for `knapsack`, the time of each layer, measured once on the engine.
    """

    seconds: dict[Candidate, float] | None = None

    def __init__(self, method: SkipSet, config: OnlineSearchConfig, adapted: AdaptedModel) -> None:
        super().__init__(method, config)
        self.adapted = adapted
        self.skip(inner(list(range(method.num_layers)), self.num_out)[-self.num_out :])

    def search(self, session: Session, request: Request) -> None:
        windows = torch.tensor([request.ids[-1 - self.config.window : -1]])
        layers = candidates(self.method.num_layers, branches=False)
        problem = Problem(self.adapted, windows, layers, self.num_out)
        if self.config.strategy == "knapsack":
            found = by_knapsack(problem, self._seconds(session, request))
        else:
            found = STRATEGIES[self.config.strategy](problem)
        self.skip(layer_idx for _, layer_idx in found)

    def _seconds(self, session: Session, request: Request) -> dict[Candidate, float]:
        if self.seconds is None:
            measured = session.layer_seconds(request.kv, request.ids[-self.config.window :])
            self.seconds = {("layer", layer_idx): seconds for layer_idx, seconds in enumerate(measured)}
        return self.seconds


def searched_drafter(config: OnlineSearchConfig, adapted: AdaptedModel) -> SearchedDrafter:
    method = SkipSet(SkipSetConfig(), adapted.backbone)
    return ProposedSkipSet(method, config) if config.strategy == "bayesian" else FoundSkipSet(method, config, adapted)
