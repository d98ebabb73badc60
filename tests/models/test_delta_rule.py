"""Gated delta rules as alternate mixers: no larger than the softmax mixer, and drawn from their own generator."""

from __future__ import annotations

import pytest
import torch

import families
from anydepth.models.backbone import Backbone
from anydepth.models.delta_rule import DeltaShape, build_delta_rule, matched_shape


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "falcon", "qwen3_next"])
def test_matched_mixers_have_no_more_parameters(family: str) -> None:
    """Apart from two small linear layers for each head."""
    backbone = Backbone(families.build(family))
    view = next(view for view in backbone.layers if not view.is_recurrent)
    mixer = build_delta_rule(32, matched_shape(view), torch.Generator())
    ours, theirs = (sum(p.numel() for p in part.parameters() if p.dim() == 2) for part in (mixer, view.mixer))
    assert 0.6 * theirs < ours <= 1.1 * theirs, (ours, theirs)


def test_the_shape_of_llamas_mixer() -> None:
    """Four heads of queries and two of keys are 12 heads of weights; 2 + 3 · 3 = 11 is the most that fits."""
    assert matched_shape(Backbone(families.build("llama")).layers[1]) == DeltaShape(1, 3, 8)


def test_weights_are_drawn_from_the_generator_alone() -> None:
    state = torch.get_rng_state()
    first, same, other = (
        build_delta_rule(32, DeltaShape(1, 2, 8), torch.Generator().manual_seed(seed)).state_dict()
        for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], same[name]) for name in first)
    drawn = {name for name in first if not torch.equal(first[name], other[name])}
    assert {name.split(".")[0] for name in drawn} >= {"in_proj_qkvz", "in_proj_ba", "out_proj", "conv1d", "A_log"}
