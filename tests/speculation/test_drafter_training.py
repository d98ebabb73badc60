"""A model's own text, and drafters that learn from it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import anydepth
import families
from anydepth import FastEngine
from anydepth.decoding.request import DraftCounts
from anydepth.draft_sections import DrafterConfig
from anydepth.models.backbone import Backbone
from anydepth.models.llama_like import FAMILIES as ENGINE_FAMILIES
from anydepth.speculation.drafter_training import DraftTraining, batches_of, train_drafter
from anydepth.speculation.self_generated import Text
from anydepth.speculation.trained_drafter import DraftNetwork
from drafts import network_of, texts_of, untrained_draft
from tiny import tiny_llama

FAST = {"llama", "gemma3_text", "granite", "gpt_neox", "phi", "olmo"}
"""Families that differ in the arguments of a layer, the embedding, the head and the final norm."""


def test_a_drafter_learns_and_resumes_bitwise(tmp_path: Path) -> None:
    config = DrafterConfig(max_steps=30, batch_tokens=256, warmup_steps=3, save_every=10, precision="float32")
    backbone = anydepth.attach(tiny_llama(), []).backbone
    draft, texts = untrained_draft(), texts_of(tmp_path / "text")
    history = train_drafter(network_of(draft), backbone, texts, config, tmp_path / "a")
    first, last = (sum(row["loss"] for row in part) / 5 for part in (history[:5], history[-5:]))
    assert last < 0.8 * first and len(history) == 30
    other = untrained_draft()
    stopped: list[int] = []

    def stop(row: dict[str, float]) -> None:
        stopped.append(0)
        if len(stopped) == 17:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_drafter(network_of(other), backbone, texts, config, tmp_path / "b", on_step=stop)
    again = untrained_draft()
    resumed = train_drafter(network_of(again), backbone, texts, config, tmp_path / "b", resume=True)
    assert [row["loss"] for row in resumed] == [row["loss"] for row in history]
    for ours, theirs in zip(
        network_of(again).state_dict().values(), network_of(draft).state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "family", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in ENGINE_FAMILIES]
)
def test_every_engine_family_teaches_a_drafter(family: str) -> None:
    """The teacher has the model's own logits, and the drafter's layer runs as one of its family."""
    model, ids = families.build(family), families.token_ids(2, 20)
    backbone = Backbone(model)
    network = DraftNetwork(backbone, [2, 5], 60)
    training = DraftTraining(network, backbone)
    with torch.no_grad(), backbone.layer_outputs() as outputs:
        logits = model(ids).logits
    states = torch.stack([outputs[1], outputs[4]], dim=2)
    torch.testing.assert_close(training.teacher(states[:, :, -1]), logits[..., :60], rtol=1e-4, atol=1e-4)
    loss, _ = training(ids, states, torch.tensor([20, 20]), torch.tensor([3, 3]))
    loss.backward()
    assert network.read.weight.grad is not None and network.read.weight.grad.norm() > 0


def test_training_raises_the_acceptance_length(tmp_path: Path) -> None:
    draft, adapted = untrained_draft(), anydepth.attach(tiny_llama(), []).eval()
    texts, rates = texts_of(tmp_path / "text"), []
    for steps in (1, 120):
        config = DrafterConfig(max_steps=steps, batch_tokens=512, warmup_steps=3, learning_rate=3e-3)
        train_drafter(network_of(draft), adapted.backbone, texts, config, tmp_path / str(steps))
        engine, counts = FastEngine(adapted, draft=draft), DraftCounts()
        for number in range(12):  # texts that it has seen
            prompt = texts[number].ids[None, : texts[number].completion]
            engine.generate(input_ids=prompt, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
            assert engine.draft_counts is not None
            counts.add(engine.draft_counts)
        rates.append(counts.mean_acceptance_length)
    assert rates[1] > rates[0]


def test_batches_hold_every_text_once() -> None:
    texts = [Text(torch.zeros(length, dtype=torch.long), torch.zeros(length, 1, 4), 1, 1) for length in range(5, 60)]
    batches = batches_of(texts, 200, torch.Generator().manual_seed(0))
    assert sorted(number for batch in batches for number in batch) == list(range(55))
    assert all(len(batch) * max(len(texts[i].ids) for i in batch) <= 200 for batch in batches)
