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
from itertools import cycle
from pathlib import Path
from typing import Any

from torch import Tensor

from anydepth.calibration.guarantee import least_sequences, p_value
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
from anydepth.measure.race import Entrant, Race, Setting
from anydepth.measure.timing import Batch, on_free_cores, unpadded
from anydepth.methods._base.calibration import comparing
from anydepth.methods.skip_set import SkipSetConfig
from anydepth.models.load import AUTO, NATIVE, dtype_name, has_blocks
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
MOST_PROMPTS = 90
"""Batches of text to take prompts from; two thirds choose."""
FOR_SKIPS, FOR_THE_END = 0.2, 0.25
"""Fractions of the time for the search of skip sets, and for confirming."""
ROUNDED_PER_SECOND = 1.5e6
"""Weights that error feedback rounds in a second on two cores."""
WIDE = 0.3
"""Increase of perplexity that a skip set may have where risk is bounded instead."""
ERROR = 0.05
"""Probability that a setting that is said to keep a bound on risk does not."""


@dataclass
class Tuner:
    """One search: a target of the command line, and the recipe section `tune`."""

    target: str
    config: TuneConfig
    dtype: str = AUTO
    device: str = "cpu"
    say: Callable[[str], None] = lambda text: None

    def __post_init__(self) -> None:
        self.started = time.monotonic()
        self.seconds = 60 * self.config.minutes
        recorded = run_options(self.target).get("weights") == NATIVE and self.dtype == AUTO
        self.is_native = recorded or has_blocks(self.target, self.dtype, self.device)
        adapted, self.tokenizer = self._load(native=self.is_native)
        self.skipping = Skipping(adapted, is_lossless=self.config.is_lossless)
        self.adapted = self.skipping.adapted
        self.own = self._open("auto", NATIVE if self.is_native else None)
        self.engines = {self.own.weights: self.own}
        self.drafts: dict[str, Draft] = {}
        self.refused: list[Entrant] = []
        self.reference = self._entrant(Setting(self.own.name, self.own.weights))

    def _load(self, *, native: bool = False) -> tuple[Any, Any]:
        return load_target(self.target, dtype=self.dtype, device=self.device, merge=True, native=native)

    def _open(self, engine: str, weights: str | None) -> Engine:
        return open_engine(self.adapted.eval(), engine, weights, self.say)

    # --- texts -------------------------------------------------------------------------------------------------------

    @cached_property
    def batches(self) -> tuple[Prompts, Prompts]:
        """Batches of prompts with the names of their shapes, to choose and to confirm with."""
        config, new_tokens, sizes = self.config, self.config.new_tokens, self.config.batch_sizes
        shaped: list[Prompts]
        if config.prompts is not None:
            texts = read_prompts(Path(config.prompts), self.tokenizer)
            groups = {size: batches_of(self.adapted, self.tokenizer, texts, size, new_tokens) for size in sizes}
            shaped = [[(f"batch {size}", batch) for batch in batches] for size, batches in groups.items()]
        else:
            longest = max(config.prompt_tokens)
            check_window(self.adapted, longest, new_tokens)
            windows = load_windows(config.data, self.tokenizer, longest, max_windows=MOST_PROMPTS * max(sizes))
            windows = windows.to(self.adapted.device)
            shaped = [
                [
                    (f"{length} tokens, batch {size}", unpadded(windows[start : start + size, :length]))
                    for start in range(0, len(windows) - size + 1, size)
                ]
                for size in sizes
                for length in config.prompt_tokens
            ]
        rows = list(zip(*shaped, strict=False))
        if len(rows) < 3:
            source = config.prompts or config.data
            raise UserError(
                f"{source} has {len(rows)} batches of prompts; tune needs at least 3, to choose and to confirm with: "
                "give more text, or smaller batches"
            )
        cut = len(rows) - max(len(rows) // 3, 1)
        return [batch for row in rows[:cut] for batch in row], [batch for row in rows[cut:] for batch in row]

    @property
    def num_shapes(self) -> int:
        return len(self.config.batch_sizes) * (1 if self.config.prompts else len(self.config.prompt_tokens))

    @cached_property
    def windows(self) -> tuple[Tensor, Tensor]:
        """Return (N, T) windows of text that choose, and others."""
        length = min(LENGTH, getattr(self.adapted.config, "max_position_embeddings", None) or LENGTH)
        data = self.config.data
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
        self.refused = [one for one in entrants if one.left is not None]
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
        """Note an entrant's quality on a text; it leaves if that is out of the bound."""
        entrant.quality = quality.of(entrant, self.reference)
        limit, found = self.config.max_perplexity_increase, entrant.quality["perplexity_increase"]
        if limit is not None and found > limit:
            entrant.left = f"perplexity {found:+.1%} on {where}"
        return entrant.left is None

    # --- the search --------------------------------------------------------------------------------------------------

    def run(self) -> Document:
        """Return the fields of `anydepth.tune/1`."""
        choosing, confirming = self.batches
        with on_free_cores(self.say):
            entrants = self.entrants()
            self.say(f"racing {len(entrants)} settings against full depth …")
            race = self._race(cycle(choosing))
            race.warm_up(entrants)
            left = race.run(entrants, self.started + (1 - FOR_THE_END) * self.seconds)
            self.chosen, confirmed = self._confirmed(left, confirming)
            others = self._baselines(confirming)
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

    def _race(self, prompts: Iterator[tuple[str, Batch]]) -> Race:
        most = 0.0 if self.config.is_lossless else self.config.max_risk
        return Race(self.reference, prompts, self.num_shapes, self.config.new_tokens, most, self.say)

    def _confirmed(self, ranked: Sequence[Entrant], prompts: Prompts) -> tuple[Entrant, Entrant]:
        """Measure the fastest again, until one keeps the bound and is faster on prompts that chose nothing.

        Returns:
            The entrant that was chosen, full depth if none of the others, and the same with its new times.
        """
        for entrant in ranked:
            if not self._is_allowed(entrant, self.unseen, "text that chose nothing"):
                continue
            self.say(f"confirming {entrant.setting.label} on other prompts …")
            again, race = self._again(entrant, prompts)
            if again.left is None and again.speedup <= 1:
                again.left = f"{again.speedup:.2f}× on prompts that chose nothing"
            if again.left is None:
                self._test_risk(again, race, ERROR / len(ranked))
            if again.left is None:
                return entrant, again
            entrant.left = again.left
        self._is_allowed(self.reference, self.unseen, "")
        return self.reference, self._again(self.reference, prompts)[0]

    def _again(self, entrant: Entrant, prompts: Prompts) -> tuple[Entrant, Race]:
        """Time a setting on other prompts."""
        again, race = entrant.again(), self._race(cycle(prompts))
        race.round([again], CONFIRMING)
        return again, race

    def _test_risk(self, entrant: Entrant, race: Race, error: float) -> None:
        """Test a bound on risk, if there is one, with as many texts as it needs; the setting leaves if it fails."""
        most = self.config.max_risk
        if most is None:
            return
        num_texts = 2 * least_sequences(most, 1 - error)  # enough where half of the bound is lost
        while len(entrant.distances) < num_texts and time.monotonic() < self.started + self.seconds:
            race.round([entrant], 1)
        p = p_value(entrant.distances, most)
        entrant.quality["p_value"] = p
        if p > error:
            entrant.left = f"risk not shown to be at most {most:g} (p {p:.2g})"

    def _baselines(self, prompts: Prompts) -> Document:
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
        if not is_checkpoint(self.target):
            found = attach(detach(self.adapted), SkipSetConfig(**as_lists(setting.skips)) if setting.skips else [])
            save(found, out, base=self.target, draft=draft, run=run)
        else:
            found, _ = load_target(self.target, dtype=self.dtype, device=self.device)  # with its adapter
            if setting.skip_share is not None:
                for method in comparing(found.attached):
                    method.set_skip_share(setting.skip_share)
            elif draft is None:
                found = attach(detach(found), [])
            has_base = own_base(Path(self.target)) is not None
            save(found, out, own_base=tokenizer if has_base else None, draft=draft, run=run)


def on_front(candidates: Sequence[Document]) -> list[str]:
    """Return the labels of the timed candidates that no other beats in both time and perplexity, the fastest first."""
    rows: list[Document] = []
    for one in candidates:
        if one["speedup"] is not None:
            low, high = one["speedup_interval"] or (one["speedup"], one["speedup"])
            rows.append({**one, "time_share": 1 / one["speedup"], "time_share_range": [1 / high, 1 / low]})
    return front(rows, "time")
