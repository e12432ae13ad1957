"""A `python` for processes under test that has imported everything: what it runs is a fork of one that waits.

Of the time that a command of the toolkit takes on little data, most is that of importing torch, transformers and peft.
Tests drive the real scripts all the same; only the interpreter that these start is this one. It differs from a fresh
one in what libraries read from the environment when they are imported, and in the order of hashes.

`warm_environment()` gives the variables for a script, `start_warm()` is a process by itself. As a program, this file is
the process that waits, or with `--client` what stands as `python` in place of a fork: it hands over its words,
variables, folder, namespaces and open files, passes signals on, and ends as the fork does. A client that is killed
takes its fork along.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import gc
import io
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PRELOADED = (
    "pretrain.__main__", "finetune.__main__", "finetune_lora.__main__", "finetune_lora.merge", "predict.__main__",
    "predict.chat", "predict.score", "novelgpt.doctor", "novelgpt.model.tiny_random", "deepspeed",
    "matplotlib.pyplot", "tensorboard", "PIL.PngImagePlugin",
)  # fmt: skip
# Of a client, which its fork joins: its network, its file systems.
NAMESPACES = ("net", "mnt")
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class WarmProcess:
    """A fork of the process that waits.

    Args:
        address: socket of the process that waits.
        words: of its command line, behind `python`.
        variables: all of its environment.
        folder: where it works.
        files: open files that are its standard input, output and errors.

    Attributes:
        pid: of the fork.
    """

    def __init__(
        self,
        address: str,
        words: Sequence[str],
        variables: Mapping[str, str],
        folder: str | Path = ROOT,
        files: Sequence[int] = (0, 1, 2),
    ) -> None:
        self.connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.connection.connect(address)
        job = json.dumps({"words": list(words), "variables": dict(variables), "folder": str(folder)}).encode()
        with ExitStack() as stack:
            spaces = [stack.enter_context(Path("/proc/self/ns", name).open("rb")) for name in NAMESPACES]
            handed = [*files, *(space.fileno() for space in spaces)]
            socket.send_fds(self.connection, [_bytes(len(job))], handed)
        self.connection.sendall(job)
        self.pid = _number(_exactly(self.connection, 4))
        self.status: int | None = None

    def poll(self) -> int | None:
        """Its exit status, negative for a signal; None while it lives."""
        return self.wait(0)

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for its end, for so many seconds at most."""
        if self.status is None and select.select([self.connection], [], [], timeout)[0]:
            self.status = _number(_exactly(self.connection, 4))
            self.connection.close()
        return self.status

    def signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)


