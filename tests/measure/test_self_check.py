"""The self-check: it passes what is right, and names what differs where something is wrong."""

from __future__ import annotations

import pytest

import anydepth
from anydepth import HFEngine
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


def test_a_wrong_execution_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sparse execution that forgets to put the kept tokens back is not what masked execution computes."""
    monkeypatch.setattr(PartialRunner, "run_on_kept", lambda self, run, gate, own, hidden, base, *rest: base)
    with pytest.raises(RunError, match="self-check failed.*sparse and masked"):
        checked(ROUTER)
