"""Every recipe for a large model, two steps on a random model of its family: as deep, narrow, 4 bits included."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import anydepth
from anydepth.methods.compose import load_recipe
from anydepth.runs.run import Runner
from tiny import SHAPES, byte_tokenizer, save_text

RECIPES = sorted((Path(__file__).parents[2] / "recipes" / "large").glob("*.yaml"))
ALWAYS = ("tinyllama-1.1b_hat", "qwen2.5-3b_layer_router_token")


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", [pytest.param(p, id=p.stem, marks=() if p.stem in ALWAYS else pytest.mark.slow) for p in RECIPES]
)
def test_two_steps_of_every_large_recipe(tmp_path: Path, path: Path) -> None:
    torch.manual_seed(0)
    config = SHAPES[path.stem.partition("_")[0]]
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    text = save_text(tmp_path / "text.txt")
    recipe = load_recipe(path)
    overrides = [
        f"model.target={tmp_path / 'base'}",
        "model.device=cpu",
        f"data.train={text}",
        f"eval.data={text}",
        "data.sequence_length=32",
    ]
    if recipe.train is not None:
        overrides += ["train.max_steps=2", "train.batch_size=1", "train.gradient_accumulation_steps=2"]
        overrides += ["train.warmup_steps=1"]
    if recipe.train is not None and recipe.train.distillation is not None:
        overrides += ["train.distillation.warmup_steps=0"]
    if recipe.calibrate is not None:
        overrides += ["calibrate.num_windows=2"]
    if recipe.search is not None:
        overrides += ["search.num_windows=1", "search.sequence_length=32", "search.strategy=influence"]
    overrides += [f"phases.{number}.max_steps=2" for number in range(len(recipe.phases))]
    runner = Runner(load_recipe(path, overrides), tmp_path / "out", say=lambda line: None)
    runner.search()
    document = runner.train()
    steps = 2 * max(len(recipe.phases), 1) if recipe.train is not None else 0
    assert len(document["loss_history"]) == steps
    adapted = anydepth.load(tmp_path / "out", dtype="bfloat16")
    ids = torch.arange(1, 40)[None]
    assert adapted(input_ids=ids).logits.isfinite().all()
    if recipe.model.quantisation == "nf4":
        assert adapted.backbone.model.is_loaded_in_4bit
