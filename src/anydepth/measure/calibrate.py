"""Measurements of `anydepth calibrate`: skipped fractions, speed and perplexity, on calibration and held-out text.

Perplexity is compared with that of the same model at full depth (gates off, LoRA on); the base model's is next to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from anydepth.calibration.budget import find_budget
from anydepth.calibration.shares import (
    Scores,
    collect_scores,
    compared,
    keep_scores,
    off_target,
    restored,
    set_skip_shares,
    set_thresholds,
    skipped_shares,
    thresholds_at,
    thresholds_of,
)
from anydepth.decoding.engine import Engine
from anydepth.decoding.engines import FastEngine, HFEngine, open_engine
from anydepth.errors import UserError
from anydepth.hf.adapted import AdaptedModel
from anydepth.measure.bench import load_prompts
from anydepth.measure.evaluate import evaluate
from anydepth.measure.timing import Side, paired_ratios
from anydepth.speculation.draft import Draft
from anydepth.statistics import mean_of_sums, speedup_fields
from anydepth.training.checkpoint import has_adapter, load_draft, load_target
from anydepth.training.data import load_windows

CONTROL = "int8"
"""Weights of the control of a sweep: full depth with them is a cheaper model without any router."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Calibration:
    """A model, (M, T) windows to set its thresholds on, others to evaluate them, and the command's options."""

    adapted: AdaptedModel
    tokenizer: PreTrainedTokenizerBase
    windows: Tensor
    held_out: Tensor
    options: Mapping[str, Any]
    say: Callable[[str], None]

    @classmethod
    def load(cls, options: Mapping[str, Any], say: Callable[[str], None]) -> Calibration:
        """Load what the options name; raise `UserError` for too little text, or a model that only drafts."""
        adapted, tokenizer = load_target(options["target"], dtype=options["dtype"], device=options["device"])
        if options["skip_share"] is None and options["capacity"] is None:
            check_decides(load_draft(options["target"], adapted), options["target"])
        length, count, other = options["sequence_length"], options["num_windows"], options["held_out"]
        windows = load_windows(options["data"], tokenizer, length, max_windows=count if other else 2 * count)
        if other is not None:
            held_out = load_windows(other, tokenizer, length, max_windows=count)
        else:
            cut = min(count, len(windows) // 2)
            windows, held_out = windows[:cut], windows[cut:]
        if len(windows) == 0:
            raise UserError(
                f"{options['data']} has one window of {length} tokens; calibration needs one to set thresholds on and "
                "one to evaluate: give more text, --held-out, or a smaller --sequence-length"
            )
        return cls(adapted, tokenizer, windows, held_out, options, say)

    @cached_property
    def engine(self) -> Engine:
        """The engine that is timed, with the model as it would be run: a LoRA adapter merged into the weights."""
        options, adapted = self.options, self.adapted
        if has_adapter(adapted):
            adapted, _ = load_target(options["target"], dtype=options["dtype"], device=options["device"], merge=True)
        return open_engine(adapted, options["engine"], None, self.say)

    @cached_property
    def prompts(self) -> Tensor:
        """Return (N, T) prompts of timed generations."""
        data, length, new_tokens = (self.options[name] for name in ("data", "prompt_tokens", "new_tokens"))
        prompts = load_prompts(self.engine.adapted, self.tokenizer, data, [length], new_tokens)
        return prompts[: self.options["num_runs"]]

    def to_share(self, share: float) -> Row:
        """Set thresholds that skip a fraction; return the fields of the document."""
        found = set_skip_shares(self.adapted, self.windows, share)
        not_measured = dict.fromkeys(("speedup", "speedup_interval", "perplexity_increase"))
        fields = {"share": share, **not_measured, **self._held_out_fields(found, share)}
        return {"met": not fields["warnings"], **fields}

    def to_bounds(self, target_speedup: float | None, max_perplexity_increase: float | None) -> Row:
        """Set thresholds that reach a speed or keep a bound on perplexity; return the fields of the document."""
        measures: dict[str, Any] = {}
        if target_speedup is not None:
            measures |= {"target_speedup": target_speedup, "speedup": self._speedups}
        if max_perplexity_increase is not None:
            measures |= {
                "max_perplexity_increase": max_perplexity_increase,
                "perplexity_increase": lambda: quality(self.adapted, self.windows)["perplexity_increase"],
            }
        found = find_budget(self.adapted, self._kept_scores(), on_try=self._say_try, **measures)
        fields = self._held_out_fields(skipped_shares(self.adapted, self.windows), found.share)
        increase = fields["held_out"]["perplexity_increase"]
        if max_perplexity_increase is not None and increase > max_perplexity_increase:
            fields["warnings"].append(
                f"perplexity of held-out text is {increase:.1%} above full depth; the bound of "
                f"{max_perplexity_increase:.1%} holds on the calibration text"
            )
        return {"met": True, **asdict(found), **fields}

    def sweep(self, capacities: Sequence[float]) -> Row:
        """Measure several capacities and the control, leaving the thresholds; return the fields of the document."""
        scores = self._kept_scores()
        with restored(self.adapted):
            rows = [self._at_capacity(scores, capacity) for capacity in capacities]
        warnings = [f"{row['label']}: {line}" for row in rows for line in row.pop("warnings")]
        return {
            "met": None,
            "sweep": rows,
            "control": self._control(),
            "warnings": warnings,
            "engine": {"engine": self.engine.name, "weights": self.engine.weights},
        }

    def _kept_scores(self) -> Scores:
        scores = collect_scores(self.adapted, self.windows)
        keep_scores(self.adapted, scores)
        return scores

    def _speedups(self) -> list[float]:
        """Return paired ratios full depth ÷ adapted with the current thresholds."""
        set_thresholds(self.engine.adapted, thresholds_of(self.adapted))
        return self._ratios((self.engine, False))

    def _ratios(self, ours: Side) -> list[float]:
        new_tokens, num_runs = self.options["new_tokens"], self.options["num_runs"]
        return paired_ratios((self.engine, True), ours, self.prompts, new_tokens, num_runs)

    def _at_capacity(self, scores: Scores, capacity: float) -> Row:
        """Set a capacity and measure its skipped fractions, quality and speed."""
        set_thresholds(self.adapted, thresholds_at(scores, 1 - capacity))
        row = {"label": f"capacity {capacity:g}", "capacity": capacity, **quality(self.adapted, self.held_out)}
        shares = row["skip_share"]
        speedups = self._speedups() if any(shares.values()) else []  # Otherwise both sides are full depth.
        row |= {"realised_capacity": 1 - mean(shares.values()), **speedup_fields(speedups)}
        speed = f"speed-up {row['speedup']:.2f}, " if speedups else ""
        self.say(
            f"  {row['label']}: {row['realised_capacity']:.0%} run, {speed}perplexity {row['perplexity_increase']:+.1%}"
        )
        return {**row, "warnings": off_target(shares, dict.fromkeys(shares, 1 - capacity))}

    @torch.no_grad()
    def _control(self) -> Row | None:
        """Measure full depth with int8 weights against full depth of the fast engine; None where they do not run."""
        if self.engine.is_quantised or self.engine.name != FastEngine.name:
            return None
        try:
            light = FastEngine(self.engine.adapted, CONTROL)
        except UserError as error:
            self.say(f"no control: {error}")
            return None
        with self.engine.adapted.disabled():
            ours, full = ([_loss(each, window) for window in self.held_out] for each in (light, self.engine))
        fields = {**increase_of(ours, full), **speedup_fields(self._ratios((light, True)))}
        return {"label": f"full depth, {CONTROL}", "weights": CONTROL, **fields}

    def _held_out_fields(self, found: dict[str, float], share: float) -> Row:
        """Return what held-out text shows, next to the fractions found on the calibration text."""
        held_out = quality(self.adapted, self.held_out)
        shares = held_out.pop("skip_share") or skipped_shares(self.adapted, self.held_out)
        return {**compared(dict.fromkeys(found, share), found, shares), "held_out": held_out}

    def _say_try(self, row: dict[str, float]) -> None:
        name, value = next((name, value) for name, value in row.items() if name != "share")
        self.say(f"  {row['share']:.0%} skipped: {name.replace('_', ' ')} {value:.3f}")


def check_decides(draft: Draft | None, target: str) -> None:
    """Raise `UserError` for a target that skips only in drafts: its text is that of full depth."""
    if draft is not None:
        raise UserError(
            f"{target} skips only in drafts, so its text is that of full depth; give --skip-share, and bench it"
        )


def quality(adapted: AdaptedModel, windows: Tensor) -> Row:
    """Return perplexity on (N, T) windows, its increase over the same model at full depth, and the skipped fractions.

    `perplexity_increase_range` is the 95% interval of the increase, from the differences of windows; None for one.
    """
    each = [evaluate(HFEngine(adapted), window[None]) for window in windows]
    shares = {name: mean(fields["skip_share"][name] for fields in each) for name in each[0].get("skip_share", {})}
    base = mean(fields["full_depth"]["loss"] for fields in each)
    ours = [fields["loss"] for fields in each]
    full = [fields.get("full_depth_adapted", fields["full_depth"])["loss"] for fields in each]
    return {"skip_share": shares, **increase_of(ours, full), "untouched_perplexity": math.exp(base)}


def increase_of(ours: Sequence[float], full: Sequence[float]) -> Row:
    """Return perplexities and their relative increase, from losses of the same windows."""
    changes = [own - other for own, other in zip(ours, full, strict=True)]
    found = mean_of_sums(torch.tensor(changes, dtype=torch.double), torch.ones(len(changes)))
    bounds = [math.expm1(bound) for end in ("low", "high") if (bound := found[end]) is not None]
    return {
        "perplexity": math.exp(mean(ours)),
        "full_depth_perplexity": math.exp(mean(full)),
        "perplexity_increase": math.expm1(mean(changes)),
        "perplexity_increase_range": bounds or None,
    }


def _loss(engine: Engine, window: Tensor) -> float:
    """Return the loss of (T,) ids in nats per token."""
    ids = window.to(engine.adapted.device)
    return F.cross_entropy(engine.logits(ids)[:-1].float(), ids[1:]).item()
