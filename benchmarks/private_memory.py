"""Private memory (RssAnon) of a command and of all that it starts, sampled while it runs."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SAMPLING_SECONDS = 0.05
# What a shell or a slot of a queue may have set, and a user has not.
NOT_THE_USERS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TOKENIZERS_PARALLELISM", "PYTHONPATH")


@dataclass
class Usage:
    """What a command took.

    Attributes:
        seconds: until it ended.
        reached: seconds until what it was watched for; None where that did not come.
        own: largest RssAnon of its first process, in bytes.
        child: that of the largest of the others. Pages that a fork shares with its parent count in both.
        tree: largest sum over all processes, likewise.
        ranks: largest sum over the processes that train, which a launcher starts; 0 without one.
    """

    seconds: float = 0.0
    reached: float | None = None
    own: int = 0
    child: int = 0
    tree: int = 0
    ranks: int = 0


def run_measured(
    command: Sequence[str],
    folder: Path,
    log: Path,
    variables: Mapping[str, str],
    reached: Callable[[], bool] = lambda: False,
) -> Usage:
    """Run a command to its end.

    Args:
        command: with its arguments.
        folder: where it runs.
        log: takes what it prints.
        variables: of the environment, beside the user's.
        reached: is asked until it is true, and gives `Usage.reached`.

    Raises:
        SystemExit: it failed, with the end of what it printed.
    """
    environment = {name: value for name, value in os.environ.items() if name not in NOT_THE_USERS}
    usage = Usage()
    start = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=environment | dict(variables), stdout=output, stderr=output, start_new_session=True
        )
        try:
            while process.poll() is None:
                _sample(process.pid, usage)
                if usage.reached is None and reached():
                    usage.reached = time.perf_counter() - start
                time.sleep(SAMPLING_SECONDS)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # where it was not waited for
    usage.seconds = time.perf_counter() - start
    if usage.reached is None and reached():
        usage.reached = usage.seconds
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\n" + log.read_text(encoding="utf-8", errors="replace")[-3000:])
    return usage


def _sample(pid: int, usage: Usage) -> None:
    own = private_bytes(pid)
    usage.own = max(usage.own, own)
    tree, ranks = own, 0
    waiting = [(child, False) for child in _children(pid)]
    while waiting:
        child, is_of_rank = waiting.pop()
        size = private_bytes(child)
        usage.child = max(usage.child, size)
        tree += size
        is_rank = not is_of_rank and _is_rank(child)
        ranks += size if is_rank else 0
        waiting += [(further, is_of_rank or is_rank) for further in _children(child)]
    usage.tree, usage.ranks = max(usage.tree, tree), max(usage.ranks, ranks)


def private_bytes(pid: int) -> int:
    """RssAnon of a process; 0 where it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    lines = (line.split() for line in status.splitlines() if line.startswith("RssAnon:"))
    return next((int(words[1]) * 1024 for words in lines), 0)


def _children(pid: int) -> list[int]:
    """Processes that a process has started; none where it has ended."""
    try:
        threads = [thread.name for thread in Path(f"/proc/{pid}/task").iterdir()]
        texts = [Path(f"/proc/{pid}/task/{name}/children").read_text(encoding="utf-8") for name in threads]
    except OSError:
        return []
    return [int(word) for word in " ".join(texts).split()]


def _is_rank(pid: int) -> bool:
    """Whether a process trains as one of several, which a launcher has told which one it is."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(one.startswith(b"RANK=") for one in variables) and b"finetune" in words
