"""The self-check: it passes what is right, and names what differs where something is wrong."""

from __future__ import annotations

import pytest
import torch

import anydepth
from anydepth import FastEngine, HFEngine
from anydepth.errors import RunError
from anydepth.hf.partial import PartialRunner
from anydepth.measure.self_check import self_check
from tiny import tiny_llama, windows

ROUTER = {"name": "layer_router", "always_keep": 1, "router": "random", "rates": [0.5] * 5}


def checked(spec: dict[str, object]) -> None:
    self_check([HFEngine(anydepth.attach(tiny_llama(), spec))], windows(2, 48))


@pytest.mark.parametrize("spec", [ROUTER, {**ROUTER, "kv_rule": "omit"}, {"name": "skip_set", "skip_mixers": [0, 3]}])
def test_the_self_check_passes_what_is_right(spec: dict[str, object]) -> None:
    checked(spec)


def test_exits_that_recompute_pass_on_both_engines() -> None:
    """Their gates are of layers, and only the exits are repeated: gates of branches would not go with them."""
    adapted = anydepth.attach(tiny_llama(), {"name": "exit_gate", "layers": [2, 4], "kv_rule": "recompute"}).eval()
    for name, weight in adapted.methods.named_parameters():
        (torch.nn.init.normal_ if "direct.weight" in name else torch.nn.init.zeros_)(weight)
    self_check([HFEngine(adapted), FastEngine(adapted)], windows(2, 48))
    adapted(windows(2, 48), use_cache=False)
    assert adapted.last_trace.kv_rules[2:] == ["recompute"] * 4 and not adapted.last_trace.mixer_keep[2].all()


def test_a_wrong_execution_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sparse execution that forgets to put the kept tokens back is not what masked execution computes."""
    monkeypatch.setattr(PartialRunner, "run_on_kept", lambda self, run, gate, own, hidden, base, *rest: base)
    with pytest.raises(RunError, match="self-check failed.*sparse and masked"):
        checked(ROUTER)
