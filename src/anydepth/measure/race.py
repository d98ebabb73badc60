"""Successive halving of ways to run a model, by times that are paired with full depth (Jamieson & Talwalkar 2016)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from statistics import mean, median, stdev
from typing import Any

from anydepth.calibration.guarantee import inconsistency
from anydepth.decoding.engine import Engine
from anydepth.measure.timing import Batch, Timing, time_generation
from anydepth.search.problem import Candidate, as_lists
from anydepth.statistics import is_noise, ratio_interval

CLOSE = 0.97
"""Fraction of the best speed-up above which none is dropped, however many are faster."""
FEW = 2
"""Entrants of which none is dropped for its speed."""
ROUNDS, MOST_ROUNDS = 4, 12
"""Rounds in which a race halves, each with one batch of a shape more than the one before; and rounds at most."""
KNOWN = 0.1
"""Half of the interval of a speed-up, relative to it, at which it is known, if it also shows a difference."""


@dataclass(frozen=True)
class Setting:
    """A way to run a model.

    Attributes:
        weights: precision of the engine's weights.
        draft: name of the drafting; with it the text is that of full depth. None: none.
        skips: branches that a skip set leaves out.
        prompt_layers: layers that the tokens of a prompt run, all but the last ones; None: all.
        is_attached: whether the attached methods decide, with the thresholds that they were loaded with.
        skip_share: fraction of decisions that the attached methods are set to skip; None: they do not decide.
    """

    engine: str
    weights: str
    draft: str | None = None
    skips: tuple[Candidate, ...] = ()
    prompt_layers: int | None = None
    is_attached: bool = False
    skip_share: float | None = None

    @property
    def label(self) -> str:
        skipped = f"without {', '.join(f'{kind} {idx}' for kind, idx in self.skips)}" if self.skips else None
        prompts = None if self.prompt_layers is None else f"prompts by {self.prompt_layers} layers"
        share = "as attached" if self.is_attached else None
        share = share if self.skip_share is None else f"skips {self.skip_share:.0%}"
        name = "transformers" if self.engine == "hf" else "engine"
        draft = None if self.draft is None else f"drafts by {self.draft}"
        return ", ".join(part for part in (f"{name} {self.weights}", skipped, prompts, share, draft) if part)

    def drafts_for(self, full: Setting) -> bool:
        """Return whether it drafts for another setting, so that its text is the same."""
        return self.draft is not None and replace(self, draft=None) == full

    def to_json(self) -> dict[str, Any]:
        own = {"engine": self.engine, "weights": self.weights, "draft": self.draft}
        own |= {"attached": self.is_attached, "skip_share": self.skip_share, "prompt_layers": self.prompt_layers}
        return {**own, **(as_lists(self.skips) if self.skips else {})}


@dataclass(eq=False)
class Entrant:
    """A setting in a race, and what was measured of it.

    Attributes:
        on: sets the methods to what it runs, within a block.
        ratios: by shape of the prompts, times of full depth ÷ its own, one for each batch.
        full, num_tokens: by shape, the seconds of full depth at these batches, and the new tokens of a batch.
        distances: 1 − ROUGE-L of each text and that of full depth; 0 where all tokens are the same.
        quality: fields on a text: perplexity, its increase, agreement.
        dropped: why it is not the fastest within the bound; None: it was not dropped.
    """

    setting: Setting
    engine: Engine
    on: Callable[[], AbstractContextManager[Any]]
    ratios: dict[str, list[float]] = field(default_factory=dict)
    distances: list[float] = field(default_factory=list)
    full: dict[str, list[float]] = field(default_factory=dict)
    num_tokens: dict[str, int] = field(default_factory=dict)
    quality: dict[str, Any] = field(default_factory=dict)
    dropped: str | None = None

    @property
    def speedup(self) -> float:
        """Geometric mean over the shapes of the median ratio; 1 before any run."""
        medians = [median(own) for own in self.ratios.values()]
        return math.exp(sum(map(math.log, medians)) / len(medians)) if medians else 1.0

    @property
    def full_speed(self) -> float | None:
        """New tokens a second of full depth, from its median times at these batches; None before any run."""
        seconds = sum(median(own) for own in self.full.values())
        return sum(self.num_tokens.values()) / seconds if seconds else None

    @property
    def num_runs(self) -> int:
        return sum(map(len, self.ratios.values()))

    @property
    def interval(self) -> list[float] | None:
        """Bounds of the speed-up; None where a shape was run once: ratios of one run each would not spread."""
        if not all(len(own) > 1 for own in self.ratios.values()):
            return None
        return ratio_interval(self.scaled_ratios)

    @property
    def scaled_ratios(self) -> list[float]:
        """Ratios of all shapes, scaled so that the median of each shape is the speed-up."""
        return [ratio / median(own) * self.speedup for own in self.ratios.values() for ratio in own]

    @property
    def error(self) -> float:
        """Half of the interval relative to the speed-up; infinite where there is none."""
        if (interval := self.interval) is None:
            return math.inf
        low, high = interval
        return (high - low) / (high + low)

    @property
    def is_known(self) -> bool:
        """Whether the speed-up needs no more runs: its interval is narrow and shows a difference."""
        return self.error < KNOWN and not is_noise(self.interval)

    def run(self, batch: Batch, new_tokens: int) -> Timing:
        with self.on():
            return time_generation(self.engine, batch, new_tokens, full_depth=False)

    def again(self) -> Entrant:
        """Return the same setting without its times."""
        return Entrant(self.setting, self.engine, self.on, quality=self.quality)

    def fields(self, reference: Entrant) -> dict[str, Any]:
        """Return the fields of a document; tokens per second are those of the reference times the speed-up."""
        ratios, interval = self.scaled_ratios, self.interval
        return {
            "label": self.setting.label,
            "setting": self.setting.to_json(),
            "speedup": self.speedup if ratios else None,
            "speedup_interval": interval,
            "is_noise": bool(ratios) and set(ratios) != {1.0} and is_noise(interval),  # full depth is 1 without noise
            "speedup_range": [min(ratios), max(ratios)] if ratios else None,
            "by_prompt": {shape: median(own) for shape, own in self.ratios.items()},
            "tokens_per_second": (reference.full_speed or 0.0) * self.speedup if ratios else None,
            "identical_tokens": not any(self.distances) if self.distances else None,
            "num_runs": self.num_runs,
            **self.quality,
            "dropped": self.dropped,
        }


@dataclass
class Race:
    """Runs entrants on the same prompts in turn, full depth among them. The fastest that keeps the text stays.

    Args:
        prompts: yields a shape's name and a batch of prompts; each is run once by all.
        num_shapes: batches that have one of each shape, in a row.
        most_distance: mean distance of its texts from full depth with which an entrant leaves; None: none does.
    """

    reference: Entrant
    prompts: Iterator[tuple[str, Batch]]
    num_shapes: int
    new_tokens: int
    most_distance: float | None = None
    say: Callable[[str], None] = lambda text: None

    def warm_up(self, entrants: Sequence[Entrant], new_tokens: int | None = None) -> None:
        """Run each entrant once on a batch of each shape, not counted: drafters learn what pays."""
        for _ in range(self.num_shapes):
            _, batch = next(self.prompts)
            for entrant in entrants:
                entrant.run(batch, new_tokens or self.new_tokens)

    def run(self, entrants: Sequence[Entrant], deadline: float) -> list[Entrant]:
        """Halve the entrants until few are active and their speeds known, or the time is over.

        Returns:
            Those that are still active, the fastest first.
        """
        active = list(entrants)
        for number in range(1, MOST_ROUNDS + 1):
            num_batches = min(number, ROUNDS)
            started, num_runs = time.monotonic(), num_batches * (len(active) + 1)
            self.round(active, num_batches)
            per_run = (time.monotonic() - started) / num_runs
            active = self._halve([one for one in active if one.dropped is None])
            if number >= ROUNDS and all(one.is_known for one in active):
                break
            following = min(number + 1, ROUNDS) * (len(active) + 1)
            if time.monotonic() + per_run * following > deadline:
                break
        return active

    def round(self, entrants: Sequence[Entrant], num_batches: int) -> None:
        """Run `num_batches` of each shape."""
        sides = [self.reference, *entrants]
        for number in range(num_batches * self.num_shapes):
            shape, batch = next(self.prompts)
            timings: dict[Entrant, Timing] = {}
            for place in range(len(sides)):
                entrant = sides[(place + number) % len(sides)]
                if entrant.dropped is None:
                    timings[entrant] = entrant.run(batch, self.new_tokens)
            self._record(shape, timings)

    def _record(self, shape: str, timings: dict[Entrant, Timing]) -> None:
        full = timings[self.reference]
        for entrant, own in timings.items():
            entrant.ratios.setdefault(shape, []).append(full.total / own.total)
            entrant.full.setdefault(shape, []).append(full.total)
            entrant.num_tokens[shape] = own.token_ids.numel()
            entrant.distances += map(inconsistency, own.token_ids.tolist(), full.token_ids.tolist())
            if self.most_distance == 0 and any(entrant.distances):
                entrant.dropped = "its text is not that of full depth"

    def _is_too_far(self, entrant: Entrant) -> bool:
        """Return whether the mean distance is above the bound, with some confidence: a first text can be unlucky."""
        if self.most_distance is None or len(entrant.distances) < 2:
            return False
        error = stdev(entrant.distances) / len(entrant.distances) ** 0.5
        return mean(entrant.distances) - 2 * error > self.most_distance

    def _halve(self, entrants: list[Entrant]) -> list[Entrant]:
        for entrant in entrants:
            if self._is_too_far(entrant):
                entrant.dropped = f"texts {mean(entrant.distances):.2f} from full depth (1 − ROUGE-L)"
        entrants = [one for one in entrants if one.dropped is None]
        ranked = sorted(entrants, key=lambda one: -one.speedup)
        best = ranked[0].speedup if ranked else 1.0
        lossless = next((one for one in ranked if one.setting.drafts_for(self.reference.setting)), None)
        for place, entrant in enumerate(ranked):
            if entrant is lossless:  # its speed is to be known as well as that of the fastest
                continue
            if place >= max(math.ceil(len(ranked) / 2), FEW) and entrant.speedup < CLOSE * best:
                entrant.dropped = f"{entrant.speedup:.2f}× after {entrant.num_runs} prompts, {best:.2f}× the best"
        active = [one for one in ranked if one.dropped is None]
        if active:
            self.say(f"  {len(active)} of {len(entrants)} stay, the fastest {best:.2f}×: {active[0].setting.label}")
        return active
