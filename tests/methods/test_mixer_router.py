"""What the contract does not say of mixer_router: caches that are smaller, losses, sizes, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import anydepth
import families
from anydepth import HFEngine
from anydepth.errors import RunError, UserError
from anydepth.gating import cost
from anydepth.gating.plan import Sample
from anydepth.hf import alternate
from anydepth.hf.adapted import AdaptedModel
from anydepth.measure.inspect import inspect_model
from anydepth.measure.self_check import self_check
from anydepth.methods.mixer_router import MixerRouter


def attach(family: str = "llama", *, decided: bool = True, **options: Any) -> AdaptedModel:
    """Attached, with a router that decides differently for different tokens."""
    adapted = anydepth.attach(families.build(family), {"name": "mixer_router", **options})
    if decided:
        for network in router_of(adapted).networks:
            torch.nn.init.normal_(network.get_parameter("direct.weight"), generator=torch.Generator().manual_seed(1))
    return adapted


def router_of(adapted: AdaptedModel) -> MixerRouter:
    router = adapted.methods["mixer_router"]
    assert isinstance(router, MixerRouter)
    return router


@torch.no_grad()
@pytest.mark.parametrize("state", ["routed", "all"])
def test_the_cache_holds_what_the_softmax_mixer_sees(state: str) -> None:
    adapted, ids = attach(layers=[1, 3], state=state, threshold=0.7), families.token_ids(batch_size=1, length=120)
    cache = adapted.new_cache()
    for part in ids.split([90, *[1] * 30], dim=1):
        adapted(input_ids=part, past_key_values=cache)
    trace = adapted.last_trace
    for layer_idx in range(5):
        wanted = int(trace.mixer_keep[layer_idx].sum()) if state == "routed" else 120
        kv = cache.kv(layer_idx)
        assert kv.num_kv + kv.num_deferred == wanted
    share = trace.mixer_keep[[1, 3]].float().mean().item()
    assert 0.05 < share < 0.6
    assert cache.num_bytes["kv"] == cost.kv_bytes(adapted.backbone, trace, 4)
    assert cache.num_bytes["states"] == 2 * 4 * (
        3 * 8 * 8 + 4 * (2 * 8 + 3 * 8)
    )  # heads × dk × dv, and the convolution


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_all_softmax_is_the_base_bitwise_and_its_cache_too(family: str) -> None:
    model, ids = families.build(family), families.token_ids()
    wanted = model(ids).logits
    for options in ({"initial_bias": 9.0}, {"threshold": float("-inf"), "state": "all"}):
        adapted = anydepth.attach(model, {"name": "mixer_router", **options})
        assert torch.equal(adapted(ids).logits, wanted)
        tokens = adapted.generate(input_ids=ids[:, :9], max_new_tokens=9, do_sample=False, pad_token_id=0)
        anydepth.detach(adapted)
        stock = model.generate(input_ids=ids[:, :9], max_new_tokens=9, do_sample=False, pad_token_id=0)  # type: ignore[operator]
        assert torch.equal(tokens, stock)


@torch.no_grad()
def test_routers_before_each_layer_and_at_random() -> None:
    ids = families.token_ids()
    adapted = attach(reads="sequential", layers=[0, 2, 4])
    assert len(router_of(adapted).networks) == 3
    adapted(input_ids=ids)
    shares = adapted.last_trace.mixer_keep.float().mean((1, 2))
    assert ((shares > 0.1) & (shares < 0.9)).tolist() == [True, False, True, False, True]
    adapted = attach(router="random", rate=0.3, decided=False)
    adapted(input_ids=families.token_ids(length=150))
    keep = adapted.last_trace.mixer_keep[1:4]
    assert torch.allclose(keep.float().mean((1, 2)), torch.full((3,), 0.3), atol=0.08)
    assert torch.equal(keep[:, 0], keep[:, 1])  # blind to what the token is


def losses_of(adapted: AdaptedModel, ids: Tensor) -> dict[str, Tensor]:
    adapted.train()
    adapted(input_ids=ids)
    return adapted.auxiliary_losses()


def test_losses_are_balance_or_target() -> None:
    ids = families.token_ids()
    lone = losses_of(attach(initial_bias=8.0, balance_weight=0.5, decided=False), ids)
    assert lone["mixer_router/balance"].item() == pytest.approx(1.0, abs=0.01)  # all on one mixer: 0.5 · 2
    even = losses_of(attach(balance_weight=0.5, decided=False), ids)
    assert even["mixer_router/balance"].item() == pytest.approx(0.5, abs=0.01)
    adapted = attach(target=0.25, target_weight=2.0, decided=False)
    losses = losses_of(adapted, ids)
    share = router_of(adapted).metrics(adapted.context)["softmax_share"]
    assert losses["mixer_router/target"].item() == pytest.approx(2 * (share - 0.25) ** 2, rel=1e-4)
    losses["mixer_router/target"].backward()
    bias = router_of(adapted).networks[0].get_parameter("direct.bias")
    assert bias.grad is not None and (bias.grad > 0).all()  # half take softmax: fewer should


@pytest.mark.parametrize("state", ["routed", "all"])
@pytest.mark.parametrize("execution", ["masked", "sparse"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_everything_that_learns_gets_a_gradient(family: str, execution: str, state: str) -> None:
    adapted, ids = attach(family, state=state).train(), families.token_ids()
    if execution == "masked":
        with adapted.masked():
            adapted(input_ids=ids, labels=ids).loss.backward()
    else:
        adapted(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in adapted.methods.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2"])
def test_the_gate_learns_from_the_difference_where_both_outputs_are_known(family: str) -> None:
    """masked, `all`: w·softmax + (1 − w)·linear for tokens of either mixer, and its derivative by w."""
    adapted, ids = attach(family, layers=[3], state="all").train(), families.token_ids(batch_size=1)
    adapted.backbone.model.double()
    router_of(adapted).mixers.double()
    probe = torch.randn(1, 40, families.VOCABULARY, generator=torch.Generator().manual_seed(2))
    router, own = router_of(adapted), MixerRouter.sample
    weight, flips = torch.zeros(()), torch.zeros(1, 40, dtype=torch.bool)

    def chosen(*args: Any) -> Sample:
        return Sample(own(router, *args).keep ^ flips, weight[None], (1 - weight)[None])

    router.sample = chosen  # type: ignore[method-assign]

    def outcome(at: Tensor) -> Tensor:
        nonlocal weight
        weight = at
        router.reseed(0)
        with adapted.masked():
            return (adapted(input_ids=ids).logits * probe).sum()

    weight = torch.zeros(1, 40)
    outcome(weight)
    keep = adapted.last_trace.mixer_keep[3]
    assert 0.2 < keep.float().mean() < 0.8
    at = keep.double().requires_grad_()
    (gradient,) = torch.autograd.grad(outcome(at), at)
    for place in (int(keep[0].nonzero()[2]), int((~keep[0]).nonzero()[2])):
        step = torch.zeros(1, 40, dtype=torch.double)
        step[0, place] = 1e-2  # the rule itself computes in float32
        with torch.no_grad():
            slope = (outcome(at + step) - outcome(at - step)) / 2e-2
        assert gradient[0, place].item() == pytest.approx(slope.item(), rel=1e-2)
        other_way = keep.double()
        other_way[0, place] = 1 - other_way[0, place]
        with torch.no_grad():
            by_weight = outcome(other_way)
            flips[0, place] = True
            by_choice = outcome(other_way)
            flips[0, place] = False
        assert by_weight.item() == pytest.approx(by_choice.item(), rel=1e-4)


def test_the_same_seed_gives_the_same_mixers() -> None:
    first, second = (attach(seed=seed, decided=False).methods.state_dict() for seed in (1, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_inspect_names_the_length_where_linear_is_cheaper() -> None:
    adapted = attach(decided=False)
    view, mixer = adapted.backbone.layers[1], router_of(adapted).mixers["1"]
    length = inspect_model(adapted)["layers"][1]["break_even_length"]
    linear, softmax = cost.recurrent_mixer_flops(mixer), cost.layer_cost(view)

    def softmax_at(length: int) -> float:
        return softmax.mixer + softmax.per_pair * length / 2

    assert softmax_at(length) >= linear > softmax_at(length - 2)


def test_bfloat16_models_take_float32_mixers() -> None:
    adapted = anydepth.attach(families.build("llama").to(torch.bfloat16), {"name": "mixer_router", "threshold": 1e9})
    logits = adapted(families.token_ids()).logits
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
    assert adapted.last_trace.other_keep[1:4].all()


@pytest.mark.parametrize(
    ("beside", "words"),
    [
        ({"name": "layer_router", "always_keep": 2}, "a mixer for every token"),
        ({"name": "skip_set", "skip_mixers": [1]}, "a mixer for every token"),
    ],
)
def test_what_cannot_be_attached_with_it(beside: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        anydepth.attach(families.build("llama"), [{"name": "mixer_router"}, beside])


@torch.no_grad()
def test_ffn_gates_are_attached_with_it() -> None:
    adapted = anydepth.attach(
        families.build("llama"), [{"name": "mixer_router", "threshold": 1e9}, {"name": "ffn_router"}]
    )
    adapted.methods.get_buffer("ffn_router.thresholds").zero_()
    ids = families.token_ids()
    sparse = adapted(input_ids=ids, use_cache=False).logits
    trace = adapted.last_trace
    assert trace.other_keep[1:4].all() and 0.1 < trace.ffn_keep[1:].float().mean() < 0.9
    with adapted.masked():
        assert torch.allclose(adapted(input_ids=ids, use_cache=False).logits, sparse, atol=1e-4)


def test_the_rates_of_training_are_the_routers_alone() -> None:
    adapted = attach(decided=False)
    gates = {id(part) for part in router_of(adapted).gate_parameters()}
    assert gates == {id(part) for part in router_of(adapted).networks.parameters()}
    assert len(list(router_of(adapted).parameters())) > len(gates)


def test_the_self_check_runs_alternate_mixers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both states pass it; a second mixer that computes something else when it is run sparsely does not."""
    ids = families.token_ids(batch_size=2, length=40)
    for state in ("routed", "all"):
        self_check([HFEngine(attach(layers=[1, 3], state=state))], ids)
    own = alternate._Mixer.__call__

    def wrong(self: Any, hidden: Tensor, state: Any, real: Any = None) -> Tensor:
        return own(self, hidden, state, real) * (1.0 if state is None else 1.5)

    monkeypatch.setattr(alternate._Mixer, "__call__", wrong)
    with pytest.raises(RunError, match="cached and uncached"):
        self_check([HFEngine(attach(layers=[1, 3]))], ids)


def test_routed_mixers_train_under_autocast() -> None:
    adapted = attach(layers=[1, 3])
    adapted.train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = adapted(input_ids=families.token_ids()).logits.float().square().mean()
    loss.backward()
    assert all(part.grad is not None and part.grad.isfinite().all() for part in router_of(adapted).mixers.parameters())


def test_masked_training_learns_from_linear_mixers_that_no_token_took() -> None:
    """`all` knows both outputs: the router is told what the other one would have been worth."""
    adapted = attach(state="all", layers=[1, 3], initial_bias=30.0)
    adapted.train()
    with adapted.masked():
        adapted(input_ids=families.token_ids()).logits.square().mean().backward()
    assert adapted.last_trace.mixer_keep.all()
    assert all(part.grad is not None for part in router_of(adapted).mixers.parameters())
