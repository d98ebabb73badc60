"""Timing: the threads that are used, and what other processes keep busy."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from anydepth.measure import timing


def test_threads_are_as_many_as_cores_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    before, told = torch.get_num_threads(), []
    monkeypatch.setattr(timing, "num_cores", lambda: 4)
    torch.set_num_threads(4)
    try:
        for busy, wanted in ((0.2, 4), (1.0, 3), (2.6, 1), (9.0, 1)):
            monkeypatch.setattr(timing, "busy_cores", lambda busy=busy: busy)
            with timing.on_free_cores(told.append):
                assert torch.get_num_threads() == wanted
            assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
    assert len(told) == 3 and "timing with 3 of 4 threads" in told[0]


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="only Linux says who is busy")
def test_a_busy_process_is_seen() -> None:
    quiet = timing.busy_cores(0.3)
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.3)
        assert timing.busy_cores(0.5) > min(quiet + 0.2, timing.num_cores() - 0.5)
    finally:
        busy.kill()
        busy.wait()
