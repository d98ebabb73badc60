"""Drafters that come with the package."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import anydepth
from anydepth.speculation.shipped import default_draft, pack, ship, unpack
from drafts import network_of, untrained_draft
from tiny import tiny_llama


def test_a_shipped_drafter_is_found_by_the_weights_of_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anydepth.speculation.shipped.folder", lambda: tmp_path)
    draft, adapted = untrained_draft(), anydepth.attach(tiny_llama(), [])
    network_of(draft).vocabulary.copy_(torch.arange(7, 67))
    ship(adapted, draft, tmp_path / "tiny", {"seed": 0})
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
    assert set(unpack(pack(network_of(draft).state_dict()))) == set(network_of(draft).state_dict())
