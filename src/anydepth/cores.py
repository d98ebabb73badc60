"""The cores of this process, and threads for those that no other process keeps busy.

Work that is split between threads waits for the slowest of them: with one busy process on two cores, two threads
generate far more slowly than one does.
"""

from __future__ import annotations

import math
import os
import threading
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


class _Own(threading.local):
    """What one thread has set, since OpenMP and PyTorch have a number of threads for each."""

    def __init__(self) -> None:
        self.most = self.used = torch.get_num_threads()
        self.usage = _Usage()

    def use(self, number: int) -> None:
        self.used = number
        if number != torch.get_num_threads():
            torch.set_num_threads(number)


class Threads:
    """The number of PyTorch's threads, which changes with the cores that are free unless it is fixed.

    Results do not depend on it. A number that a program sets by `torch.set_num_threads` is the most that is used.
    """

    def __init__(self) -> None:
        self.own = _Own()
        self.fixed_number: int | None = None  # for all threads

    def fix(self, number: int) -> None:
        """Use this number of threads from now on."""
        self.fixed_number = number
        self.own.use(number)

    def adapt(self) -> None:
        """Use as many threads as cores are free, at most twice a second; call it in the thread that computes."""
        own = self.own
        if self.fixed_number is not None:
            own.use(self.fixed_number)
            return
        if (current := torch.get_num_threads()) != own.used:
            own.most = own.used = current
        if own.most > 1 and time.perf_counter() - own.usage.at > INTERVAL:
            own.use(_free(own.most, own.usage.others()))
            own.usage = _Usage()

    @contextmanager
    def fixed(self, say: Callable[[str], None] = lambda text: None) -> Iterator[None]:
        """Keep within the block as many threads as cores are free at its start, so that times compare."""
        if self.fixed_number is not None:
            yield
            return
        before, busy = torch.get_num_threads(), busy_cores()
        self.fix(_free(before, busy))
        if self.own.used < before:
            say(f"other processes keep {busy:.1f} cores busy: timing with {self.own.used} of {before} threads")
        try:
            yield
        finally:
            self.fixed_number = None
            self.own.use(before)


def _free(most: int, busy: float) -> int:
    """Return the number of threads for the cores that others do not keep busy, of at most so many."""
    return max(min(most, num_cores() - math.ceil(busy - IGNORED)), 1)


THREADS = Threads()
