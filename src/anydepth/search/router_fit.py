"""A first router without training: measure what every layer is worth to every token, and regress on it.

Around a static choice of layers, or of mixers, each routed one is toggled for all tokens of a window; what that does to
KL(full depth ‖ adapted) at a token is the layer's *benefit* to it. Ridge regression from the state that its network
reads predicts benefits of new tokens, and a token runs the layers whose predicted benefit is highest. Gradients alone
leave the gates where they start: a straight-through gradient of one sampled choice is mostly noise (docs/results).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anydepth.errors import RunError, UserError
from anydepth.hf.adapted import AdaptedModel
from anydepth.losses import divergence
from anydepth.methods.layer_router import LayerRouter
from anydepth.methods.skip_set import SkipSet, SkipSetConfig
from anydepth.models.backbone import recorded_inputs

NO_ROUTER = "only a learned layer_router can be fitted; this model has none"
RIDGES = (1e2, 1e3, 3e3, 1e4, 3e4, 1e5)
CLIPPED = 0.01
"""Share of benefits at either end that is cut off: a few tokens would lead the regression."""


@dataclass(frozen=True)
class RouterFit:
    """What a fit found on held-out windows; divergences are KL(full depth ‖ adapted) in nats per token.

    Attributes:
        static_divergence: of the static choice that benefits were measured around.
        routed_divergence: of the fitted router at `skip_share`, the share that it skips there.
        ridge: chosen by the predicted gain on the held-out windows.
    """

    static_divergence: float
    static_skip_share: float
    routed_divergence: float
    skip_share: float
    ridge: float
    num_tokens: int
    seconds: float

    def to_json(self) -> dict[str, float]:
        return asdict(self)


@torch.no_grad()
def fit_router(adapted: AdaptedModel, windows: Tensor) -> RouterFit:
    """Fit the attached `layer_router` to benefits measured on (N, T) windows, at its `target_skip`; sets its weights.

    Costs one forward per window and routed layer. The last quarter of the windows is held out to choose the ridge and
    to measure the result. Deterministic. Of a router that reads sequentially the states are those of the static choice.

    Raises:
        RunError: no learned router is attached. UserError: fewer than two windows.
    """
    router = _learned_router(adapted)
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
    routed, skipped = [], []
    for window in windows[-num_held_out:]:
        ids = window[None].to(adapted.device)
        with adapted.untouched():
            full = adapted(input_ids=ids, use_cache=False).logits[0]
        routed.append(divergence(adapted(input_ids=ids, use_cache=False).logits[0], full))
        skipped.append(~adapted.last_trace.mixer_keep[router.routed])
    _write(router, *_solve(states, benefits, ridge, router.config.target_skip), states)
    return RouterFit(
        static_divergence=torch.cat([part[2] for part in parts[-num_held_out:]]).mean().item(),
        static_skip_share=(~static).double().mean().item(),
        routed_divergence=torch.cat(routed).mean().item(),
        skip_share=torch.cat(skipped, dim=2).double().mean().item(),
        ridge=ridge,
        num_tokens=windows.numel(),
        seconds=time.monotonic() - started,
    )


def _learned_router(adapted: AdaptedModel) -> LayerRouter:
    router = learned_router(adapted.methods.values())
    if router is None:
        raise RunError(NO_ROUTER)
    return router


def learned_router(methods: Iterable[nn.Module]) -> LayerRouter | None:
    """Return the router that can be fitted; None if there is none."""
    return next((one for one in methods if isinstance(one, LayerRouter) and one.networks), None)


def _measure(
    adapted: AdaptedModel, router: LayerRouter, ids: Tensor, static: Tensor
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Of one (1, T) window: states (T, D) of each network, benefits (T, G), the static choice's divergence (T,).

    All on the host.
    """
    with adapted.untouched():
        full = adapted(input_ids=ids, use_cache=False).logits[0]

    fixed = SkipSet(SkipSetConfig(), adapted.backbone)  # in place of the router
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
    """Return what each network reads, (T, D) in float32 on the host."""
    views = [adapted.backbone.layers[layer_idx] for layer_idx in router.networks]
    with recorded_inputs(views) as inputs:
        adapted(input_ids=ids, use_cache=False, logits_to_keep=1)
    return [inputs[view.layer_idx][0][0].float().cpu() for view in views]


def _features(states: Tensor) -> Tensor:
    """Normalised states and a constant, (N, D + 1), as the router's network sees them at the start."""
    normed = F.layer_norm(states, states.shape[-1:])
    return torch.cat([normed, torch.ones(len(states), 1)], dim=1).double()


def _solve(states: Sequence[Tensor], benefits: Tensor, ridge: float, target_skip: float) -> tuple[list[Tensor], Tensor]:
    """Weights (D + 1, G) of each network's regression, and the prediction below which `target_skip` of these fall."""
    columns = benefits.chunk(len(states), dim=1)
    weights = [_regress(own, part, ridge) for own, part in zip(states, columns, strict=True)]
    predicted = _predicted(states, weights).flatten().sort().values
    return weights, predicted[round(target_skip * (len(predicted) - 1))]


def _regress(states: Tensor, benefits: Tensor, ridge: float) -> Tensor:
    features, targets = _features(states), benefits.double()
    targets = targets.clamp(targets.quantile(CLIPPED, dim=0), targets.quantile(1 - CLIPPED, dim=0))
    penalty = ridge * torch.eye(features.shape[1], dtype=features.dtype)
    penalty[-1, -1] = 0  # the constant is free
    return torch.linalg.solve(features.T @ features + penalty, features.T @ targets)


def _predicted(states: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """(N, G) benefits of all routed layers, by the states that their networks read."""
    return torch.cat([_features(own) @ part for own, part in zip(states, weights, strict=True)], dim=1)


def _gain(
    states: Sequence[Tensor], benefits: Tensor, split: int, static: Tensor, target_skip: float, ridge: float
) -> float:
    """Benefit per held-out token of the fitted choice over the static one, were benefits additive."""
    weights, threshold = _solve([own[:split] for own in states], benefits[:split], ridge, target_skip)
    keep = _predicted([own[split:] for own in states], weights) > threshold
    return ((keep.double() - static.double()) * benefits[split:]).sum(1).mean().item()


def _write(router: LayerRouter, weights: Sequence[Tensor], threshold: Tensor, states: Sequence[Tensor]) -> None:
    """Into the networks' linear maps, scaled so that the median logit is `initial_bias` away from the threshold."""
    distance = (_predicted(states, weights) - threshold).abs().median()
    scale = router.config.initial_bias / distance.clamp_min(1e-9)
    for network, part in zip(router.networks.values(), weights, strict=True):
        network.direct.weight.copy_((part[:-1] * scale).T)
        network.direct.bias.copy_((part[-1] - threshold) * scale + router.config.threshold)
