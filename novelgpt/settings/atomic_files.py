"""Atomic writes: files and folders appear under their names complete and synced, or not at all; and their hashes."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from novelgpt.settings.errors import UserError
from novelgpt.settings.locks import locked, make_and_lock, remove_empty, unlock

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


def hash_json(value: Any) -> str:
    """Hexadecimal sha256 of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def atomic_write(path: Path, content: str | bytes) -> None:
    """Write a file that keeps its former content until it has the new one, also where the disk is full.

    Processes that write it at once take turns.
    """
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """`atomic_write` for content that need not be in memory at once: yield a file to write it to.

    It gets the name `path` when the block ends, and is removed after an error.
    """
    unfinished = path.with_name(f"{path.name}.unfinished")
    with locked(unfinished, wait=True):
        try:
            with unfinished.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                unfinished.unlink()
            raise
    sync(path.parent)


@contextmanager
def atomic_folder(folder: Path, keep_existing: bool = False) -> Iterator[Path]:
    """Yield a folder to fill, which becomes `folder` when the block ends; after an error, nothing is left.

    It is filled beside `folder`, on the same disk, and its files are on the disk before it gets its name, so that no
    crash of the machine leaves a name without its content.

    Args:
        folder: is missing or empty.
        keep_existing: where another process has filled `folder` in the meantime, from the same inputs, that one stays.

    Raises:
        UserError: `folder` was filled in the meantime, or a disk is mounted there.
        OSError: it cannot be made.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f"{folder.name}.unfinished-"
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=prefix, ignore_cleanup_errors=True) as work:
        unfinished = Path(work, folder.name)
        unfinished.mkdir()
        yield unfinished
        for path in unfinished.iterdir():
            sync(path)
        sync(unfinished)
        try:
            if os.name == "nt" and folder.is_dir():  # no folder takes the place of another there
                folder.rmdir()
            unfinished.rename(folder)
        except OSError as error:
            if not keep_existing or not folder.is_dir():
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY):
                    raise
                taken = "is where a disk is mounted" if error.errno == errno.EBUSY else "was filled by something else"
                raise UserError(f"{folder} {taken}", "name a new folder") from error
        sync(folder.parent)


@contextmanager
def new_output_folder(output: Path) -> Iterator[Path]:
    """`atomic_folder` for a folder that a user names: until the block ends, an empty, locked folder holds its place.

    Raises:
        UserError: `output` exists and is not an empty folder, another process fills it, or nothing can be written where
            it is to lie; as well as those of `atomic_folder`.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} is not empty", "name a new folder")
    target = Path(os.path.realpath(output))  # of a link, which stays
    with ExitStack() as stack:
        try:
            handle, made = make_and_lock(target)
            stack.callback(unlock, handle)
            stack.callback(remove_empty, made)  # where it stays empty
            unfinished = stack.enter_context(atomic_folder(target))
        except BlockingIOError as error:
            raise UserError(f"another command fills {output}", "wait for its end, or name another folder") from error
        except OSError as error:
            raise UserError(f"{output} cannot be made: {error.strerror}", "name a folder you can write to") from error
        yield unfinished


@contextmanager
def exclusive_folder(out: Path, inside: Path) -> Iterator[None]:
    """Make a folder, with another one inside, and lock it for the block.

    After a UserError, the folders that were made and are still empty are removed.

    Raises:
        UserError: another run holds it, it cannot be made, or the disk is full; or what the block raises.
    """
    try:
        handle, made = make_and_lock(out)
    except BlockingIOError:
        raise UserError(f"another run is writing into {out}", "wait until it ends, or name another folder") from None
    except OSError as error:
        raise UserError(f"{out} cannot be made: {error.strerror}", "name a folder you can write to") from error
    try:
        made = [*(path for path in (inside, *inside.parents) if not path.exists()), *made]
        inside.mkdir(parents=True, exist_ok=True)
        yield
    except UserError:
        remove_empty(made)
        raise
    except OSError as error:
        remove_empty(made)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{out}: the disk is full", "make room and run the same command again: what is done stays done"
        ) from error
    finally:
        unlock(handle)


def follow_umask(path: Path) -> None:
    """Give a file, or a folder with all that is in it, the mode that the user's umask gives to new ones.

    Libraries that write to a temporary file first, as safetensors does, leave one that only its owner can read.
    """
    umask = os.umask(0o077)
    os.umask(umask)
    for place in (path, *path.rglob("*")) if path.is_dir() else (path,):
        if not place.is_symlink():
            place.chmod((0o777 if place.is_dir() else 0o666) & ~umask)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk; Windows opens no folders, and files only for writing."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
