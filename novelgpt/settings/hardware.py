"""What this process may use of the machine: cores, GPUs and memory, without torch, whose import takes seconds."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping

try:
    import resource
except ImportError:  # Windows
    HAS_RESOURCE = False
else:
    HAS_RESOURCE = True


def usable_cores() -> int:
    """Cores of this machine that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


def threads_each(processes: int) -> int:
    """Threads per process, where so many processes share these cores."""
    return max(1, usable_cores() // processes)


def visible_gpus(environment: Mapping[str, str]) -> int:
    """GPUs of this machine that CUDA_VISIBLE_DEVICES leaves visible; all where it is not set.

    Args:
        environment: variables of the process that will use them.
    """
    program = shutil.which("nvidia-smi", path=environment.get("PATH"))
    if program is None:
        return 0
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        # CUDA takes a number or an identifier for a device; -1 hides it and all that follow, as does NoDevFiles, which
        # schedulers write for none. Of MIG instances, it takes the first.
        named = list(itertools.takewhile(re.compile(r"\s*([0-9]|GPU-|MIG-)").match, chosen.split(",")))
        return min(1, len(named)) if chosen.lstrip().startswith("MIG-") else len(named)
    try:
        listed = subprocess.run([program, "-L"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return 0
    return sum(line.startswith("GPU") for line in listed.splitlines())


def peak_process_memory() -> int:
    """Peak memory of this process so far, in bytes."""
    if not HAS_RESOURCE:
        import psutil  # not before: what is settled at a process's start is the standard library's

        memory: dict[str, int] = psutil.Process().memory_info()._asdict()
        return memory.get("peak_wset", memory["rss"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # KiB everywhere but there
