"""Which of several processes this is; one process where no launcher says otherwise."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed

from novelgpt.settings.errors import UserError
from novelgpt.settings.paths import ROOT


def is_first_process() -> bool:
    """Whether this is rank 0, the only one that prints and writes."""
    return os.environ.get("RANK", "0") == "0"


def is_first_on_host() -> bool:
    """Whether this is the rank that does on its host what needs to be done there once."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def in_process_group() -> bool:
    """Whether processes have met to work together; a launcher may start one alone, too."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def run_outside_group(module: str, *args: str) -> int:
    """Run a module's `main` in a process of its own, which is no rank, and return its exit status.

    For what transformers does in the first rank only, such as writing weights.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    return subprocess.run([sys.executable, "-m", module, *args], env=kept | {"PYTHONPATH": path}).returncode


def first_process_value(value: Any) -> Any:
    """What the first process has, on all of them."""
    if not in_process_group():
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def all_processes_values(value: Any) -> list[Any]:
    """What each process has, by rank, on all of them."""
    values = [value]
    if in_process_group():
        values *= torch.distributed.get_world_size()
        torch.distributed.all_gather_object(values, value)
    return values


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Raise a UserError of one rank on all of them; where several have one, that of the lowest rank.

    All ranks enter the block. Nothing within may wait for a rank that has left it with an error; other exceptions are
    raised on their own rank alone, immediately. Also decorates functions.
    """
    problem: UserError | None = None
    try:
        yield
    except UserError as error:
        problem = error
    for found in all_processes_values(problem):
        if found is not None:
            raise found


def leave_process_group(main: Callable[..., None]) -> Callable[..., None]:
    """Decorate a `main` so that its process leaves those that it works with before Python ends.

    Left to Python, gloo's threads may still let go of their last tensors while it ends, which aborts the process
    (PyTorch issue 190489): a run that has ended well would be reported as killed. NCCL has no such threads,
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
