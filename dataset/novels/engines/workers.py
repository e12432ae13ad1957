"""One function over many files, in processes of which each may die without taking the others with it."""

from __future__ import annotations

import multiprocessing
import multiprocessing.resource_tracker
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait as wait_for_end
from pathlib import Path

from novelgpt.settings.errors import UserError


def map_files(function: Callable[[Path], Path], files: Sequence[Path], workers: int) -> Iterator[tuple[Path, Path]]:
    """(file, what `function` makes of it), in the order in which they are done.

    Each process is a pool of its own: the one that died is known, and with it the file that it was at. After a failure
    the files that other processes are at are finished, and no further one is begun.

    Args:
        function: can be pickled, as all it raises.
        files: begun in this order; the largest first keeps all processes busy to the end.
        workers: how many processes.

    Raises:
        UserError: a process died; names the file.
        Exception: the first that `function` raised.
    """
    if not files:
        return
    # Never fork: this process may have threads, and their locks would be copied as they stand.
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload(["dataset.novels.prepare"])
    count = min(workers, len(files))
    pools = [ProcessPoolExecutor(1, mp_context=context, initializer=_start_worker) for _ in range(count)]
    waiting = iter(files)
    running: dict[Future[Path], tuple[ProcessPoolExecutor, Path]] = {}
    failures: list[BaseException] = []

    def begin(pool: ProcessPoolExecutor) -> None:
        file = next(waiting, None)
        if file is not None:
            running[pool.submit(function, file)] = (pool, file)

    try:
        with _interrupts_blocked():
            for pool in pools:
                begin(pool)
        while running:
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                pool, file = running.pop(done)
                failure = done.exception()
                if failure is None:
                    yield file, done.result()
                else:
                    failures.append(_worker_died(file) if isinstance(failure, BrokenProcessPool) else failure)
                if not failures:
                    begin(pool)
        if failures:
            raise failures[0]
    except BaseException:
        _end_workers()
        raise
    finally:
        for pool in pools:
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """A process that starts has the signals blocked that its parent has: until it ignores Ctrl-C, it never sees one."""
    if "pthread_sigmask" not in vars(signal):  # Windows
        yield
        return
    multiprocessing.resource_tracker.ensure_running()  # which would unblock them here
    signals = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, signals)


def _worker_died(file: Path) -> UserError:
    return UserError(
        f"{file}: the process that prepared it was killed; too little memory is the usual reason",
        "run the same command again (files that are done stay done), with fewer --workers, or take this file out",
    )


def _end_workers() -> None:
    """What they were at would keep this process from ending."""
    for process in multiprocessing.active_children():
        process.terminate()


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        wait_for_end([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
