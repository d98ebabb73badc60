"""Texts that begin alike: what they share runs once, and is counted once."""

from __future__ import annotations

import pytest
import torch

import anydepth
from anydepth import FastEngine
from anydepth.gating import cost
from anydepth.gating.plan import Plan
from anydepth.gating.trace import Trace
from anydepth.measure.shared_prefix import SharedPrefixes
from scoring import METHODS, ROUTER, deciding, model


@pytest.mark.parametrize("kind", METHODS)
def test_work_is_counted_once_for_what_is_shared(kind: str) -> None:
    """Text by text it adds up to one cached sequence, where every next text goes on from the last one."""
    adapted, texts = deciding(METHODS[kind]), torch.randint(1, 257, (70,)).tolist()
    counts: list[cost.FlopCount] = []
    prefixes = SharedPrefixes(FastEngine(adapted), counts.append)
    for length in (30, 31, 50, 70):
        prefixes.score(texts[:length], 1)
    cache = (engine := FastEngine(adapted)).model.new_cache(1)
    slot, records = cache.take_slot(), []
    for begin, end in ((0, 30), (30, 31), (31, 50), (50, 70)):
        part = torch.tensor([texts[begin:end]])
        records.append(engine.model.forward(part, [slot], cache, Plan.of(adapted.active_methods))[1])
        records[-1].head_rows = 1
    whole = cost.flops(adapted.backbone, Trace.join(records))
    for part in ("layers", "full_depth_layers", "head", "router"):
        assert sum(getattr(count, part) for count in counts) == getattr(whole, part)
    prefixes.score(texts[:60], 1)  # cut in the middle: ten tokens run again, behind forty that stay
    prefixes.score([*texts[:50], *texts[60:]], 1)
    tokens = [(counts[place].full_depth_layers) for place in (-2, -1)]
    assert tokens[0] < tokens[1] < counts[0].full_depth_layers


def test_a_text_is_not_run_twice() -> None:
    adapted, counts = anydepth.attach(model(), ROUTER), []
    prefixes, ids = SharedPrefixes(FastEngine(adapted), counts.append), list(range(1, 40))
    assert torch.equal(prefixes.score(ids, 2), prefixes.score(ids, 2)) and len(counts) == 1
