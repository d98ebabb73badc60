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
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
)

from anydepth.execution.trace import PassRecord
from anydepth.inference.drafters import NUM_CLASSES, Drafter, FirstLayers, Lookup, Reduced
from anydepth.inference.economy import FIRST, TRY_AGAIN, Economy
from anydepth.inference.targets import Row, Target


@dataclass
class Counts:
    """What speculation did.

    Attributes:
        num_verified: verifications of a row, plain steps included.
        num_taken: tokens that they gave.
        num_drafted, num_accepted: tokens, by drafter.
        by_place: by place in the draft, how many were drafted whose forerunners were all accepted, and accepted.
    """

    num_verified: int = 0
    num_taken: int = 0
    num_drafted: dict[str, int] = field(default_factory=dict)
    num_accepted: dict[str, int] = field(default_factory=dict)
    by_place: list[list[int]] = field(default_factory=list)

    def note(self, drafter: str | None, num_drafted: int, num_accepted: int, num_taken: int) -> None:
        """One verification of a row."""
        self.num_verified += 1
        self.num_taken += num_taken
        if drafter is not None:
            self.num_drafted[drafter] = self.num_drafted.get(drafter, 0) + num_drafted
            self.num_accepted[drafter] = self.num_accepted.get(drafter, 0) + num_accepted
        self.by_place += [[0, 0] for _ in range(num_drafted - len(self.by_place))]
        for place in range(min(num_accepted + 1, num_drafted)):
            self.by_place[place][0] += 1
            self.by_place[place][1] += place < num_accepted

    @property
    def acceptance_rate(self) -> float:
        """Accepted ÷ drafted tokens."""
        return sum(self.num_accepted.values()) / max(sum(self.num_drafted.values()), 1)

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens that a verification gives a row, the one that the model itself adds included."""
        return self.num_taken / max(self.num_verified, 1)

    def add(self, other: Counts) -> None:
        """Count another generation as well."""
        self.num_verified += other.num_verified
        self.num_taken += other.num_taken
        for ours, theirs in ((self.num_drafted, other.num_drafted), (self.num_accepted, other.num_accepted)):
            for name, count in theirs.items():
                ours[name] = ours.get(name, 0) + count
        self.by_place += [[0, 0] for _ in range(len(other.by_place) - len(self.by_place))]
        for place, (seen, accepted) in enumerate(other.by_place):
            self.by_place[place][0] += seen
            self.by_place[place][1] += accepted

    def to_json(self) -> dict[str, Any]:
        """Fields of documents; `acceptance_by_place` is of guesses in front of which all were right."""
        return {
            "acceptance_rate": self.acceptance_rate,
            "mean_acceptance_length": self.mean_acceptance_length,
            "acceptance_by_place": [accepted / seen for seen, accepted in self.by_place if seen],
            "num_drafted": dict(self.num_drafted),
            "num_accepted": dict(self.num_accepted),
        }


@dataclass(frozen=True)
class Setup:
    """How an engine drafts, kept from one generation to the next.

    Attributes:
        economies: by number of rows.
    """

    drafters: Sequence[Drafter]
    max_draft: int
    adaptive: bool
    vocabulary_size: int
    economies: dict[int, Economy] = field(default_factory=dict)


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
    num_rows = len(input_ids)
    padding = [0] * num_rows if attention_mask is None else (attention_mask == 0).sum(1).tolist()
    rows = [Row(ids, num_padding) for ids, num_padding in zip(input_ids.tolist(), padding, strict=True)]
    choice = Choice(processors, num_rows, setup.vocabulary_size, sampling=bool(config.do_sample))
    economy = setup.economies.setdefault(num_rows, Economy(num_rows))
    run = Speculation(target, setup.drafters, choice, Stops(criteria), economy, setup.max_draft, setup.adaptive)
    pad = 0 if config._pad_token_tensor is None else int(config._pad_token_tensor)
    start, num_put = input_ids.shape[1], 0

    def put() -> None:
        """Give the streamer the steps that all rows have taken."""
        nonlocal num_put
        longest = max(len(row.ids) for row in rows)
        ready = min(longest if row.is_done else len(row.ids) for row in rows) - start
        for step in range(num_put, ready):
            ids = [row.ids[start + step] if start + step < len(row.ids) else pad for row in rows]
            streamer.put(torch.tensor(ids))
        num_put = max(num_put, ready)

    run.run(rows, (lambda: None) if streamer is None else put)
    if streamer is not None:
        streamer.end()
    longest = max(len(row.ids) for row in rows)
    ids = [row.ids + [pad] * (longest - len(row.ids)) for row in rows]
    return torch.tensor(ids, device=input_ids.device), run.counts


class Choice:
    """The next token out of logits, as transformers' `generate` chooses it.

    Args:
        processors: transformers' own.
        num_rows: of the batch; noise is drawn for all of them, as there.
        vocabulary_size: of the model.
    """

    def __init__(self, processors: LogitsProcessorList, num_rows: int, vocabulary_size: int, *, sampling: bool) -> None:
        self.processors, self.num_rows, self.sampling = processors, num_rows, sampling
        self.vocabulary_size = vocabulary_size
        self.noise: dict[int, Tensor] = {}

    def scores(self, row: Row, ids: Sequence[int], logits: Tensor) -> Tensor:
        """(V,) behind `ids`, which begin as the row's."""
        if not self.processors:
            return logits.float()
        # Some know their batch: they get the row in its place among copies of itself.
        so_far: Any = torch.tensor([ids], device=logits.device).expand(self.num_rows, -1)
        return self.processors(so_far, logits[None].float().repeat(self.num_rows, 1))[row.slot]

    def token(self, row: Row, ids: Sequence[int], scores: Tensor) -> int:
        """The one behind `ids`, which begin as the row's."""
        if not self.sampling:
            return int(scores.numpy().argmax()) if scores.device.type == "cpu" else int(scores.argmax())
        noise = self._noise(len(ids) - row.num_prompt, scores)[row.slot]
        return int((scores.softmax(-1) / noise).argmax())

    def _noise(self, step: int, like: Tensor) -> Tensor:
        """(B, V) what `torch.multinomial` would divide by, were this the step of all rows."""
        if step not in self.noise:  # asked for in order: a row's next step is at most one behind the latest
            self.noise[step] = torch.empty(self.num_rows, len(like), device=like.device).exponential_(1)
        return self.noise[step]

    def forget(self, step: int) -> None:
        """No row will ask for noise of steps before this one."""
        for old in [known for known in self.noise if known < step]:
            del self.noise[old]

    def guess(self, rows: Sequence[Row], logits: Tensor, vocabulary: Tensor | None) -> tuple[list[int], list[float]]:
        """`drafters.Choose`."""
        if not self.processors and not self.sampling:
            scores = logits.float().cpu().numpy()  # faster than torch at so few numbers
            places = scores.argmax(-1)
            tops = scores[range(len(scores)), places]
            shares = (1 / np.exp(scores - tops[:, None]).sum(-1)).tolist()
            ids = torch.from_numpy(places)
            return (ids if vocabulary is None else vocabulary.cpu()[ids]).tolist(), shares
        tokens, shares = [], []
        for row, part in zip(rows, logits, strict=True):
            if vocabulary is not None:
                whole = part.new_full((self.vocabulary_size,), float("-inf"))
                part = whole.index_copy(0, vocabulary, part)
            ids = [*row.ids, *row.draft]
            scores = self.scores(row, ids, part)
            tokens.append(self.token(row, ids, scores))
            shares.append(scores.softmax(-1)[tokens[-1]].item())
        return tokens, shares


