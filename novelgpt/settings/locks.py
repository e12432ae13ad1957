"""Locks on files and folders, one process at a time; the system releases them when the process ends, however it ends.

Not filelock, which locks no folder, no file that is renamed or removed while it is locked, and cannot probe a lock
without creating it. Where the system has no flock (Windows), nothing is locked, and whoever holds something there
trusts that no other process works on it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    LOCKS = False
else:
    LOCKS = True

# In which others may have taken a folder away; some places, as /proc, take none and say the same.
ATTEMPTS = 1000


def lock(path: Path, wait: bool = False, folder: bool = False) -> int:
    """Lock a file, which is created if missing and keeps its content, or an existing folder.

    Whoever holds a file may rename or remove it, so that the one that was opened here may have lost its name before it
    was locked; the lock is on what has the name when this returns. On file systems without locks nothing is locked.

    Args:
        path: of the file or folder.
        wait: until the holder releases it.
        folder: whether it is one. Network file systems lock only what is open for writing, as folders cannot be.

    Returns:
        A handle for `unlock`. Content is read and written through a file that is opened for it.

    Raises:
        BlockingIOError: another process holds it, and `wait` is not set.
        OSError: it cannot be opened.
    """
    if not LOCKS:  # nothing of `path` stays open, as an open file cannot be renamed there
        if folder:
            path.stat()
        else:
            path.touch()
        return os.open(os.devnull, os.O_RDONLY)
    flags = os.O_RDONLY | os.O_DIRECTORY if folder else os.O_RDWR | os.O_APPEND | os.O_CREAT
    while True:
        with ExitStack() as stack:
            handle = os.open(path, flags, 0o666)
            stack.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise
            except OSError:  # a file system without locks
                stack.pop_all()
                return handle
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), path.stat()):
                    stack.pop_all()
                    return handle


def unlock(handle: int) -> None:
    """End a lock, also where processes forked from this one have the file open, too."""
    if LOCKS:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)
    os.close(handle)


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """`lock` a file for the block."""
    handle = lock(path, wait)
    try:
        yield
    finally:
        unlock(handle)


def host_lock(name: str) -> Path:
    """The file by which processes of one user on this host take turns.

    By the number of the user, who may have no name, as in containers.

    Args:
        name: of what they take turns at.
    """
    user = f"-{os.getuid()}" if LOCKS else ""
    return Path(tempfile.gettempdir()) / f"novelgpt-{name}{user}.lock"


def is_locked(path: Path) -> bool:
    """Whether a process, this one or another, holds the file or folder. Nothing is created."""
    if not LOCKS:
        return False
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return isinstance(error, BlockingIOError)
    finally:
        os.close(handle)
    return False


def make_and_lock(folder: Path, file: str | None = None) -> tuple[int, list[Path]]:
    """Make a folder, if missing, and `lock` it, whoever else makes or removes it at the same moment.

    Args:
        folder: and those above it.
        file: name of a file in it that is locked in its place, so that network file systems lock it as well.

    Returns:
        A handle for `unlock`, and the folders that were made, the innermost first.

    Raises:
        BlockingIOError: another process holds it.
        OSError: it cannot be made.
    """
    made: list[Path] = []
    try:
        for attempt in range(ATTEMPTS):
            try:
                # A folder with a file to lock is made by `_make_locked`.
                for path in reversed([folder, *folder.parents] if file is None else folder.parents):
                    if path.is_dir():
                        continue
                    try:
                        path.mkdir()
                        made = [path, *(other for other in made if other != path)]
                    except FileExistsError:
                        if not stat.S_ISDIR(path.lstat().st_mode) and not path.is_symlink():
                            raise
                if file is None:
                    return lock(folder, folder=True), made
                if folder.exists():
                    return lock(folder / file), made
                handle = _make_locked(folder, file)
                if handle is not None:
                    return handle, [folder, *made]
            except FileNotFoundError:  # another process took it away in this moment; or it is a place for no folder
                if attempt == ATTEMPTS - 1:
                    raise
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
    except BlockingIOError:
        raise  # it is the other's now
    except BaseException:
        remove_empty(made)
        raise


def _make_locked(folder: Path, file: str) -> int | None:
    """Make a folder whose file is locked when it gets its name; None where another process was faster.

    So the process that makes a folder is the one that holds it, and removes it where nothing came of it.
    """
    if not LOCKS:
        try:
            folder.mkdir()
        except FileExistsError:
            return None
        return lock(folder / file)
    new = folder.with_name(f"{folder.name}.unfinished-{uuid.uuid4().hex}")
    new.mkdir()
    handle: int | None = None
    try:
        handle = lock(new / file)
        new.rename(folder)  # not onto another one's, which holds a file
    except BaseException as error:
        (new / file).unlink(missing_ok=True)
        remove_empty([new])
        if handle is not None:
            unlock(handle)
        if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return None
        raise
    return handle


def remove_empty(folders: list[Path]) -> None:
    """Remove folders, the innermost first, up to one that holds something."""
    with contextlib.suppress(OSError):
        for path in folders:
            path.rmdir()
