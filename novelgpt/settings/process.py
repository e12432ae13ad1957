"""Which of several processes this is; one process where no launcher says otherwise."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch.distributed


def is_first_process() -> bool:
    """Whether this is rank 0, the only one that prints and writes."""
    return os.environ.get("RANK", "0") == "0"


def in_process_group() -> bool:
    """Whether processes have met to work together; a launcher may start one alone, too."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def first_process_value(value: Any) -> Any:
    """What the first process has, on all of them."""
    if not in_process_group():
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def leave_process_group(main: Callable[..., None]) -> Callable[..., None]:
    """Decorate a `main` so that its process leaves those that it works with before Python ends.

    Left to Python, gloo's threads may still let go of their last tensors while it ends, which aborts the process
    (PyTorch issue 190489): a run that has ended well would be told as one that was killed. NCCL has no such threads,
    and waits for the others, who may wait for this one after an error; then it is left alone. Who makes a group of gloo
    beside NCCL's ends it.
    """

    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None) -> None:
        ended_well = False
        try:
            main(argv)
            ended_well = True
        finally:
            if in_process_group() and (ended_well or torch.distributed.get_backend() == "gloo"):
                torch.distributed.destroy_process_group()

    return wrapped
