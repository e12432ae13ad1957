"""A CPU that other programs use as well: threads that wait for each other give their cores away.

The threads that share an operation meet at its end, and those that are there first spin for some milliseconds
(libgomp's GOMP_SPINCOUNT): the fastest way as long as every thread has a core to itself. Beside another busy program
one thread has not, and the others spend their shares of the cores on waiting for it. So it is measured how long threads
that could run have to wait for a core. While that is long, waiting threads sleep after 100 spins: libgomp's own rule
for processes with more OpenMP threads than cores, which idle threads bring about. Operations are still cut into as many
parts as before, so results stay the same to the last bit.

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

# Variables by which users decide it themselves.
DECIDED_BY_USERS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
PERIOD_SECONDS = 0.25
# Of a period, spent waiting for a core: more means other work, less means none. Between them nothing changes.
CROWDED_SHARE, QUIET_SHARE = 0.2, 0.1
# So many periods of one kind in a row decide, as others' work of a moment is no reason.
DECIDING_PERIODS = 2
# torch cuts operations on single elements into parts of at least so many.
GRAIN = 32_768


@contextmanager
def shared_cores(device: torch.device) -> Iterator[None]:
    """Give cores away, as long as they are wanted, while the body computes on the CPU.

    Does nothing for GPUs, for single threads, where users have set DECIDED_BY_USERS, and on systems without Linux's
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
    """While the body runs, threads of this process that wait for others sleep after 100 spins."""
    each = torch.get_num_threads()
    with ExitStack() as stack:
        # Those of the threads that compute are there already.
        for _ in range(max(1, usable_cores() // each)):
            stack.enter_context(_idle_threads(each))
        yield


@contextmanager
def _idle_threads(count: int) -> Iterator[None]:
    """OpenMP threads that do nothing: those that an operation needs when another thread of Python begins it."""
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
        thread.join()  # and with it its OpenMP threads end


class Crowding:
    """Whether other work wants the cores, from how long threads waited for one."""

    def __init__(self) -> None:
        self.crowded = False
        self._before: Mapping[int, int] = {}
        self._against = 0  # periods in a row that speak against `crowded`

    def note(self, waits: Mapping[int, int], seconds: float) -> bool:
        """Take the waits of `core_waits` after so many seconds more; whether cores are wanted now.

        The thread that waited longest counts, as all others have to wait for it.
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
    """Nanoseconds that each thread of this process could have run and had no core; none where the system does not say.

    The second figure of schedstat (Documentation/scheduler/sched-stats.rst of Linux).
    """
    waits = {}
    for folder in Path("/proc/self/task").glob("*"):
        try:
            waits[int(folder.name)] = int((folder / "schedstat").read_text().split()[1])
        except (OSError, IndexError):  # the thread has ended meanwhile, or the system keeps no statistics
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
