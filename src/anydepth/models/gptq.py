"""4-bit weights with error feedback (GPTQ, Frantar et al. 2023): later inputs make up for the rounding of earlier ones.

The second moments H = Xᵀ·X of a layer's inputs say how much each error of a weight costs. Inputs are rounded in order;
the error of each is taken out of the weights that are still to be rounded, so that outputs change least.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gguf import GGMLQuantizationType
from torch import Tensor, nn

from anydepth.models.backbone import Backbone, recorded_inputs
from anydepth.models.blocks import Blocks
from anydepth.models.hooks import Hooks
from anydepth.models.layer_view import LayerView, first_output

GROUP = 32
"""Inputs with one step and one offset, as in Q4_1."""
LEVELS = 15
DAMPING = 0.01
"""Added to the diagonal of H, relative to its mean."""
SHRINKS = tuple(1 - 0.05 * number for number in range(11))
"""Fractions of a group's range that its levels are tried to cover."""


def rounded(weight: Tensor, moments: Tensor) -> Blocks:
    """Round a weight (out, in) to Q4_1 blocks, with error feedback by its inputs' second moments (in, in)."""
    weight, moments = weight.float().clone(), moments.float().clone()
    dead = moments.diagonal() == 0
    moments.diagonal()[dead] = 1.0
    importance = moments.diagonal().clone()
    moments.diagonal().add_(DAMPING * moments.diagonal().mean())
    inverse = _inverse_factor(moments)
    data = torch.empty(len(weight), weight.shape[1] // GROUP, 20, dtype=torch.uint8)
    for number, start in enumerate(range(0, weight.shape[1], GROUP)):
        own = slice(start, start + GROUP)
        block, factors = weight[:, own], inverse[own, own]
        step, offset = _levels(block, importance[own])
        codes, errors = torch.empty_like(block), torch.empty_like(block)
        for column in range(GROUP):
            code = ((block[:, column] - offset) / step).round().clamp(0, LEVELS)
            codes[:, column] = code
            errors[:, column] = (block[:, column] - code * step - offset) / factors[column, column]
            block[:, column + 1 :] -= errors[:, column, None] * factors[column, column + 1 :]
        weight[:, own.stop :] -= errors @ inverse[own, own.stop :]
        scales = torch.stack([step, offset], dim=1).to(torch.float16)
        data[:, number, :4] = scales.view(torch.uint8)
        bytes_ = codes.to(torch.uint8)
        data[:, number, 4:] = bytes_[:, :16] | bytes_[:, 16:] << 4
    return Blocks(data.flatten(1), GGMLQuantizationType.Q4_1)


def _inverse_factor(moments: Tensor) -> Tensor:
    """Return the upper triangular U with H⁻¹ = Uᵀ·U: with the order of inputs reversed, H = L·Lᵀ and U = L⁻¹."""
    lower = torch.linalg.cholesky(moments.flip(0, 1))
    return torch.linalg.solve_triangular(lower, torch.eye(len(lower)), upper=False).flip(0, 1)


def _levels(block: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Return the (out,) steps and offsets, as float16 has them, with the least weighted error of (out, 32) weights."""
    low, high = block.amin(1), block.amax(1)
    middle, half = (low + high) / 2, (high - low).clamp_min(1e-6) / 2
    tried = [_fitted(block, importance, middle - half * shrink, 2 * half * shrink / LEVELS) for shrink in SHRINKS]
    errors, steps, offsets = (torch.stack(part) for part in zip(*tried, strict=True))
    best = errors.argmin(0, keepdim=True)
    return steps.gather(0, best)[0], offsets.gather(0, best)[0]


def _fitted(block: Tensor, importance: Tensor, offset: Tensor, step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return errors, steps and offsets of the least-squares line through the codes of a first line and the weights."""
    codes = ((block - offset[:, None]) / step[:, None]).round().clamp(0, LEVELS)
    total = importance.sum()
    mean_code, mean_weight = (codes @ importance) / total, (block @ importance) / total
    around = codes - mean_code[:, None]
    variance = (around.square() @ importance).clamp_min(1e-12)
    step = ((around * (block - mean_weight[:, None])) @ importance / variance).clamp_min(1e-7).to(torch.float16).float()
    offset = (mean_weight - step * mean_code).to(torch.float16).float()
    codes = ((block - offset[:, None]) / step[:, None]).round().clamp(0, LEVELS)
    return (block - codes * step[:, None] - offset[:, None]).square() @ importance, step, offset


def linear_layers(backbone: Backbone) -> list[nn.Module]:
    """Return the linear layers of all decoder layers, wrapped ones as they are."""
    return [part for view in backbone.layers for part in view.module.modules() if hasattr(part, "in_features")]


@torch.no_grad()
def round_layers(
    backbone: Backbone, windows: Tensor, say: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Blocks]:
    """Round the linear layers of all decoder layers, in order; return their blocks by module name.

    Args:
        windows: (N, T) token ids; a layer's inputs are those that the rounded layers before it give.
        say: called after each layer, with the number of layers done and of all.
    """
    names = {module: name for name, module in backbone.model.named_modules()}
    found, arguments, states = dict[str, Blocks](), list[dict[int, dict[str, Any]]](), list[Tensor]()
    for window in windows:
        with recorded_inputs(backbone.layers) as records:
            backbone.decoder(input_ids=window[None].to(backbone.device), use_cache=False)
        states.append(records[0][0])
        arguments.append({layer_idx: own for layer_idx, (_, own) in records.items()})
    for view in backbone.layers:
        own_arguments = [own[view.layer_idx] for own in arguments]
        moments = _moments(view, states, own_arguments)
        weights = {}
        for module, own in moments.items():
            blocks = found[names[module]] = rounded(module.weight, own)
            prefix = names[module].removeprefix(names[view.module] + ".")
            weights[f"{prefix}.weight"] = blocks.dense().to(module.weight)
        run = partial(torch.func.functional_call, view.module, weights)
        states = [first_output(run((one,), own)) for one, own in zip(states, own_arguments, strict=True)]
        say(view.layer_idx + 1, len(backbone.layers))
    return found


def _moments(view: LayerView, states: list[Tensor], arguments: list[dict[str, Any]]) -> dict[nn.Linear, Tensor]:
    """Return the second moments of the inputs of a layer's linear layers."""
    found: dict[nn.Linear, Tensor] = {}

    def add(module: nn.Linear, _: nn.Module, args: tuple[Any, ...]) -> None:
        inputs = args[0].flatten(0, -2).float()
        found[module] = found.get(module, 0) + inputs.T @ inputs

    with Hooks() as hooks:
        for part in view.module.modules():
            if isinstance(part, nn.Linear) and part.in_features % GROUP == 0:
                hooks.before(part, partial(add, part))
        for one, own in zip(states, arguments, strict=True):
            view.module(one, **own)
    return found
