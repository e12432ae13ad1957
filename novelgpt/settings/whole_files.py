"""Files that are there wholly or not at all, and what they hold as a hash."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

from novelgpt.settings.locks import held

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


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file that keeps its former content until it has the new one, also where the disk is full.

    Of processes that write it at once, one comes after the other.
    """
    unfinished = path.with_name(f"{path.name}.unfinished")
    with held(unfinished, wait=True):
        try:
            with unfinished.open("wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                unfinished.unlink()
            raise
    sync(path.parent)


def follow_umask(path: Path) -> None:
    """Give a file, or a folder with all that is in it, the mode that the user's umask gives to new ones.

    Libraries that write to a temporary file first, as safetensors does, leave one that its owner alone can read.
    """
    umask = os.umask(0o077)
    os.umask(umask)
    for place in (path, *path.rglob("*")) if path.is_dir() else (path,):
        if not place.is_symlink():
            place.chmod((0o777 if place.is_dir() else 0o666) & ~umask)


def sync(path: Path) -> None:
    """Hand a file, or the names in a folder, to the disk; Windows opens no folders, and files only for writing."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
