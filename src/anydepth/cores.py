"""The cores of this process, and threads for those that no other process keeps busy.

Work that is split between threads waits for the slowest of them: with one busy process on two cores, two threads
generate far more slowly than one does.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

INTERVAL = 0.5
"""Seconds between two looks at what other processes use."""
IGNORED = 0.3
"""Fraction of a core that other processes may use without costing a thread."""


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    # macOS and Windows do not report which cores a process may use.
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def busy_cores(seconds: float = 0.4) -> float:
    """Return how many cores other processes keep busy while this one sleeps; 0 where the system is not Linux."""
    usage = _Usage()
    time.sleep(seconds)
    return usage.others()


class _Usage:
    """The time that all processes, and this one, have used of its cores so far."""

    def __init__(self) -> None:
        self.at, self.own, self.all = time.perf_counter(), time.process_time(), _used_seconds()

    def others(self) -> float:
        """Return how many cores other processes have kept busy since then."""
        now = _Usage()
        return max(now.all - self.all - (now.own - self.own), 0.0) / (now.at - self.at)


def _used_seconds() -> float:
    """Return the seconds that this process's cores have spent on any process; 0 where the system is not Linux."""
    try:
        names = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        rows = (line.split() for line in Path("/proc/stat").read_text().splitlines())
        ticks = sum(sum(map(int, row[1:4])) for row in rows if row and row[0] in names)  # user, nice, system
        return ticks / os.sysconf("SC_CLK_TCK")
    except (AttributeError, OSError, ValueError):
        return 0.0


class Threads:
    """The number of PyTorch's threads, which changes with the cores that are free unless it is fixed.

    Results do not depend on it. A number that a program sets by `torch.set_num_threads` is the most that is used.
    """

    def __init__(self) -> None:
        self.most = self.used = torch.get_num_threads()
        self.is_fixed = False
        self.usage = _Usage()

    def fix(self, number: int) -> None:
        """Use this number of threads from now on."""
        self.most = self.used = number
        self.is_fixed = True
        torch.set_num_threads(number)

    def adapt(self) -> None:
        """Use as many threads as cores are free, at most twice a second; call it in the thread that computes."""
        if self.is_fixed:
            return
        if (current := torch.get_num_threads()) != self.used:
            self.most = self.used = current
        if self.most > 1 and time.perf_counter() - self.usage.at > INTERVAL:
            self._use(self.usage.others())
            self.usage = _Usage()

    def _use(self, busy: float) -> None:
        self.used = max(min(self.most, num_cores() - math.ceil(busy - IGNORED)), 1)
        if self.used != torch.get_num_threads():
            torch.set_num_threads(self.used)

    @contextmanager
    def fixed(self, say: Callable[[str], None] = lambda text: None) -> Iterator[None]:
        """Keep within the block as many threads as cores are free at its start, so that times compare."""
        if self.is_fixed:
            yield
            return
        before, busy = torch.get_num_threads(), busy_cores()
        self.most, self.is_fixed = before, True
        self._use(busy)
        if self.used < before:
            say(f"other processes keep {busy:.1f} cores busy: timing with {self.used} of {before} threads")
        try:
            yield
        finally:
            self.is_fixed, self.used = False, before
            torch.set_num_threads(before)


THREADS = Threads()
