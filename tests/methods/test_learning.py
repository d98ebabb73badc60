"""What each trained method learns from: gradients that reach every gate, and optima that are known beforehand."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import anydepth
import families
from anydepth.hf.adapted import AdaptedModel
from anydepth.losses import expected_exit_loss, token_losses
from anydepth.methods.mixture_of_depths import MixtureOfDepths
from anydepth.recipe import TrainConfig
from anydepth.training.train import train
from tiny import tiny_llama

Spec = dict[str, Any] | list[dict[str, Any]]
TRAINED: dict[str, Spec] = {
    "token": {"name": "layer_router", "always_keep": 1, "initial_bias": 0.3},
    "embeddings": {"name": "layer_router", "always_keep": 1, "initial_bias": 0.3, "input": "embeddings"},
    "sequence": {"name": "layer_router", "always_keep": 1, "initial_bias": 0.3, "granularity": "sequence"},
    "batch": {"name": "layer_router", "always_keep": 1, "initial_bias": 0.3, "granularity": "batch"},
    "reinforce": {"name": "layer_router", "always_keep": 1, "initial_bias": 0.3, "estimator": "reinforce"},
    "reinforce_sequence": {
        "name": "layer_router",
        "always_keep": 1,
        "initial_bias": 0.3,
        "estimator": "reinforce",
        "granularity": "sequence",
        "target_rule": "lagrange",
    },
    "mixers": {"name": "layer_router", "always_keep": 1, "initial_bias": 0.3, "branch": "mixer", "kv_rule": "omit"},
    "mixers_sequential": {
        "name": "layer_router",
        "always_keep": 1,
        "initial_bias": 0.3,
        "branch": "mixer",
        "reads": "sequential",
        "widths": [],
    },
    "reinforce_sequential": {
        "name": "layer_router",
        "always_keep": 1,
        "initial_bias": 0.3,
        "reads": "sequential",
        "estimator": "reinforce",
        "granularity": "batch",
    },
    "mixture_of_depths": {"name": "mixture_of_depths"},
    "mixture_unweighed": {"name": "mixture_of_depths", "weigh": False, "kv_rule": "project"},
    "exit_gate": {"name": "exit_gate", "initial_bias": 0.3},
    "ffn_router": {"name": "ffn_router", "widths": [5]},
    "hat": [{"name": "exit_gate", "layers": [2, 4], "initial_bias": 0.3}, {"name": "ffn_router"}],
}


def windows(num: int = 16, length: int = 24) -> Tensor:
    return torch.randint(1, 257, (num, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("execution", [pytest.param("masked", marks=pytest.mark.slow), "sparse"])
@pytest.mark.parametrize("name", TRAINED)
def test_training_moves_every_gate(tmp_path: Path, name: str, execution: str) -> None:
    model = tiny_llama()
    model.requires_grad_(False)
    adapted = anydepth.attach(model, TRAINED[name])
    before = {part: value.clone() for part, value in adapted.methods.named_parameters()}
    config = TrainConfig.model_validate({"max_steps": 5, "warmup_steps": 0, "execution": execution, "batch_size": 3})
    history = train(adapted, windows(), config, tmp_path).loss_history
    still = [part for part, value in adapted.methods.named_parameters() if torch.equal(value, before[part])]
    assert not still
    assert all("lm_loss" in row for row in history)


@pytest.mark.parametrize("execution", ["masked", "sparse"])
@pytest.mark.parametrize("name", TRAINED)
def test_gradient_checkpointing_changes_no_gradient(name: str, execution: str) -> None:
    gradients = []
    for saving in (False, True):
        model = tiny_llama()
        if saving:
            model.gradient_checkpointing_enable()
        adapted = anydepth.attach(model, TRAINED[name]).train()
        ids = windows(3)
        with adapted.masked() if execution == "masked" else nullcontext():
            output = adapted(input_ids=ids, labels=ids, use_cache=False)
        losses = [output.loss, *adapted.auxiliary_losses().values()]
        losses += adapted.policy_losses(token_losses(output.logits.detach(), ids)).values()
        for exits in adapted.exit_states().values():
            losses.append(expected_exit_loss(exits, output.logits, ids, adapted.backbone.logits_of))
        torch.stack(losses).sum().backward()
        gradients.append({part: value.grad for part, value in adapted.named_parameters()})
    for part, plain in gradients[0].items():
        assert plain is not None, part
        torch.testing.assert_close(gradients[1][part], plain, msg=part)


def test_scores_far_from_their_threshold_have_a_gradient() -> None:
    """A gate's probability rounds to 0 or 1 there, and its entropy is taken from the logit: never NaN."""
    adapted = anydepth.attach(tiny_llama(), {"name": "ffn_router"}).train()
    with torch.no_grad():
        for name, weight in adapted.methods.named_parameters():
            if name.endswith("direct.weight"):
                weight.mul_(1e4)
    adapted(input_ids=windows(3), use_cache=False)
    adapted.auxiliary_losses()["ffn_router/entropy"].backward()
    gradients = [part.grad for part in adapted.methods.parameters() if part.grad is not None]
    assert gradients and all(part.isfinite().all() for part in gradients)


