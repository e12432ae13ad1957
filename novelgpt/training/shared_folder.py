"""Several hosts write into one run folder: whether they see the same one."""

from __future__ import annotations

import os
import socket
import tempfile
import time
from pathlib import Path

from torch import distributed

from novelgpt.settings.errors import UserError
from novelgpt.settings.process import first_process_value, in_process_group, is_first_process

# Network file systems show new files late where a host has looked before.
WAIT_SECONDS = 30.0


def check_shared_folder(folder: Path) -> None:
    """Try, on several hosts, whether all see what the first one writes where `folder` is or will be. All ranks call it.

    Raises:
        UserError: names the hosts that do not, on all ranks.
    """
    if not in_process_group():
        return
    if distributed.get_world_size() == int(os.environ.get("LOCAL_WORLD_SIZE", distributed.get_world_size())):
        return
    parent = next(path for path in (folder, *folder.parents) if path.is_dir())
    token = ""
    if is_first_process():
        descriptor, token = tempfile.mkstemp(prefix=".shared-", dir=parent)
        os.close(descriptor)
    token = first_process_value(token)
    try:
        answers: list[str | None] = [None] * distributed.get_world_size()
        distributed.all_gather_object(answers, None if _appears(Path(token)) else socket.gethostname())
    finally:
        if is_first_process():
            Path(token).unlink()
    blind = sorted({answer for answer in answers if answer is not None})
    if blind:
        raise UserError(
            f"{', '.join(blind)} does not see what the first host writes into {Path(token).parent}",
            f"name an --output_dir on a file system that all hosts share, in place of {folder}",
        )


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        if path.parent.is_dir() and path in path.parent.iterdir():
            return True
        time.sleep(0.5)
    return False
