"""Fit the K/V projections of tokens that leave early, in closed form: no training.

Each layer after the exit gets projections from its norm of the state at the exit to the K and V that the layer projects
at full depth, by ridge regression on the difference to its own projections.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from anydepth.decoding.engine import Engine
from anydepth.gating.plan import FULL_DEPTH
from anydepth.methods.prompt_exit import PromptExit

RIDGE = 1e-3
"""Weight of the penalty, relative to the mean square of an input."""


@torch.no_grad()
def fit_projections(
    methods: Sequence[PromptExit],
    engine: Engine,
    windows: Tensor,
    until: float = math.inf,
) -> int:
    """Fit the projections of methods with `fitted: true` to the states of full depth on (N, T) windows.

    Args:
        until: time, as by `time.monotonic`, after which no further window is read.

    Returns:
        The number of windows that were read.
    """
    for method in methods:
        method.reset()
    first, last = min(method.layer for method in methods), engine.adapted.backbone.num_layers
    sums = {(method, layer_idx): _Sums() for method in methods for layer_idx in range(method.layer, last)}
    num_read = 0
    for window in windows:
        num_read += 1
        states = _states(engine, window.tolist(), range(first, last))
        for (method, layer_idx), own in sums.items():
            projection = method.projection(layer_idx)
            inputs = projection.normalise(states[method.layer]).float()
            own.add(inputs, (projection(states[layer_idx]) - projection(states[method.layer])).float())
        if time.monotonic() > until:
            break
    for (method, layer_idx), own in sums.items():
        method.projection(layer_idx).fit(*own.solve())
    return num_read


class _Sums:
    """Sums of a regression with a constant."""

    def __init__(self) -> None:
        self.inputs = self.outputs = torch.zeros((), dtype=torch.double)

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1)
        self.inputs = self.inputs + (inputs.T @ inputs).double()
        self.outputs = self.outputs + (inputs.T @ outputs).double()

    def solve(self) -> tuple[Tensor, Tensor]:
        """Return the weight (out, in) and the bias (out,)."""
        ridge = RIDGE * self.inputs.diagonal().mean() * torch.ones_like(self.inputs.diagonal())
        found = torch.linalg.solve(self.inputs + ridge.diag(), self.outputs).float().T
        return found[:, :-1], found[:, -1]


def _states(engine: Engine, ids: list[int], layers: range) -> dict[int, Tensor]:
    """Return the (T, D) inputs of layers at full depth."""
    adapted = engine.adapted
    if engine.model is None:
        with adapted.disabled(), adapted.backbone.layer_outputs() as outputs:
            adapted(input_ids=torch.tensor([ids], device=adapted.device), use_cache=False, logits_to_keep=1)
        return {layer_idx: outputs[layer_idx - 1][0] for layer_idx in layers}
    session = engine.new_session(1, captures=list(layers))
    sequence = session.open()
    session.read(sequence, ids, FULL_DEPTH, num_logits=0, capture=True)
    return dict(zip(layers, session.captured(sequence), strict=True))
