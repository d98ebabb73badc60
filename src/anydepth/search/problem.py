"""The problem that strategies of a skip-set search solve, and what they measure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anydepth.hf.adapted import AdaptedModel
from anydepth.methods.skip_set import SkipSet
from anydepth.models.backbone import Backbone, first_output
from anydepth.models.hooks import Hooks

Candidate = tuple[str, int]
"""(`layer`, `mixer` or `ffn`, layer index)."""


@dataclass(frozen=True)
class Problem:
    """The problem of a strategy: find the `num_out` candidates that matter least.

    Attributes:
        adapted: a model with a `skip_set` attached.
        windows: (N, T) token ids of text.
        reference: (N, T) next tokens at full depth; None for a strategy that does not compare them.
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
        lists = as_lists(out)
        method.choose(lists["skip_layers"], lists["skip_mixers"], lists["skip_ffns"])
        return (next_tokens(self.adapted, self.windows) == self.reference).double().mean().item()


def as_lists(chosen: Sequence[Candidate]) -> dict[str, list[int]]:
    """Return candidates as options of `skip_set`."""
    names = {"layer": "skip_layers", "mixer": "skip_mixers", "ffn": "skip_ffns"}
    return {name: sorted(i for kind, i in chosen if names[kind] == name) for name in names.values()}


@torch.no_grad()
def next_tokens(adapted: AdaptedModel, windows: Tensor) -> Tensor:
    """Return the (N, T) most likely next tokens."""
    return torch.cat(
        [adapted(input_ids=row[None].to(adapted.device), use_cache=False).logits.argmax(-1) for row in windows]
    )


@torch.no_grad()
def influences(adapted: AdaptedModel, windows: Tensor) -> dict[Candidate, float]:
    """Return 1 − cos of the states before and after each layer, mixer and FFN at full depth, the mean over tokens."""
    totals: dict[Candidate, float] = {}
    with adapted.disabled(), _listening(adapted.backbone, totals):
        for window in windows:
            adapted(input_ids=window[None].to(adapted.device), use_cache=False, logits_to_keep=1)
    return {candidate: total / len(windows) for candidate, total in totals.items()}


@contextmanager
def _listening(backbone: Backbone, totals: dict[Candidate, float]) -> Iterator[None]:
    """Add the influence of each layer and branch to `totals` in every forward."""
    added: dict[Candidate, Tensor] = {}

    def record_branch(candidate: Candidate) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            added[candidate] = first_output(output)

        return hook

    def record_layer(layer_idx: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            before, after = args[0], first_output(output)
            ffn = added.pop(("ffn", layer_idx)).view_as(after)
            mixer = added.pop(("mixer", layer_idx))
            changes = {"layer": (before, after), "mixer": (before, before + mixer), "ffn": (after - ffn, after)}
            for kind, (old, new) in changes.items():
                change = 1 - F.cosine_similarity(old.float(), new.float(), dim=-1).mean().item()
                totals[(kind, layer_idx)] = totals.get((kind, layer_idx), 0.0) + change

        return hook

    with Hooks() as hooks:
        for view in backbone.layers:
            hooks.after(view.mixer_out, record_branch(("mixer", view.layer_idx)))
            hooks.after(view.ffn_out, record_branch(("ffn", view.layer_idx)))
            hooks.after(view.module, record_layer(view.layer_idx))
        yield
