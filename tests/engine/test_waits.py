"""A decision reaches the host once for all its layers: on a GPU each further read would wait for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import anydepth
from anydepth.decoding.engines import FastEngine
from anydepth.gating.plan import Plan
from tiny import NUM_LAYERS, tiny_llama

WAITING = {"tolist", "item", "__bool__", "__int__", "__float__", "__index__", "cpu", "nonzero", "unique"}
IDS = [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10], [11, 12, 13, 14, 15]]


class Waits(TorchFunctionMode):
    """Counts the operations with a result that the host needs, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        indices = args[1] if name in ("__getitem__", "__setitem__") and len(args) > 1 else ()
        by_mask = any(isinstance(one, Tensor) and one.dtype == torch.bool for one in _parts(indices))
        if name in WAITING or by_mask:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def _parts(indices: Any) -> Sequence[Any]:
    return indices if isinstance(indices, tuple) else (indices,)


ONCE, EACH = 3, 2 + NUM_LAYERS
"""The mask of the tokens, their number, and one decision for all layers or one for each."""


@pytest.mark.parametrize(
    ("method", "most"),
    [
        (None, 0),
        ({"name": "skip_set", "skip_layers": [2, 4]}, 0),
        ({"name": "layer_router", "always_keep": 1, "threshold": 2.0}, ONCE),
        ({"name": "layer_router", "always_keep": 1, "threshold": 2.0, "kv_rule": "omit"}, ONCE),
        ({"name": "layer_router", "always_keep": 1, "threshold": 2.0, "branch": "mixer"}, ONCE),
        ({"name": "layer_router", "always_keep": 1, "threshold": 2.0, "reads": "sequential"}, EACH),
        ({"name": "exit_gate"}, EACH),
        ({"name": "mixture_of_depths"}, EACH),
        ({"name": "ffn_router"}, EACH),
    ],
)
def test_a_step_of_several_sequences_waits_once_for_each_decision(method: dict[str, Any] | None, most: int) -> None:
    adapted = anydepth.attach(tiny_llama(), method or []).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.methods.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1.0, generator=generator)
    engine = FastEngine(adapted, native=False)
    plan, session = Plan.of(adapted.active_methods), engine.new_session(len(IDS))
    sequences = [session.open() for _ in IDS]
    for sequence, ids in zip(sequences, IDS, strict=True):
        session.read(sequence, ids, plan)
    with Waits() as waits:
        for ids in ([21, 22, 23], [24, 25, 26]):
            session.step(sequences, ids, plan)
    assert len(waits.names) <= 2 * most, waits.names
