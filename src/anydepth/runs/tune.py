"""Find the fastest way to run a model on this machine within a bound, and keep it as a folder.

Weights, drafting, skip sets and thresholds of what is attached are raced against full depth in the model's own
precision (`measure/race.py`). Some texts choose; others, which chose nothing, score those that are left and confirm the
fastest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import cycle, product
from pathlib import Path
from statistics import mean
from typing import Any

from torch import Tensor

from anydepth.calibration.guarantee import least_sequences, p_value
from anydepth.cores import THREADS
from anydepth.decoding.engine import Engine
from anydepth.decoding.engines import FastEngine, HFEngine, open_engine
from anydepth.decoding.generate import check_window
from anydepth.decoding.int4 import kept_blocks
from anydepth.engine.weights import BFloat16
from anydepth.errors import UserError
from anydepth.hf.adapted import attach, detach
from anydepth.measure.bench import batches_of
from anydepth.measure.front import front
from anydepth.measure.prompts import read_prompts
from anydepth.measure.race import FEW, Entrant, Race, Setting
from anydepth.measure.timing import Batch, unpadded
from anydepth.methods._base.calibration import comparing
from anydepth.methods.skip_set import SkipSetConfig
from anydepth.models.load import ADAPTER, AUTO, NATIVE, dtype_name, has_blocks
from anydepth.recipe import TuneConfig
from anydepth.runs.candidates import Quality, Skipping
from anydepth.search.problem import as_lists
from anydepth.speculation.draft import Draft, default_draft, why_no_draft
from anydepth.training.checkpoint import is_checkpoint, load_draft, load_target, own_base, run_options, save
from anydepth.training.corpora import validation_of
from anydepth.training.data import load_windows

Document = dict[str, Any]
Prompts = list[tuple[str, Batch]]
LENGTH, NUM_CHOOSING, NUM_UNSEEN = 512, 6, 24
"""Tokens of a window of text; windows that choose, and those that score what is left."""
CONFIRMING, BASELINE = 4, 2
"""Batches of prompts, of each shape, that confirm the winner; and that transformers is timed on."""
MOST_PROMPTS = 30
"""Batches of prompts that confirm, of text; twice as many choose."""
FOR_SKIPS, FOR_THE_END = 0.2, 0.25
"""Fractions of the time for the search of skip sets, and for confirming."""
ROUNDED_PER_SECOND = 1.5e6
"""Weights that error feedback rounds in a second on two cores."""
WIDE = 0.3
"""Increase of perplexity that a skip set may have where risk is bounded instead."""
ERROR = 0.05
"""Probability that a setting passes the test of a bound on risk and does not keep it."""


@dataclass
class Tuner:
    """One search: a target of the command line, and the recipe section `tune`."""

    target: str
    config: TuneConfig
    device: str = "cpu"
    say: Callable[[str], None] = lambda text: None

    def __post_init__(self) -> None:
        self.started = time.monotonic()
        self.seconds = 60 * self.config.minutes
        recorded = run_options(self.target).get("weights") == NATIVE and self.config.dtype == AUTO
        self.is_native = recorded or has_blocks(self.target, self.config.dtype, self.device)
        adapted, self.tokenizer = self._load(native=self.is_native)
        self.skipping = Skipping(adapted, is_lossless=self.config.is_lossless)
        self.adapted = self.skipping.adapted
        self.own = self._open("auto", NATIVE if self.is_native else None)
        self.engines = {self.own.weights: self.own}
        self.drafts: dict[str, Draft] = {}
        self.refused: list[Entrant] = []
        self.reference = self._entrant(Setting(self.own.name, self.own.weights))

    def _load(self, *, native: bool = False) -> tuple[Any, Any]:
        return load_target(self.target, dtype=self.config.dtype, device=self.device, merge=True, native=native)

    def _open(self, engine: str, weights: str | None) -> Engine:
        return open_engine(self.adapted.eval(), engine, weights, self.say)

    # --- texts -------------------------------------------------------------------------------------------------------

    @cached_property
    def batches(self) -> tuple[Prompts, Prompts]:
        """Batches of prompts with the names of their shapes, to choose and to confirm with."""
        config = self.config
        if config.prompts is not None:
            texts = read_prompts(Path(config.prompts), self.tokenizer)
            cut = self._cut(len(texts))
            return self._of_texts(texts[:cut]), self._of_texts(texts[cut:])
        longest = max(config.prompt_tokens)
        check_window(self.adapted, longest, config.new_tokens)
        # Windows as long as those that score, so that prompts that confirm come after the text that chooses.
        most = 3 * max(MOST_PROMPTS * max(config.batch_sizes), self._num_texts(ERROR / FEW))
        windows = load_windows(config.data, self.tokenizer, max(longest, self._length), max_windows=most)
        cut = self._cut(len(windows))
        return self._of_windows(windows[:cut]), self._of_windows(windows[cut:])

    def _of_texts(self, texts: list[str]) -> Prompts:
        config, found = self.config, list[Prompts]()
        for size in config.batch_sizes:
            batches = batches_of(self.adapted, self.tokenizer, texts, size, config.new_tokens)
            found.append([(f"batch {size}", batch) for batch in batches])
        return _in_turn(found)

    def _of_windows(self, windows: Tensor) -> Prompts:
        found, windows = list[Prompts](), windows.to(self.adapted.device)
        for size, length in product(self.config.batch_sizes, self.config.prompt_tokens):
            parts = [windows[start : start + size, :length] for start in range(0, len(windows) - size + 1, size)]
            found.append([(f"{length} tokens, batch {size}", unpadded(part)) for part in parts])
        return _in_turn(found)

    def _cut(self, count: int) -> int:
        """Return how many of the prompts choose; raise `UserError` if too few are left to confirm with."""
        cut, source = count - count // 3, self.config.prompts or self.config.data
        if count - cut < max(self.config.batch_sizes):
            raise UserError(
                f"{source} has {count} prompts; tune needs at least {3 * max(self.config.batch_sizes)}, to choose and "
                "to confirm with: give more text, or smaller batches"
            )
        return cut

    @property
    def num_shapes(self) -> int:
        return len(self.config.batch_sizes) * (1 if self.config.prompts else len(self.config.prompt_tokens))

    @cached_property
    def windows(self) -> tuple[Tensor, Tensor]:
        """Return (N, T) windows of text that choose, and others."""
        data, length = self.config.data, self._length
        other = validation_of(data)
        count = NUM_CHOOSING if other else NUM_CHOOSING + NUM_UNSEEN
        windows = load_windows(data, self.tokenizer, length, max_windows=count)
        unseen = windows[NUM_CHOOSING:]
        if other:
            unseen = load_windows(other, self.tokenizer, length, max_windows=NUM_UNSEEN)
        if not len(unseen):
            raise UserError(
                f"{data} has {len(windows)} windows of {length} tokens; {NUM_CHOOSING} choose, and others have to "
                "score: give more text"
            )
        return windows[:NUM_CHOOSING], unseen

    @property
    def _length(self) -> int:
        return min(LENGTH, getattr(self.adapted.config, "max_position_embeddings", None) or LENGTH)

    @cached_property
    def choosing(self) -> Quality:
        return Quality(self.windows[0])

    @cached_property
    def unseen(self) -> Quality:
        return Quality(self.windows[1])

    # --- what is raced -----------------------------------------------------------------------------------------------

    def entrants(self) -> list[Entrant]:
        """Return the settings within the bound on the text that chooses; others are in `refused`, with the reason."""
        self._open_drafts()
        found = [Setting(self.own.name, self.own.weights, draft=name) for name in self.drafts]
        if not self.config.is_lossless:
            for kind in self._lossy_kinds():
                self.say(f"packing {kind} weights …")
                self.engines[kind] = self._open("fast", kind)
                names = [name for name in self.drafts if "copy" not in name]
                found += [Setting("fast", kind, draft=name) for name in (None, *names)]
            self.say("searching what can be skipped …")
            most = self.config.max_perplexity_increase or WIDE
            until = time.monotonic() + FOR_SKIPS * self.seconds
            skips = list(self.skipping.settings(self.own, self.windows[0], most, until, self.say))
            found += [replace(one, weights=kind) for one in skips for kind in self.engines]
        self._is_allowed(self.reference, self.choosing, "")
        entrants = list(map(self._entrant, found))
        allowed = [one for one in entrants if self._is_allowed(one, self.choosing, "the text that chooses")]
        self.refused = [one for one in entrants if one.dropped is not None]
        return allowed

    def _entrant(self, setting: Setting) -> Entrant:
        engine = self.engines[setting.weights]
        if setting.draft is not None:
            with self.skipping.in_drafts():
                engine = engine.with_draft(self.drafts[setting.draft])
        return Entrant(setting, engine, partial(self.skipping.running, setting))

    def _open_drafts(self) -> None:
        why = why_no_draft(self.adapted.backbone, self.adapted.attached)
        if why is not None:
            self.say(f"no drafting: {why}")
            return
        self.drafts["prompt lookup"] = Draft(self.adapted, {})
        if (recorded := load_draft(self.target, self.adapted)) is not None:
            self.drafts["what the folder drafts with"] = recorded
        if self.own.model is None or self.own.model.why_not_native is not None:
            return
        shipped = default_draft(self.adapted)
        if shipped.network is not None:
            self.drafts["lookup and a trained network"] = shipped
        if self.own.weights == BFloat16.name:
            for kind in ("auto", "int8"):
                self.drafts[f"lookup and a copy in {kind.replace('auto', 'int4 or int8')}"] = Draft(
                    self.adapted, {"quantised": kind}
                )

    def _lossy_kinds(self) -> list[str]:
        """Return kinds of weights to try; int4 with error feedback where there is time to prepare it."""
        if self.own.name != FastEngine.name or self.own.weights not in (BFloat16.name, NATIVE):
            return []
        backbone = self.adapted.backbone
        seconds = sum(parameter.numel() for parameter in backbone.model.parameters()) / ROUNDED_PER_SECOND
        in_time = seconds < self.seconds / 3 or kept_blocks(backbone) is not None
        return ["int8", "int4" if in_time and not self.is_native else "int4-nearest"]

    def _is_allowed(self, entrant: Entrant, quality: Quality, where: str) -> bool:
        """Score an entrant on a text; it is dropped if it is out of the bound there."""
        entrant.quality = quality.of(entrant, self.reference)
        limit, found = self.config.max_perplexity_increase, entrant.quality["perplexity_increase"]
        if limit is not None and found > limit:
            entrant.dropped = f"perplexity {found:+.1%} on {where}"
        return entrant.dropped is None

    # --- the search --------------------------------------------------------------------------------------------------

    def run(self) -> Document:
        """Return the fields of `anydepth.tune/1`."""
        choosing, confirming = self.batches
        with THREADS.fixed(self.say):
            entrants = self.entrants()
            self.say(f"racing {len(entrants)} settings against full depth …")
            race = self.new_race(cycle(choosing))
            race.warm_up(entrants)
            left = race.run(entrants, self.started + (1 - FOR_THE_END) * self.seconds)
            self.chosen, confirmed = self._confirmed(left, confirming)
            others = self.baselines(confirming)
        everything = [one.fields() for one in (self.reference, *entrants, *self.refused)]
        return {
            "bound": {
                "lossless": self.config.is_lossless,
                "max_perplexity_increase": self.config.max_perplexity_increase,
                "max_risk": self.config.max_risk,
            },
            "baselines": others,
            "candidates": everything,
            "front": on_front(everything),
            "chosen": self.chosen.fields(),
            "confirmed": confirmed.fields(),
            "met": True,
            "seconds": time.monotonic() - self.started,
        }

    def new_race(self, prompts: Iterator[tuple[str, Batch]]) -> Race:
        """Return a race against full depth on these prompts."""
        most = 0.0 if self.config.is_lossless else self.config.max_risk
        return Race(self.reference, prompts, self.num_shapes, self.config.new_tokens, most, self.say)

    def _confirmed(self, ranked: Sequence[Entrant], prompts: Prompts) -> tuple[Entrant, Entrant]:
        """Measure the fastest again, until one keeps the bound and is faster on prompts that chose nothing.

        Returns:
            The entrant that was chosen, full depth if none of the others, and the same with its new times.
        """
        most = len(prompts) // self.num_shapes
        for entrant in ranked:
            if entrant.speedup <= 1:
                entrant.dropped = f"{entrant.speedup:.2f}×: full depth is as fast"
                continue
            again = entrant.again()
            if self._is_allowed(again, self.unseen, "text that chose nothing"):
                self.say(f"confirming {entrant.setting.label} on other prompts …")
                race = self.new_race(iter(prompts))
                self._time(again, race, most)
                if again.dropped is None and again.speedup <= 1:
                    again.dropped = f"{again.speedup:.2f}× on prompts that chose nothing"
                if again.dropped is None:
                    self._test_risk(again, race, most, ERROR / len(ranked))
            if again.dropped is None:
                return entrant, again
            entrant.dropped = again.dropped
        again = self.reference.again()
        self._is_allowed(again, self.unseen, "")
        self._time(again, self.new_race(iter(prompts)), most)
        return self.reference, again

    def _time(self, again: Entrant, race: Race, most: int) -> None:
        """Time an entrant on up to `most` batches of each shape: on more of them while it may be no faster."""
        while (count := min(CONFIRMING, most - again.num_runs // self.num_shapes)) > 0 and again.dropped is None:
            race.round([again], count)
            late = time.monotonic() > self.started + self.seconds
            if late or again.num_runs >= 3 * CONFIRMING * self.num_shapes or not again.fields()["is_noise"]:
                return

    def _test_risk(self, again: Entrant, race: Race, most: int, error: float) -> None:
        """Test a bound on risk, if there is one; the entrant is dropped if it fails.

        A row of batches, one of each shape, may be of one text: its mean distance is one independent loss.
        """
        if self.config.max_risk is None:
            return
        needed = self._num_texts(error)
        race.round([again], max(min(needed, most) - again.num_runs // self.num_shapes, 0))
        per_row = len(again.distances) * self.num_shapes // again.num_runs
        losses = [mean(again.distances[at : at + per_row]) for at in range(0, len(again.distances), per_row)]
        p = p_value(losses, self.config.max_risk)
        again.quality |= {"p_value": p, "num_texts": len(losses)}
        if p > error:
            again.dropped = f"risk of {self.config.max_risk:g} not shown on {len(losses)} texts (p {p:.2g})"

    def _num_texts(self, error: float) -> int:
        """Return how many texts show a bound on risk of which half is lost."""
        return 0 if self.config.max_risk is None else 2 * least_sequences(self.config.max_risk, 1 - error)

    def baselines(self, prompts: Prompts) -> Document:
        """Time transformers next to the engine at full depth."""
        self.say("timing transformers …")
        dense = self.adapted if not self.is_native else self._load()[0]
        plain = HFEngine(dense)
        one = Entrant(Setting(plain.name, plain.weights), plain, dense.disabled)
        if self.own.name == plain.name:
            return {"transformers": self.reference.fields(), "engine": None}
        race = Race(self.reference.again(), cycle(prompts), self.num_shapes, self.config.new_tokens)
        race.warm_up([one])
        race.round([one], BASELINE)
        return {"transformers": one.fields(), "engine": race.reference.fields()}

    # --- the folder --------------------------------------------------------------------------------------------------

    def write(self, out: Path) -> None:
        """Write the chosen setting as a folder that `generate`, `chat`, `serve`, `bench` and `eval` run as it is."""
        setting, tokenizer = self.chosen.setting, self.tokenizer
        draft = None if setting.draft is None else self.drafts[setting.draft]
        run = {"dtype": dtype_name(self.adapted), "engine": setting.engine}
        run |= {"weights": setting.weights} if setting.engine == FastEngine.name else {}
        is_folder = is_checkpoint(self.target)
        is_plain = not (is_folder or (Path(self.target) / ADAPTER).is_file())
        # Here a LoRA adapter is merged; it is saved unmerged.
        found = self.adapted if is_plain else load_target(self.target, dtype=self.config.dtype, device=self.device)[0]
        if setting.skip_share is not None:
            for method in comparing(found.attached):
                method.set_skip_share(setting.skip_share)
        elif not self.skipping.has_own or not (draft or setting.is_attached):
            found = attach(detach(found), SkipSetConfig(**as_lists(setting.skips)) if setting.skips else [])
        has_base = is_folder and own_base(Path(self.target)) is not None
        base = self.target if is_plain else None
        save(found, out, base=base, own_base=tokenizer if has_base else None, draft=draft, run=run)


def _in_turn(shapes: Sequence[Prompts]) -> Prompts:
    """Return a batch of each shape, then the next of each."""
    return [batch for row in zip(*shapes, strict=False) for batch in row]


def on_front(candidates: Sequence[Document]) -> list[str]:
    """Return the labels of the timed candidates that no other beats in both time and perplexity, the fastest first."""
    rows: list[Document] = []
    for one in candidates:
        if one["speedup"] is not None:
            low, high = one["speedup_interval"] or (one["speedup"], one["speedup"])
            rows.append({**one, "time_share": 1 / one["speedup"], "time_share_range": [1 / high, 1 / low]})
    return front(rows, "time")
