"""Drafting as a step policy: requests draft, are verified together, and take what was right and one token more.

Lossless: tokens are those of full depth, sampled ones too, because drafts and targets are sampled with the same noise.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite

import torch
from torch import Tensor

from anydepth.decoding.request import Request, draft_tokens
from anydepth.decoding.sampler import largest
from anydepth.decoding.session import Session
from anydepth.speculation.draft_policy import DraftPolicy
from anydepth.speculation.drafters import Drafter


@dataclass(frozen=True)
class Drafting:
    """How an engine drafts; kept from one generation to the next, with what was measured.

    Attributes:
        max_draft: tokens that are drafted at a time, at most.
        adaptive: draft for as long as it pays; else always `max_draft`.
        captures: layers, counted from 1, whose output states drafters read.
    """

    drafters: Sequence[Drafter]
    max_draft: int
    adaptive: bool
    captures: Sequence[int]
    policy: DraftPolicy = field(default_factory=DraftPolicy)

    def open(self, session: Session) -> DraftedSteps:
        """Return the step policy of the requests in a session that are drafted for."""
        return DraftedSteps(session, self)


@dataclass(eq=False)
class Draft:
    """How a request drafts in one round.

    Attributes:
        drafter: None: with none. limit: tokens at most.
        is_trial: whether the drafter is tried for its statistics.
        bins: confidence bins of the tokens so far. reached: probability that all of them are right.
    """

    request: Request
    drafter: Drafter | None
    limit: int
    is_trial: bool
    bins: list[int] = field(default_factory=list)
    reached: float = 1.0


class DraftedSteps:
    """Decodes requests by rounds of drafts and verification.

    Of several drafters each request drafts with the one that is worth most at the moment.
    """

    def __init__(self, session: Session, drafting: Drafting) -> None:
        self.session, self.drafting = session, drafting
        self.drafters, self.policy = list(drafting.drafters), drafting.policy
        self.times, self.num_requests = self.policy.times(1), 1
        self.rate = 0.0
        for drafter in self.drafters:
            drafter.refresh()

    def prepare(self, request: Request) -> None:
        """Let pruned models see the first tokens of a prompt that their later decisions depend on."""
        for drafter in self.drafters:
            if drafter.pool_tokens and drafter.plan is not None:
                first = request.tokens[: drafter.pool_tokens]
                self.session.read(request.kv, first, drafter.plan, num_logits=0)
                self.session.rewind(request.kv, 0)

    def begin(self, request: Request, logits: Tensor) -> None:
        """Take the first token of a request whose prompt is read, from (V,) logits."""
        self._take([request], [logits[None]])

    def step(self, requests: Sequence[Request]) -> None:
        """Draft, verify, and take what was right and one token more."""
        self.times, self.num_requests = self.policy.times(len(requests)), len(requests)
        for drafter in self.drafters:
            drafter.observe(self.session, requests)
        drafts, exit_layer = self._draft(requests)
        sequences = [request.kv for request in requests]
        started = time.perf_counter()
        logits = self.session.verify(sequences, [[request.ids[-1], *request.draft] for request in requests], exit_layer)
        _wait(logits[0])
        self.times.observe_verification(sum(len(part) for part in logits), time.perf_counter() - started)
        num_taken = self._take(requests, logits)
        for draft, count in zip(drafts, num_taken, strict=True):
            self._learn(draft, draft.request.ids[-count:] if count else [])
            draft.request.draft = []
        self.session.commit(sequences, num_taken)

    # --- drafting --------------------------------------------------------------------------------------------------

    def _draft(self, requests: Sequence[Request]) -> tuple[list[Draft], int]:
        """Let each request draft for as long as it pays; how, and the first layers that drafts have run."""
        candidates, trial = self._candidates()
        most = self._most(requests)
        drafts: list[Draft] = []
        self.rate = 0.0
        for request in requests:
            drafter, rate = (trial, 0.0) if trial is not None else self._drafter_for(request, candidates)
            drafts.append(Draft(request, drafter, self._limit(request, most), trial is not None))
            self.rate += rate
        drafting = [draft for draft in drafts if draft.drafter is not None and draft.limit > 0]
        while drafting:
            continuing: list[Draft] = []
            for drafter in candidates:
                own = [draft for draft in drafting if draft.drafter is drafter]
                if own:
                    keeps_all = not self.drafting.adaptive or self._tries(drafter, own)
                    if keeps_all or self._pays(drafter, own):
                        continuing += self._propose(drafter, own, keeps_all=keeps_all)
            drafting = [draft for draft in continuing if len(draft.request.draft) < draft.limit]
        return drafts, max((draft.drafter.exit_layer for draft in drafts if draft.drafter is not None), default=0)

    def _candidates(self) -> tuple[list[Drafter], Drafter | None]:
        """Return the drafters of this round, of those with first layers the best; and one that is due to be tried."""
        if self.drafting.adaptive and self.times.plain is None:
            return [], None  # a plain step is measured first
        due = self.policy.due_trial(self.drafters) if self.drafting.adaptive else None
        if due is not None:
            return [due], due
        exits = [drafter for drafter in self.drafters if drafter.exit_layer]
        best = max(exits, key=lambda drafter: self.policy.rate(drafter, self.num_requests), default=None)
        return [one for one in self.drafters if one is best or not one.exit_layer], None

    def _most(self, requests: Sequence[Request]) -> int:
        """Return how many tokens each may draft, so that a verification is one pass of few tokens, and the same bits.

        All requests are as long there as the longest: none may reach where the bits of another would change.
        """
        most, limits = self.session.max_tokens, [self.session.draft_limit(request.kv) for request in requests]
        longest = self.drafting.max_draft
        most = longest if most is None else min(longest, max(most // len(requests) - 1, 0))
        return min([most, *(limit for limit in limits if limit is not None)])

    def _limit(self, request: Request, most: int) -> int:
        """Return the same, where the request's own end does not come first; the model itself adds one."""
        left = request.stops.num_left(request)
        return most if left is None else min(most, left - 1)

    def _pays(self, drafter: Drafter, drafts: list[Draft]) -> bool:
        """Return whether one more token of these is worth its time."""
        probabilities = [draft.reached * self._next_right(drafter, draft) for draft in drafts]
        return self.times.pays(drafter.name, probabilities, self.rate)

    def _tries(self, drafter: Drafter, drafts: list[Draft]) -> bool:
        """Return whether these would be first tokens of a drafter that is to be known better, at any cost."""
        is_known = self.policy.is_known(drafter)
        return any((draft.is_trial or not is_known) and not draft.request.draft for draft in drafts)

    def _next_right(self, drafter: Drafter, draft: Draft) -> float:
        next_bin = drafter.next_bin(draft.request)
        return 0.0 if next_bin == -1 else self.policy.next_right(drafter, draft.bins, next_bin)

    def _propose(self, drafter: Drafter, drafts: list[Draft], *, keeps_all: bool) -> list[Draft]:
        """Draft one more token of these; return those that got one, if it is worth verifying or all are kept."""
        started = time.perf_counter()
        proposals = drafter.propose(self.session, [draft.request for draft in drafts], draft_tokens)
        self.times.observe_draft(drafter.name, time.perf_counter() - started)
        acceptance, continuing = self.policy.statistics(drafter).by_bin, []
        for draft, proposal in zip(drafts, proposals, strict=True):
            reached = 0.0 if proposal is None else draft.reached * acceptance.of(proposal.bin)
            # None: no token of its vocabulary is allowed.
            if proposal is None or not (keeps_all or self.times.repays(reached, self.rate)):
                self.policy.observe_none(drafter, draft.bins)
                continue
            draft.request.draft.append(proposal.token)
            draft.bins.append(proposal.bin)
            draft.reached = reached
            continuing.append(draft)
        return continuing

    def _drafter_for(self, request: Request, candidates: Sequence[Drafter]) -> tuple[Drafter | None, float]:
        """Return the drafter with the highest rate for a request, and that rate, 0 where unknown; None: no drafter."""
        best: Drafter | None = None
        best_rate = 0.0
        for drafter in candidates:
            next_bin = drafter.next_bin(request)
            rate = 0.0 if next_bin == -1 else self.policy.rate(drafter, self.num_requests, next_bin)
            if rate > best_rate:
                best, best_rate = drafter, rate
        return best, best_rate if isfinite(best_rate) else 0.0

    # --- verification ----------------------------------------------------------------------------------------------

    def _take(self, requests: Sequence[Request], logits: Sequence[Tensor]) -> list[int]:
        """Let requests take the model's own tokens, up to the first that was not drafted; how many each took."""
        num_taken = []
        for request, part in zip(requests, logits, strict=True):
            try:
                num_taken.append(self._take_one(request, part))
            except Exception as failed:  # one request must not take the others with it
                request.fail(failed)
                num_taken.append(0)
        return num_taken

    def _take_one(self, request: Request, logits: Tensor) -> int:
        sampler = request.sampler
        plain = largest(logits) if sampler.is_plain else None
        for position, own in enumerate(logits):
            if plain is None:
                scores = sampler.row_scores(request, request.ids, own)
                token = sampler.take(request, scores)
            else:
                scores, token = own, plain[position]
            request.take(token, own)
            request.is_finished = request.stops.ends(request, scores)
            is_last = position == len(request.draft)
            if request.is_finished or is_last or token != request.draft[position]:
                return position + 1
        return len(logits)

    def _learn(self, draft: Draft, taken: list[int]) -> None:
        """Count what verification says of a draft."""
        tokens, num_right = draft.request.draft, 0
        for token, own in zip(tokens, taken, strict=False):
            if token != own:
                break
            num_right += 1
        judged = len(tokens) if num_right < len(taken) else num_right  # what came after the end was not
        name = None if draft.drafter is None else draft.drafter.name
        draft.request.counts.observe(name, judged, num_right, len(taken))
        if draft.drafter is not None:
            self.policy.observe(draft.drafter, draft.bins, num_right, len(taken))


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:  # a clock would see the launch alone
        torch.cuda.synchronize(tensor.device)
