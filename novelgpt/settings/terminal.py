"""Output on the terminal: text of any origin as lines that are neither control sequences nor markup.

File names, fields of files, answers of models and messages of servers may hold anything. Everything that the toolkit
prints goes through here or through `novelgpt.settings.console`; `ruff` refuses `print` and rich's Console elsewhere.
"""

from __future__ import annotations

import io
import logging
import os
import re
import select
import sys
import time
import traceback
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from novelgpt.settings.third_party import silence_libraries

# Unicode categories of characters that control a terminal, reverse text, or cannot be written as UTF-8.
STEERING = ("Cc", "Cf", "Cs", "Zl", "Zp")
# Of these, layout, and the joiners within emoji and within words of some scripts.
HARMLESS = "\n\t\u200c\u200d"
# Without a progress bar, a line shows the progress, at most this often.
SECONDS_BETWEEN_LINES = 15.0
GIGABYTE = 10**9
# Colours and weights, which transformers gives to what it logs.
_COLOURS = re.compile(r"(\x1b\[[0-9;]*m)")


def visible(text: str) -> str:
    """Return text whose characters that control a terminal or reverse text are written as their codes.

    >>> visible("a\\x1b[31m\\u202eb")
    'a<U+001B>[31m<U+202E>b'
    """
    if text.isprintable():
        return text
    steering = {
        character
        for character in set(text)
        if unicodedata.category(character) in STEERING and character not in HARMLESS
    }
    return text.translate({ord(character): f"<U+{ord(character):04X}>" for character in steering})


def one_line(text: str) -> str:
    r"""Return `visible` text whose line ends are codes as well, so that a field cannot start a line of its own.

    >>> one_line("a\nerror: b")
    'a<U+000A>error: b'
    """
    return visible(text).replace("\n", "<U+000A>")


def gigabytes(size: float) -> str:
    """Format a number of bytes as GB, or as MB where there are few."""
    return f"{size / GIGABYTE:.2f} GB" if size >= GIGABYTE / 10 else f"{size / 10**6:.1f} MB"


def counted(number: int, noun: str) -> str:
    """Format a number with its noun: 0 rows, 1 row, 2,000 rows.

    Args:
        number: of them.
        noun: for one of them, whose plural is regular (`file`, `train row`, `process`, `pair of books`).
    """
    counts, of, rest = noun.partition(" of ")
    ending = "" if number == 1 else "es" if counts.endswith("s") else "s"
    return f"{number:,} {counts}{ending}{of}{rest}"


def say(*lines: str, style: str | None = None, stderr: bool = False) -> None:
    """Print lines.

    Args:
        lines: one line each.
        style: of rich, as "yellow"; only a terminal shows it.
        stderr: print on standard error.
    """
    shown = "\n".join(map(one_line, lines))
    stream = sys.stderr if stderr else sys.stdout
    if style is not None:
        try:
            from rich.console import Console  # not before: the doctor runs without rich, too
        except ImportError:
            pass
        else:
            Console(file=stream, soft_wrap=True, markup=False, emoji=False, highlight=False).print(shown, style=style)
            return
    print(shown, file=stream, flush=True)


def say_text(text: str, end: str = "\n", stderr: bool = False) -> None:
    """Print text with its own line ends: an answer, or a chunk of one while it is generated."""
    shown = "\r\n".join(visible(line) for line in text.split("\r\n"))
    print(shown, end=end, file=sys.stderr if stderr else sys.stdout, flush=True)


def say_above_bars(line: str) -> None:
    """Print a line above the progress bars on the terminal."""
    from tqdm import tqdm  # not before: the doctor checks installations without it

    tqdm.write(one_line(line))


@contextmanager
def progress(total: int, what: str, unit: str) -> Iterator[Callable[[int], None]]:
    """Show a progress bar of `total` units on a terminal; where standard error is not one, occasional lines.

    Yields:
        a function to call with the number of units that were done.
    """
    from tqdm import tqdm  # not before: the doctor checks installations without it

    began = last_line = time.monotonic()
    done = 0
    with tqdm(total=total, desc=what, unit=unit, disable=None) as bar:

        def advance(count: int) -> None:
            nonlocal done, last_line
            done += count
            bar.update(count)
            now = time.monotonic()
            if bar.disable and now >= last_line + SECONDS_BETWEEN_LINES and done < total:
                last_line = now
                left = timedelta(seconds=round((now - began) / max(done, 1) * (total - done)))
                say(f"{what}: {done:,} of {total:,}, {left} left", stderr=True)

        yield advance


def leave_closed_output() -> bool:
    """Whether the reader of the output has ended; then nothing more is written there, also when Python ends."""
    closed = False
    for stream in (sys.stdout, sys.stderr):
        # Poll reports the end of a pipe's reader unasked. Without poll, on Windows, the error is believed.
        poll = select.poll() if "poll" in vars(select) else None
        if poll is not None:
            poll.register(stream.fileno(), 0)
        if poll is None or any(events & select.POLLERR for _, events in poll.poll(0)):
            closed = True
            with Path(os.devnull).open("wb") as nothing:
                os.dup2(nothing.fileno(), stream.fileno())
    return closed


class VisibleRecord(logging.LogRecord):
    """A record of a library, which may quote files, as names of tensors: of control sequences, only colours pass."""

    def getMessage(self) -> str:  # noqa: N802  logging's own name
        """The message, made visible but for colours."""
        parts = _COLOURS.split(super().getMessage())
        return "".join(part if number % 2 else visible(part) for number, part in enumerate(parts))


def guard_terminal() -> None:
    """Make what libraries log, warn of and raise visible; characters that the terminal lacks end no command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    logging.setLogRecordFactory(VisibleRecord)
    plain = warnings.formatwarning
    warnings.formatwarning = lambda *args, **options: visible(plain(*args, **options))
    sys.excepthook = lambda *error: say_text("".join(traceback.format_exception(*error)), end="", stderr=True)
    silence_libraries()
