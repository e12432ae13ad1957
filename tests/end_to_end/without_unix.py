"""A `python -m` for a process that does without what Windows lacks: it imports all of the toolkit, then runs a module.

    python without_unix.py finetune_lora --model tiny

Modules are gone for the toolkit's own files alone, signals and functions for what other libraries do once they are
imported: on the system that this really is, they take what is there.
"""

from __future__ import annotations

import builtins
import importlib
import os
import pkgutil
import runpy
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("cli", "novelgpt", "dataset", "pretrain", "finetune", "finetune_lora", "predict")
MODULES = {"fcntl", "resource", "termios", "tty", "pty", "pwd", "grp", "syslog"}
SIGNALS = ("SIGUSR1", "SIGUSR2", "SIGHUP", "SIGKILL", "SIGBUS", "SIGXCPU", "SIGVTALRM", "SIGALRM", "SIGPROF", "SIGCHLD")
FUNCTIONS = {
    signal: ("setitimer", "pthread_sigmask", "alarm", "sigwait"),
    os: ("fork", "killpg", "setsid", "sched_getaffinity", "getpgid", "geteuid", "getuid", "mkfifo", "O_DIRECTORY"),
}

import_module = builtins.__import__


def import_what_is_there(
    name: str,
    globals: Mapping[str, Any] | None = None,
    locals: Mapping[str, Any] | None = None,
    fromlist: Sequence[str] | None = (),
    level: int = 0,
) -> ModuleType:
    """`import`, as where these modules do not exist."""
    importer = str((globals or {}).get("__file__", ""))
    own = any(importer.startswith(str(ROOT / room)) for room in ROOMS)
    if own and level == 0 and name.split(".")[0] in MODULES:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return import_module(name, globals, locals, fromlist or (), level)


if __name__ == "__main__":
    for name in ("transformers.trainer", "peft", "psutil", "torch.utils.tensorboard", "matplotlib.pyplot"):
        importlib.import_module(name)
    for name in SIGNALS:
        delattr(signal, name)
    for module, names in FUNCTIONS.items():
        for name in names:
            delattr(module, name)
    builtins.__import__ = import_what_is_there
    sys.argv = sys.argv[1:]
    sys.path[0] = str(ROOT)
    for room in ROOMS:
        for found in pkgutil.walk_packages([str(ROOT / room)], f"{room}."):
            importlib.import_module(found.name)
    assert "deepspeed" not in sys.modules
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    finally:
        assert "deepspeed" not in sys.modules
