"""The memory of this process, on every system."""

from __future__ import annotations

import sys

import psutil

try:
    import resource
except ImportError:  # Windows
    HAS_RESOURCE = False
else:
    HAS_RESOURCE = True


def peak_process_memory() -> int:
    """Bytes: the most that this process has had in memory so far."""
    if not HAS_RESOURCE:
        # Windows keeps the peak; anything else is asked for what is held now.
        memory: dict[str, int] = psutil.Process().memory_info()._asdict()
        return memory["peak_wset"] if "peak_wset" in memory else memory["rss"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # KiB everywhere but there
