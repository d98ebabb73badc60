"""Losses over real tokens, against their formulas."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from anydepth import losses
from anydepth.losses import IGNORED, distillation_loss


def test_distillation_is_the_divergence_over_real_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(2, 5, 11, generator=generator, requires_grad=True)
    teacher = torch.randn(2, 5, 11, generator=generator)
    labels = torch.randint(0, 11, (2, 5), generator=generator)
    labels[1, 3:] = IGNORED
    monkeypatch.setattr(losses, "CHUNK", 3)
    loss = distillation_loss(student, teacher, labels, temperature=2.0)
    p, q = F.softmax(teacher / 2, -1), F.log_softmax(student / 2, -1)
    rows = [(b, t) for b in range(2) for t in range(4) if labels[b, t + 1] != IGNORED]
    expected = sum((p[b, t] * (p[b, t].log() - q[b, t])).sum() for b, t in rows) * 4 / len(rows)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert student.grad[1, 2:].abs().sum() == 0  # what predicts padding teaches nothing
    assert distillation_loss(teacher, teacher, labels, 2.0).abs() < 1e-6
