"""Files and folders that are there wholly or not at all, and one process at a time that makes them."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from novelgpt.settings.errors import UserError

_BLOCK = 1 << 20


def hash_file(path: Path) -> tuple[str, int]:
    """Hexadecimal sha256 and size in bytes."""
    digest, size = hashlib.sha256(), 0
    buffer = memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return digest.hexdigest(), size


def digest_of(value: Any) -> str:
    """Hexadecimal sha256 of what JSON can say."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_whole(path: Path, text: str) -> None:
    """Write a file that keeps its former content until it has the new one."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    sync(unfinished)
    unfinished.replace(path)
    sync(path.parent)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `folder` when the block ends; after an error, nothing is there.

    Where another process has made `folder` in the meantime, from the same inputs, that one stays.
    Its files are on disk before it gets its name, so that no crash of the machine leaves a name without its content.
    """
    # Hosts that share a disk may run processes of one number.
    unfinished = folder.with_name(f"{folder.name}.unfinished-{platform.node()}-{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        for path in unfinished.iterdir():
            sync(path)
        sync(unfinished)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
        sync(folder.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def folder_if_used(folder: Path) -> Iterator[None]:
    """Make a folder; after a UserError, those that were made and are still empty are gone again.

    Raises:
        UserError: it cannot be made, or what the block raises.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made: {error.strerror}", "name a folder you can write to") from error
    try:
        yield
    except UserError:
        for path in made:
            if not path.is_dir() or any(path.iterdir()):
                break
            path.rmdir()
        raise


def sync(path: Path) -> None:
    """Hand a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def only_run(out: Path) -> Iterator[None]:
    """Hold the lock of a folder that is there; the system lets go of it when this process ends, in whatever way.

    Raises:
        UserError: another run holds it, or the disk is full.
    """
    handle = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"another run is writing into {out}", "wait until it ends, or name another folder") from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{out}: the disk is full", "make room and run the same command again: what is done stays done"
        ) from error
    finally:
        os.close(handle)
