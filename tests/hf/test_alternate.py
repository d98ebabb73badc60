"""Alternate mixers: each token's output is that of the gated delta rule, token by token, over what the rule sees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import anydepth
import families
from anydepth.hf import gated_layer
from anydepth.hf.alternate import run_alternate
from reference import delta_rule, relative_rms

PER_TOKEN = 7488
"""FLOPs of the rule for llama's tiny model, by hand in `gating/test_cost.py`."""


class Ran:
    """An adapted model of which layer 2 is routed by a given decision; keeps what the alternate mixer gives."""

    def __init__(self, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
        spec = {"name": "mixer_router", "layers": [2], "state": state, "router": "random", "rate": 0.5}
        self.adapted = anydepth.attach(families.build("llama"), spec).eval()
        router: Any = self.adapted.methods["mixer_router"]
        self.mixer = router.mixers["2"]
        self.hidden: list[Tensor] = []
        self.outputs: list[Tensor | None] = []
        monkeypatch.setattr(gated_layer, "run_alternate", self._run)

    def _run(self, run: Any, layer_idx: int, routing: Any, hidden: Tensor) -> Tensor | None:
        self.hidden.append(hidden)
        self.outputs.append(run_alternate(run, layer_idx, routing, hidden))
        return self.outputs[-1]

    def __call__(self, ids: Tensor, **options: Any) -> tuple[Tensor, int]:
        """Run a forward; return which tokens took the alternate mixer, and its FLOPs for one token."""
        self.adapted(ids, **options)
        record = self.adapted.records[-1]
        return record.other_keep[2], record.other_flops

    def wanted(self, routed: Tensor, *, sees_all: bool, real: Tensor | None = None) -> Tensor:
        """Return (B, T, D) outputs of the rule over all forwards so far, zero for other tokens."""
        hidden = torch.cat(self.hidden, dim=1)
        output = torch.zeros_like(hidden)
        for row, (states, own) in enumerate(zip(hidden, routed, strict=True)):
            seen = own if not sees_all else torch.ones_like(own) if real is None else real[row]
            output[row, seen] = delta_rule(self.mixer, states[seen])
        return output * routed[..., None]


@torch.no_grad()
@pytest.mark.parametrize("state", ["routed", "all"])
def test_one_forward(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the routed tokens of all rows, aligned on the right, or of every real token."""
    ran, ids = Ran(state, monkeypatch), families.token_ids(3, 20)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    routed, flops = ran(ids, attention_mask=mask, use_cache=False)
    (output,) = ran.outputs
    assert output is not None and 10 < int(routed.sum()) < 45 and not routed[1, :6].any()
    counts = routed.sum(1)
    assert counts.unique().numel() > 1
    assert flops == PER_TOKEN * (3 * int(counts.max()) if state == "routed" else int(mask.sum()))
    wanted = ran.wanted(routed, sees_all=state == "all", real=mask.bool())
    assert relative_rms(output, wanted) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("state", ["routed", "all"])
def test_forwards_with_a_cache_continue_the_state_of_each_row(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran, ids = Ran(state, monkeypatch), families.token_ids(3, 20)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0  # rows of different lengths
    cache, found, flops = ran.adapted.new_cache(), [], 0
    for part in ids.split([9, 1, 1, 9], dim=1):
        seen = cache.num_seen + part.shape[1]
        routed, own_flops = ran(part, past_key_values=cache, attention_mask=mask[:, :seen])
        found.append(routed)
        flops += own_flops
    outputs = [
        torch.zeros_like(hidden) if output is None else output
        for hidden, output in zip(ran.hidden, ran.outputs, strict=True)
    ]
    wanted = ran.wanted(torch.cat(found, dim=1), sees_all=state == "all", real=mask.bool())
    assert relative_rms(torch.cat(outputs, dim=1), wanted) < 1e-4
    first = 3 * int(found[0].sum(1).max())  # zeros before a row included; later each row runs its own tokens
    assert flops == PER_TOKEN * (56 if state == "all" else first + int(torch.cat(found[1:], dim=1).sum()))


@torch.no_grad()
@pytest.mark.parametrize(
    ("state", "cached", "runs"), [("routed", True, False), ("all", True, True), ("all", False, False)]
)
def test_no_token_for_it(state: str, cached: bool, runs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that sees every token runs for its state alone, where a later token could read that."""
    ran = Ran(state, monkeypatch)
    router: Any = ran.adapted.methods["mixer_router"]
    router.config = router.config.model_copy(update={"rate": 1.0})
    routed, flops = ran(families.token_ids(2, 5), use_cache=cached)
    assert not routed.any() and flops == PER_TOKEN * 10 * runs
    assert (ran.outputs[0] is not None) == runs
