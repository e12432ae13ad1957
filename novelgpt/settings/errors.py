"""Errors that a user can cause: one line of cause, one of remedy, exit status 2."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

from novelgpt.settings.external_ranks import (
    is_external_rank,
    is_loss_of_a_rank,
    quieten_further_ranks,
    wait_for_launcher,
)
from novelgpt.settings.signals import hear_interrupts
from novelgpt.settings.terminal import guard_terminal, leave_closed_output, say, visible

# The module of panics in Rust libraries, which are not Exceptions.
RUST_PANICS = "pyo3_runtime"
# 128 + SIGPIPE, as of other programs whose reader has ended.
OUTPUT_CLOSED = 141


class UserError(Exception):
    """A problem that the user can fix.

    Args:
        cause: what is wrong, in one line, naming file, line and field where there are any.
        remedy: what to do about it, in one line.
    """

    def __init__(self, cause: str, remedy: str) -> None:
        self.cause = visible(" ".join(cause.split()))
        self.remedy = visible(" ".join(remedy.split()))
        super().__init__(self.cause)

    def __reduce__(self) -> tuple[type[UserError], tuple[str, str]]:
        """Let processes pass it to each other: an exception is otherwise rebuilt from its message alone."""
        return UserError, (self.cause, self.remedy)


def reason_of(error: BaseException) -> str:
    """Return the first line of a library's error, with the next one where the first only introduces it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].rstrip().endswith(":") else 1])


def exit_on_user_error(main: Callable[..., None]) -> Callable[..., None]:
    """Decorate a `main` so that a UserError ends in two lines on standard error and exit status 2.

    Of several ranks, novelgpt.launch shows the output of the first, and of the others where it matters; under other
    launchers, ranks wait for the one whose error it is. Ctrl-C ends in one line and exit status 130, the loss of
    another rank in two lines and 1. Where the reader of the output has ended, as `head` does, so does this process,
    silently.
    """

    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None) -> None:
        hear_interrupts()
        guard_terminal()
        quieten_further_ranks()
        try:
            main(argv)
        except UserError as error:
            wait_for_launcher(refused=True)
            say(f"error: {error.cause}", f"  fix: {error.remedy}", stderr=True)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            if not is_external_rank() or os.environ["RANK"] == "0":
                say("stopped by Ctrl-C", stderr=True)
            raise SystemExit(130) from None
        except BrokenPipeError:
            if not leave_closed_output():
                raise
            raise SystemExit(OUTPUT_CLOSED) from None
        except BaseException as error:
            if is_loss_of_a_rank(error):
                wait_for_launcher(refused=False)
                say(
                    f"error: another rank has ended, or cannot be reached: {reason_of(error)}",
                    "  fix: see what it printed, here or on its host; the same command resumes from the newest "
                    "checkpoint",
                    stderr=True,
                )
                raise SystemExit(1) from None
            if type(error).__module__ != RUST_PANICS:
                raise
            # The patterns of a tokenizer.json may exceed the matcher's limits on some texts.
            say(
                f"error: the tokenizer fails on a text: {reason_of(error)}",
                "  fix: see the patterns in its tokenizer.json, or take that of the model's own authors",
                stderr=True,
            )
            raise SystemExit(2) from None

    return wrapped
