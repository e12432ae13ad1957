"""Sharing a CPU with other programs: OpenMP threads that wait for each other yield their cores.

The threads of an operation meet at its end, and the first ones spin for some milliseconds (libgomp's GOMP_SPINCOUNT).
That is fastest as long as every thread has a core of its own. Beside another busy program one thread has none, and the
others waste their share of the cores by waiting for it. So we measure how long runnable threads wait for a core. While
that is long, waiting threads sleep after 100 spins: libgomp's own rule for processes with more OpenMP threads than
cores, which we trigger by idle threads. Operations are still split into the same parts, so results are bit-equal.

https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from novelgpt.settings.hardware import usable_cores

# Variables by which users choose the policy themselves.
DECIDED_BY_USERS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
PERIOD_SECONDS = 0.25
# Fraction of a period spent waiting for a core, above which there is other work, and below which there is none.
CROWDED_SHARE, QUIET_SHARE = 0.2, 0.1
# Consecutive periods that decide, so that short bursts of other work are ignored.
DECIDING_PERIODS = 2
# torch splits element-wise operations into parts of at least this size.
GRAIN = 32_768


@contextmanager
def shared_cores(device: torch.device) -> Iterator[None]:
    """Yield cores to other programs while the body computes on the CPU.

    Does nothing on GPUs, with a single thread, if one of DECIDED_BY_USERS is set, and without Linux's
    /proc/self/schedstat. OpenMP runtimes other than libgomp ignore it.
    """
    wanted = device.type == "cpu" and torch.get_num_threads() > 1
    if not wanted or any(os.environ.get(name) for name in DECIDED_BY_USERS) or not core_waits():
        yield
        return
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(ended,), name="shared-cores", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


@contextmanager
def early_sleep() -> Iterator[None]:
    """While the body runs, waiting threads of this process sleep after 100 spins."""
    each = torch.get_num_threads()
    with ExitStack() as stack:
        # In addition to the threads that compute.
        for _ in range(max(1, usable_cores() // each)):
            stack.enter_context(_idle_threads(each))
        yield


@contextmanager
def _idle_threads(count: int) -> Iterator[None]:
    """Idle OpenMP threads: those that torch starts for an operation in another Python thread."""
    there, ended = threading.Event(), threading.Event()

    def work() -> None:
        torch.empty(count * GRAIN, dtype=torch.int8).fill_(0)
        there.set()
        ended.wait()

    thread = threading.Thread(target=work, name="idle-threads", daemon=True)
    thread.start()
    there.wait()
    try:
        yield
    finally:
        ended.set()
        thread.join()  # its OpenMP threads end with it


class Crowding:
    """Whether other programs compete for the cores, judged by how long threads wait for one."""

    def __init__(self) -> None:
        self.crowded = False
        self._before: Mapping[int, int] = {}
        self._against = 0  # consecutive periods that contradict `crowded`

    def note(self, waits: Mapping[int, int], seconds: float) -> bool:
        """Update with the result of `core_waits` after a period of `seconds`; return `crowded`.

        The thread that waited longest counts, as all others wait for it.
        """
        known = [wait - self._before[thread] for thread, wait in waits.items() if thread in self._before]
        self._before = waits
        share = max(known, default=0) / 1e9 / seconds
        against = share < QUIET_SHARE if self.crowded else share > CROWDED_SHARE
        self._against = self._against + 1 if against else 0
        if self._against == DECIDING_PERIODS:
            self.crowded, self._against = not self.crowded, 0
        return self.crowded


def core_waits() -> dict[int, int]:
    """Nanoseconds that each thread of this process was runnable without a core; empty if the system does not report it.

    The second value of schedstat (Documentation/scheduler/sched-stats.rst of Linux).
    """
    waits = {}
    for folder in Path("/proc/self/task").glob("*"):
        try:
            waits[int(folder.name)] = int((folder / "schedstat").read_text().split()[1])
        except (OSError, IndexError):  # the thread has ended, or the system has no statistics
            continue
    return waits


def _watch(ended: threading.Event) -> None:
    crowding = Crowding()
    crowding.note(core_waits(), PERIOD_SECONDS)
    with ExitStack() as stack:
        sleeping = False
        while not ended.wait(PERIOD_SECONDS):
            crowded = crowding.note(core_waits(), PERIOD_SECONDS)
            if crowded and not sleeping:
                stack.enter_context(early_sleep())
            elif sleeping and not crowded:
                stack.close()
            sleeping = crowded
