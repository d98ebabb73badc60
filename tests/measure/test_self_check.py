"""The self-check: it passes what is right, and no speed-up is reported for what is wrong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import anydepth
from anydepth import HFEngine
from anydepth.errors import RunError
from anydepth.hf.partial import PartialRunner
from anydepth.measure.bench import bench
from anydepth.measure.self_check import self_check
from tiny import tiny_llama

ROUTER = {"name": "layer_router", "always_keep": 1, "router": "random", "rates": [0.5] * 5}


def windows(num: int = 4, length: int = 48) -> Tensor:
    return torch.randint(1, 257, (num, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("spec", [ROUTER, {**ROUTER, "kv_rule": "omit"}, {"name": "skip_set", "skip_mixers": [0, 3]}])
def test_the_self_check_passes_what_is_right(spec: dict[str, object]) -> None:
    self_check([HFEngine(anydepth.attach(tiny_llama(), spec))], windows(2))


def test_a_wrong_execution_gets_no_speed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: sparse execution that forgets to put the kept tokens back."""
    monkeypatch.setattr(PartialRunner, "run_on_kept", lambda self, run, gate, own, hidden, base, *rest: base)
    with pytest.raises(RunError, match="self-check failed"):
        bench(
            [HFEngine(anydepth.attach(tiny_llama(), ROUTER))],
            windows(),
            batch_sizes=[1],
            prompt_tokens=[8],
            new_tokens=2,
            num_runs=1,
        )
