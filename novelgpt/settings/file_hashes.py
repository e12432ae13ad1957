"""Hashes of data files, remembered in the user's cache for as long as nobody writes the files."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

from novelgpt.settings.atomic_files import atomic_write, hash_file, hash_json
from novelgpt.settings.paths import cache_folder

# Smaller files are hashed each time, in about a millisecond.
REMEMBERED_FROM_BYTES = 1 << 20
# Clocks of file systems are coarse: a file may be written again without a later time, as long as that is now.
SETTLED_NANOSECONDS = 2_000_000_000


def content_hash(path: Path) -> tuple[str, int]:
    """Hexadecimal sha256 of a file, and its size in bytes; the file is read only if it was written since the last time.

    Hashes are kept by path, device, inode, size, and the times of the last change of content and of the inode, which no
    program sets. A file that was written within the last seconds is read the next time, too.

    Raises:
        OSError: the file cannot be read. A cache that cannot be read or written changes nothing.
    """
    state = _state_of(path)
    memo = cache_folder() / "hashes" / f"{hash_json(state['path'])}.json"
    if state["bytes"] >= REMEMBERED_FROM_BYTES:
        with contextlib.suppress(OSError, ValueError):
            remembered = json.loads(memo.read_bytes())
            known = remembered.get("sha256") if isinstance(remembered, dict) else None
            if isinstance(known, str) and remembered == state | {"sha256": known}:
                return known, state["bytes"]
    begin = time.time_ns()
    sha256, size = hash_file(path)
    settled = begin - max(state["written_ns"], state["changed_ns"]) >= SETTLED_NANOSECONDS
    if size >= REMEMBERED_FROM_BYTES and settled and _state_of(path) == state:
        with contextlib.suppress(OSError):
            memo.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(memo, json.dumps(state | {"sha256": sha256}))
    return sha256, size


def _state_of(path: Path) -> dict[str, Any]:
    status = path.stat()
    return {
        "path": str(path.absolute()), "device": status.st_dev, "inode": status.st_ino, "bytes": status.st_size,
        "written_ns": status.st_mtime_ns, "changed_ns": status.st_ctime_ns,
    }  # fmt: skip
