"""Files and folders that one process at a time holds; the system lets go of them when it ends, in whatever way."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def hold(path: Path, wait: bool = False) -> int:
    """Lock a folder, or a file, which is made where it is not there and whose content stays.

    Whoever holds a file may rename or remove it, so that the one that was opened here may have lost its name before it
    was locked; the lock is on what has the name when this returns. On file systems without locks nothing is locked.

    Args:
        path: of the folder or file.
        wait: until whoever holds it lets go.

    Returns:
        The open file; `let_go` closes it.

    Raises:
        BlockingIOError: another process holds it, and this one shall not wait.
        OSError: it cannot be opened.
    """
    while True:
        # Network file systems lock only what is open for writing, as folders cannot be.
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), path.stat()):
                    return handle
            os.close(handle)
        except OSError as error:
            if not isinstance(error, BlockingIOError):
                return handle
            os.close(handle)
            raise
        except BaseException:
            os.close(handle)
            raise


def let_go(handle: int) -> None:
    """End a lock, also where processes forked from this one have the file open, too."""
    with contextlib.suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_UN)
    os.close(handle)


def is_held(path: Path) -> bool:
    """Whether a process, this one or another, holds the file or folder. Nothing is made."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(handle)
    return False


@contextmanager
def held(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold a folder or a file for the block.

    Raises:
        BlockingIOError: another process holds it, and this one shall not wait.
        OSError: it cannot be opened.
    """
    handle = hold(path, wait)
    try:
        yield
    finally:
        let_go(handle)
