"""A fitted router: learns which token needs which layer where that can be told, and leaves the rest as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import anydepth
from anydepth.errors import RunError, UserError
from anydepth.hf.adapted import AdaptedModel
from anydepth.methods.layer_router import LayerRouter
from anydepth.search import router_fit
from anydepth.search.router_fit import fit_router
from tiny import tiny_llama


def windows(num: int = 8, length: int = 40) -> Tensor:
    return torch.randint(1, 257, (num, length), generator=torch.Generator().manual_seed(1))


def routed(**options: Any) -> tuple[AdaptedModel, LayerRouter]:
    adapted = anydepth.attach(tiny_llama(), {"name": "layer_router", "always_keep": 1, "target_skip": 0.4, **options})
    router = adapted.methods["layer_router"]
    assert isinstance(router, LayerRouter)
    return adapted, router


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"input": "embeddings"},
        {"reads": "sequential"},
        {"branch": "mixer"},
        {"branch": "mixer", "reads": "sequential"},
    ],
)
def test_states_are_those_that_networks_read_and_benefits_those_of_the_branch(options: dict[str, Any]) -> None:
    adapted, router = routed(initial_skip_layers=[2, 4], **options)
    ids = windows(1)
    states, benefits, base = router_fit._measure(adapted, router, ids, torch.tensor([True, False, True, False, True]))
    kind = "skip_mixers" if options.get("branch") == "mixer" else "skip_layers"
    full = tiny_llama()(ids).logits[0].log_softmax(-1)

    def without(out: list[int]) -> tuple[Tensor, list[Tensor]]:
        """KL against full depth, and the inputs of all layers."""
        reduced, inputs = anydepth.attach(tiny_llama(), {"name": "skip_set", kind: out}), []
        for layer in reduced.model.model.layers:
            layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0]))
        ours = reduced(ids).logits[0].log_softmax(-1)
        return (full.exp() * (full - ours)).sum(-1), inputs

    wanted, inputs = without([2, 4])
    torch.testing.assert_close(base, wanted, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(benefits[:, 1], wanted - without([4])[0], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(benefits[:, 2], without([2, 3, 4])[0] - wanted, rtol=1e-3, atol=1e-5)
    assert benefits.shape == (40, 5)
    read = {"embeddings": [0], "sequential": [1, 2, 3, 4, 5]}.get(options.get("reads") or options.get("input"), [1])
    assert len(states) == len(read)
    for own, layer_idx in zip(states, read, strict=True):
        torch.testing.assert_close(own, inputs[layer_idx], rtol=1e-4, atol=1e-5)


def planted(adapted: AdaptedModel, router: LayerRouter, ids: Tensor, static: Tensor) -> Any:
    """The first layer's worth to a token is told by one direction of its state; the others are worth what they are."""
    states = torch.randn(ids.shape[1], 32, generator=torch.Generator().manual_seed(int(ids.sum())))
    worth = torch.tensor([0.0, 1.0, 1.0, 1.0, -1.0]).repeat(ids.shape[1], 1)
    worth[:, 0] = 4 * states[:, 3]
    return [states] * len(router.networks), worth, torch.ones(ids.shape[1])


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"reads": "sequential", "branch": "mixer"}])
def test_planted_dependence_is_found(options: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_fit, "_measure", planted)
    adapted, router = routed(initial_bias=8.0, target_skip=0.3, **options)
    fit_router(adapted, windows(num=20))
    states = torch.randn(500, 32, generator=torch.Generator().manual_seed(5))
    runs = torch.cat([network(states) for network in router.networks.values()], dim=1).T > 0  # (layers, tokens)
    assert runs[1:4].float().mean() > 0.95 and runs[4].float().mean() < 0.05
    agrees = (runs[0] == (states[:, 3] > states[:, 3].quantile(0.5))).float().mean()
    assert agrees > 0.9, f"the planted direction decides {agrees:.0%} of the tokens"


@pytest.mark.parametrize("options", [{}, {"reads": "sequential", "branch": "mixer"}])
def test_fit_holds_the_target_and_repeats_to_the_bit(options: dict[str, str]) -> None:
    adapted, _ = routed(initial_skip_layers=[2, 4], **options)
    found = fit_router(adapted, windows())
    assert found.static_skip_share == pytest.approx(0.4) and found.skip_share == pytest.approx(0.4, abs=0.15)
    assert found.num_tokens == windows().numel()
    shares = [1 - row for row in _rates(adapted)]
    assert sum(shares) / 5 == pytest.approx(0.4, abs=0.1)
    again, _ = routed(initial_skip_layers=[2, 4], **options)
    fit_router(again, windows())
    for ours, other in zip(adapted.methods.parameters(), again.methods.parameters(), strict=True):
        assert torch.equal(ours, other)


@torch.no_grad()
def _rates(adapted: AdaptedModel) -> list[float]:
    adapted(input_ids=windows(), use_cache=False)
    return adapted.last_trace.executed_share()[0][1:]


def test_what_cannot_be_fitted_is_refused() -> None:
    random = {"name": "layer_router", "router": "random", "always_keep": 1, "rates": [0.5] * 5}
    with pytest.raises(RunError, match="learned layer_router"):
        fit_router(anydepth.attach(tiny_llama(), random), windows())
    with pytest.raises(UserError, match="two windows"):
        fit_router(routed()[0], windows(1))