def routed(**options: Any) -> tuple[AdaptedModel, Any]:
    adapted = anydepth.attach(tiny_llama(), {"name": "layer_router", "always_keep": 2, "initial_bias": 0.0, **options})
    return adapted.train(), adapted.methods["layer_router"]


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["token", "sequence", "batch"])
def test_reinforce_finds_a_known_optimum(granularity: str) -> None:
    """A toy reward: the first routed layer costs 1 nat, the second saves 1, the others do nothing but have a price."""
    adapted, router = routed(
        estimator="reinforce", granularity=granularity, pool_tokens=2, sparsity_weight=0.2, target_weight=0.0
    )
    optimiser = torch.optim.Adam(router.parameters(), lr=0.01)
    ids = windows(8)
    for step in range(150):
        router.reseed(step)
        adapted(input_ids=ids, use_cache=False, logits_to_keep=1)
        keep = router.sampled(adapted.context).keep
        losses = (3.0 + keep[0].float() - keep[1].float()).expand(ids.shape)
        optimiser.zero_grad()
        sum(router.policy_losses(adapted.context, losses).values()).backward()
        optimiser.step()
    margin = router.sampled(adapted.context).margin
    chance = torch.sigmoid(margin).mean((1, 2))
    assert chance[0] < 0.1 and chance[1] > 0.9, chance
    assert (chance[2:] < 0.4).all(), chance


def test_reinforce_sign_in_one_step() -> None:
    """What was cheaper than the baseline becomes more likely, what was dearer less."""
    adapted, router = routed(estimator="reinforce", target_weight=0.0)
    adapted(input_ids=windows(4), use_cache=False, logits_to_keep=1)
    router.baseline.fill_(2.0)
    sampled = router.sampled(adapted.context)
    margin, keep = sampled.margin, sampled.keep
    margin.retain_grad()
    losses = torch.full(windows(4).shape, 2.0)
    losses[:2] -= 1  # cheap rows
    losses[2:] += 1
    router.policy_losses(adapted.context, losses)["policy"].backward()
    assert margin.grad is not None
    towards = torch.where(keep, -margin.grad, margin.grad)  # descent makes what was chosen more likely
    assert (towards[:, :2] > 0).all() and (towards[:, 2:] < 0).all()


