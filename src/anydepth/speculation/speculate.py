"""Self-speculative decoding: tokens are drafted by a part of the model and verified by all of it, many in one pass.

Lossless, and more than in distribution: the tokens are those that decoding at full depth gives, sampled ones too. A
token is sampled by adding the same noise to logits whoever computed them (Gumbel-max), so drafts are right as often as
the two distributions agree, and the output depends on the seed and never on the drafts (Daliri et al. 2024,
drafter-invariant speculative decoding). The noise is what `torch.multinomial` would have drawn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import isfinite
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from anydepth.decoding.sampler import NextToken, Stops, largest
from anydepth.errors import UserError
from anydepth.gating.context import LogitsOf
from anydepth.gating.trace import PassRecord
from anydepth.hf.adapted import AdaptedModel
from anydepth.speculation.counts import Counts
from anydepth.speculation.draft_network import DraftNetwork
from anydepth.speculation.draft_policy import DraftPolicy
from anydepth.speculation.drafters import Drafter, drafters_of
from anydepth.speculation.targets import Row, Target


@dataclass(frozen=True)
class Setup:
    """How drafts are made, kept from one generation to the next for as long as `made_of` is the same."""

    made_of: Any
    drafters: Sequence[Drafter]
    max_draft: int
    adaptive: bool
    vocabulary_size: int
    policy: DraftPolicy = field(default_factory=DraftPolicy)


def setup_of(
    adapted: AdaptedModel, known: Setup | None, logits_of: LogitsOf, trained: Callable[[DraftNetwork], Drafter] | None
) -> Setup:
    """The one that is known, or a new one if a method or an option has changed.

    Args:
        logits_of: of states of any depth.
        trained: a drafter with a trained network; None: there is none here.

    Raises:
        UserError: nothing to draft with.
    """
    method, others = adapted.speculation, tuple(adapted.draft_methods)
    assert method is not None
    config, network = method.config, method.network
    made_of = (config, network, others)
    if known is not None and known.made_of == made_of:
        return known
    own = None if network is None or trained is None else trained(network)
    drafters = drafters_of(method, others, adapted, logits_of, own)
    if not drafters:
        raise UserError(
            "there is nothing to draft with: the trained drafter runs on the fast engine; use engine fast, let lookup "
            "draft, or name exit_layers"
        )
    return Setup(made_of, drafters, config.max_draft, config.adaptive, adapted.config.vocab_size)


def records_of(ids: Tensor, attention_mask: Tensor | None, num_prompt: int, num_layers: int) -> list[PassRecord]:
    """What a reader of traces sees: the prompt, then token by token, all at full depth."""
    real = torch.ones_like(ids[:, :-1], dtype=torch.bool)
    if attention_mask is not None:
        real[:, :num_prompt] = attention_mask.bool()
    lengths = [num_prompt, *[1] * (real.shape[1] - num_prompt)]
    places = accumulate([0, *lengths])
    return [
        PassRecord(part, place, cached=True, num_layers=num_layers, head_rows=len(part))
        for part, place in zip(real.split(lengths, dim=1), places, strict=False)
    ]


@torch.no_grad()
def decode(
    target: Target,
    setup: Setup,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    streamer: Any = None,
) -> tuple[Tensor, Counts]:
    """(B, prompt + new) token ids, as transformers' decoding loop gives them, and what was drafted."""
    num_rows, num_prompt = input_ids.shape
    padding = [0] * num_rows if attention_mask is None else (attention_mask == 0).sum(1).tolist()
    rows = [Row(ids, num_padding) for ids, num_padding in zip(input_ids.tolist(), padding, strict=True)]
    sampling, device = bool(config.do_sample), input_ids.device
    choice = NextToken(processors, num_rows, setup.vocabulary_size, device, sampling=sampling)
    run = Speculation(target, setup, choice, Stops(criteria))
    fills = config._eos_token_tensor is not None  # rows that ended; without an end token transformers lets them go on
    pad = 0 if config._pad_token_tensor is None else int(config._pad_token_tensor)
    num_put = 0

    def put() -> None:
        """Give the streamer the steps that all rows have taken."""
        nonlocal num_put
        longest = max(len(row.ids) for row in rows)
        ready = min(longest if row.is_done and fills else len(row.ids) for row in rows) - num_prompt
        for place in range(num_prompt + num_put, num_prompt + ready):
            streamer.put(torch.tensor([row.ids[place] if place < len(row.ids) else pad for row in rows]))
        num_put = max(num_put, ready)

    run.run(rows, (lambda: None) if streamer is None else put, fills=fills)
    if streamer is not None:
        streamer.end()
    longest = max(len(row.ids) for row in rows)
    choice.noise.rewind(longest - num_prompt)
    ids = [row.ids + [pad] * (longest - len(row.ids)) for row in rows]
    return torch.tensor(ids, device=device), run.counts


