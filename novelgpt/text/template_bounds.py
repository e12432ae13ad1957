"""Chat templates are programs that lie with a model: they are run within bounds of time, memory and output.

Transformers runs them in a sandbox that reaches no files, but lets them loop for ever or double a text forty times.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from novelgpt.settings.errors import UserError

try:
    import resource
except ImportError:  # Windows
    HAS_LIMITS = False
else:
    # A fork of a process with threads is safe to render in on Linux; elsewhere, memory cannot be bound either.
    HAS_LIMITS = sys.platform == "linux"

# Of the processor; templates take milliseconds.
TRIAL_SECONDS = 5
RENDER_SECONDS = 20
# In which the process of a trial ends for certain, on a machine that does other things as well.
TRIAL_WAIT = 120
TRIAL_MEMORY = 1 << 30
# Characters that are written whatever the messages, and for each character of them.
MOST_OWN_CHARACTERS, MOST_CHARACTERS_EACH = 200_000, 50
ASKED = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}, {"role": "user", "content": "再问"}]
TRIALS = (ASKED, ASKED[:2], [{"role": "system", "content": "说明"}, *ASKED])
REMEDY = "put the model's own chat_template.jinja beside the weights"

# Templates of this process that were tried.
_known_to_end: set[str] = set()


class _OverrunError(Exception):
    """A template took more time than it may."""


def render_template(tokenizer: PreTrainedTokenizerBase, messages: list[Any], **variables: Any) -> str:
    """What the tokenizer's chat template makes of messages.

    Raises:
        UserError: it takes too long or writes too much; whatever else it raises is raised as it is.
    """
    try:
        with _processor_time(RENDER_SECONDS):
            text = tokenizer.apply_chat_template(messages, tokenize=False, **variables)
    except _OverrunError:
        raise UserError(f"the chat template has not ended after {RENDER_SECONDS} s", REMEDY) from None
    assert isinstance(text, str)
    given = len(str(messages)) + len(str(variables))
    if len(text) > MOST_OWN_CHARACTERS + MOST_CHARACTERS_EACH * given:
        raise UserError(f"the chat template writes {len(text):,} characters for messages of {given:,}", REMEDY)
    return text


def check_template_ends(tokenizer: PreTrainedTokenizerBase) -> None:
    """Try the chat template on short conversations, in a process that is ended where it does not end by itself.

    On other systems than Linux it is tried in this process, without a bound of memory.

    Raises:
        UserError: it does not, or takes too much memory, or writes too much.
    """
    try:
        text = tokenizer.get_chat_template() if tokenizer.chat_template else ""
    except ValueError:  # several templates, of which `settle_template` tells
        return
    if text in _known_to_end:
        return
    if text and not (_ends(tokenizer) if HAS_LIMITS else _within_bounds(tokenizer)):
        raise UserError(
            f"the chat template does not come to an end within {TRIAL_SECONDS} s, {TRIAL_MEMORY >> 30} GiB and "
            f"{MOST_OWN_CHARACTERS:,} characters on a conversation of a few words",
            REMEDY,
        )
    _known_to_end.add(text)


def _ends(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the trial ends well. One that cannot be made out is left to the bounds of each rendering."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads that a fork lacks; none is needed there
        child = os.fork()
    if child == 0:
        _try(tokenizer)
    os.close(writer)
    try:
        ended, _, _ = select.select([reader], [], [], TRIAL_WAIT)
    finally:
        os.close(reader)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    return not ended or status == 0


def _try(tokenizer: PreTrainedTokenizerBase) -> None:
    """In a process of its own: render, and end it with status 0 where nothing was out of bounds."""
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


def _within_bounds(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether all trials end, with texts of a sensible length."""
    for messages in TRIALS:
        for thinking in (False, True):
            question = messages[-1]["role"] == "user"
            try:
                with _processor_time(TRIAL_SECONDS):
                    text = tokenizer.apply_chat_template(
                        messages, tokenize=False, add_generation_prompt=question, enable_thinking=thinking
                    )
            except (_OverrunError, MemoryError, RecursionError):
                return False
            except Exception:  # what a template refuses is no matter of bounds
                continue
            if len(text) > MOST_OWN_CHARACTERS:
                return False
    return True


@contextlib.contextmanager
def _processor_time(seconds: float) -> Iterator[None]:
    """Raise _OverrunError within once the process has computed for so long. Other threads than the first are not bound.

    By the clock that stands still while others compute: a machine that is busy makes no template endless.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise _OverrunError

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
    """Raise _OverrunError within after so long by the clock: from another thread, between two steps of Python."""
    thread = ctypes.c_ulong(threading.get_ident())
    raise_there = ctypes.pythonapi.PyThreadState_SetAsyncExc
    timer = threading.Timer(seconds, raise_there, (thread, ctypes.py_object(_OverrunError)))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        raise_there(thread, None)  # one that has not been raised yet
