"""What DeepSpeed compiles when processes meet: an operator without use here, and locks that hold up all builds."""

from __future__ import annotations

import os
from pathlib import Path

LOCK = "lock"
PROCESSES = Path("/proc")


def spare_unused_build() -> None:
    """Let DeepSpeed leave out its operator for sums in shared memory, which it offers to inference on CPUs alone.

    It would be compiled at the first training on a machine, for a minute without a word.
    """
    import deepspeed.ops  # slow to import, and of use to few

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def release_build_locks() -> list[Path]:
    """Delete the locks on builds of torch extensions that killed processes have left: torch waits for them for ever.

    Deleted are those that no process of this machine holds open, as the one that builds does; they are returned.
    Nothing is deleted in runs on several machines: they may share the folder, and another one's lock looks the same.
    """
    here = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE", "1")  # torchrun's name, DeepSpeed's name
    if os.environ.get("WORLD_SIZE", "1") != here:
        return []
    from torch.utils.cpp_extension import get_default_build_root  # slow to import, and of use to few

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    released = []
    for path in root.glob(f"**/{LOCK}"):
        try:
            left = path.stat()
            if not _is_open(left) and path.stat().st_ino == left.st_ino:
                path.unlink()
                released.append(path)
        except FileNotFoundError:
            continue  # by the one that holds it, or by another rank
    return released


def _is_open(file: os.stat_result) -> bool:
    """Whether a process that can be seen has the file open; where none can be seen, it may."""
    if not PROCESSES.is_dir():
        return True
    for descriptor in PROCESSES.glob("[0-9]*/fd/*"):
        try:
            found = descriptor.stat()
        except OSError:
            continue  # ended, closed, or of another user
        if (found.st_dev, found.st_ino) == (file.st_dev, file.st_ino):
            return True
    return False
