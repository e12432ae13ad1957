"""The signals that ask a run to end, and Ctrl-C during imports."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# SIGHUP comes when the terminal is closed, SIGUSR1 from Slurm ahead of the time limit. Windows has neither.
STOP_SIGNALS: tuple[signal.Signals, ...] = tuple(
    vars(signal)[name] for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if name in vars(signal)
)
# Of these, a second one ends the run immediately.
IMPATIENT_SIGNALS = (signal.SIGINT, signal.SIGTERM)

_began = False  # whether this process is a command of this toolkit


def end_at_interrupts() -> None:
    """Let Ctrl-C end this process at once, with the message and the status of `exit_on_user_error`.

    For the time of imports: nothing can be left behind yet, and within imports an interrupt becomes a traceback, an
    ImportError or is lost. A parent's SIG_IGN stays.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def hear_interrupts() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def importing() -> Iterator[None]:
    """Let Ctrl-C end the process at once during imports that are made when needed.

    Only in a process that runs a command, not in one that calls it as a function.
    """
    if _began:
        end_at_interrupts()
    try:
        yield
    finally:
        hear_interrupts()


def begin_command() -> None:
    """Mark this process as a command; called once, when `python -m` starts to import a room."""
    global _began
    _began = True
    end_at_interrupts()


def _end(number: int, _: FrameType | None) -> None:
    if os.environ.get("RANK", "0") == "0":
        os.write(2, b"stopped by Ctrl-C\n")
    os._exit(128 + number)
