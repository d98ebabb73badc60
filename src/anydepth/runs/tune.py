"""Find the fastest way to run a model on this machine within a bound, and keep it as a folder.

Weights, drafting, skip sets and thresholds of what is attached are raced against full depth in the model's own
precision (`measure/race.py`). Some texts choose; others, which chose nothing, score those that are left and confirm the
fastest.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import mean, median
from typing import Any

from anydepth.calibration.guarantee import p_value
from anydepth.cores import THREADS
from anydepth.decoding.engine import Engine
from anydepth.decoding.engines import FastEngine, HFEngine, open_engine
from anydepth.decoding.int4 import kept_blocks
from anydepth.engine.weights import BFloat16
from anydepth.hf.adapted import attach, detach
from anydepth.measure.front import front
from anydepth.measure.race import FEW, Entrant, Race, Setting
from anydepth.measure.timing import Batch
from anydepth.methods._base.calibration import comparing
from anydepth.methods.prompt_exit import PromptExitConfig
from anydepth.methods.skip_set import SkipSetConfig
from anydepth.models.load import AUTO, NATIVE, dtype_name, has_blocks
from anydepth.models.target import ADAPTER, local_folder
from anydepth.recipe import TuneConfig
from anydepth.runs.candidates import Quality, Skipping
from anydepth.runs.tune_texts import ERROR, Prompts, Texts
from anydepth.search.problem import as_lists
from anydepth.speculation.draft import Draft, default_draft, why_no_draft
from anydepth.training.checkpoint import is_checkpoint, load_draft, load_target, own_base, run_options, save

Document = dict[str, Any]
CONFIRMING, BASELINE = 4, 2
"""Batches of prompts, of each shape, that confirm the winner; and that transformers is timed on."""
WARM_TOKENS = 4
"""New tokens of a first run of full depth and of transformers, which is not counted."""
FOR_EXITS, FOR_SKIPS, FOR_THE_END = 0.1, 0.2, 0.25
"""Fractions of the time for fitting prompts that leave early, for the search of skip sets, and for confirming."""
FOR_A_BASELINE = 0.05
"""Fraction of the time above which a round of transformers is the last one."""
ROUNDED_PER_SECOND = 1.5e6
"""Weights that error feedback rounds in a second on two cores."""
WIDE = 0.3
"""Increase of perplexity that a skip set may have where risk is bounded instead."""


@dataclass
class Tuner:
    """One search: a target of the command line, and the recipe section `tune`."""

    target: str
    config: TuneConfig
    device: str = "cpu"
    say: Callable[[str], None] = lambda text: None
    why_lossless: str | None = field(default=None, init=False)
    """Why only lossless settings are raced, though the bound allows others."""

    def __post_init__(self) -> None:
        self.started = time.monotonic()
        self.seconds = 60 * self.config.minutes
        recorded = run_options(self.target).get("weights") == NATIVE and self.config.dtype == AUTO
        self.is_native = recorded or has_blocks(self.target, self.config.dtype, self.device)
        adapted, self.tokenizer = self._load(native=self.is_native)
        self.skipping = Skipping(adapted, is_lossless=self.config.is_lossless)
        self.adapted = self.skipping.adapted
        self.texts = Texts(self.config, self.adapted, self.tokenizer)
        self.own = self._open("auto", NATIVE if self.is_native else None)
        self.engines = {self.own.weights: self.own}
        self.drafts: dict[str, Draft] = {}
        self.refused: list[Entrant] = []
        self.reference = self._entrant(Setting(self.own.name, self.own.weights))

    def _load(self, *, native: bool = False) -> tuple[Any, Any]:
        return load_target(self.target, dtype=self.config.dtype, device=self.device, merge=True, native=native)

    def _open(self, engine: str, weights: str | None) -> Engine:
        return open_engine(self.adapted.eval(), engine, weights, self.say)

    def _left(self, kept: float = 0.0) -> float:
        """Return the seconds that are left, a fraction of all of them kept for later."""
        return self.started + (1 - kept) * self.seconds - time.monotonic()

    # --- what is raced -----------------------------------------------------------------------------------------------

    def entrants(self) -> list[Entrant]:
        """Return the settings within the bound on the text that chooses; others are in `refused`, with the reason."""
        self._open_drafts()
        found = [Setting(self.own.name, self.own.weights, draft=name) for name in self.drafts]
        if not (self.config.is_lossless or self.why_lossless):
            for kind in self._lossy_kinds():
                self.say(f"packing {kind} weights …")
                self.engines[kind] = self._open("fast", kind)
                names = [name for name in self.drafts if "copy" not in name]
                found += [Setting("fast", kind, draft=name) for name in (None, *names)]
            found += [replace(one, weights=kind) for one in self._exits() for kind in self.engines]
            self.say("searching what can be skipped …")
            most = self.config.max_perplexity_increase or WIDE
            until = time.monotonic() + FOR_SKIPS * self.seconds
            skips = list(self.skipping.settings(self.own, self.texts.windows[0], most, until, self.say))
            found += [replace(one, weights=kind) for one in skips for kind in self.engines]
        self._is_allowed(self.reference, self.texts.choosing, "")
        entrants = list(map(self._entrant, found))
        allowed = [one for one in entrants if self._is_allowed(one, self.texts.choosing, "the text that chooses")]
        self.refused = [one for one in entrants if one.dropped is not None]
        return allowed

    def _exits(self) -> list[Setting]:
        """Return settings in which prompts leave early, unless all of them are too short for that."""
        longest, whole = max(batch["input_ids"].shape[1] for _, batch in self.texts.batches[0]), PromptExitConfig()
        if longest <= whole.first + whole.last:
            return []
        self.say("fitting prompts that leave early …")
        until = time.monotonic() + FOR_EXITS * self.seconds
        return self.skipping.exit_prompts(self.own, self.texts.fitting, until, self.say)

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
        if (recorded := load_draft(self.target, self.adapted)) is not None:
            self.drafts["what the folder drafts with"] = recorded
        if self.own.model is not None and self.own.model.why_not_native is None:
            shipped = default_draft(self.adapted)
            if shipped.network is not None:
                self.drafts["lookup and a trained network"] = shipped
            for kind in ("auto", "int8") if self.own.weights == BFloat16.name else ():
                self.drafts[f"lookup and a copy in {kind.replace('auto', 'int4 or int8')}"] = Draft(
                    self.adapted, {"quantised": kind}
                )
        self.drafts["prompt lookup"] = Draft(self.adapted, {})  # the last where time is short: it gains least

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
        choosing, confirming = self.texts.batches
        with THREADS.fixed(self.say):
            self.time_full_depth(choosing)
            entrants = self._in_time(self.entrants())
            self.say(f"racing {len(entrants)} {'setting' if len(entrants) == 1 else 'settings'} against full depth …")
            race = self.new_race(cycle(choosing))
            race.warm_up(entrants)
            left = race.run(entrants, self.started + (1 - FOR_THE_END) * self.seconds)
            self.chosen, confirmed, same = self._confirmed(left, confirming)
        everything = [one.fields(self.reference) for one in (self.reference, *entrants, *self.refused)]
        return {
            "bound": {
                "lossless": self.config.is_lossless,
                "max_perplexity_increase": self.config.max_perplexity_increase,
                "max_risk": self.config.max_risk,
            },
            "baselines": self.baselines(),
            "candidates": everything,
            "front": on_front(everything),
            "chosen": self.chosen.fields(self.reference),
            "confirmed": confirmed.fields(self.reference),
            "confirmed_lossless": None if same is None else same.fields(self.reference),
            "why_lossless": self.why_lossless,
            "met": True,
            "seconds": time.monotonic() - self.started,
        }

    def time_full_depth(self, prompts: Prompts) -> None:
        """Time full depth, next to transformers if that is another engine: what else there is time for follows."""
        plain = self.own if self.own.name == HFEngine.name else self._transformers()
        self.plain = Entrant(Setting(plain.name, plain.weights), plain, plain.adapted.disabled)
        others = [] if plain is self.own else [self.plain]
        self.say("timing full depth, and transformers next to it …" if others else "timing full depth …")
        race = Race(self.reference, cycle(prompts), self.texts.num_shapes, self.config.new_tokens)
        race.warm_up([self.reference, *others], WARM_TOKENS)
        for number in range(BASELINE):
            started = time.monotonic()
            race.round(others, 1)
            if number == 0 and others:
                times, speed = 1 / self.plain.speedup, self.reference.full_speed
                self.say(f"  {speed:.0f} tokens/s, {times:.1f}× transformers")
            if time.monotonic() - started > FOR_A_BASELINE * self.seconds:
                break
        self.plain = replace(self.plain, engine=self.own, on=self.reference.on)  # without its copy of the model
        self.full_seconds = sum(median(own) for own in self.reference.full.values())
        needed = self.texts.num_texts(ERROR / FEW)
        if (seconds := 2 * self.full_seconds * needed) > self._left():
            self.why_lossless = (
                f"a risk of {self.config.max_risk:g} takes {needed} texts to show, about {seconds / 60:.0f} minutes: "
                f"give --minutes {math.ceil((self.seconds - self._left() + seconds) / 60 / (1 - FOR_SKIPS))}"
            )
            self.say(f"only lossless settings: {self.why_lossless}")

    def _transformers(self) -> HFEngine:
        return HFEngine(self.adapted if not self.is_native else self._load()[0])

    def baselines(self) -> Document:
        """Return the fields of transformers and of the engine, both at full depth."""
        full = None if self.own.name == HFEngine.name else self.reference.fields(self.reference)
        plain = self.plain if full is not None else self.reference
        return {"transformers": plain.fields(self.reference), "engine": full}

    def _in_time(self, entrants: list[Entrant]) -> list[Entrant]:
        """Return as many as can be warmed up and run once in the time; at least one."""
        most = max(int(self._left(FOR_THE_END) / (2 * self.full_seconds)) - 1, 1)
        for entrant in entrants[most:]:
            entrant.dropped = "no time for it: give --minutes more"
        self.refused += entrants[most:]
        return entrants[:most]

    def new_race(self, prompts: Iterator[tuple[str, Batch]]) -> Race:
        """Return a race against full depth on these prompts."""
        most = 0.0 if self.config.is_lossless else self.config.max_risk
        return Race(self.reference, prompts, self.texts.num_shapes, self.config.new_tokens, most, self.say)

    def _confirmed(self, ranked: Sequence[Entrant], prompts: Prompts) -> tuple[Entrant, Entrant, Entrant | None]:
        """Measure the fastest again, until one keeps the bound and is faster on prompts that chose nothing.

        Returns:
            The entrant that was chosen, and the same with its new times; full depth if none of the others was faster.
            Then the fastest that keeps the text, with its times at the same prompts; None if it is the one chosen.
        """
        most = len(prompts) // self.texts.num_shapes
        full = self.reference.setting
        lossless = next((one for one in ranked if one.setting.drafts_for(full)), None)
        for entrant in ranked:
            if entrant.speedup <= 1:
                entrant.dropped = f"{entrant.speedup:.2f}×: full depth is as fast"
                continue
            again, same = entrant.again(), None
            if lossless is not None and lossless is not entrant:
                same = lossless.again()
            if self._is_allowed(again, self.texts.unseen, "text that chose nothing"):
                self.say(f"confirming {entrant.setting.label} on other prompts …")
                race = self.new_race(iter(prompts))
                self._time(again, same, race, most)
                if again.dropped is None and again.speedup <= 1:
                    again.dropped = f"{again.speedup:.2f}× on prompts that chose nothing"
                if again.dropped is None:
                    self._test_risk(again, race, most, ERROR / len(ranked))
            if again.dropped is None:
                return entrant, again, same
            entrant.dropped = again.dropped
        again = replace(self.reference)
        self._is_allowed(again, self.texts.unseen, "")
        return self.reference, again, None

    def _time(self, again: Entrant, same: Entrant | None, race: Race, most: int) -> None:
        """Time an entrant, and one that keeps the text, on up to `most` batches of each shape, until it is known."""
        entrants = [again] if same is None else [again, same]
        while again.dropped is None and not again.is_known:
            in_time = max(int(self._left() / ((1 + len(entrants)) * self.full_seconds)), 1 - again.num_runs)
            count = min(CONFIRMING, most - again.num_runs // self.texts.num_shapes, in_time)
            if count <= 0:
                return
            race.round(entrants, count)

    def _test_risk(self, again: Entrant, race: Race, most: int, error: float) -> None:
        """Test a bound on risk, if there is one; the entrant is dropped if it fails.

        A row of batches, one of each shape, may be of one text: its mean distance is one independent loss.
        """
        if self.config.max_risk is None or again.setting.drafts_for(self.reference.setting):
            return
        shapes = self.texts.num_shapes
        race.round([again], max(min(self.texts.num_texts(error), most) - again.num_runs // shapes, 0))
        per_row = len(again.distances) * shapes // again.num_runs
        losses = [mean(again.distances[at : at + per_row]) for at in range(0, len(again.distances), per_row)]
        p = p_value(losses, self.config.max_risk)
        again.quality |= {"p_value": p, "num_texts": len(losses)}
        if p > error:
            again.dropped = f"risk of {self.config.max_risk:g} not shown on {len(losses)} texts (p {p:.2g})"

    # --- the folder --------------------------------------------------------------------------------------------------

    def write(self, out: Path) -> None:
        """Write the chosen setting as a folder that `generate`, `chat`, `serve`, `bench` and `eval` run as it is."""
        setting, tokenizer = self.chosen.setting, self.tokenizer
        draft = None if setting.draft is None else self.drafts[setting.draft]
        run = {"dtype": dtype_name(self.adapted), "engine": setting.engine}
        run |= {"weights": setting.weights} if setting.engine == FastEngine.name else {}
        is_folder = is_checkpoint(self.target)
        is_plain = not (is_folder or (local_folder(self.target) / ADAPTER).is_file())
        # Here a LoRA adapter is merged; it is saved unmerged.
        found = self.adapted if is_plain else load_target(self.target, dtype=self.config.dtype, device=self.device)[0]
        if setting.skip_share is not None:
            for method in comparing(found.attached):
                method.set_skip_share(setting.skip_share)
        elif not self.skipping.has_own or not (draft or setting.is_attached):
            skips = [SkipSetConfig(**as_lists(setting.skips))] if setting.skips else []
            exits = [] if setting.prompt_layers is None else [self.skipping.exits[setting.prompt_layers]]
            found = attach(detach(found), [*skips, *(method.config for method in exits)])
            for method in exits:
                found.methods[method.name].load_state_dict(method.state_dict())
        has_base = is_folder and own_base(self.target) is not None
        base = self.target if is_plain else None
        save(found, out, base=base, own_base=tokenizer if has_base else None, draft=draft, run=run)


def on_front(candidates: Sequence[Document]) -> list[str]:
    """Return the labels of the timed candidates that no other beats in both time and perplexity, the fastest first."""
    rows: list[Document] = []
    for one in candidates:
        if one["speedup"] is not None:
            low, high = one["speedup_interval"] or (one["speedup"], one["speedup"])
            rows.append({**one, "time_share": 1 / one["speedup"], "time_share_range": [1 / high, 1 / low]})
    return front(rows, "time")
