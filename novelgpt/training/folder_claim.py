"""Claims a folder for one process: makes and locks it in one step, and removes it again if it stays unused."""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from novelgpt.settings.errors import UserError
from novelgpt.settings.locks import is_locked, make_and_lock, remove_empty, unlock

LOCK = "run.lock"


@dataclass
class Claim:
    """A folder that this process holds: no other run chooses it until it is released.

    Attributes:
        folder: absolute.
        handle: of the lock; None for a peek and after the release.
        lock: the lock file as it was when this process locked it; None for a peek.
        made: folders that were made for it, the innermost first.
        lock_made: whether the lock file was made, too.
    """

    folder: Path
    handle: int | None = None
    lock: os.stat_result | None = None
    made: list[Path] = field(default_factory=list)
    lock_made: bool = False

    def holds(self) -> bool:
        """Whether the folder is still the one that was claimed: neither moved nor removed and made anew."""
        try:
            return self.lock is not None and os.path.samestat(self.lock, (self.folder / LOCK).stat())
        except OSError:
            return False

    def release(self, unused: bool = False) -> None:
        """End the claim, and remove what was made for it where it is empty.

        Args:
            unused: whether nothing has been written since the folder was claimed.
        """
        if self.handle is None:
            return
        with contextlib.suppress(OSError):
            if is_vacant(self.folder) or (self.lock_made and unused):
                (self.folder / LOCK).unlink()
        remove_empty(self.made)
        unlock(self.handle)
        self.handle = None


def take(folder: Path) -> Claim:
    """Make a folder, if missing, and lock it.

    Raises:
        BlockingIOError: another process holds it.
        UserError: it cannot be made.
    """
    target = Path(os.path.realpath(folder))  # of a link, which stays
    lock_made = not (target / LOCK).exists()
    try:
        left = not lock_made and is_vacant(target)  # by a process that was killed
        handle, made = make_and_lock(target, LOCK)
    except BlockingIOError:
        raise
    except OSError as error:
        raise UserError(f"{folder} cannot be made: {error.strerror}", "name a folder you can write to") from error
    return Claim(folder, handle, (target / LOCK).stat(), made or ([target] if left else []), lock_made or left)


def peek(folder: Path) -> Claim:
    """Return a claim that holds nothing.

    Raises:
        BlockingIOError: another process holds the folder.
    """
    if is_locked(folder / LOCK):
        raise BlockingIOError
    return Claim(folder)


def is_vacant(folder: Path) -> bool:
    """Whether a folder is missing or empty, except for a lock file that a killed process left."""
    target = Path(os.path.realpath(folder))
    try:
        return all(path.name == LOCK for path in target.iterdir())
    except FileNotFoundError:  # perhaps removed in this moment, by another run that left it unused
        return True
    except NotADirectoryError:
        return False


def check_none_held_below(folder: Path) -> None:
    """Make sure that no process holds anything in a folder, such as a run in a subfolder, except for its own lock.

    Raises:
        UserError: one does.
    """
    for place, folders, files in os.walk(folder):
        for path in (Path(place, name) for name in (*folders, *files)):
            if path != folder / LOCK and (path.is_dir() or path.is_file()) and is_locked(path):
                raise UserError(f"another process works on {path}", "wait until it exits, or choose another folder")


def snapshot(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the inode, for files also size and mtime, of everything in a folder and below, except for the lock."""
    found: dict[str, tuple[int, ...]] = {}
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place, name)
            with contextlib.suppress(FileNotFoundError):  # removed in this moment
                status = path.lstat()
                of_file = (status.st_size, status.st_mtime_ns) if name in files else ()
                found[str(path.relative_to(folder))] = (status.st_ino, *of_file)
    found.pop(LOCK, None)
    return found


def empty(folder: Path) -> None:
    """Delete what a folder holds, except for the lock."""
    for path in folder.iterdir():
        if path.name == LOCK:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
