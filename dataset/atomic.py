"""Folders that are there wholly or not at all, and one process at a time that makes them."""

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
from novelgpt.settings.whole_files import sync


def digest_of(value: Any) -> str:
    """Hexadecimal sha256 of what JSON can say."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


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
