"""Files and folders that one process at a time holds; the system lets go of them when it ends, in whatever way.

Where the system knows no locks of this kind (Windows), nothing is locked: whoever holds something there trusts that no
other process works on it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:
    LOCKS = False
else:
    LOCKS = True

# In which others may have taken a folder away; some places, as /proc, take none and say the same.
ATTEMPTS = 1000


def hold(path: Path, wait: bool = False, folder: bool = False) -> int:
    """Lock a file, which is made where it is not there and whose content stays, or a folder that is there.

    Whoever holds a file may rename or remove it, so that the one that was opened here may have lost its name before it
    was locked; the lock is on what has the name when this returns. On file systems without locks nothing is locked.

    Args:
        path: of the file or folder.
        wait: until whoever holds it lets go.
        folder: whether it is one. Network file systems lock only what is open for writing, as folders cannot be.

    Returns:
        A handle for `let_go`. What is read and written goes through a file that is opened for it.

    Raises:
        BlockingIOError: another process holds it, and this one shall not wait.
        OSError: it cannot be opened.
    """
    if not LOCKS:
        return _touch(path, folder)
    flags = os.O_RDONLY | os.O_DIRECTORY if folder else os.O_RDWR | os.O_APPEND | os.O_CREAT
    while True:
        handle = os.open(path, flags, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(handle)
            raise
        except OSError:
            return handle
        except BaseException:
            os.close(handle)
            raise
        try:
            if os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        except FileNotFoundError:
            pass
        os.close(handle)


def let_go(handle: int) -> None:
    """End a lock, also where processes forked from this one have the file open, too."""
    if LOCKS:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)
    os.close(handle)


def _touch(path: Path, folder: bool) -> int:
    """What is left of `hold` without locks. Nothing of `path` stays open, as an open file cannot be renamed there."""
    if folder:
        path.stat()
    else:
        path.touch()
    return os.open(os.devnull, os.O_RDONLY)


@contextmanager
def held(path: Path, wait: bool = False) -> Iterator[None]:
    """`hold` a file for the block."""
    handle = hold(path, wait)
    try:
        yield
    finally:
        let_go(handle)


def make_and_hold(folder: Path, lock: str | None = None) -> tuple[int, list[Path]]:
    """Make a folder, where it is not there, and `hold` it, whoever else makes or removes it in the same moment.

    Args:
        folder: and those above it.
        lock: name of a file in it that is held in its place, so that network file systems do it as well.

    Returns:
        A handle for `let_go`, and the folders that were made, the innermost first.

    Raises:
        BlockingIOError: another process holds it.
        OSError: it cannot be made.
    """
    made: list[Path] = []
    try:
        for attempt in range(ATTEMPTS):
            try:
                for path in reversed([path for path in _to_make(folder, lock) if not path.is_dir()]):
                    try:
                        path.mkdir()
                        made = [path, *(other for other in made if other != path)]
                    except FileExistsError:
                        if not stat.S_ISDIR(path.lstat().st_mode) and not path.is_symlink():
                            raise
                if lock is None:
                    return hold(folder, folder=True), made
                if folder.exists():
                    return hold(folder / lock), made
                handle = _make_held(folder, lock)
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


def _to_make(folder: Path, lock: str | None) -> Iterator[Path]:
    """The innermost first. A folder with a file that is held is made by `_make_held`."""
    if lock is None:
        yield folder
    yield from folder.parents


def _make_held(folder: Path, lock: str) -> int | None:
    """Make a folder that is held when it gets its name; None where another process was faster.

    So whoever makes a folder is who holds it, and takes it away where nothing came of it.
    """
    if not LOCKS:
        try:
            folder.mkdir()
        except FileExistsError:
            return None
        return hold(folder / lock)
    new = folder.with_name(f"{folder.name}.unfinished-{uuid.uuid4().hex}")
    new.mkdir()
    handle: int | None = None
    try:
        handle = hold(new / lock)
        new.rename(folder)  # not onto another one's, which holds a file
    except BaseException as error:
        (new / lock).unlink(missing_ok=True)
        remove_empty([new])
        if handle is not None:
            let_go(handle)
        if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return None
        raise
    return handle


def remove_empty(folders: list[Path]) -> None:
    """Remove folders, the innermost first, up to one that holds something."""
    with contextlib.suppress(OSError):
        for path in folders:
            path.rmdir()


def is_held(path: Path) -> bool:
    """Whether a process, this one or another, holds the file or folder. Nothing is made."""
    if not LOCKS:
        return False
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
