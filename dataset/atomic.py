"""Folders that are there wholly or not at all, and one process at a time that makes them."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from novelgpt.settings.errors import UserError
from novelgpt.settings.locks import let_go, make_and_hold, remove_empty
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
    # Hosts that share a disk, and containers of one name, may run processes of one number.
    unfinished = folder.with_name(f"{folder.name}.unfinished-{uuid.uuid4().hex}")
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
def only_run(out: Path, inside: Path) -> Iterator[None]:
    """Make a folder, with another one inside, and hold it for the block.

    The system lets go of it when this process ends, in whatever way. After a UserError, the folders that were made and
    are still empty are gone again.

    Raises:
        UserError: another run holds it, it cannot be made, or the disk is full; or what the block raises.
    """
    try:
        handle, made = make_and_hold(out)
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
        let_go(handle)
