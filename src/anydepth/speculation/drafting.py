"""Drafting as a step policy: requests draft, are verified together, and get the right tokens and one more.

Lossless: tokens are those of full depth, sampled ones too, because draft and target tokens are sampled with the same
noise.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite
from statistics import mean

from torch import Tensor

from anydepth.decoding.request import Request, draft_tokens
from anydepth.decoding.sampler import largest
from anydepth.decoding.session import Session
from anydepth.models.clock import now
from anydepth.speculation.draft_policy import DraftPolicy
from anydepth.speculation.drafters import Drafter


@dataclass(frozen=True)
class Drafting:
    """The drafters of an engine and their policy, kept from one generation to the next."""

    drafters: Sequence[Drafter]
    max_draft: int
    adaptive: bool  # draft for as long as it pays; else always `max_draft` tokens
    captures: Sequence[int]  # layers, counted from 1, of which drafters read the output states
    policy: DraftPolicy = field(default_factory=DraftPolicy)

    def open(self, session: Session) -> DraftedSteps:
        return DraftedSteps(session, self)


@dataclass(eq=False)
class Draft:
    """The draft of a request in one round."""

    request: Request
    drafter: Drafter | None  # None: the request does not draft
    limit: int
    is_trial: bool  # whether the drafter is tried for its statistics
    bins: list[int] = field(default_factory=list[int])  # of the draft tokens so far
    reached: float = 1.0  # probability that all of them are right


class DraftedSteps:
    """Decodes requests in rounds of drafts and verification.

    Each request drafts with the drafter of the highest expected rate.
    """

    def __init__(self, session: Session, drafting: Drafting) -> None:
        self.session, self.drafting = session, drafting
        self.drafters, self.policy = list(drafting.drafters), drafting.policy
        self.times, self.num_requests = self.policy.times(1), 1
        self.rate = 0.0
        for drafter in self.drafters:
            drafter.refresh()

    def prepare(self, request: Request) -> None:
        """Run pruned models over the first tokens of a prompt, which their later decisions depend on."""
        for drafter in self.drafters:
            if drafter.pool_tokens:
                first = request.tokens[: drafter.pool_tokens]
                self.session.read(request.kv, first, drafter.plan, num_logits=0)
                self.session.rewind(request.kv, 0)

    def begin(self, request: Request, logits: Tensor) -> None:
        self._take([request], [logits[None]])

    def step(self, requests: Sequence[Request]) -> None:
        if self.drafting.adaptive and self.policy.times(len(requests)).rests:  # without any work of drafters
            self._start(requests)
            self.session.capturing = False
            self._verify([Draft(request, None, 0, False) for request in requests], 0)
        else:
            self.observe(requests)
            self.round(requests)

    def observe(self, requests: Sequence[Request]) -> None:
        """Let drafters process the tokens that requests got since the last round."""
        for drafter in self.drafters:
            drafter.observe(self.session, requests)
        awake = [one for one in self.drafters if not self.policy.sleeps(one, len(requests))]
        self.session.capturing = any(one.needs_states(len(requests)) for one in awake)

    def round(self, requests: Sequence[Request]) -> None:
        """Draft, verify, and append the right tokens and one more."""
        self._start(requests)
        began = time.perf_counter()
        drafts, exit_layer = self._draft(requests)
        drafted = time.perf_counter() - began
        verified = self._verify(drafts, exit_layer)
        trial = next((draft.drafter for draft in drafts if draft.is_trial), None)
        if trial is not None:
            self.policy.observe_trial(trial, self.num_requests, drafted + verified)

    def _start(self, requests: Sequence[Request]) -> None:
        self.times, self.num_requests = self.policy.times(len(requests)), len(requests)

    def _verify(self, drafts: Sequence[Draft], exit_layer: int) -> float:
        """Verify drafts and take the right tokens and one more of each; return the seconds of the pass."""
        requests = [draft.request for draft in drafts]
        sequences = [request.kv for request in requests]
        started = time.perf_counter()
        logits = self.session.verify(sequences, [[request.ids[-1], *request.draft] for request in requests], exit_layer)
        seconds = now(logits[0].device) - started
        self.times.observe_verification(sum(len(part) for part in logits), seconds)
        num_taken = self._take(requests, logits)
        for draft, count in zip(drafts, num_taken, strict=True):
            self._observe(draft, draft.request.ids[-count:] if count else [])
            draft.request.draft = []
        self.session.commit(sequences, num_taken)
        return seconds

    # --- drafting --------------------------------------------------------------------------------------------------

    def _draft(self, requests: Sequence[Request]) -> tuple[list[Draft], int]:
        """Let each request draft for as long as it pays; return the drafts, and the exit layer or 0."""
        candidates, trial = self._candidates()
        longest = self._longest(requests)
        drafts: list[Draft] = []
        self.rate = 0.0
        for request in requests:
            if trial is None:
                drafter, rate = self._drafter_for(request, candidates)
            else:
                drafter, rate = None if trial.next_bin(request) == -1 else trial, 0.0
            is_trial = trial is not None and drafter is trial
            drafts.append(Draft(request, drafter, self._limit(request, longest), is_trial))
            self.rate += rate
        drafting = [draft for draft in drafts if draft.drafter is not None and draft.limit > 0]
        for drafter in candidates:
            if own := [draft.request for draft in drafting if draft.drafter is drafter]:
                drafter.catch_up(self.session, own)
        seconds: dict[str, list[float]] = {}  # by drafter, of each draft token
        while drafting:
            continuing: list[Draft] = []
            for drafter in candidates:
                own = [draft for draft in drafting if draft.drafter is drafter]
                if own:
                    keeps_all = not self.drafting.adaptive or self._tries(drafter, own)
                    if keeps_all or self._pays(drafter, own):
                        started = time.perf_counter()
                        continuing += self._propose(drafter, own, keeps_all=keeps_all)
                        seconds.setdefault(drafter.name, []).append(time.perf_counter() - started)
            drafting = [draft for draft in continuing if len(draft.request.draft) < draft.limit]
        for name, own in seconds.items():  # drafters may compute several tokens at a time
            self.times.observe_draft(name, mean(own))
        return drafts, max((draft.drafter.exit_layer for draft in drafts if draft.drafter is not None), default=0)

    def _candidates(self) -> tuple[list[Drafter], Drafter | None]:
        """Return the drafters of this round, at most one of them an early exit, and a drafter that is due a trial."""
        if self.drafting.adaptive and self.times.needs_plain_step:
            return [], None
        due = self.policy.due_trial(self.drafters, self.num_requests) if self.drafting.adaptive else None
        if due is not None:
            return [due], due
        num_rows = self.num_requests
        awake = [one for one in self.drafters if one.is_free or not self.policy.sleeps(one, num_rows)]
        exits = [drafter for drafter in awake if drafter.exit_layer]
        best = max(exits, key=lambda drafter: self.policy.rate(drafter, num_rows), default=None)
        return [one for one in awake if one is best or not one.exit_layer], None

    def _longest(self, requests: Sequence[Request]) -> int:
        """Return the draft length up to which a verification of all requests has the bits of plain steps.

        A pass with padding treats all sequences as long as its longest: no draft may reach a length where the bits of
        another request would change, or beyond its cache.
        """
        max_tokens, limits = self.session.max_tokens, [self.session.draft_limit(request.kv) for request in requests]
        longest = self.drafting.max_draft
        if max_tokens is not None:
            longest = min(longest, max(max_tokens // len(requests) - 1, 0))
        return min([longest, *(limit for limit in limits if limit is not None)])

    def _limit(self, request: Request, longest: int) -> int:
        left = request.stops.num_left(request)  # the model itself adds one token
        return longest if left is None else min(longest, left - 1)

    def _pays(self, drafter: Drafter, drafts: list[Draft]) -> bool:
        probabilities = [draft.reached * self._next_right(drafter, draft) for draft in drafts]
        is_ready = all(drafter.is_ready(draft.request) for draft in drafts)
        return self.times.pays(drafter.name, probabilities, self.rate, is_ready=is_ready)

    def _tries(self, drafter: Drafter, drafts: list[Draft]) -> bool:
        """Return whether some of these drafts begin a trial, which runs at any cost."""
        is_known = self.policy.is_known(drafter)
        return any((draft.is_trial or not is_known) and not draft.request.draft for draft in drafts)

    def _next_right(self, drafter: Drafter, draft: Draft) -> float:
        next_bin = drafter.next_bin(draft.request)
        return 0.0 if next_bin == -1 else self.policy.next_right(drafter, draft.bins, next_bin)

    def _propose(self, drafter: Drafter, drafts: list[Draft], *, keeps_all: bool) -> list[Draft]:
        """Draft one more token for each draft; return the drafts that got one that is worth verifying, or all."""
        proposals = drafter.propose(self.session, [draft.request for draft in drafts], draft_tokens)
        acceptance, continuing = self.policy.statistics(drafter).by_bin, list[Draft]()
        for draft, proposal in zip(drafts, proposals, strict=True):
            reached = 0.0 if proposal is None else draft.reached * acceptance.of(proposal.bin)
            if proposal is None or not (keeps_all or self.times.repays(reached, self.rate)):
                self.policy.observe_none(drafter, draft.bins)
                continue
            draft.request.draft.append(proposal.token)
            draft.bins.append(proposal.bin)
            draft.reached = reached
            continuing.append(draft)
        return continuing

    def _drafter_for(self, request: Request, candidates: Sequence[Drafter]) -> tuple[Drafter | None, float]:
        """Return the drafter with the highest rate for a request, or None, and that rate, 0 if not known."""
        best: Drafter | None = None
        best_rate = 0.0
        for drafter in candidates:
            next_bin = drafter.next_bin(request)
            rate = 0.0 if next_bin == -1 else self.policy.rate(drafter, self.num_requests, next_bin)
            gains = not self.drafting.adaptive or self.policy.gains(drafter, self.num_requests, rate)
            if rate > best_rate and gains:
                best, best_rate = drafter, rate
        return best, best_rate if isfinite(best_rate) else 0.0

    # --- verification ----------------------------------------------------------------------------------------------

    def _take(self, requests: Sequence[Request], logits: Sequence[Tensor]) -> list[int]:
        """Append target tokens to each request, up to the first that was not drafted; return how many."""
        num_taken: list[int] = []
        for request, part in zip(requests, logits, strict=True):
            try:
                num_taken.append(self._take_one(request, part))
            except Exception as failed:  # one request must not end the others
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

    def _observe(self, draft: Draft, targets: list[int]) -> None:
        tokens, num_right = draft.request.draft, 0
        for token, target in zip(tokens, targets, strict=False):
            if token != target:
                break
            num_right += 1
        # Draft tokens after the end of a request were not verified.
        num_verified = len(tokens) if num_right < len(targets) else num_right
        name = None if draft.drafter is None else draft.drafter.name
        draft.request.counts.observe(name, num_verified, num_right, len(targets))
        if draft.drafter is not None:
            rows, taken = self.num_requests, len(targets)
            self.policy.observe(draft.drafter, draft.bins, num_right, taken, rows, is_trial=draft.is_trial)
