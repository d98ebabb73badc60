"""Threads: as many as cores are free, unless their number is fixed."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import anydepth
import families
from anydepth import FastEngine, cores
from anydepth.cores import Threads


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Threads]:
    """Four threads on four cores."""
    before = torch.get_num_threads()
    monkeypatch.setattr(cores, "num_cores", lambda: 4)
    torch.set_num_threads(4)
    yield Threads()
    torch.set_num_threads(before)


def others_use(busy: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "INTERVAL", 0.0)
    monkeypatch.setattr(cores._Usage, "others", lambda usage: busy)
    monkeypatch.setattr(cores, "busy_cores", lambda: busy)


@pytest.mark.parametrize(("busy", "wanted"), [(0.2, 4), (0.5, 3), (1.0, 3), (2.6, 1), (9.0, 1)])
def test_threads_are_as_many_as_cores_are_free(
    threads: Threads, monkeypatch: pytest.MonkeyPatch, busy: float, wanted: int
) -> None:
    said: list[str] = []
    others_use(busy, monkeypatch)
    with threads.fixed(said.append):
        assert torch.get_num_threads() == wanted
    assert torch.get_num_threads() == 4
    assert not said if wanted == 4 else f"timing with {wanted} of 4 threads" in said[0]
    threads.adapt()
    assert torch.get_num_threads() == wanted
    others_use(0.0, monkeypatch)
    threads.adapt()
    assert torch.get_num_threads() == 4


def test_a_number_that_a_program_sets_is_the_most(threads: Threads, monkeypatch: pytest.MonkeyPatch) -> None:
    others_use(3.0, monkeypatch)
    threads.adapt()
    assert torch.get_num_threads() == 1
    torch.set_num_threads(2)
    others_use(0.0, monkeypatch)
    threads.adapt()
    assert torch.get_num_threads() == 2


def test_a_fixed_number_does_not_change(threads: Threads, monkeypatch: pytest.MonkeyPatch) -> None:
    others_use(3.0, monkeypatch)
    threads.fix(3)
    threads.adapt()
    with threads.fixed():
        assert torch.get_num_threads() == 3
    assert torch.get_num_threads() == 3


def test_each_thread_has_its_own_number_and_all_have_a_fixed_one(
    threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    others_use(2.0, monkeypatch)

    def in_another() -> int:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(
                lambda: (torch.set_num_threads(4), threads.adapt(), torch.get_num_threads())[-1]
            ).result()

    assert in_another() == 2 and torch.get_num_threads() == 4
    threads.adapt()
    assert torch.get_num_threads() == 2
    others_use(0.0, monkeypatch)
    threads.adapt()
    assert torch.get_num_threads() == 4  # what the other thread used was no number of this one
    threads.fix(3)
    assert in_another() == 3


def test_a_generation_adapts(threads: Threads, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = anydepth.attach(families.build("llama"), [])
    ids = families.token_ids(batch_size=1)
    monkeypatch.setattr("anydepth.decoding.scheduler.THREADS", threads)
    others_use(2.0, monkeypatch)
    with_two = FastEngine(adapted).generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    assert torch.get_num_threads() == 2
    others_use(0.0, monkeypatch)
    assert torch.equal(FastEngine(adapted).generate(input_ids=ids, max_new_tokens=8, do_sample=False), with_two)
    assert torch.get_num_threads() == 4


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="only Linux says which cores are busy")
def test_a_busy_process_is_seen() -> None:
    quiet = cores.busy_cores(0.3)
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.3)
        assert cores.busy_cores(0.5) > min(quiet + 0.2, cores.num_cores() - 0.5)
    finally:
        busy.kill()
        busy.wait()
