"""Fit the first weights of a router without training: measure the benefit of each layer to each token, and regress.

Around a static set of layers, or of mixers, each routed one is toggled for all tokens of a window; the change of
KL(full depth ‖ adapted) at a token is the layer's *benefit* to it. Ridge regression predicts benefits from the state
that the layer's network reads, and a token runs the layers with the highest predictions. Gradients alone hardly move
the gates, because a straight-through gradient of one sampled decision is mostly noise (docs/results).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anydepth.errors import RunError, UserError
from anydepth.hf.adapted import AdaptedModel
from anydepth.losses import divergence
from anydepth.methods.layer_router import LayerRouter
from anydepth.methods.skip_set import SkipSet, SkipSetConfig
from anydepth.models.backbone import recorded_inputs

NO_ROUTER = "only a learned layer_router can be fitted, and this model has none; attach one"
RIDGES = (1e2, 1e3, 3e3, 1e4, 3e4, 1e5)
CLIPPED = 0.01
"""Fraction of benefits at either end that is clipped, because a few tokens would dominate the regression."""


@dataclass(frozen=True)
class RouterFit:
    """Result of a fit on held-out windows: KL(full depth ‖ adapted) of the static set and of the router, in nats."""

    static_divergence: float
    static_skip_share: float
    routed_divergence: float
    skip_share: float
    ridge: float
    num_tokens: int
    seconds: float


@torch.no_grad()
def fit_router(adapted: AdaptedModel, windows: Tensor) -> RouterFit:
    """Fit the weights of the attached `layer_router` to benefits on (N, T) windows, at its `target_skip`.

    It takes one forward per window and routed layer. The last quarter of the windows is held out to select the ridge
    and to measure the result. A router that reads sequentially is fitted to states of the static set.
    """
    router = learned_router(adapted.methods.values())
    if router is None:
        raise RunError(NO_ROUTER)
    if len(windows) < 2:
        raise UserError("fitting a router needs at least two windows of text, one to fit and one to hold out")
    started = time.monotonic()
    adapted.eval()
    static = torch.tensor([layer_idx not in router.config.initial_skip_layers for layer_idx in router.routed])
    parts = [_measure(adapted, router, window[None].to(adapted.device), static) for window in windows]
    states = [torch.cat(own) for own in zip(*(part[0] for part in parts), strict=True)]
    benefits = torch.cat([part[1] for part in parts])
    num_held_out = max(len(windows) // 4, 1)
    split = len(benefits) - num_held_out * windows.shape[1]
    ridge = max(RIDGES, key=lambda ridge: _gain(states, benefits, split, static, router.config.target_skip, ridge))
    known = [own[:split] for own in states]
    _write(router, *_solve(known, benefits[:split], ridge, router.config.target_skip), known)
    routed_divergence, skip_share = _held_out(adapted, router, windows[-num_held_out:])
    _write(router, *_solve(states, benefits, ridge, router.config.target_skip), states)
    return RouterFit(
        static_divergence=torch.cat([part[2] for part in parts[-num_held_out:]]).mean().item(),
        static_skip_share=(~static).double().mean().item(),
        routed_divergence=routed_divergence,
        skip_share=skip_share,
        ridge=ridge,
        num_tokens=windows.numel(),
        seconds=time.monotonic() - started,
    )


def _held_out(adapted: AdaptedModel, router: LayerRouter, windows: Tensor) -> tuple[float, float]:
    """Return the mean divergence of the router on (N, T) windows, and the fraction that it skips."""
    divergences, skipped = [], []
    for window in windows:
        ids = window[None].to(adapted.device)
        full = _full_depth(adapted, ids)
        divergences.append(divergence(adapted(input_ids=ids, use_cache=False).logits[0], full))
        skipped.append(~adapted.last_trace.mixer_keep[router.routed])
    return torch.cat(divergences).mean().item(), torch.cat(skipped, dim=2).double().mean().item()


def _full_depth(adapted: AdaptedModel, ids: Tensor) -> Tensor:
    """Return the (T, V) logits of (1, T) ids at full depth."""
    with adapted.untouched():
        return adapted(input_ids=ids, use_cache=False).logits[0]


def learned_router(methods: Iterable[nn.Module]) -> LayerRouter | None:
    return next((one for one in methods if isinstance(one, LayerRouter) and one.networks), None)


def _measure(
    adapted: AdaptedModel, router: LayerRouter, ids: Tensor, static: Tensor
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Return the (T, D) states that each network reads, (T, G) benefits, and the (T,) divergence of the static set."""
    full = _full_depth(adapted, ids)
    fixed = SkipSet(SkipSetConfig(), adapted.backbone)  # replaces the router
    deciding = [fixed if method is router else method for method in adapted.active_methods]

    def choose(keep: Tensor) -> None:
        skipped = [layer_idx for layer_idx, kept in zip(router.routed, keep.tolist(), strict=True) if not kept]
        fixed.choose(**{"mixers": skipped, "layers": ()} if router.config.branch == "mixer" else {"layers": skipped})

    def distance(keep: Tensor) -> Tensor:
        choose(keep)
        with adapted.deciding(*deciding):
            return divergence(adapted(input_ids=ids, use_cache=False).logits[0], full).cpu()

    choose(static)
    with adapted.deciding(*deciding):
        states = _states_of(adapted, router, ids)
    base = distance(static)
    columns = []
    for number, kept in enumerate(static.tolist()):
        toggled = static.clone()
        toggled[number] = not kept
        columns.append(distance(toggled) - base if kept else base - distance(toggled))
    return states, torch.stack(columns, dim=1), base


