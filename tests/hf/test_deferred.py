"""Exits of which the skipped layers run later: K/V are those of full depth, and no token runs a layer twice."""

from __future__ import annotations

import pytest
import torch

from reference import relative_rms
from scripted import NUM_LAYERS, adapted_model, scripted

PATTERN = [(2, 1), (6, 3), (2, 1), (4, 1), (2, 2), (4, 1), (6, 1), (2, 1), (6, 2)]
"""(Depth, number of tokens) of each forward."""


@torch.no_grad()
@pytest.mark.parametrize("masked_rows", [False, True])
def test_kv_are_those_of_full_depth_and_layers_run_once(masked_rows: bool) -> None:
    adapted, tokens = adapted_model(), sum(count for _, count in PATTERN)
    ids = torch.randint(1, 256, (2, tokens), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if masked_rows:
        mask[0, :3] = 0
    with adapted.disabled():
        whole = adapted(input_ids=ids, attention_mask=mask, use_cache=True)
        wanted = whole.past_key_values
    script, cache, ran = scripted(adapted), adapted.new_cache(), torch.zeros(NUM_LAYERS, dtype=torch.long)
    start = 0
    with adapted.deciding(script):
        for depth, count in PATTERN:
            script.depth = depth
            part = ids[:, start : start + count]
            logits = adapted(input_ids=part, attention_mask=mask[:, : start + count], past_key_values=cache).logits
            if depth == NUM_LAYERS:
                real = mask[:, start : start + count, None]
                assert relative_rms(logits * real, whole.logits[:, start : start + count] * real) < 1e-5
            start += count
            ran += (adapted.records[-1].stacked()[0] & part.ne(-1) & mask[:, start - count : start].bool()).sum((1, 2))
            ran += adapted.records[-1].stacked_late().sum(1)
    assert ran.tolist() == [int(mask.sum())] * NUM_LAYERS
    for layer_idx in range(NUM_LAYERS):
        real = mask[:, None, :, None]
        for name in ("keys", "values"):
            ours, theirs = getattr(cache.layers[layer_idx], name), getattr(wanted.layers[layer_idx], name)
            assert relative_rms(ours * real, theirs * real) < 1e-5
