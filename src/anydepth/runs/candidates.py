"""What `tune` chooses from: settings of the methods, and their quality on text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from anydepth.calibration.shares import restored
from anydepth.decoding.engine import Engine
from anydepth.errors import UserError
from anydepth.hf.adapted import AdaptedModel, attach, detach
from anydepth.measure.calibrate import increase_of
from anydepth.measure.race import Entrant, Setting
from anydepth.methods._base.calibration import comparing, is_filled
from anydepth.methods.prompt_exit import PromptExit, PromptExitConfig
from anydepth.methods.skip_set import SkipSet, SkipSetConfig
from anydepth.search.problem import Candidate, as_lists
from anydepth.search.projection_fit import fit_projections

SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)
"""Fractions of their decisions that attached methods are set to skip."""
PROMPT_SHARES = (0.9, 5 / 6, 0.75, 2 / 3)
"""Fractions of the layers that the tokens of a prompt run, where they exit early."""
POOL = 5
"""Branches that the search of a skip set tries for each next place."""
ALONE, TOGETHER = 2, 4
"""Halves of windows that score single branches, and sets of them."""


class Skipping:
    """The methods of a model as settings want them: what is attached, or a skip set where nothing is.

    Attributes:
        adapted: the model; with an empty skip set if settings may be lossy and nothing was attached.
    """

    def __init__(self, adapted: AdaptedModel, *, is_lossless: bool) -> None:
        self.has_own = bool(adapted.attached)
        searches = not (self.has_own or is_lossless)
        self.adapted = attach(detach(adapted), SkipSetConfig()).eval() if searches else adapted
        self.exits: dict[int, PromptExit] = {}

    def in_drafts(self) -> AbstractContextManager[Any]:
        """Return a block to open drafters in: methods that were attached draft too, the skip set of a search not."""
        return nullcontext() if self.has_own else self.adapted.deciding()

    @contextmanager
    def running(self, setting: Setting) -> Iterator[None]:
        """Set the methods to what a setting runs, within the block."""
        if setting.draft is not None:
            yield  # the methods decide in drafts, as they are
        elif setting.skips:
            method = self.adapted.methods[SkipSet.name]
            assert isinstance(method, SkipSet)
            method.choose(*as_lists(setting.skips).values())
            try:
                yield
            finally:
                method.choose(())
        elif setting.prompt_layers is not None:
            with self.adapted.deciding(self.exits[setting.prompt_layers]):
                yield
        elif setting.is_attached:
            yield
        elif setting.skip_share is not None:
            with restored(self.adapted):
                for method in comparing(self.adapted.attached):
                    method.set_skip_share(setting.skip_share)
                yield
        else:
            with self.adapted.deciding():
                yield

    def exit_prompts(self, engine: Engine, windows: Tensor, until: float, say: Callable[[str], None]) -> list[Setting]:
        """Return settings of an engine in which prompts leave early, fitted on (N, T) windows until a time."""
        if self.has_own:
            return []
        backbone = self.adapted.backbone
        layers = sorted(
            {min(max(round(backbone.num_layers * share), 1), backbone.num_layers - 1) for share in PROMPT_SHARES}
        )
        try:
            made = [PromptExit(PromptExitConfig(layer=layer, fitted=True), backbone) for layer in layers]
            num_read = fit_projections(made, engine, windows, until)
            say(f"  K/V of prompts that leave early: fitted on {num_read} windows of {windows.shape[1]} tokens")
        except UserError as error:
            say(f"  K/V of prompts that leave early are the layers' own: {error}")
            made = [PromptExit(PromptExitConfig(layer=layer), backbone) for layer in layers]
        self.exits = {method.layer: method.to(backbone.device).eval() for method in made}
        return [Setting(engine.name, engine.weights, prompt_layers=layer) for layer in reversed(layers)]

    def settings(
        self, engine: Engine, windows: Tensor, most: float, until: float, say: Callable[[str], None]
    ) -> Iterator[Setting]:
        """Yield settings of an engine that skip more and more.

        Args:
            windows: (N, T) tokens of text that chooses.
            most: increase of perplexity at which it ends.
            until: time at which it ends, as by `time.monotonic`.
        """
        plain = Setting(engine.name, engine.weights)
        if self.has_own:
            own = comparing(self.adapted.attached)
            yield replace(plain, is_attached=True)
            if own and all(is_filled(method.score_quantiles) for method in own):
                most_skipped = min(method.score_quantiles[:, 0].max().item() for method in own)
                yield from (replace(plain, skip_share=share) for share in SHARES if share <= most_skipped)
            elif own:
                say("attached methods keep their thresholds: the folder has no score quantiles (`calibrate` adds them)")
            return
        halves = windows.view(-1, windows.shape[1] // 2)
        few, more = halves[:ALONE], halves[:TOGETHER]
        layers = engine.weight_bytes()[0]
        read: dict[Candidate, int] = {
            (kind, layer_idx): size
            for layer_idx, sizes in enumerate(layers)
            for kind, size in zip(("mixer", "ffn"), sizes, strict=True)
        }
        if engine.adapted.backbone.family.whole_layers:
            read = {("layer", layer_idx): sum(sizes) for layer_idx, sizes in enumerate(layers)}

        def loss(chosen: Sequence[Candidate], texts: Tensor) -> float:
            with self.running(replace(plain, skips=tuple(chosen))):
                return mean(scored(engine, texts)[0])

        before, cost = loss([], few), dict[Candidate, float]()
        for candidate in read:
            cost[candidate] = (loss([candidate], few) - before) / read[candidate]
            if time.monotonic() > until:
                break
        order, chosen = sorted(cost, key=lambda one: cost[one]), list[Candidate]()
        base = now = loss([], more)
        while order and time.monotonic() < until:
            tried = {one: loss([*chosen, one], more) for one in order[:POOL]}
            best = min(tried, key=lambda one: (tried[one] - now) / read[one])
            increase = math.expm1(tried[best] - base)
            if increase > most:
                return
            now = tried[best]
            chosen.append(best)
            order.remove(best)
            say(f"  without {len(chosen)} of {len(read)} parts: perplexity {increase:+.1%}")
            yield replace(plain, skips=tuple(chosen))


@torch.no_grad()
def scored(engine: Engine, windows: Tensor, num_prompt: int = 0) -> tuple[list[float], Tensor]:
    """Return the loss of each of (N, T) windows in nats per token, and the most likely next tokens (N, T − 1).

    With `num_prompt` the first tokens are read as a prompt, and those after it are scored.
    """
    losses, tokens = list[float](), list[Tensor]()
    for window in windows.to(engine.adapted.device):
        logits = engine.logits(window, num_prompt)[:-1].float()
        losses.append(F.cross_entropy(logits, window[-len(logits) :]).item())
        tokens.append(logits.argmax(-1))
    return losses, torch.stack(tokens)


@dataclass
class Quality:
    """Quality of settings on (N, T) windows of text, next to full depth in the model's own precision."""

    windows: Tensor
    known: dict[tuple[Setting, int], tuple[list[float], Tensor]] = field(default_factory=dict)

    def of(self, entrant: Entrant, reference: Entrant) -> dict[str, Any]:
        """Return perplexity, its increase over the reference, and the agreement with it.

        Where prompts are read in another way, both are scored on the last quarter of each window, after a prompt. The
        perplexity is then the reference's on whole windows times the increase there, so that settings compare.
        """
        num_prompt = 0 if entrant.setting.prompt_layers is None else 3 * self.windows.shape[1] // 4
        losses, tokens = self._scored(entrant, num_prompt)
        full_losses, full_tokens = self._scored(reference, num_prompt)
        agreement = (tokens == full_tokens).double().mean().item()
        found = increase_of(losses, full_losses)
        found["full_depth_perplexity"] = math.exp(mean(self._scored(reference, 0)[0]))
        found["perplexity"] = found["full_depth_perplexity"] * (1 + found["perplexity_increase"])
        return {**found, "agreement": agreement, "num_tokens": tokens.numel()}

    def _scored(self, entrant: Entrant, num_prompt: int) -> tuple[list[float], Tensor]:
        key = replace(entrant.setting, draft=None), num_prompt  # drafts change nothing
        if key not in self.known:
            with entrant.on():
                self.known[key] = scored(entrant.engine, self.windows, num_prompt)
        return self.known[key]
