"""Options of drafting: which fit a model and an engine; and drafters that come with the package."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import anydepth
from anydepth import Draft
from anydepth.errors import UserError
from anydepth.speculation.draft import default_draft, unpack
from drafts import drafting, network_of, untrained_draft
from tiny import tiny_llama

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"exit_layers": [6]}, "exit_layers has \\[6\\]"),
        ({"exit_layers": [0]}, "at least one layer"),
        ({"max_draft": 0}, "max_draft"),
        ({"network": {"taps": [7]}}, "taps"),
        ({"network": {"taps": [2, 4]}}, "the last must be 6"),
        ({"exit_layers": [3], "exit_vocabulary": 999}, "257 tokens"),
        ({"network": {"taps": [2, 6]}, "exit_layers": [3]}, "after exit_layers"),
        ({"draft": 3}, "unknown key"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        Draft(anydepth.attach(tiny_llama(), []), options)


def test_the_trained_drafter_needs_the_fast_engine() -> None:
    with pytest.raises(UserError, match="use engine fast"):
        drafting("hf", "trained")


def test_a_shipped_drafter_is_found_by_the_weights_of_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anydepth.speculation.draft.folder", lambda: tmp_path)
    draft, adapted = untrained_draft(), anydepth.attach(tiny_llama(), [])
    network_of(draft).vocabulary.copy_(torch.arange(7, 67))
    script = runpy.run_path(str(ROOT / "benchmarks" / "ship_drafter.py"))
    script["ship"](adapted, draft, tmp_path / "tiny", {"seed": 0})
    packed = load_file(tmp_path / "tiny" / "drafter.safetensors")
    assert sum(part.dtype == torch.int8 for part in packed.values()) == 9  # two linear layers, seven of the layer
    found = default_draft(anydepth.attach(tiny_llama(), []))
    assert found.config.network is not None and found.config.network.taps == [2, 6]
    assert default_draft(anydepth.attach(tiny_llama(seed=5), [])).network is None
    for name, value in network_of(draft).state_dict().items():
        ours = network_of(found).state_dict()[name]
        if value.dtype == torch.long:
            assert torch.equal(ours, value)
        else:
            assert (ours - value).norm() <= 0.02 * value.norm()
    assert set(unpack(script["pack"](network_of(draft).state_dict()))) == set(network_of(draft).state_dict())
