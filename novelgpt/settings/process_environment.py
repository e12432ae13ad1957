"""Variables that libraries read once, when a training process begins: what it runs best with, unless the user decides.

Standard library only, as all of this is settled before anything else is imported.
"""

from __future__ import annotations

from collections.abc import Mapping

from novelgpt.settings.cores import threads_each

ALWAYS = {
    "TOKENIZERS_PARALLELISM": "true",
    # glibc would hand the large blocks of each step back to the system and ask for them again.
    "MALLOC_MMAP_THRESHOLD_": str(4 * 2**30),
    "MALLOC_TRIM_THRESHOLD_": str(8 * 2**30),
    # Lines appear as they are written, in files and pipes too.
    "PYTHONUNBUFFERED": "1",
}


def process_defaults(environment: Mapping[str, str], processes: int | None, gpus: int) -> dict[str, str]:
    """Variables for a training process, without those that the user has set to anything.

    Args:
        environment: the variables that are there.
        processes: that share the cores of this host; None where that is settled later, host by host.
        gpus: that this process may use.
    """
    wanted = dict(ALWAYS)
    if gpus == 0:
        wanted["DS_ACCELERATOR"] = "cpu"  # DeepSpeed would look for others
    if processes is not None:
        wanted["OMP_NUM_THREADS"] = str(threads_each(processes))
    return {name: value for name, value in wanted.items() if not environment.get(name)}
