"""The signals that ask a run to end, and Ctrl-C while nothing is running yet."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# SIGHUP comes when the terminal is gone, SIGUSR1 from Slurm ahead of the time limit. Windows has neither.
STOP_SIGNALS: tuple[signal.Signals, ...] = tuple(
    vars(signal)[name] for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if name in vars(signal)
)
# Of these, a second one ends the run at once.
IMPATIENT_SIGNALS = (signal.SIGINT, signal.SIGTERM)

_began = False  # whether this process is a command of this toolkit


def end_at_interrupts() -> None:
    """Let Ctrl-C end this process at once, with the word and the status of `exit_on_user_error`.

    For the time in which libraries are imported: nothing is there yet that could be left behind, and within their
    imports an interrupt becomes a traceback, an ImportError or nothing at all. A parent's SIG_IGN stays.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def hear_interrupts() -> None:
    """From here on, Ctrl-C raises KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def importing() -> Iterator[None]:
    """Around imports that wait until they are needed: Ctrl-C ends the process at once, as at the start.

    Only in a process that began so, not in one that calls a command as a function.
    """
    if _began:
        end_at_interrupts()
    try:
        yield
    finally:
        hear_interrupts()


def begin_command() -> None:
    """Called once, when `python -m` begins to import one of the rooms."""
    global _began
    _began = True
    end_at_interrupts()


def _end(number: int, _: FrameType | None) -> None:
    if os.environ.get("RANK", "0") == "0":
        os.write(2, b"stopped by Ctrl-C\n")
    os._exit(128 + number)
