"""Measurements of `anydepth calibrate`: skipped fractions, speed and perplexity, on calibration and held-out text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from anydepth.calibration.budget import find_budget
from anydepth.calibration.shares import (
    collect_scores,
    configs_of,
    keep_scores,
    off_target,
    set_configs,
    set_skip_shares,
    set_thresholds,
    skipped_shares,
    thresholds_of,
)
from anydepth.decoding.engine import Engine
from anydepth.decoding.engines import open_engine
from anydepth.errors import UserError
from anydepth.hf.adapted import AdaptedModel
from anydepth.measure.bench import load_prompts, paired_speedups
from anydepth.measure.capacities import control, quality, sweep_capacities
from anydepth.speculation.draft import Draft
from anydepth.training.checkpoint import has_adapter, load_draft, load_target
from anydepth.training.data import load_windows

Say = Callable[[str], None]


@dataclass(frozen=True)
class Timing:
    """The timed generations, of the model as it would be run: with a LoRA adapter merged into the weights."""

    engine: Engine
    prompts: Tensor
    new_tokens: int
    num_runs: int

    def speedups(self, like: AdaptedModel) -> list[float]:
        """Return paired ratios full depth ÷ adapted, with the thresholds of another copy of the model."""
        set_thresholds(self.engine.adapted, thresholds_of(like))
        return paired_speedups(self.engine, self.prompts, self.new_tokens, self.num_runs)

    def control(self, held_out: Tensor, say: Say) -> dict[str, Any] | None:
        """Measure full depth with int8 weights; return None, with a line to `say`, where they do not run."""
        try:
            return control(self.engine, held_out, self.prompts, self.new_tokens, self.num_runs)
        except UserError as error:
            say(f"no control: {error}")
            return None


@dataclass(frozen=True)
class Calibration:
    """A model and the text that its thresholds are set on.

    Attributes:
        windows, held_out: (M, T) text to set thresholds on, and to evaluate afterwards.
        options: options of the command line.
    """

    adapted: AdaptedModel
    tokenizer: PreTrainedTokenizerBase
    windows: Tensor
    held_out: Tensor
    options: Mapping[str, Any]
    say: Say

    @classmethod
    def load(cls, options: Mapping[str, Any], say: Say) -> Calibration:
        """Load what the options name.

        Raises:
            UserError: too little text to set thresholds on some of it and evaluate on the rest; or a model that only
                drafts, the perplexity of which no threshold changes.
        """
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

    def timing(self) -> Timing:
        """Load what speed is measured on."""
        options, adapted = self.options, self.adapted
        if has_adapter(adapted):
            adapted, _ = load_target(options["target"], dtype=options["dtype"], device=options["device"], merge=True)
        engine = open_engine(adapted, options["engine"], None, self.say)
        new_tokens, num_runs = options["new_tokens"], options["num_runs"]
        prompts = load_prompts(adapted, self.tokenizer, options["data"], [options["prompt_tokens"]], new_tokens)
        return Timing(engine, prompts[:num_runs], new_tokens, num_runs)

    def to_share(self, share: float) -> dict[str, Any]:
        """Set thresholds that skip a fraction; return the fields of the document."""
        found = set_skip_shares(self.adapted, self.windows, share)
        not_measured = dict.fromkeys(("speedup", "speedup_interval", "perplexity_increase"))
        fields = {"share": share, **not_measured, **self._held_out_fields(found, share)}
        return {"met": not fields["warnings"], **fields}

    def to_bounds(self, target_speedup: float | None, max_perplexity_increase: float | None) -> dict[str, Any]:
        """Set thresholds that reach a speed or keep a bound on perplexity; return the fields of the document."""
        scores = collect_scores(self.adapted, self.windows)
        keep_scores(self.adapted, scores)
        measures: dict[str, Any] = {}
        if target_speedup is not None:
            timing = self.timing()
            measures["speedup"] = lambda: timing.speedups(self.adapted)
        if max_perplexity_increase is not None:
            measures["perplexity_increase"] = lambda: quality(self.adapted, self.windows)["perplexity_increase"]
        found = find_budget(
            self.adapted,
            scores,
            target_speedup=target_speedup,
            max_perplexity_increase=max_perplexity_increase,
            on_try=self._say_try,
            **measures,
        )
        fields = self._held_out_fields(skipped_shares(self.adapted, self.windows), found.share)
        increase = fields["held_out"]["perplexity_increase"]
        if max_perplexity_increase is not None and increase > max_perplexity_increase:
            fields["warnings"].append(
                f"perplexity of held-out text is {increase:.1%} above full depth; the bound of "
                f"{max_perplexity_increase:.1%} holds on the calibration text"
            )
        return {"met": True, **found.to_json(), **fields}

    def sweep(self, capacities: Sequence[float]) -> dict[str, Any]:
        """Measure several capacities and the control, leaving the thresholds; return the fields of the document."""
        scores, before = collect_scores(self.adapted, self.windows), configs_of(self.adapted)
        keep_scores(self.adapted, scores)
        timing = self.timing()
        rows = sweep_capacities(
            self.adapted, scores, capacities, self.held_out, lambda: timing.speedups(self.adapted), self._say_row
        )
        set_configs(self.adapted, before)
        control_row = timing.control(self.held_out, self.say)
        warnings = [f"{row['label']}: {line}" for row in rows for line in row.pop("warnings")]
        return {
            "met": None,
            "sweep": rows,
            "control": control_row,
            "warnings": warnings,
            "engine": {"engine": timing.engine.name, "weights": timing.engine.weights},
        }

    def _held_out_fields(self, found: dict[str, float], share: float) -> dict[str, Any]:
        """Return what held-out text shows, next to the fractions found on the calibration text."""
        held_out = quality(self.adapted, self.held_out)
        shares = held_out.pop("skip_share") or skipped_shares(self.adapted, self.held_out)
        rows = {name: {"target": share, "calibration": found[name], "held_out": shares[name]} for name in found}
        return {
            "skip_share": rows,
            "held_out": held_out,
            "warnings": off_target(shares, dict.fromkeys(found, share)),
        }

    def _say_try(self, row: dict[str, float]) -> None:
        name, value = next((name, value) for name, value in row.items() if name != "share")
        self.say(f"  {row['share']:.0%} skipped: {name.replace('_', ' ')} {value:.3f}")

    def _say_row(self, row: dict[str, Any]) -> None:
        speed = "" if row["speedup"] is None else f"speed-up {row['speedup']:.2f}, "
        self.say(
            f"  {row['label']}: {row['realised_capacity']:.0%} run, {speed}perplexity {row['perplexity_increase']:+.1%}"
        )


def check_decides(draft: Draft | None, target: str) -> None:
    """Raise `UserError` for a target that skips only in drafts: its text is that of full depth."""
    if draft is not None:
        raise UserError(
            f"{target} skips only in drafts, so its text is that of full depth; give --skip-share, and bench it"
        )