@functools.cache
def warm_server() -> tuple[str, Path]:
    """Address of the process that waits, and a folder as of a virtual environment; both go with the caller."""
    place = Path(tempfile.mkdtemp(prefix="warm-"))
    address = str(place / "socket")
    (place / "bin").mkdir()
    for program in Path(sys.executable).parent.iterdir():
        if not program.name.startswith(("python", "activate")):
            (place / "bin" / program.name).symlink_to(program)
    python = place / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -ISE "{__file__}" --client "{address}" "$@"\n')
    python.chmod(0o755)
    for stamp in Path(sys.prefix).glob("installed-*"):
        (place / stamp.name).touch()
    ready, signalled = os.pipe()
    server = subprocess.Popen(
        [sys.executable, __file__, address, str(python), str(signalled)],
        env=warm_variables(), cwd=ROOT, pass_fds=[signalled], stdin=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    os.close(signalled)

    def end() -> None:
        server.kill()
        server.wait()
        shutil.rmtree(place, ignore_errors=True)

    atexit.register(end)
    with os.fdopen(ready) as pipe:
        assert pipe.read() == "ready", "the Python that waits has ended"
    return address, place


def warm_environment() -> dict[str, str]:
    """VENV for a script: its Python is warm."""
    return {"VENV": str(warm_server()[1])}


def warm_python() -> str:
    """Path of a program that is used as `sys.executable`."""
    return str(warm_server()[1] / "bin" / "python")


def warm_variables() -> dict[str, str]:
    """As scripts/launch.sh has them, on a host without a GPU, with a thread a process."""
    variables = os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    # Another ninja than the environment's would build DeepSpeed's parts again.
    variables["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return variables | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def start_warm(words: Sequence[str], variables: Mapping[str, str], log: Path) -> WarmProcess:
    """A process with nothing to read, whose output and errors are added to a file.

    Args:
        words: of its command line, behind `python`.
        variables: beside `warm_variables()`.
        log: the file.
    """
    with log.open("ab") as printed, Path(os.devnull).open("rb") as nothing:
        files = [nothing.fileno(), printed.fileno(), printed.fileno()]
        return WarmProcess(warm_server()[0], words, warm_variables() | dict(variables), files=files)


def client(address: str, words: list[str]) -> None:
    """Stand for a fork that runs these words, and end as it does."""
    process = WarmProcess(address, words, os.environ, Path.cwd())
    for number in PASSED_ON:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, _: process.signal(number))
    status = process.wait()
    assert status is not None
    if status < 0:
        if -status not in (signal.SIGKILL, signal.SIGSTOP):  # whose effect is always the same
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


def serve(address: str, python: str, ready: int) -> list[str]:
    """Import everything, then wait for clients. Returns in each fork, with the words that it shall run."""
    before = dict(os.environ)
    for name in PRELOADED:
        __import__(name)
    gc.freeze()  # what is collected in a fork leaves all this alone, which would copy it
    own = {name: value for name, value in os.environ.items() if before.get(name) != value}
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers end unattended
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as door:
        door.bind(address)
        door.listen(64)
        os.write(ready, b"ready")
        os.close(ready)
        while True:
            readable, _, _ = select.select([door, 0], [], [])
            if 0 in readable:
                os._exit(0)  # the tests have ended
            connection, _ = door.accept()
            if os.fork() == 0:
                break
            connection.close()
    for number in (*PASSED_ON, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    size, handed, _, _ = socket.recv_fds(connection, 4, 3 + len(NAMESPACES))
    job: dict[str, Any] = json.loads(_exactly(connection, _number(size)))
    fork = os.fork()
    if fork:
        for file in handed:
            os.close(file)
        _keep(connection, fork)
    connection.close()
    for file, name in zip(handed[3:], NAMESPACES, strict=True):
        _enter(file, Path("/proc/self/ns", name))
    for number, file in enumerate(handed[:3]):
        os.dup2(file, number)
    for file in handed:
        os.close(file)
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update(own | job["variables"])
    sys.executable = python
    words: list[str] = job["words"]
    return words


def _enter(space: int, own: Path) -> None:
    """Join a namespace, unless it is the one that this process is in."""
    if os.fstat(space).st_ino != own.stat().st_ino and ctypes.CDLL(None, use_errno=True).setns(space, 0) != 0:
        raise OSError(ctypes.get_errno(), f"no way into {own.name}")


def _keep(connection: socket.socket, fork: int) -> None:
    """Tell which process it is and how it ends; kill it when its client is gone."""
    for number in PASSED_ON:
        signal.signal(number, signal.SIG_IGN)
    os.close(1)
    os.close(2)
    end = os.pidfd_open(fork)
    with contextlib.suppress(OSError):
        connection.sendall(_bytes(fork))
        if end not in select.select([connection, end], [], [])[0]:
            os.kill(fork, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1])
    with contextlib.suppress(OSError):
        connection.sendall(_bytes(status))
    os._exit(0)


def _bytes(number: int) -> bytes:
    return number.to_bytes(4, "big", signed=True)


def _number(four: bytes) -> int:
    return int.from_bytes(four, "big", signed=True)


def _exactly(connection: socket.socket, count: int) -> bytes:
    read = b""
    while len(read) < count:
        part = connection.recv(count - len(read))
        if not part:
            raise ConnectionError("the Python that waits is gone")
        read += part
    return read


def run(words: list[str], real: str) -> None:
    """What `python` does with these words, in this process."""
    os.setsid()
    for name in ("stdout", "stderr"):
        raw = io.FileIO(getattr(sys, name).fileno(), "w", closefd=False)
        setattr(sys, name, io.TextIOWrapper(raw, encoding="utf-8", errors="replace", write_through=True))
    words = words[1:] if words[0] == "-u" else words  # nothing is buffered above
    script = words[0].endswith(".py")
    if words[0] != "-m" and not script:
        os.execve(real, [real, *words], os.environ)
    sys.modules["torch"].set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))))
    first = str(Path(words[0]).resolve().parent) if script else str(Path.cwd())
    sys.path[0:1] = [first, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    if script:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
        return
    sys.argv = words[1:]
    for name in (words[1], f"{words[1]}.__main__"):  # of which another copy runs
        if not hasattr(sys.modules.get(name), "__path__"):
            sys.modules.pop(name, None)
    runpy.run_module(words[1], run_name="__main__", alter_sys=True)


def end_after(words: list[str], real: str) -> None:
    """Run the words, and end as `python` does."""
    status: object = None
    try:
        run(words, real)
    except SystemExit as error:
        status = error.code
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
        traceback.print_exc()
    except BaseException:
        status = 1
        traceback.print_exc()
    if isinstance(status, str):
        print(status, file=sys.stderr)
    threading._shutdown()
    atexit._run_exitfuncs()
    # Not by sys.exit: to take all that was imported apart would copy it first.
    os._exit(status if isinstance(status, int) else int(status is not None))


if __name__ == "__main__":
    if sys.argv[1] == "--client":
        client(sys.argv[2], sys.argv[3:])
    interpreter = sys.executable
    end_after(serve(sys.argv[1], sys.argv[2], int(sys.argv[3])), interpreter)
