"""Search the layers, mixers or FFNs that matter least on calibration text.

`influence` takes one forward and leaves out the branches that change the state least (block influence 1 − cos(h, h'),
ShortGPT, Men et al. 2024). `greedy` leaves out one more at a time, the one with which most next tokens equal those of
full depth; it is slower, and better where layers depend on each other. `bayesian`, `dynamic` and `knapsack` have files.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anydepth.errors import UserError
from anydepth.hf.adapted import AdaptedModel, attach, detach
from anydepth.methods.skip_set import SkipSet, SkipSetConfig
from anydepth.models.backbone import Backbone, first_output
from anydepth.models.hooks import Hooks

Candidate = tuple[str, int]
"""(`layer`, `mixer` or `ffn`, layer index)."""


@dataclass(frozen=True)
class SkipSearchResult:
    """A skip set and its agreement with full depth.

    Attributes:
        agreement: fraction of next tokens on the search text that equal those of full depth.
        trajectory: one row per branch left out, with the agreement after it.
    """

    config: SkipSetConfig
    agreement: float
    seconds: float
    trajectory: list[dict[str, Any]] = field(default_factory=list)


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
        return (_choices(self.adapted, self.windows) == self.reference).double().mean().item()


Strategy = Callable[[Problem], list[Candidate]]
"""Returns the candidates to leave out, in order."""


def search(
    model: nn.Module, windows: Tensor, *, strategy: str, budget: float, branches: bool = False, seed: int = 0
) -> SkipSearchResult:
    """Find a skip set with a fraction `budget` of the layers, or of the branches, on (N, T) windows.

    Raises:
        UserError: an unknown strategy, or a budget that leaves out nothing or everything.
    """
    check_strategy(strategy)
    started = time.monotonic()
    adapted = attach(model, SkipSetConfig())
    try:
        everything = candidates(adapted.backbone.num_layers, branches=branches)
        num_out = num_left_out(adapted.backbone.num_layers, budget, branches=branches)
        problem = Problem(adapted, windows, everything, num_out, _choices(adapted, windows), seed)
        order = STRATEGIES[strategy](problem)
        trajectory = []
        for count in range(1, len(order) + 1):
            kind, layer_idx = order[count - 1]
            row = {"step": count, "branch": kind, "layer": layer_idx, "agreement": problem.agreement(order[:count])}
            trajectory.append(row)
    finally:
        detach(adapted)
    config = SkipSetConfig(**as_lists(order))
    return SkipSearchResult(config, trajectory[-1]["agreement"], time.monotonic() - started, trajectory)


def check_strategy(strategy: str) -> None:
    """Raise `UserError` for an unknown strategy."""
    if strategy not in STRATEGIES:
        raise UserError(f"strategy '{strategy}' is unknown; strategies are {', '.join(STRATEGIES)}")


def num_left_out(num_layers: int, budget: float, *, branches: bool) -> int:
    """Return the number of layers or branches that a budget leaves out; raise `UserError` for none or all."""
    if not 0 < budget < 1:
        raise UserError(f"budget is a fraction between 0 and 1, such as 0.25; came {budget:g}")
    everything = len(candidates(num_layers, branches=branches))
    num_out = round(budget * everything)
    if not 0 < num_out < everything:
        raise UserError(
            f"budget {budget} of {everything} {'branches' if branches else 'layers'} is {num_out} left out; "
            "give a fraction that leaves out at least one and keeps at least one"
        )
    return num_out


def candidates(num_layers: int, *, branches: bool) -> list[Candidate]:
    """Return what can be left out: layers, or mixers and FFNs."""
    kinds = ("mixer", "ffn") if branches else ("layer",)
    return [(kind, layer_idx) for layer_idx in range(num_layers) for kind in kinds]


def as_lists(chosen: Sequence[Candidate]) -> dict[str, list[int]]:
    """Return candidates as options of `skip_set`."""
    names = {"layer": "skip_layers", "mixer": "skip_mixers", "ffn": "skip_ffns"}
    return {name: sorted(i for kind, i in chosen if names[kind] == name) for name in names.values()}


def _by_influence(problem: Problem) -> list[Candidate]:
    influence = influences(problem.adapted, problem.windows)
    return sorted(problem.candidates, key=lambda candidate: influence[candidate])[: problem.num_out]


def _by_greedy(problem: Problem) -> list[Candidate]:
    chosen: list[Candidate] = []
    for _ in range(problem.num_out):
        rest = [candidate for candidate in problem.candidates if candidate not in chosen]
        chosen.append(max(rest, key=lambda extra: problem.agreement([*chosen, extra])))
    return chosen


def _bayesian(problem: Problem) -> list[Candidate]:
    from anydepth.search.bayesian import choose

    return choose(problem)


def _dynamic(problem: Problem) -> list[Candidate]:
    from anydepth.search.dynamic import choose

    return choose(problem)


def _knapsack(problem: Problem) -> list[Candidate]:
    from anydepth.search.knapsack import choose

    return choose(problem)


STRATEGIES: dict[str, Strategy] = {
    "influence": _by_influence,
    "greedy": _by_greedy,
    "bayesian": _bayesian,
    "dynamic": _dynamic,
    "knapsack": _knapsack,
}
"""Strategies by name; a new one is a function and a line here."""


@torch.no_grad()
def _choices(adapted: AdaptedModel, windows: Tensor) -> Tensor:
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
