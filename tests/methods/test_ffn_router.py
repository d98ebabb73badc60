"""The gradient and the capacity of FFN routers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import anydepth
from anydepth.recipe import TrainConfig
from anydepth.training.train import train
from tiny import tiny_llama, windows


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
