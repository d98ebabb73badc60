"""Drafters that search their skip set on the text being generated, every few tokens on the latest ones."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence

import torch

from anydepth.decoding.request import Request
from anydepth.decoding.session import Session
from anydepth.draft_sections import OnlineSearchConfig
from anydepth.hf.adapted import AdaptedModel
from anydepth.methods.skip_set import SkipSet, SkipSetConfig
from anydepth.search.bayesian import Proposals, inner
from anydepth.search.skip_search import STRATEGIES, Candidate, Problem, by_knapsack, candidates
from anydepth.speculation.drafters import PrunedDrafter


class SearchedDrafter(PrunedDrafter):
    """Base of drafters that search; all requests share the skip set, which is kept between generations."""

    name = "searched skip set"

    def __init__(self, method: SkipSet, config: OnlineSearchConfig) -> None:
        super().__init__([method])
        self.method, self.config, self.number = method, config, 0
        self.num_out = min(max(round(config.budget * method.num_layers), 1), method.num_layers - 1)

    def observe(self, session: Session, requests: Sequence[Request]) -> None:
        """Search on the last tokens of each request that got `every` tokens since its last search."""
        for request in requests:
            window = self.config.window
            searched_at = request.memory.setdefault(self, request.num_seen)
            if request.num_seen < window or request.num_seen - searched_at < self.config.every:
                continue
            if self.number < self.config.num_searches:
                request.memory[self] = request.num_seen
                self.number += 1
                self.search(session, request, window)

    def skip(self, layers: Iterable[int]) -> None:
        """Draft without these layers from now on."""
        self.method.choose(layers)
        self.refresh()

    @abstractmethod
    def search(self, session: Session, request: Request, window: int) -> None:
        """Choose the skip set by the last `window` tokens of a request that have K/V."""


class ProposedSkipSet(SearchedDrafter):
    """Tries one more proposal at each search, and compares its choices with the target tokens (SWIFT)."""

    def __init__(self, method: SkipSet, config: OnlineSearchConfig) -> None:
        super().__init__(method, config)
        layers = list(range(method.num_layers))
        self.proposals = Proposals(inner(layers, self.num_out), self.num_out, len(layers), config.seed)
        self.skip(self.proposals.next())

    def search(self, session: Session, request: Request, window: int) -> None:
        """Score one proposal on the last tokens; draft with the best so far."""
        proposal = self.proposals.next()
        self.skip(proposal)
        ids = request.ids[-1 - window : -1]
        chosen = session.score(request.kv, ids, self.plan).argmax(-1).tolist()
        targets = request.ids[-window:]  # the token after each of `ids`
        self.proposals.seen[proposal] = sum(a == b for a, b in zip(chosen, targets, strict=True)) / window
        self.skip(self.proposals.best or proposal)


class FoundSkipSet(SearchedDrafter):
    """Runs a strategy of `search/skip_search.py` at each search (CLaSp, Chen et al. 2025, is `dynamic`)."""

    def __init__(self, method: SkipSet, config: OnlineSearchConfig, adapted: AdaptedModel) -> None:
        super().__init__(method, config)
        self.adapted = adapted
        self.skip(inner(list(range(method.num_layers)), self.num_out)[-self.num_out :])

    def search(self, session: Session, request: Request, window: int) -> None:
        """Run the strategy on the last tokens."""
        windows = torch.tensor([request.ids[-1 - window : -1]])
        layers = candidates(self.method.num_layers, branches=False)
        found = self.find(Problem(self.adapted, windows, layers, self.num_out), session, request)
        self.skip(layer_idx for _, layer_idx in found)

    def find(self, problem: Problem, session: Session, request: Request) -> list[Candidate]:
        """Return the layers to skip for the last tokens of a request."""
        return STRATEGIES[self.config.strategy](problem)


class TimedSkipSet(FoundSkipSet):
    """Chooses by influence on the last tokens and by the time of each layer, measured once on the engine."""

    seconds: dict[Candidate, float] | None = None

    def find(self, problem: Problem, session: Session, request: Request) -> list[Candidate]:
        """Return the layers to skip for the last tokens of a request."""
        if self.seconds is None:
            measured = session.layer_seconds(request.kv, request.ids[-self.config.window :])
            self.seconds = {("layer", layer_idx): seconds for layer_idx, seconds in enumerate(measured)}
        return by_knapsack(problem, self.seconds)


SEARCHES: dict[str, type[FoundSkipSet]] = {
    "dynamic": FoundSkipSet,
    "influence": FoundSkipSet,
    "knapsack": TimedSkipSet,
}


def searched_drafter(config: OnlineSearchConfig, adapted: AdaptedModel) -> SearchedDrafter:
    """Return the drafter of a strategy."""
    method, found = SkipSet(SkipSetConfig(), adapted.backbone), SEARCHES.get(config.strategy)
    return ProposedSkipSet(method, config) if found is None else found(method, config, adapted)
