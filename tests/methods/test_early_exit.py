"""Early exit by confidence: what the confidences are, who leaves, and what training pays."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import anydepth
from anydepth import FastEngine
from anydepth.errors import UserError
from tiny import tiny_llama

IDS = torch.randint(3, 200, (2, 12), generator=torch.Generator().manual_seed(4))


def early_exit(**options: Any) -> anydepth.AdaptedModel:
    return anydepth.attach(tiny_llama(), {"name": "early_exit", "layers": [2, 4], **options}).eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["max_probability", "margin", "entropy", "cosine"])
def test_confidences_are_what_they_are_called(kind: str) -> None:
    adapted = early_exit(confidence=kind, thresholds=10.0)
    model: Any = adapted.model
    states = model(IDS, output_hidden_states=True).hidden_states
    method: Any = adapted.methods["early_exit"]
    method.is_watched = True
    adapted(IDS)
    for layer_idx in (2, 4):
        shares = model.lm_head(model.model.norm(states[layer_idx])).softmax(-1)
        top = shares.topk(2).values
        wanted = {
            "max_probability": top[..., 0],
            "margin": top[..., 0] - top[..., 1],
            "entropy": 1 + (shares * shares.log()).sum(-1) / math.log(257),
            "cosine": F.cosine_similarity(states[layer_idx], states[layer_idx - 1], dim=-1),
        }[kind]
        assert torch.allclose(-adapted.context.scores["early_exit"][layer_idx][0](), wanted, atol=1e-5)


@torch.no_grad()
def test_thresholds_by_layer_out_of_a_list_or_a_file(tmp_path: Path) -> None:
    path = tmp_path / "thresholds.json"
    path.write_text(json.dumps({"thresholds": [2.0, 0.0]}))
    for thresholds in ([2.0, 0.0], str(path)):
        adapted = early_exit(thresholds=thresholds)
        adapted(IDS)
        assert (adapted.last_trace.depths == 4).all()  # nobody leaves at 2, everybody at 4
    path.write_text("[0.0, 2.0]")
    adapted = early_exit(thresholds=str(path))
    adapted(IDS)
    assert (adapted.last_trace.depths == 2).all()


def test_a_file_that_is_missing_and_a_list_that_is_too_long_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.json"):
        early_exit(thresholds=str(tmp_path / "none.json"))
    with pytest.raises(UserError, match="3 values; there are 2 layers"):
        early_exit(thresholds=[0.1, 0.2, 0.3])
    with pytest.raises(UserError, match=r"give them in order, \[2, 4\]"):
        early_exit(layers=[4, 2], thresholds=[0.1, 0.2])
    with pytest.raises(UserError, match="at least one layer before it"):
        anydepth.attach(tiny_llama(), {"name": "early_exit", "layers": [0]})


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("{", "is not JSON"),
        ("\xff", "is not JSON"),
        ('["high", 1]', "must hold a number"),
        ("[true, false]", "must hold a number"),
        ("[null, 1]", "must hold a number"),
        ('["NaN", 1]', "must hold a number"),
        ("[NaN, 1]", "must be a number"),
        ("[]", "0 values; there are 2 layers"),
        ("[[0.1], [0.2]]", "must hold a number"),
        ('{"early_exit": [0.1, 0.2]}', "must hold a number"),
        ('{"thresholds": {"2": 0.1}}', "must hold a number"),
        ("[0.1]", "1 values; there are 2 layers"),
        ('{"layers": [1, 4], "thresholds": [0.1, 0.2]}', r"exits at layers \[1, 4\]; the exits are at \[2, 4\]"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path: Path, content: str, named: str) -> None:
    path = tmp_path / "thresholds.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=named) as raised:
        early_exit(thresholds=str(path))
    assert "\n" not in str(raised.value) and "thresholds" in str(raised.value)
    with pytest.raises(UserError, match="cannot be read"):
        early_exit(thresholds=str(tmp_path))  # a folder


@torch.no_grad()
def test_thresholds_decay_with_the_place() -> None:
    adapted = early_exit(thresholds=0.2, decay=204.8)
    method: Any = adapted.methods["early_exit"]
    adapted(IDS)
    places = torch.arange(12)
    wanted = 0.18 + 0.1 * torch.exp(-0.4 * places)
    for spec in method.gates():
        assert torch.allclose(-spec.threshold_at(adapted.context.positions)[0], wanted)


@torch.no_grad()
def test_no_head_is_evaluated_where_no_token_may_exit() -> None:
    adapted = early_exit()
    adapted(IDS)
    assert adapted.last_trace.mean_depth == 6 and adapted.last_trace.router_flops == 0


@torch.no_grad()
def test_a_smaller_vocabulary_costs_less_and_decides_in_both_engines() -> None:
    adapted = early_exit(thresholds=0.25, vocabulary=64)
    engine = FastEngine(adapted)
    options: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    ids = adapted.generate(input_ids=IDS, **options)
    trace = adapted.last_trace
    assert torch.equal(engine.generate(input_ids=IDS, **options), ids)
    assert torch.equal(adapted.last_trace.mixer_keep, trace.mixer_keep)
    assert 2 < trace.mean_depth < 6
    assert trace.router_flops % (2 * 64 * 32) == 0 and trace.router_flops > 0


# --- training ---------------------------------------------------------------------------------------------------


def test_exit_weights_are_those_of_the_paper() -> None:
    """L = 6: e(l) = s·Σ_{i≤l} i behind layer l < 5, the last 5 + s·Σ_{i≤4} i."""
    method: Any = early_exit(loss_scale=0.5, curriculum="none").methods["early_exit"]
    last = 5 + 0.5 * 10
    wanted = {layer + 1: 0.5 * sum(range(layer + 1)) / last for layer in range(5)}
    assert method.weights() == pytest.approx(wanted)


def test_curricula() -> None:
    method: Any = early_exit(curriculum="rotational", rotation=3).methods["early_exit"]
    paying = []
    for step in range(3):
        method.set_progress(step / 10, step)
        paying.append(set(method.weights()))
    assert paying[0] | paying[1] | paying[2] == {1, 2, 3, 4, 5}
    assert not paying[0] & paying[1] and not paying[1] & paying[2]
    method = early_exit(curriculum="gradual").methods["early_exit"]
    seen = []
    for progress in (0.0, 0.25, 0.5, 1.0):
        method.set_progress(progress)
        seen.append(sorted(method.weights()))
    assert seen == [[], [3, 4, 5], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5]]


def test_training_runs_full_depth_and_pays_every_exit() -> None:
    from anydepth.losses import expected_exit_loss

    adapted = early_exit(loss_scale=0.5, curriculum="none", thresholds=0.0).train()
    model: Any = adapted.model
    output = adapted(input_ids=IDS, labels=IDS)
    assert adapted.last_trace.mean_depth == 6
    exits = adapted.exit_states()["early_exit"]
    method: Any = adapted.methods["early_exit"]
    loss = expected_exit_loss(exits, output.logits, IDS, adapted.backbone.logits_of)
    states = model(IDS, output_hidden_states=True).hidden_states
    wanted = sum(
        weight * F.cross_entropy(model.lm_head(model.model.norm(states[i]))[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        for i, weight in method.weights().items()
        if weight
    )
    assert loss.item() == pytest.approx(float(torch.as_tensor(wanted).detach()), rel=1e-5)
    loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


def test_the_classifier_learns_whether_an_exit_says_what_the_last_layer_says() -> None:
    adapted = early_exit(confidence="classifier", loss_scale=0.0).train()
    method: Any = adapted.methods["early_exit"]
    optimizer = torch.optim.Adam(method.parameters(), lr=0.05)
    for _ in range(60):
        output = adapted(IDS)
        loss = adapted.outcome_losses(output.logits)["early_exit/classifier"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    adapted.eval()
    with torch.no_grad():
        final = adapted(IDS).logits.argmax(-1)
        model: Any = adapted.model
        states = model(IDS, output_hidden_states=True).hidden_states
        for layer_idx in (2, 4):
            sure = torch.sigmoid(-method.networks[layer_idx](states[layer_idx])[..., 0])
            agrees = model.lm_head(model.model.norm(states[layer_idx])).argmax(-1) == final
            assert ((sure > 0.5) == agrees).float().mean() > 0.9
