"""Threads that wait for each other sleep while other work wants their cores, and results stay what they are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from novelgpt.model.shared_cores import DECIDED_BY_USERS, Crowding, core_waits

ROOT = Path(__file__).resolve().parents[2]
SECOND = 10**9
# With so many spins, threads that are not told to sleep early never do within the test.
ENDLESS = str(10**9)
REPORT = """
import os, sys, threading, time, torch
from novelgpt.model.shared_cores import early_sleep, shared_cores

def sleeps():
    begun, count = {}, 0
    for thread in os.listdir("/proc/self/task"):
        if int(thread) != os.getpid():
            lines = open(f"/proc/self/task/{thread}/status").read().splitlines()
            begun[thread] = next(int(line.split()[1]) for line in lines if line.startswith("voluntary"))
    return begun

def work():
    numbers = torch.linspace(-1, 1, 2**18)
    (numbers + 1).sum()
    before = sleeps()
    for _ in range(6):
        numbers = numbers * 1.01 + 0.1
        time.sleep(0.001)
    after = sleeps()
    matrix = numbers.reshape(512, 512)
    return sum(after[thread] - before[thread] for thread in before), len(before), (matrix @ matrix).sum(1)

alone, threads, result = work()
with early_sleep():
    crowded, more, crowded_result = work()
again, fewer, _ = work()
assert alone == 0 and again == 0, (alone, again)
assert crowded >= 6 and more > threads == fewer, (crowded, threads, more, fewer)
assert torch.equal(result, crowded_result)

def watched():
    with shared_cores(torch.device("cpu")):
        return any(thread.name == "shared-cores" for thread in threading.enumerate())

seen = [watched()]
del os.environ["GOMP_SPINCOUNT"]
seen.append(watched())
torch.set_num_threads(1)
seen.append(watched())
assert seen == [False, True, False], seen
"""


@pytest.mark.long  # libgomp reads its variables when a process starts, so torch is imported once more
def test_threads_sleep_early_as_long_as_they_are_told_and_results_stay() -> None:
    if not core_waits():
        pytest.skip("this system does not say how long threads wait for cores")
    environment = {name: value for name, value in os.environ.items() if name not in DECIDED_BY_USERS}
    environment |= {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": ENDLESS, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", REPORT], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_cores_are_wanted_once_the_thread_that_waits_longest_waits_again_and_again() -> None:
    crowding, waits = Crowding(), {1: 0, 2: 0}

    def after(first: float, second: float) -> bool:
        waits[1] += int(first * SECOND)
        waits[2] += int(second * SECOND)
        return crowding.note(dict(waits), 1.0)

    assert not after(0.9, 0.9), "what was before the first look is unknown"
    assert [after(0.0, 0.5), after(0.0, 0.0), after(0.0, 0.5), after(0.5, 0.0)] == [False, False, False, True]
    assert [after(0.0, 0.0), after(0.0, 0.3), after(0.0, 0.0), after(0.0, 0.0)] == [True, True, True, False]
    waits[3] = 50 * SECOND
    assert not after(0.0, 0.0) and not after(0.0, 0.0), "a new thread brings no waits along"


def test_threads_that_want_a_core_are_seen_to_wait() -> None:
    if not core_waits():
        pytest.skip("this system does not say how long threads wait for cores")
    usable = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(usable)})
    try:
        rival = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        try:
            before = core_waits()
            numbers = torch.zeros(1000)
            while core_waits()[os.getpid()] - before[os.getpid()] < SECOND // 50:
                numbers += 1
        finally:
            rival.kill()
            rival.wait()
    finally:
        os.sched_setaffinity(0, usable)
