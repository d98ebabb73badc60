"""Diagnose the gates of each method over real tokens, and warn about gates that decide nothing.

All is computed from traces, both in training and in `analyze`. Warnings are about learned gates only: a skip set,
random gates and exits by confidence may be constant because of their options.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from anydepth.gating.plan import Plan
from anydepth.gating.shared_batch import batch_mean
from anydepth.gating.trace import Trace
from anydepth.hf.adapted import AdaptedModel
from anydepth.methods._base.method import Method
from anydepth.methods._base.training import Trained

ALL_CLOSED, ALL_OPEN = 0.02, 0.98
"""Mean fraction of tokens that the gates of a method let run, below and above which they have collapsed."""
DEAD = 0.01
"""Fraction of tokens below which a gate counts as never open, or never closed."""
LOW_ENTROPY = 0.10
"""Mean entropy of gates, in nats, below which they are nearly constant."""
UNEVEN = 0.10
"""Variance between gates of the fraction of tokens that run, above which gates are uneven."""
PREFIX = "gate_"
"""Prefix of the training metrics of this module."""
DIAGNOSED_WINDOWS = 8
PATIENCE = 5
"""A collapse is reported once it has lasted for 1 ÷ PATIENCE of training."""


@dataclass(frozen=True)
class GateDecisions:
    """The decisions of one method's gates.

    Attributes:
        branch: the branch that a gate decides: `layer`, `mixer`, `ffn`, or `softmax` (the layer's own mixer, where
            there is an alternate one).
        keep: (G, N) bool, which of N real tokens each gate lets run.
    """

    method: str
    branch: str
    layers: list[int]
    keep: Tensor

    @property
    def fractions(self) -> Tensor:
        """The (G,) fraction of tokens that each gate lets run."""
        return self.keep.double().mean(1)

    def metrics(self) -> dict[str, float]:
        """Return the mean fraction of tokens that run, entropies in nats, and deviations between gates and tokens.

        They are of the tokens of all processes that share a batch.
        """
        fractions, of_tokens = batch_mean(self.fractions), self.keep.double().mean(0)
        variance = batch_mean(of_tokens.square().mean()) - batch_mean(of_tokens.mean()).square()
        values = {
            "fraction": fractions.mean(),
            "entropy": binary_entropy(fractions).mean(),
            "entropy_of_mean": binary_entropy(fractions.mean()),
            "layer_std": fractions.std(correction=0),
            "token_std": variance.clamp_min(0).sqrt(),
        }
        return {name: value.item() for name, value in values.items()}

    def open_gates(self) -> list[float]:
        """Return the fraction of tokens for which k of the G gates are open, for k from 0 to G."""
        counts = torch.bincount(self.keep.sum(0), minlength=len(self.layers) + 1)
        return (counts.double() / counts.sum()).tolist()


def binary_entropy(fraction: Tensor) -> Tensor:
    """Return the entropy, in nats, of a gate that opens for this fraction of tokens."""
    return torch.special.entr(fraction) + torch.special.entr(1 - fraction)


def gate_decisions(trace: Trace, methods: Sequence[Method]) -> list[GateDecisions]:
    """Read the decisions of each method that gates from a trace of whole sequences.

    Layers that another method closes for every token, such as a skip set, are left out, because their gates decide
    nothing.
    """
    mixers, ffns = trace.mixer_keep, trace.ffn_keep
    branches = {"layer": mixers | ffns, "mixer": mixers, "ffn": ffns, "softmax": mixers}
    positions = trace.token_mask.cumsum(1) - 1
    decisions = []
    for method in methods:
        branch = _branch(method)
        layers = sorted(set(method.gated_layers) - _closed(methods, branch))
        gated = trace.token_mask & (positions >= method.pool_tokens)
        if layers and bool(gated.any()):
            decisions.append(GateDecisions(method.name, branch, layers, branches[branch][layers][:, gated].cpu()))
    return decisions


def _branch(method: Method) -> str:
    if method.routes_mixers:
        return "softmax"
    return "mixer" if "mixer" in method.branches else "ffn" if method.branches == {"ffn"} else "layer"


def _closed(methods: Sequence[Method], branch: str) -> frozenset[int]:
    """Return the layers in which some method closes `branch` for every token."""
    closed: frozenset[int] = frozenset()
    for plan in (Plan.of([method]) for method in methods):
        mixers, ffns = plan.closed["mixer"], plan.closed["ffn"]
        closed |= plan.closed["layer"] | {"layer": mixers & ffns, "ffn": ffns}.get(branch, mixers)
    return closed


def joined(parts: Sequence[list[GateDecisions]]) -> list[GateDecisions]:
    """Join the decisions of several forwards along the tokens."""
    return [
        replace(same[0], keep=torch.cat([part.keep for part in same], dim=1))
        for same in zip(*(part for part in parts if part), strict=True)
    ]


@torch.no_grad()
def diagnose(adapted: AdaptedModel, rows: Sequence[Tensor]) -> list[dict[str, Any]]:
    """Run the first of the rows of (1, T) token ids, and describe the gates at inference."""
    adapted.eval()
    parts = []
    if any(method.gated_layers for method in adapted.active_methods):
        for row in rows[:DIAGNOSED_WINDOWS]:
            adapted(input_ids=row.to(adapted.device), use_cache=False)
            parts.append(gate_decisions(adapted.last_trace, adapted.active_methods))
    return described(joined(parts), adapted.active_methods)


def described(decisions: Sequence[GateDecisions], methods: Sequence[Method]) -> list[dict[str, Any]]:
    """Return the documents of `gates`, one for each method that gates, with its warnings."""
    by_name = {method.name: method for method in methods}
    return [
        {
            "method": own.method,
            "branch": own.branch,
            "num_tokens": own.keep.shape[1],
            **own.metrics(),
            "gates": [
                {"layer": layer_idx, "fraction": float(fraction), "entropy": float(binary_entropy(fraction))}
                for layer_idx, fraction in zip(own.layers, own.fractions, strict=True)
            ],
            "open_gates": own.open_gates(),
            "warnings": gate_warnings(own, by_name[own.method]),
        }
        for own in decisions
    ]


def training_metrics(decisions: Sequence[GateDecisions]) -> dict[str, float]:
    """Return the metrics of each method for the training history, by `method/gate_…`, over the whole batch."""
    return {f"{own.method}/{PREFIX}{name}": value for own in decisions for name, value in own.metrics().items()}


def gate_warnings(decisions: GateDecisions, method: Method) -> list[str]:
    """Return warnings about learned gates, one sentence each, with numbers and advice."""
    if not (isinstance(method, Trained) and method.has_learned_gates):
        return []
    metrics, fractions = decisions.metrics(), decisions.fractions
    collapse = _collapse(method, decisions.branch, metrics["fraction"], metrics["entropy"])
    found = [] if collapse is None else [collapse]
    if not ALL_CLOSED <= metrics["fraction"] <= ALL_OPEN:
        return found
    variance = metrics["layer_std"] ** 2
    if collapse is None and variance > UNEVEN:
        found.append(
            f"{method.name}: the fraction of tokens differs between layers with a variance of {variance:.2f} "
            f"(limit {UNEVEN:g}): much of the choice of layers is fixed; {_advice(method)}"
        )
    for word, those, why in (
        ("never", fractions < DEAD, "a skip set does the same without a gate"),
        ("always", fractions > 1 - DEAD, "such a gate saves nothing"),
    ):
        if those.any():
            layers = [layer_idx for layer_idx, is_one in zip(decisions.layers, those.tolist(), strict=True) if is_one]
            verb = "run" if decisions.branch == "layer" and len(layers) > 1 else "runs"
            bounds = dict.fromkeys(f"{float(bound):.3f}" for bound in (fractions[those].min(), fractions[those].max()))
            found.append(
                f"{method.name}: {_named(decisions.branch, layers)} {word} {verb} (fraction of tokens "
                f"{' to '.join(bounds)}): {why}; {_advice(method)}"
            )
    return found


def lasting_collapse(history: Sequence[dict[str, Any]], methods: Sequence[Method], max_steps: int) -> list[str]:
    """Return one warning for each method with sampled gates that have collapsed for a fifth of training.

    A method with a warning in the history gets no other.
    """
    num_rows = max(max_steps // PATIENCE, PATIENCE)
    recent = [row.get("figures", {}) for row in history[-num_rows:]]
    warned = [text for row in history for text in row.get("warnings", [])]
    found = []
    for method in methods:
        names = [f"{method.name}/{PREFIX}{name}" for name in ("fraction", "entropy")]
        is_new = not any(text.startswith(f"{method.name}:") for text in warned)
        if len(recent) < num_rows or not is_new or not all(names[0] in row for row in recent):
            continue
        if not isinstance(method, Trained) or not method.has_learned_gates or method.is_frozen:
            continue
        fraction, entropy = (sum(row[name] for row in recent) / num_rows for name in names)
        collapse = _collapse(method, _branch(method), fraction, entropy)
        if collapse is not None:
            found.append(f"{collapse} (sampled gates, mean of the last {num_rows} steps)")
    return found


def _collapse(method: Method, branch: str, fraction: float, entropy: float) -> str | None:
    """Return a warning where all gates of a method are open, closed, or constant."""
    what = {"layer": "gated layers", "mixer": "gated mixers", "ffn": "gated FFNs", "softmax": "softmax mixers"}[branch]
    if fraction < ALL_CLOSED:
        problem = f"almost no token runs the {what} (mean fraction {fraction:.3f}, limit {ALL_CLOSED:g})"
    elif fraction > ALL_OPEN:
        problem = f"almost every token runs the {what} (mean fraction {fraction:.3f}, limit {ALL_OPEN:g})"
    elif entropy < LOW_ENTROPY:
        return (
            f"{method.name}: gates are nearly constant (mean entropy {entropy:.3f} nats, limit {LOW_ENTROPY:g}): a "
            f"skip set does the same without gates; {_advice(method)}"
        )
    else:
        return None
    return f"{method.name}: {problem}; {_advice(method)}, or set the threshold with calibrate.skip_share"


def _advice(method: Method) -> str:
    options = method.config.model_dump()
    if options.get("initial_bias", 0) > 0:
        return f"lower initial_bias ({options['initial_bias']:g}) or train for more steps"
    if "entropy_weight" in options:
        return f"raise entropy_weight ({options['entropy_weight']:g}) or train for more steps"
    return "train for more steps"


def _named(branch: str, layers: list[int]) -> str:
    """Return a phrase for a branch of these layers in order, such as `the mixer of layers 3, 5–8`."""
    cuts = [0, *(i for i, (one, other) in enumerate(pairwise(layers), start=1) if other != one + 1), len(layers)]
    runs = [layers[first:end] for first, end in pairwise(cuts)]
    numbers = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)
    part = {"mixer": "the mixer of ", "ffn": "the FFN of ", "softmax": "the softmax mixer of "}.get(branch, "")
    return f"{part}layer{'s' if len(layers) > 1 else ''} {numbers}"
