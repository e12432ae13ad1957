"""Which of several processes this is; one process where no launcher says otherwise."""

from __future__ import annotations

import os
from typing import Any

import torch.distributed


def is_first_process() -> bool:
    """Whether this is rank 0, the only one that prints and writes."""
    return os.environ.get("RANK", "0") == "0"


def first_process_value(value: Any) -> Any:
    """What the first process has, on all of them."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]
