"""Bounds of time, memory and output for chat templates, which are programs that come with a model.

Transformers runs them in a sandbox that reaches no files, but lets them loop forever or double a text forty times.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import select
import signal
import sys
import threading
import warnings
from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from novelgpt.settings.errors import UserError

try:
    import resource
except ImportError:  # Windows
    HAS_LIMITS = False
else:
    # A fork of a process with threads is safe to render in on Linux; elsewhere, memory cannot be bounded either.
    HAS_LIMITS = sys.platform == "linux"

# Of processor time; templates take milliseconds.
TRIAL_SECONDS = 5
RENDER_SECONDS = 20
# In which the process of a trial ends for certain, on a machine that is busy with other work.
TRIAL_WAIT = 120
TRIAL_MEMORY = 1 << 30
# Characters that a template may write whatever the messages, and for each character of them.
MAX_OWN_CHARACTERS, MAX_CHARACTERS_EACH = 200_000, 50
ASKED = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}, {"role": "user", "content": "再问"}]
TRIALS = (ASKED, ASKED[:2], [{"role": "system", "content": "说明"}, *ASKED])
REMEDY = "put the model's own chat_template.jinja beside the weights"

# Templates that this process has tried.
_known_to_end: set[str] = set()


class OverrunError(Exception):
    """A template took more time than it may."""


def check_template_ends(tokenizer: PreTrainedTokenizerBase) -> None:
    """Try the chat template on short conversations, in a process that is killed if it does not end by itself.

    On other systems than Linux it is tried in this process, without a bound on memory.

    Raises:
        UserError: it does not end, or takes too much memory, or writes too much.
    """
    try:
        text = tokenizer.get_chat_template() if tokenizer.chat_template else ""
    except ValueError:  # several templates, which `settle_template` reports
        return
    if text in _known_to_end:
        return
    if text and not (_ends(tokenizer) if HAS_LIMITS else _within_bounds(tokenizer)):
        raise UserError(
            f"the chat template does not come to an end within {TRIAL_SECONDS} s, {TRIAL_MEMORY >> 30} GiB and "
            f"{MAX_OWN_CHARACTERS:,} characters on a conversation of a few words",
            REMEDY,
        )
    _known_to_end.add(text)


def _ends(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the trial ends well. An undecided one is left to the bounds of each rendering."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads that a fork lacks; none is needed there
        child = os.fork()
    if child == 0:
        status = 1
        try:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGXCPU):
                signal.signal(number, signal.SIG_DFL)
            with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123  as little as possible after a fork
                held = int(file.read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_CPU, (TRIAL_SECONDS, TRIAL_SECONDS + 1))
            resource.setrlimit(resource.RLIMIT_AS, (held + TRIAL_MEMORY, held + TRIAL_MEMORY))
            status = 0 if _within_bounds(tokenizer) else 1
        finally:
            os._exit(status)
    os.close(writer)
    try:
        ended, _, _ = select.select([reader], [], [], TRIAL_WAIT)
    finally:
        os.close(reader)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    return not ended or status == 0


def _within_bounds(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether all trials end, with texts of a sensible length."""
    for messages, thinking in itertools.product(TRIALS, (False, True)):
        asks = messages[-1]["role"] == "user"
        try:
            with processor_time(TRIAL_SECONDS):
                text = tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=asks, enable_thinking=thinking
                )
        except (OverrunError, MemoryError, RecursionError):
            return False
        except Exception:  # what a template refuses has nothing to do with bounds
            continue
        if len(text) > MAX_OWN_CHARACTERS:
            return False
    return True


@contextlib.contextmanager
def processor_time(seconds: float) -> Iterator[None]:
    """Raise OverrunError inside once the process has computed for so long. Only the main thread is bounded.

    Time in which other processes compute does not count: on a busy machine, too, templates that end pass.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise OverrunError

    if "SIGVTALRM" not in vars(signal):  # Windows
        with _seconds(seconds):
            yield
        return
    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextlib.contextmanager
def _seconds(seconds: float) -> Iterator[None]:
    """Raise OverrunError inside after so much wall-clock time: from another thread, between two steps of Python."""
    thread = ctypes.c_ulong(threading.get_ident())
    raise_there = ctypes.pythonapi.PyThreadState_SetAsyncExc
    timer = threading.Timer(seconds, raise_there, (thread, ctypes.py_object(OverrunError)))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        raise_there(thread, None)  # one that has not been raised yet
