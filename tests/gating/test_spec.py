"""Gates as data: thresholds by position, what calibration sees, and gates that never skip."""

from __future__ import annotations

import math

import pytest
import torch

from anydepth.gating.scores import Closed, Score
from anydepth.gating.spec import DECAY_LENGTH, GateSpec


def confidences() -> Score:
    score = Score()
    score.least = -1.0
    return score


def test_the_offset_is_added_to_the_threshold() -> None:
    spec = GateSpec((2,), "ffn", Score(), threshold=0.5, offset=0.25)
    assert spec.threshold_at(torch.arange(3)[None]) == 0.75


def test_a_decaying_threshold_is_that_of_calm() -> None:
    """Exit at a confidence of 0.9·λ + 0.1·exp(−τ·t ÷ N), clipped to [0, 1] (Schuster et al. 2022, equation 5)."""
    positions, lam, tau = [0, 100, 5000], 0.6, 3.0
    found = GateSpec((3,), "layer", confidences(), threshold=-lam, decay=tau).threshold_at(torch.tensor([positions]))
    wanted = [-(0.9 * lam + 0.1 * math.exp(-tau * t / DECAY_LENGTH)) for t in positions]
    assert found[0].tolist() == pytest.approx(wanted)  # type: ignore[index]
    most = GateSpec((3,), "layer", confidences(), threshold=-1.0, decay=0.0).threshold_at(torch.zeros(1, 1))
    assert most.item() == -1.0  # type: ignore[union-attr]


@pytest.mark.parametrize("decay", [None, 4.0])
def test_a_calibrated_score_is_the_threshold_that_just_skips_it(decay: float | None) -> None:
    positions = torch.tensor([[0, 7, 300]])
    scores = torch.tensor([[-0.9, -0.5, -0.3]])
    thresholds = GateSpec((1,), "layer", confidences(), offset=0.0, decay=decay).calibrated(scores, positions)
    for number, threshold in enumerate(thresholds[0].tolist()):
        spec = GateSpec((1,), "layer", confidences(), threshold=threshold, decay=decay)
        limits = torch.as_tensor(spec.threshold_at(positions)).expand(1, 3)
        assert limits[0, number].item() == pytest.approx(scores[0, number].item(), abs=1e-6)


def test_gates_that_never_skip() -> None:
    assert GateSpec((1,), "layer", Score(), threshold=-math.inf).never_skips
    assert GateSpec((1,), "layer", confidences(), threshold=-1.5).never_skips
    assert not GateSpec((1,), "layer", confidences(), threshold=-0.5).never_skips
    assert not GateSpec((1,), "layer", Closed()).never_skips