@pytest.mark.slow
def test_lagrange_multiplier_holds_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer is worth 1; the price climbs to 1 and the target share is skipped."""
    monkeypatch.setattr("anydepth.methods.layer_router.LAGRANGE_RATE", 0.1)
    adapted, router = routed(target_rule="lagrange", target_skip=0.4, target_weight=4.0)
    optimiser = torch.optim.Adam(router.parameters(), lr=0.01)
    skipped, ids = [], windows(8)
    for step in range(250):
        router.reseed(step)
        adapted(input_ids=ids, use_cache=False, logits_to_keep=1)
        worth = router.sampled(adapted.context).rates.mean()
        loss = sum(router.auxiliary_losses(adapted.context).values()) - worth
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        skipped.append(1 - worth.item())
    assert sum(skipped[-50:]) / 50 == pytest.approx(0.4, abs=0.03)
    assert router.price.item() == pytest.approx(1.0, abs=0.3)


def test_a_sequences_plan_comes_from_its_first_tokens_alone() -> None:
    adapted, router = routed(granularity="sequence", pool_tokens=6)
    adapted.eval()
    with torch.no_grad():
        router.network.direct.weight.normal_(generator=torch.Generator().manual_seed(1))
    ids = windows(3)
    adapted(input_ids=ids, use_cache=False)
    keep = adapted.last_trace.mixer_keep
    assert keep[:, :, :6].all()
    assert (keep[:, :, 6:] == keep[:, :, 6:7]).all()
    assert not keep[2:, :, 6:].all() and keep[2:, :, 6:].any()
    changed = ids.clone()
    changed[:, 6:] = changed[:, 6:] % 200 + 7
    adapted(input_ids=changed, use_cache=False)
    assert torch.equal(adapted.last_trace.mixer_keep, keep)


def test_expected_loss_is_the_sum_over_exits() -> None:
    adapted = anydepth.attach(tiny_llama(), {"name": "exit_gate", "layers": [2, 4], "initial_bias": 0.2}).train()
    ids = windows(3)
    labels = ids.clone()
    labels[0, :9] = -100
    logits = adapted(input_ids=ids, use_cache=False).logits
    exits = adapted.exit_states()["exit_gate"]
    assert torch.stack([part.weights for part in exits]).sum(0).allclose(torch.ones(ids.shape))
    wanted = torch.zeros(())
    for part in exits:
        at = logits if part.states is None else adapted.lm_head(adapted.backbone.decoder.norm(part.states))
        wanted = wanted + (token_losses(at, labels) * part.weights).sum()
    ours = expected_exit_loss(exits, logits, labels, adapted.backbone.logits_of)
    torch.testing.assert_close(ours, wanted / (labels[:, 1:] != -100).sum())
    plain = adapted(input_ids=ids, labels=labels, use_cache=False)
    mean = token_losses(plain.logits, labels).sum() / (labels[:, 1:] != -100).sum()
    torch.testing.assert_close(mean, plain.loss)


@torch.no_grad()
def test_a_token_that_exits_is_read_as_it_exited(family: str, model: Any) -> None:
    """With every gate shut the output is final norm and head of the state in front of the first gate."""
    states = []
    adapted = anydepth.attach(model, {"name": "exit_gate", "layers": [2, 3], "threshold": float("inf")})
    hook = adapted.backbone.layers[2].module.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    logits = adapted(input_ids=families.token_ids(), use_cache=False).logits
    hook.remove()
    assert adapted.last_trace.mean_depth == 2
    torch.testing.assert_close(logits, adapted.backbone.logits_of(states[0]), rtol=1e-5, atol=1e-5)


def test_the_best_tokens_of_each_row_are_chosen_and_padding_never_is() -> None:
    adapted = anydepth.attach(tiny_llama(), {"name": "mixture_of_depths", "capacity": 0.4})
    method = adapted.methods["mixture_of_depths"]
    assert isinstance(method, MixtureOfDepths)
    score = torch.tensor([[5.0, 1, 4, 2, 3], [9, 9, 1, 2, 3]])
    real = torch.tensor([[True] * 5, [False, False, True, True, True]])
    best = method._best(score, real)
    assert best.tolist() == [[True, False, True, False, False], [False, False, False, True, True]]


def test_predictor_is_reported(tmp_path: Path) -> None:
    model = tiny_llama()
    model.requires_grad_(False)
    adapted = anydepth.attach(model, {"name": "mixture_of_depths"})
    config = TrainConfig.model_validate({"max_steps": 3, "warmup_steps": 0})
    row = train(adapted, windows(), config, tmp_path).loss_history[-1]
    assert 0 <= row["figures"]["mixture_of_depths/predictor_accuracy"] <= 1
    assert 0 <= row["figures"]["mixture_of_depths/predicted_capacity"] <= 1


def test_ffn_router_reaches_its_capacity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In training, and token by token at inference with the quantiles that it kept."""
    monkeypatch.setattr("anydepth.methods.ffn_router.MOMENTUM", 0.8)
    model = tiny_llama()
    model.requires_grad_(False)
    adapted = anydepth.attach(model, {"name": "ffn_router", "capacity": 0.5})
    config = TrainConfig.model_validate({"max_steps": 40, "warmup_steps": 0, "batch_size": 4, "save_every": 40})
    train(adapted, windows(), config, tmp_path)
    adapted(input_ids=windows(), use_cache=False)
    shares = adapted.last_trace.executed_share()[1]
    assert shares[0] == 1
    assert all(share == pytest.approx(0.5, abs=0.15) for share in shares[1:]), shares
