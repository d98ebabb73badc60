"""Settings of one threshold per exit, in an order that `guarantee.py` can test.

From all exits closed, the next setting opens one exit by one step: that with the fewest tokens that differ from full
depth per saved layer. These are estimated on text that is not used for tests, as in Pareto testing (Laufer-Goldenberg
et al. 2023), so that the order needs no test sequences and a wrong estimate does not make a test invalid.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from anydepth.calibration.guarantee import STEPS
from anydepth.calibration.shares import Thresholds
from anydepth.errors import UserError
from anydepth.hf.adapted import AdaptedModel
from anydepth.methods.early_exit import EarlyExit


@dataclass(frozen=True)
class ExitScores:
    """The effect of each of E exits on N tokens that ran at full depth."""

    saved: Tensor
    """(E,) layers that a token saves there."""
    confidence: Tensor
    """(E, N) largest threshold at which each token exits."""
    differs: Tensor
    """(E, N) bool, whether the exit's top token differs from the last layer's."""

    def estimate(self, thresholds: list[float]) -> tuple[float, float]:
        """Return the fraction of tokens that differ from full depth, and the layers saved per token.

        A token exits at the first of the exits' thresholds that it reaches.
        """
        exits = self.confidence >= torch.tensor(thresholds)[:, None]
        first = exits.int().argmax(0)
        differs = self.differs.gather(0, first[None])[0] & exits.any(0)
        return differs.float().mean().item(), (self.saved[first] * exits.any(0)).mean().item()


@torch.no_grad()
def collect_exit_scores(adapted: AdaptedModel, windows: Tensor) -> ExitScores:
    """Score (M, T) windows at every exit of `early_exit` while no token exits; other methods decide as usual."""
    method = next((part for part in adapted.active_methods if isinstance(part, EarlyExit)), None)
    if method is None:
        raise UserError(
            f"thresholds per exit need early_exit, and attached is {adapted.label}; calibrate without --per-exit"
        )
    adapted.eval()
    confidence, differs = [], []
    with method.watching(), adapted.backbone.layer_outputs() as outputs:
        for window in windows:
            final = adapted(input_ids=window[None].to(adapted.device), use_cache=False).logits[0].argmax(-1)
            (scores,) = method.scores(adapted.context).values()  # of all exits in order
            confidence.append(-scores.view(len(method.layers), -1).float().cpu())
            choices = [adapted.backbone.logits_of(outputs[i - 1][0]).argmax(-1) for i in method.layers]
            differs.append((torch.stack(choices) != final).cpu())
    saved = torch.tensor([method.num_layers - layer_idx for layer_idx in method.layers], dtype=torch.float32)
    return ExitScores(saved, torch.cat(confidence, 1), torch.cat(differs, 1))


def exit_settings(scores: ExitScores) -> list[Thresholds]:
    """Return at most `len(STEPS)` settings of `early_exit`, each more open than the one before."""
    path = _path(scores)
    count = min(len(STEPS), len(path))
    chosen = [path[round((number + 1) * len(path) / count) - 1] for number in range(count)]
    return [{EarlyExit.name: [-limit for limit in limits]} for limits in chosen]


def _path(scores: ExitScores) -> list[list[float]]:
    """Return the thresholds after each step, from one exit open by one step to all exits open."""
    levels = [_levels(confidence) for confidence in scores.confidence]
    opened, path, before = [0] * len(levels), [], (0.0, 0.0)

    def thresholds(steps: list[int]) -> list[float]:
        return [own[step] for own, step in zip(levels, steps, strict=True)]

    def harm(steps: list[int]) -> float:
        differs, saved = scores.estimate(thresholds(steps))
        return (differs - before[0]) / (saved - before[1]) if saved > before[1] else math.inf

    while closed := [number for number, own in enumerate(levels) if opened[number] + 1 < len(own)]:
        options = [[step + (other == number) for other, step in enumerate(opened)] for number in closed]
        opened = min(reversed(options), key=harm)  # the deepest exit wins ties
        after = scores.estimate(thresholds(opened))
        if after[1] > before[1]:  # otherwise the same tokens exit
            path.append(thresholds(opened))
        before = after
    return path


def _levels(confidence: Tensor) -> list[float]:
    """Return the distinct thresholds of one exit, from closed to open."""
    ordered = confidence.sort(descending=True).values
    reached = [ordered[max(round(step * len(ordered)), 1) - 1].item() for step in STEPS]
    return [math.inf, *dict.fromkeys(reached)]
