"""Fitted K/V projections: the regression that they are, in both engines, and where there are none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import anydepth
import families
from anydepth import FastEngine
from anydepth.decoding.engine import Engine
from anydepth.decoding.engines import HFEngine
from anydepth.errors import UserError
from anydepth.hf.adapted import AdaptedModel
from anydepth.search import projection_fit
from anydepth.search.projection_fit import fit_projections
from tiny import save_base

LAYER, TAIL, NUM_PROMPT = 3, 6, 30
SPEC = {"name": "prompt_exit", "layer": LAYER, "last": TAIL, "fitted": True}
ENGINES: list[Callable[[Any], Engine]] = [HFEngine, FastEngine]


def attached(family: str = "llama", **options: Any) -> AdaptedModel:
    return anydepth.attach(families.build(family), {**SPEC, **options}).eval()


def logits(engine: Engine, ids: Tensor) -> Tensor:
    return engine.logits(ids, NUM_PROMPT)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "olmo2"])
@torch.no_grad()
def test_before_a_fit_they_are_the_layers_own_in_every_execution(family: str) -> None:
    ids = families.token_ids(batch_size=1)[0]
    wanted = logits(HFEngine(attached(family, fitted=False)), ids)
    for open_engine in ENGINES:
        torch.testing.assert_close(logits(open_engine(attached(family)), ids), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
@torch.no_grad()
def test_a_fit_is_ridge_regression_and_every_execution_has_it(family: str) -> None:
    windows, ids = families.token_ids(batch_size=40, length=60), families.token_ids(batch_size=1)[0]
    adapted = attached(family)
    method: Any = adapted.methods["prompt_exit"]
    assert fit_projections([method], HFEngine(adapted), windows) == 40
    with adapted.disabled():
        states = adapted(windows, output_hidden_states=True).hidden_states
    layer: Any = adapted.backbone.layers[4]
    before, wanted = layer.normalise(states[LAYER]), layer.normalise(states[4])
    wanted = torch.cat([part(wanted) for part in layer.kv_projections], -1).flatten(0, 1)
    inputs = torch.cat([before, torch.ones(*before.shape[:2], 1)], -1).flatten(0, 1).double()
    own = torch.cat([part(before) for part in layer.kv_projections], -1).flatten(0, 1)
    ridge = projection_fit.RIDGE * (inputs.T @ inputs).diagonal().mean()
    more = torch.cat([inputs, ridge.sqrt() * torch.eye(inputs.shape[1], dtype=torch.double)])
    change = torch.cat([wanted - own, torch.zeros(inputs.shape[1], own.shape[1])]).double()
    expected = own + (inputs @ torch.linalg.lstsq(more, change).solution).float()
    torch.testing.assert_close(method.projection(4)(states[LAYER]).flatten(0, 1), expected, rtol=1e-3, atol=1e-3)
    assert (expected - wanted).norm() < 0.9 * (own - wanted).norm()
    found = [logits(open_engine(adapted), ids) for open_engine in ENGINES]
    with adapted.masked():
        found.append(logits(HFEngine(adapted), ids))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found[0], logits(HFEngine(attached(family)), ids), atol=1e-2)


@torch.no_grad()
def test_rows_of_a_padded_batch_have_the_tokens_that_they_have_alone() -> None:
    """The first tokens of a prompt run every layer, so that in one column some rows exit and others do not."""
    adapted, windows = attached(first=3), families.token_ids(batch_size=40, length=60)
    fit_projections([adapted.methods["prompt_exit"]], HFEngine(adapted), windows)  # type: ignore[list-item]
    prompts = [row[:length] for row, length in zip(families.token_ids().tolist(), (40, 29, 35), strict=True)]
    mask = torch.tensor([[0] * (40 - len(row)) + [1] * len(row) for row in prompts])
    ids = torch.tensor([[0] * (40 - len(row)) + row for row in prompts])
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": 1000}
    found = {}
    for engine in (HFEngine(adapted), FastEngine(adapted)):
        found[engine.name] = engine.generate(input_ids=ids, attention_mask=mask, **options)[:, 40:].tolist()
        alone = [engine.generate(input_ids=torch.tensor([row]), **options)[0, len(row) :].tolist() for row in prompts]
        assert found[engine.name] == alone
    assert found["hf"] == found["fast"]


def test_states_of_the_engine_give_the_same_fit_and_another_fit_begins_anew() -> None:
    windows = families.token_ids(batch_size=8, length=60)
    adapted = attached()
    method: Any = adapted.methods["prompt_exit"]
    fit_projections([method], HFEngine(adapted), windows)
    first = {name: value.clone() for name, value in method.state_dict().items()}
    fit_projections([method], FastEngine(adapted), windows)
    for name, value in method.state_dict().items():
        torch.testing.assert_close(value, first[name], rtol=1e-3, atol=1e-3)
    assert fit_projections([method], HFEngine(adapted), windows, until=0.0) == 1


def test_a_checkpoint_has_them(tmp_path: Path) -> None:
    model, _ = anydepth.load_model(str(save_base(tmp_path / "base")))
    adapted = anydepth.attach(model, SPEC).eval()
    windows = torch.randint(3, 200, (4, 40), generator=torch.Generator().manual_seed(0))
    fit_projections([adapted.methods["prompt_exit"]], HFEngine(adapted), windows)  # type: ignore[list-item]
    anydepth.save(adapted, tmp_path / "mine", base=str(tmp_path / "base"))
    again = anydepth.load(tmp_path / "mine")
    assert torch.equal(logits(HFEngine(again), windows[0]), logits(HFEngine(adapted), windows[0]))


@pytest.mark.parametrize(
    "other", [{"name": "skip_set", "skip_ffns": [3]}, {"name": "layer_router"}, {"name": "exit_gate"}]
)
def test_other_methods_that_skip_are_refused_next_to_them(other: dict[str, Any]) -> None:
    """Their tokens would leave K/V from states that the projections were not fitted for."""
    with pytest.raises(UserError, match=f"fitted projections gives K/V to tokens that {other['name']} would skip"):
        anydepth.attach(families.build("llama"), [SPEC, other])
    anydepth.attach(families.build("llama"), [{**SPEC, "fitted": False}, other])


@pytest.mark.parametrize("family", ["gpt2", "phi3", "qwen3_next"])
def test_a_layer_without_projections_of_its_own_is_refused(family: str) -> None:
    with pytest.raises(UserError, match="no K and V projections of its own; leave fitted out"):
        attached(family)
