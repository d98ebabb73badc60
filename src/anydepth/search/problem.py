"""The problem that strategies of a skip-set search solve, and what they measure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anydepth.hf.adapted import AdaptedModel
from anydepth.methods.skip_set import SkipSet
from anydepth.models.hooks import Hooks
from anydepth.models.layer_view import LayerView, first_output

Candidate = tuple[str, int]
"""(`layer`, `mixer` or `ffn`, layer index)."""


@dataclass(frozen=True)
class Problem:
    """The problem of a strategy: find the `num_out` candidates that matter least on (N, T) windows.

    `reference` has the next tokens at full depth; None for a strategy that does not compare them.
    """

    adapted: AdaptedModel
    windows: Tensor
    candidates: list[Candidate]
    num_out: int
    reference: Tensor | None = None
    seed: int = 0

    def agreement(self, out: Sequence[Candidate]) -> float:
        """Return the fraction of next tokens that equal those of full depth when `out` is left out."""
        method = self.adapted.methods["skip_set"]
        assert isinstance(method, SkipSet) and self.reference is not None
        method.choose(*as_lists(out).values())
        return (next_tokens(self.adapted, self.windows) == self.reference).double().mean().item()


def as_lists(chosen: Sequence[Candidate]) -> dict[str, list[int]]:
    """Return candidates as options of `skip_set`."""
    return {f"skip_{kind}s": sorted(i for own, i in chosen if own == kind) for kind in ("layer", "mixer", "ffn")}


@torch.no_grad()
def next_tokens(adapted: AdaptedModel, windows: Tensor) -> Tensor:
    """Return the (N, T) most likely next tokens."""
    return torch.cat(
        [adapted(input_ids=row[None].to(adapted.device), use_cache=False).logits.argmax(-1) for row in windows]
    )


@torch.no_grad()
def influences(adapted: AdaptedModel, windows: Tensor) -> dict[Candidate, float]:
    """Return 1 − cos of the states before and after each layer, mixer and FFN at full depth, the mean over tokens.

    Of a family of which layers can only be skipped as a whole, layers alone.
    """
    totals: dict[Candidate, float] = defaultdict(float)
    added: dict[Candidate, Tensor] = {}

    def record_branch(candidate: Candidate, _: nn.Module, __: Any, output: Any) -> None:
        added[candidate] = first_output(output).clone()  # Falcon adds the mixer's output to the FFN's in place.

    def record_layer(view: LayerView, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        before, after = args[0], first_output(output)
        changes = {"layer": (before, after)}
        if not view.family.whole_layers:
            ffn = added.pop(("ffn", view.layer_idx)).view_as(after) * view.branch_factor
            mixer = added.pop(("mixer", view.layer_idx)) * view.branch_factor
            changes |= {"mixer": (before, before + mixer), "ffn": (after - ffn, after)}
        for kind, (old, new) in changes.items():
            totals[kind, view.layer_idx] += 1 - F.cosine_similarity(old.float(), new.float(), dim=-1).mean().item()

    with adapted.disabled(), Hooks() as hooks:
        for view in adapted.backbone.layers:
            if not view.family.whole_layers:
                hooks.after(view.mixer_out, partial(record_branch, ("mixer", view.layer_idx)))
                hooks.after(view.ffn_out, partial(record_branch, ("ffn", view.layer_idx)))
            hooks.after(view.module, partial(record_layer, view))
        for window in windows:
            adapted(input_ids=window[None].to(adapted.device), use_cache=False, logits_to_keep=1)
    return {candidate: total / len(windows) for candidate, total in totals.items()}