@dataclass(eq=False)
class Plan:
    """How a row drafts in one round: with what, at most how many, how sure, and how likely all of it is right."""

    row: Row
    drafter: Drafter | None
    limit: int
    is_trial: bool
    bins: list[int] = field(default_factory=list)
    reached: float = 1.0


class Speculation:
    """One generation: rows draft, are verified together, and take what was right and one token more.

    Of several drafters each row drafts with the one that is worth most at the moment.

    Args:
        on_token: receives the (V,) logits of the model, before any processor, and the token that a row takes from them.
    """

    def __init__(
        self,
        target: Target,
        setup: Setup,
        choice: NextToken,
        stops: Stops,
        on_token: Callable[[Tensor, int], None] | None = None,
    ) -> None:
        self.target, self.setup, self.choice, self.stops, self.on_token = target, setup, choice, stops, on_token
        self.drafters, self.policy = list(setup.drafters), setup.policy
        self.times, self.num_rows = self.policy.times(1), 1
        self.rate = 0.0
        self.counts = Counts()

    def run(self, rows: list[Row], after_round: Callable[[], None], *, fills: bool) -> None:
        """Let all rows go to their ends, and unless what is missing is filled up, all to that of the longest."""
        try:
            self.begin(rows)
            after_round()
            self._rounds(rows, after_round)
            longest = max(len(row.ids) for row in rows)
            if not fills and any(len(row.ids) < longest for row in rows):
                self.stops = Stops.at(longest)
                for row in rows:
                    row.is_done = len(row.ids) == longest
                self._rounds(rows, after_round)
        finally:
            self.end()

    def _rounds(self, rows: list[Row], after_round: Callable[[], None]) -> None:
        while active := [row for row in rows if not row.is_done]:
            self.round(active)
            after_round()

    def begin(self, rows: list[Row]) -> None:
        """Take in the prompts, and the first token of each. What was begun is to be ended, whatever happens."""
        pruned = [drafter.pruned for drafter in self.drafters]
        logits = self.target.start(rows, next((one for one in pruned if one is not None and one.keeps_state), None))
        for drafter in self.drafters:
            drafter.start(self.target, len(rows))
        self._take(rows, [part[None] for part in logits])

    def end(self) -> None:
        """Drafters forget this generation."""
        for drafter in self.drafters:
            drafter.stop()

    def round(self, rows: list[Row]) -> None:
        """Draft for rows that are not done, verify, and take what was right and one token more."""
        self.times, self.num_rows = self.policy.times(len(rows)), len(rows)
        for drafter in self.drafters:
            drafter.settle(rows)
        plans = self._draft(rows)
        started = time.perf_counter()
        logits = self.target.verify(rows)
        _wait(logits[0])
        self.times.observe_verification(sum(len(part) for part in logits), time.perf_counter() - started)
        num_taken = self._take(rows, logits)
        for plan, count in zip(plans, num_taken, strict=True):
            self._learn(plan, plan.row.ids[-count:])
            plan.row.draft = []
        self.target.settle(rows, num_taken)

    # --- drafting ----------------------------------------------------------------------------------------------

    def _draft(self, rows: list[Row]) -> list[Plan]:
        """Let each row draft for as long as it pays."""
        candidates, trial = self._candidates()
        most = self._most(rows)
        plans = []
        self.rate = 0.0
        for row in rows:
            drafter, rate = (trial, 0.0) if trial is not None else self._drafter_for(row, candidates)
            plans.append(Plan(row, drafter, self._limit(row, most), trial is not None))
            self.rate += rate
        self.target.exit_layer = max((plan.drafter.exit_layer for plan in plans if plan.drafter is not None), default=0)
        drafting = [plan for plan in plans if plan.drafter is not None and plan.limit > 0]
        while drafting:
            going_on: list[Plan] = []
            for drafter in candidates:
                own = [plan for plan in drafting if plan.drafter is drafter]
                if own:
                    whatever = not self.setup.adaptive or self._tries(drafter, own)
                    if whatever or self._pays(drafter, own):
                        going_on += self._guess(drafter, own, keeps_all=whatever)
            drafting = [plan for plan in going_on if len(plan.row.draft) < plan.limit]
        return plans

    def _candidates(self) -> tuple[list[Drafter], Drafter | None]:
        """Return the drafters of this round, of those with first layers the best; and one that is due to be tried."""
        if self.setup.adaptive and self.times.plain is None:
            return [], None  # a plain step is measured first
        due = self.policy.due_trial(self.drafters) if self.setup.adaptive else None
        if due is not None:
            return [due], due
        exits = [drafter for drafter in self.drafters if drafter.exit_layer]
        best = max(exits, key=lambda drafter: self.policy.rate(drafter, self.num_rows), default=None)
        return [one for one in self.drafters if one is best or not one.exit_layer], None

    def _most(self, rows: list[Row]) -> int:
        """Tokens that each row may draft, so that a verification is still one pass of few tokens, and the same bits.

        All rows are as long there as the longest: none may reach where the bits of another would change.
        """
        most, rooms = self.target.max_tokens, [self.target.room(row) for row in rows]
        most = self.setup.max_draft if most is None else min(self.setup.max_draft, max(most // len(rows) - 1, 0))
        return min([most, *(room for room in rooms if room is not None)])

    def _limit(self, row: Row, most: int) -> int:
        """The same, where the row's own end does not come first; the model itself adds one."""
        room = self.stops.room(row)
        return most if room is None else min(most, room - 1)

    def _pays(self, drafter: Drafter, plans: list[Plan]) -> bool:
        """Return whether one more token of these is worth its time."""
        probabilities = [plan.reached * self._next_right(drafter, plan) for plan in plans]
        return self.times.pays(drafter.name, probabilities, self.rate)

    def _tries(self, drafter: Drafter, plans: list[Plan]) -> bool:
        """Return whether these would be first tokens of a drafter that is to be known better, whatever they cost."""
        is_known = self.policy.is_known(drafter)
        return any((plan.is_trial or not is_known) and not plan.row.draft for plan in plans)

    def _next_right(self, drafter: Drafter, plan: Plan) -> float:
        next_bin = drafter.next_bin(plan.row)
        return 0.0 if next_bin == -1 else self.policy.next_right(drafter, plan.bins, next_bin)

    def _guess(self, drafter: Drafter, plans: list[Plan], *, keeps_all: bool) -> list[Plan]:
        """One more token of these rows; those that got one, if it is worth to be verified or all are kept."""
        started = time.perf_counter()
        guesses = drafter.guess([plan.row for plan in plans], self.choice.guess)
        self.times.observe_draft(drafter.name, time.perf_counter() - started)
        acceptance, got = self.policy.statistics(drafter).by_bin, []
        for plan, guess in zip(plans, guesses, strict=True):
            reached = 0.0 if guess is None else plan.reached * acceptance.of(guess.confidence)
            if guess is None or not (
                keeps_all or self.times.repays(reached, self.rate)
            ):  # or no token of its vocabulary is allowed
                self.policy.observe_none(drafter, plan.bins)
                continue
            plan.row.draft.append(guess.token)
            plan.bins.append(guess.confidence)
            plan.reached = reached
            got.append(plan)
        return got

    def _drafter_for(self, row: Row, candidates: Sequence[Drafter]) -> tuple[Drafter | None, float]:
        """Return the drafter with the highest rate for a row, and that rate, 0 where unknown; None: no drafter."""
        best: Drafter | None = None
        best_rate = 0.0
        for drafter in candidates:
            next_bin = drafter.next_bin(row)
            rate = 0.0 if next_bin == -1 else self.policy.rate(drafter, self.num_rows, next_bin)
            if rate > best_rate:
                best, best_rate = drafter, rate
        return best, best_rate if isfinite(best_rate) else 0.0

    # --- taking ------------------------------------------------------------------------------------------------

    def _take(self, rows: Sequence[Row], logits: Sequence[Tensor]) -> list[int]:
        """Rows take the tokens that the model chooses, up to the first that was not drafted; how many each took."""
        plain = [largest(part) for part in logits] if self.choice.is_plain else None
        num_taken = []
        for number, (row, part) in enumerate(zip(rows, logits, strict=True)):
            taken = 0
            for place, own in enumerate(part):
                if plain is None:
                    scores = self.choice.scores(row, row.ids, own)
                    token = self.choice.token(row, row.ids, scores)
                else:
                    scores, token = own, plain[number][place]
                row.ids.append(token)
                if self.on_token is not None:
                    self.on_token(own, token)
                taken += 1
                row.is_done = self.stops.ends(row, scores)
                if row.is_done or place == len(row.draft) or token != row.draft[place]:
                    break
            num_taken.append(taken)
        return num_taken

    def _learn(self, plan: Plan, taken: list[int]) -> None:
        """What a draft says of its drafter."""
        draft, num_right = plan.row.draft, 0
        for guess, token in zip(draft, taken, strict=False):
            if guess != token:
                break
            num_right += 1
        judged = len(draft) if num_right < len(taken) else num_right  # what came after the end was not
        self.counts.note(None if plan.drafter is None else plan.drafter.name, judged, num_right, len(taken))
        if plan.drafter is not None:
            self.policy.observe(plan.drafter, plan.bins, num_right, len(taken))


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:  # a clock would see the launch alone
        torch.cuda.synchronize(tensor.device)