def _states_of(adapted: AdaptedModel, router: LayerRouter, ids: Tensor) -> list[Tensor]:
    """Return the (T, D) states that each network reads, in float32 on the host."""
    views = [adapted.backbone.layers[layer_idx] for layer_idx in router.networks]
    with recorded_inputs(views) as inputs:
        adapted(input_ids=ids, use_cache=False, logits_to_keep=1)
    return [inputs[view.layer_idx][0][0].float().cpu() for view in views]


def _features(states: Tensor) -> Tensor:
    """Return (N, D + 1) normalised states and a constant, as the router's network computes them at the start."""
    normed = F.layer_norm(states, states.shape[-1:])
    return torch.cat([normed, torch.ones(len(states), 1)], dim=1).double()


def _solve(states: Sequence[Tensor], benefits: Tensor, ridge: float, target_skip: float) -> tuple[list[Tensor], Tensor]:
    """Return the (D + 1, G) weights of each network's regression, and the `target_skip` quantile of predictions."""
    columns = benefits.chunk(len(states), dim=1)
    weights = [_regress(own, part, ridge) for own, part in zip(states, columns, strict=True)]
    predicted = _predicted(states, weights).flatten().sort().values
    return weights, predicted[round(target_skip * (len(predicted) - 1))]


def _regress(states: Tensor, benefits: Tensor, ridge: float) -> Tensor:
    features, targets = _features(states), benefits.double()
    targets = targets.clamp(targets.quantile(CLIPPED, dim=0), targets.quantile(1 - CLIPPED, dim=0))
    penalty = ridge * torch.eye(features.shape[1], dtype=features.dtype)
    penalty[-1, -1] = 0  # no penalty of the constant
    return torch.linalg.solve(features.T @ features + penalty, features.T @ targets)


def _predicted(states: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Predict the (N, G) benefits of all routed layers from the states that their networks read."""
    return torch.cat([_features(own) @ part for own, part in zip(states, weights, strict=True)], dim=1)


def _gain(
    states: Sequence[Tensor], benefits: Tensor, split: int, static: Tensor, target_skip: float, ridge: float
) -> float:
    """Return the benefit per held-out token of the fitted router over the static set, if benefits were additive."""
    weights, threshold = _solve([own[:split] for own in states], benefits[:split], ridge, target_skip)
    keep = _predicted([own[split:] for own in states], weights) > threshold
    return ((keep.double() - static.double()) * benefits[split:]).sum(1).mean().item()


def _write(router: LayerRouter, weights: Sequence[Tensor], threshold: Tensor, states: Sequence[Tensor]) -> None:
    """Set the networks' linear layers, scaled so that the median logit is `initial_bias` away from the threshold."""
    distance = (_predicted(states, weights) - threshold).abs().median()
    scale = router.config.initial_bias / distance.clamp_min(1e-9)
    for network, part in zip(router.networks.values(), weights, strict=True):
        network.direct.weight.copy_((part[:-1] * scale).T)
        network.direct.bias.copy_((part[-1] - threshold) * scale + router.config.threshold)
