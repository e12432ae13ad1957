"""How many cores there are to use."""

from __future__ import annotations

import os


def usable_cores() -> int:
    """Of this machine, as far as this process may use them."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


def threads_each(processes: int) -> int:
    """Of each of so many processes that share these cores."""
    return max(1, usable_cores() // processes)
