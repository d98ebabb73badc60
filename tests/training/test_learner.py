"""The loss of training: its terms apart, the teacher, gradients of gates, and draws that depend on the forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

import anydepth
from anydepth.recipe import TextConfig, TrainConfig
from anydepth.training.data import WindowDataset, collate, pack
from anydepth.training.learner import Learner
from anydepth.training.train import prepare
from tiny import byte_tokenizer, tiny_llama, windows

ROUTER = {"name": "layer_router", "always_keep": 2, "initial_bias": 0.5, "target_skip": 0.5}
SKIP_SET = {"name": "skip_set", "skip_layers": [1, 3]}
IDS = windows(2, 24)


def learner_of(*methods: dict[str, Any], seed: int = 0, **settings: Any) -> Learner:
    config = TrainConfig.model_validate({"max_steps": 5, "lora": {"rank": 2}, **settings})
    adapted = anydepth.attach(prepare(tiny_llama(), config), list(methods))
    with torch.no_grad():
        for name, part in adapted.named_parameters():
            if "lora_B" in name:  # the adapter changes the model
                part.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    return Learner(adapted.train(), config, seed)


# --- terms -----------------------------------------------------------------------------------------------------------


def test_lm_loss_is_reported_without_the_auxiliary_loss() -> None:
    """The loss is the sum of the terms."""
    heavy = learner_of({**ROUTER, "target_weight": 1000.0, "target_skip": 0.9})
    light = learner_of({**ROUTER, "target_weight": 0.0, "sparsity_weight": 0.1})
    (loss, terms), (_, others) = heavy(IDS, IDS), light(IDS, IDS)
    assert torch.equal(terms["lm_loss"], others["lm_loss"]) and terms["layer_router/target"] > 10
    assert set(terms) == {"lm_loss", "layer_router/target"}
    torch.testing.assert_close(loss.detach(), terms["lm_loss"] + terms["layer_router/target"])


@pytest.mark.parametrize("step", [1, 2])
def test_the_teacher_is_the_base_model_after_the_first_steps(step: int) -> None:
    """T²·KL over predicted tokens, by its formula, with weight 0.75; the language loss has the rest."""
    learner = learner_of(SKIP_SET, distillation={"weight": 0.75, "temperature": 2.0, "warmup_steps": 2})
    learner.step = step
    labels = IDS.clone()
    labels[1, 20:] = -100
    loss, terms = learner(IDS, labels)
    with torch.no_grad():
        student, teacher = learner.adapted(IDS).logits, tiny_llama()(IDS).logits
    predicted = labels[:, 1:] != -100
    student, teacher = student[:, :-1][predicted], teacher[:, :-1][predicted]
    lm_loss = F.cross_entropy(student, labels[:, 1:][predicted])
    p, log_q = (teacher / 2).softmax(-1), (student / 2).log_softmax(-1)
    divergence = 4 * (p * (p.log() - log_q)).sum(-1).mean()
    torch.testing.assert_close(terms["lm_loss"], lm_loss)
    if step < 2:
        assert set(terms) == {"lm_loss"}
        torch.testing.assert_close(loss.detach(), lm_loss)
    else:
        assert divergence > 0.1
        torch.testing.assert_close(terms["distillation"], 0.75 * divergence)
        torch.testing.assert_close(loss.detach(), 0.25 * lm_loss + 0.75 * divergence)


# --- draws and schedules ---------------------------------------------------------------------------------------------


def test_draws_depend_on_the_seed_and_the_number_of_the_forward_alone() -> None:
    """A resumed training continues with the same ones, dropout included."""
    settings = {"lora": {"rank": 2, "dropout": 0.5}}
    learner, other = learner_of(ROUTER, **settings), learner_of(ROUTER, seed=1, **settings)
    losses = [learner(IDS, IDS)[0].item() for _ in range(3)]
    assert len({*losses, other(IDS, IDS)[0].item()}) == 4
    resumed = learner_of(ROUTER, **settings)
    resumed.forwards = 2
    torch.manual_seed(123)
    assert resumed(IDS, IDS)[0].item() == losses[2]


@pytest.mark.parametrize(("step", "wanted"), [(0, 1.0), (2, 0.5), (4, 0.25)])
def test_schedules_are_of_the_optimiser_step(step: int, wanted: float) -> None:
    """Of five steps the first and the last are the ends; the temperature between is geometric."""
    learner = learner_of({**ROUTER, "final_backward_temperature": 0.25})
    learner.step = step
    learner(IDS, IDS)
    router: Any = learner.adapted.methods["layer_router"]
    assert router.backward_temperature == pytest.approx(wanted)


# --- gradients -------------------------------------------------------------------------------------------------------


def test_every_gate_gets_a_gradient_where_it_decided_nothing() -> None:
    """Every gate is shut, so that no token of sparse execution depends on one; parallel training would wait for it."""
    shut = {**ROUTER, "initial_bias": 60.0, "initial_skip_layers": [2, 3, 4, 5], "target_weight": 0.0}
    learner = learner_of(shut, execution="sparse")
    learner(IDS, IDS)[0].backward()
    assert not learner.adapted.last_trace.mixer_keep[2:].any()
    gradients = [part.grad for part in learner.adapted.methods.parameters()]
    assert gradients and all(part is not None and not part.any() for part in gradients)


def test_masked_execution_teaches_gates_by_tokens_that_skip() -> None:
    """Of the same gates, not so shut that their own slope is zero."""
    skipping = {**ROUTER, "initial_bias": 6.0, "initial_skip_layers": [2, 3, 4, 5], "target_weight": 0.0}
    learner = learner_of(skipping, execution="masked")
    learner(IDS, IDS)[0].backward()
    assert learner.adapted.last_trace.mixer_keep[2:].float().mean() < 0.05
    gradients = [part.grad for name, part in learner.adapted.methods.named_parameters() if name.endswith("bias")]
    assert gradients and any(part is not None and part.any() for part in gradients)


def test_no_gradient_reaches_the_tokens_of_another_document() -> None:
    """C29. With a router sampling in training: the loss of one document does not depend on the other's embedding."""
    config = TrainConfig.model_validate({"max_steps": 1, "execution": "sparse", "backbone": True})
    model, tokenizer = prepare(tiny_llama(), config).train(), byte_tokenizer()
    adapted = anydepth.attach(model, {"name": "layer_router", "always_keep": 2, "target_weight": 0.0})
    rows = pack(["abc", "vwxyz"], tokenizer, 9, text=TextConfig(isolate_documents=True))
    batch = collate([*WindowDataset(rows, num_items=2, seed=0)])
    other = int(batch["attention_mask"].sum(1).argmin())
    batch["labels"][other] = -100
    Learner(adapted, config, 0)(**batch)[0].backward()
    table = model.get_input_embeddings().weight.grad
    assert (table[tokenizer("abc")["input_ids"]] == 0).all() and (table[tokenizer("vwxyz")["input_ids"]] != 0).any()


def test_wrappers_see_the_model() -> None:
    """They ask for its config and for the unit of sharding; what it lacks is an error as of any object."""
    learner = learner_of(ROUTER)
    assert learner.config is learner.adapted.config and learner._no_split_modules == ["LlamaDecoderLayer"]
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = learner.nothing_like_it
