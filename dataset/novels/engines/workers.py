"""One function over many files, in processes each of which may die without taking the others with it."""

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
    """Yield (file, result of `function`), in the order in which they are done.

    Each process is a pool of its own, so that a process that died, and the file it was processing, are known. After a
    failure the files that other processes are processing are finished, and no further one is started.

    Args:
        function: can be pickled, like everything it raises.
        files: started in this order; the largest first keeps all processes busy to the end.
        workers: number of processes.

    Raises:
        UserError: a process died; names the file.
        Exception: the first that `function` raised.
    """
    if not files:
        return
    # Never fork: this process may have threads, and their locks would be copied in their current state.
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload(["dataset.novels.prepare"])
    pools = [ProcessPoolExecutor(1, mp_context=context, initializer=_start_worker) for _ in files[:workers]]
    waiting = iter(files)
    running: dict[Future[Path], tuple[ProcessPoolExecutor, Path]] = {}
    failures: list[BaseException] = []

    def start_next(pool: ProcessPoolExecutor) -> None:
        file = next(waiting, None)
        if file is not None:
            running[pool.submit(function, file)] = (pool, file)

    try:
        with _interrupts_blocked():
            for pool in pools:
                start_next(pool)
        while running:
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                pool, file = running.pop(done)
                failure = done.exception()
                if failure is None:
                    yield file, done.result()
                elif isinstance(failure, BrokenProcessPool):
                    failures.append(
                        UserError(
                            f"{file}: the process that prepared it was killed; too little memory is the usual reason",
                            "run the same command again (files that are done stay done), with fewer --workers, or take "
                            "this file out",
                        )
                    )
                else:
                    failures.append(failure)
                if not failures:
                    start_next(pool)
        if failures:
            raise failures[0]
    except BaseException:
        for process in multiprocessing.active_children():  # what they are doing would keep this process from ending
            process.terminate()
        raise
    finally:
        for pool in pools:
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Block Ctrl-C for processes that start in the block: they inherit this, and so see none until they ignore it."""
    if "pthread_sigmask" not in vars(signal):  # Windows
        yield
        return
    multiprocessing.resource_tracker.ensure_running()  # which would unblock them here
    signals = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, signals)


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        wait_for_end([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