class Stops:
    """When a row ends: transformers' own criteria, asked only where they can say yes."""

    def __init__(self, criteria: StoppingCriteriaList) -> None:
        lengths = [part for part in criteria if type(part) is MaxLengthCriteria]
        ends = [part for part in criteria if type(part) is EosTokenCriteria]
        self.max_length = min((part.max_length for part in lengths), default=None)
        self.end_ids = {token for part in ends for token in part.eos_token_id.tolist()}
        self.others = StoppingCriteriaList(part for part in criteria if part not in lengths and part not in ends)

    def room(self, row: Row) -> int | None:
        """Tokens that a row may still take; None: any number."""
        return None if self.max_length is None else self.max_length - len(row.ids)

    def ends(self, row: Row, scores: Tensor) -> bool:
        """Whether the row's last token is its end."""
        if self.room(row) == 0 or row.ids[-1] in self.end_ids:
            return True
        if not self.others:
            return False
        ids: Any = torch.tensor([row.ids], device=scores.device)
        criteria: Any = self.others
        return bool(criteria(ids, scores[None])[0])


class Speculation:
    """One generation: rows draft, are verified together, and take what was right and one token more.

    Args:
        drafters: any number; each row drafts with the one that is worth most at the moment.
        max_draft: tokens drafted at a time, at most.
        adaptive: draft only what pays.
    """

    def __init__(
        self,
        target: Target,
        drafters: Sequence[Drafter],
        choice: Choice,
        stops: Stops,
        economy: Economy,
        max_draft: int,
        adaptive: bool,
    ) -> None:
        self.target, self.drafters, self.choice, self.stops = target, list(drafters), choice, stops
        self.economy, self.max_draft, self.adaptive = economy, max_draft, adaptive
        self.counts = Counts()

    def run(self, rows: list[Row], after_round: Callable[[], None] = lambda: None) -> None:
        """Let all rows go to their ends."""
        reduced = [method for drafter in self.drafters if isinstance(drafter, Reduced) for method in drafter.methods]
        logits = self.target.start(rows, [method for method in reduced if method.remembers])
        for drafter in self.drafters:
            drafter.start(self.target, len(rows))
        self._take(rows, [part[None] for part in logits])
        while True:
            after_round()
            active = [row for row in rows if not row.is_done]
            if not active:
                return
            for drafter in self.drafters:
                drafter.settle(active)
            plans = self._draft(active)
            started = time.perf_counter()
            logits = self.target.verify(active)
            num_tokens = sum(len(part) for part in logits)
            self.economy.note_verification(num_tokens, time.perf_counter() - started)
            self._take(active, logits, plans)
            self.choice.forget(min(len(row.ids) - row.num_prompt for row in active))

    # --- drafting ----------------------------------------------------------------------------------------------

    def _draft(self, rows: list[Row]) -> list[Plan]:
        """Let each row draft for as long as it pays."""
        candidates, trial = self._candidates()
        plans = [Plan(row, self._drafter_for(row, candidates, trial), trial is not None) for row in rows]
        exits = [plan.drafter for plan in plans if isinstance(plan.drafter, FirstLayers)]
        self.target.exit_layer = exits[0].num_layers if exits else 0
        drafting = [plan for plan in plans if plan.drafter is not None and self._limit(plan.row) > 0]
        while drafting:
            going_on: list[Plan] = []
            for drafter in candidates:
                own = [plan for plan in drafting if plan.drafter is drafter]
                if own and self._worth_it(drafter, own):
                    going_on += self._guess(drafter, own)
            drafting = [plan for plan in going_on if len(plan.row.draft) < self._limit(plan.row)]
        return plans

    def _candidates(self) -> tuple[list[Drafter], Drafter | None]:
        """Drafters of this round, of those with first layers the best; and one that is to be tried, if it is time."""
        if self.adaptive and self.economy.is_new:
            return [], None  # a plain step is measured first
        for drafter in self.drafters:
            record = self.economy.of(drafter.name)
            record.idle += 1
            if self.adaptive and record.idle > TRY_AGAIN and not isinstance(drafter, Lookup):
                record.idle = 0
                return [drafter], drafter
        exits = [drafter for drafter in self.drafters if isinstance(drafter, FirstLayers)]
        best = max(exits, key=self._worth, default=None)
        return [one for one in self.drafters if one is best or not isinstance(one, FirstLayers)], None

    def _limit(self, row: Row) -> int:
        """Tokens that a row may draft: the model itself adds one."""
        room = self.stops.room(row)
        return self.max_draft if room is None else min(self.max_draft, room - 1)

    def _worth_it(self, drafter: Drafter, plans: list[Plan]) -> bool:
        if not self.adaptive or any(plan.is_trial and not plan.row.draft for plan in plans):
            return True
        return self.economy.pays(drafter.name, [plan.reached * self._next(drafter, plan) for plan in plans])

    def _next(self, drafter: Drafter, plan: Plan) -> float:
        """How likely the next guess is right."""
        record = self.economy.of(drafter.name)
        if isinstance(drafter, Lookup):
            confidence = drafter.confidence(plan.row)
            return 0.0 if confidence is None else record.known.of(confidence)
        return record.next.of(plan.confidences[-1] if plan.confidences else FIRST)

    def _guess(self, drafter: Drafter, plans: list[Plan]) -> list[Plan]:
        """One more token of these rows; those that got one."""
        started = time.perf_counter()
        guesses = drafter.guess([plan.row for plan in plans], self.choice.guess)
        self.economy.note_guess(drafter.name, time.perf_counter() - started)
        got = []
        for plan, guess in zip(plans, guesses, strict=True):
            if guess is not None:
                plan.row.draft.append(guess.token)
                plan.confidences.append(guess.confidence)
                plan.reached *= self.economy.of(drafter.name).known.of(guess.confidence)
                got.append(plan)
        return got

    def _drafter_for(self, row: Row, candidates: Sequence[Drafter], trial: Drafter | None) -> Drafter | None:
        """The one that is worth most to a row; None: a plain step."""
        if trial is not None:
            return trial
        best, most = None, 0.0
        for drafter in candidates:
            worth = self._worth(drafter, row)
            if worth > most:
                best, most = drafter, worth
        return best

    def _worth(self, drafter: Drafter, row: Row | None = None) -> float:
        """Tokens per second that are expected of a drafter, on a row if it depends on that; 0 where it has no idea."""
        record = self.economy.of(drafter.name)
        first, middle = record.next.of(FIRST), record.next.of(NUM_CLASSES // 2)
        if isinstance(drafter, Lookup):
            confidence = None if row is None else drafter.confidence(row)
            if confidence is None:
                return 0.0
            first, middle = record.known.of(confidence), record.known.of(min(confidence + 1, NUM_CLASSES - 1))
        return self.economy.worth(drafter.name, first, middle)

    # --- taking ------------------------------------------------------------------------------------------------

    def _take(self, rows: Sequence[Row], logits: Sequence[Tensor], plans: Sequence[Plan] = ()) -> None:
        """Rows take the tokens that the model chooses, up to the first that was not drafted."""
        greedy: list[list[int]] | None = None
        if not self.choice.processors and not self.choice.sampling:
            greedy = [_largest(part) for part in logits]
        num_taken = []
        for number, (row, part) in enumerate(zip(rows, logits, strict=True)):
            draft, row.draft = row.draft, []
            taken = 0
            for place, own in enumerate(part):
                if greedy is None:
                    scores = self.choice.scores(row, row.ids, own)
                    token = self.choice.token(row, row.ids, scores)
                else:
                    scores, token = own, greedy[number][place]
                row.ids.append(token)
                taken += 1
                row.is_done = self.stops.ends(row, scores)
                if row.is_done or place == len(draft) or token != draft[place]:
                    break
            num_taken.append(taken)
            if plans:
                self._learn(plans[number], draft, row.ids[-taken:])
        self.target.settle(rows, num_taken)

    def _learn(self, plan: Plan, draft: list[int], taken: list[int]) -> None:
        """What a draft says of its drafter."""
        num_right = 0
        for guess, token in zip(draft, taken, strict=False):
            if guess != token:
                break
            num_right += 1
        name = None if plan.drafter is None else plan.drafter.name
        self.counts.note(name, len(draft), num_right, len(taken))
        if name is not None:
            record = self.economy.of(name)
            before = FIRST
            for place in range(min(num_right + 1, len(draft), len(taken))):
                record.note(before, plan.confidences[place], right=place < num_right)
                before = plan.confidences[place]


@dataclass(eq=False)
class Plan:
    """How a row drafts in one round: with what, how sure, and how likely all of it is right."""

    row: Row
    drafter: Drafter | None
    is_trial: bool
    confidences: list[int] = field(default_factory=list)
    reached: float = 1.0


def _largest(scores: Tensor) -> list[int]:
    """Places of the first of the largest of (N, V)."""
    if scores.device.type == "cpu":
        return scores.float().numpy().argmax(-1).tolist()
    return scores.argmax(-1).tolist()
