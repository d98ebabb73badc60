"""The clock reads the time after the device has finished."""

from __future__ import annotations

import time

import pytest
import torch

from anydepth.models.clock import now


@pytest.mark.parametrize(("device", "wanted"), [("cpu", ["time"]), ("cuda:1", ["wait for cuda:1", "time"])])
def test_the_time_is_read_after_the_device_has_finished(
    device: str, wanted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: seen.append(f"wait for {device}"))
    with monkeypatch.context() as patch:
        patch.setattr(time, "perf_counter", lambda: seen.append("time") or 12.5)
        found = now(torch.device(device))
    assert (found, seen) == (12.5, wanted)
