"""A rank that something else than novelgpt.launch has started: torchrun, accelerate, deepspeed, Slurm, Kubernetes.

These give a process its number, and leave the rest to it: all ranks print on one terminal, a rank that is refused its
settings says so beside all others, and one whose engine is gone trains on. Standard library only: the first part is
settled before anything else is imported.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path

from novelgpt.settings.gpus import visible_gpus
from novelgpt.settings.process_environment import process_defaults

PIPELINES = ("pretrain", "finetune", "finetune_lora", "predict")
# By which novelgpt.launch tells its ranks that it keeps their words, and ends them.
LAUNCHED = "NOVELGPT_LAUNCHED"
# By which torchrun (and accelerate with it) and deepspeed can be told: a rank's parent ends them all.
OF_ENGINES = ("TORCHELASTIC_RUN_ID", "CROSS_SIZE")
MEETING = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PR_SET_PDEATHSIG = 1
# An engine looks after its ranks every second or more often. By the end of the first time, rank 0 has said what all are
# refused for; by that of the second one, a rank that is refused alone has said so.
REFUSED_SECONDS = 5.0
LOST_SECONDS = 10.0
# What gloo, NCCL and the store say when the other end of a connection has ended.
_LOST = re.compile(
    r"gloo/transport|connection was likely closed|remote process exited|connection reset|broken pipe", re.I
)


def is_given() -> bool:
    """Whether this process is a rank that something else than novelgpt.launch has started."""
    return all(os.environ.get(name) for name in ("RANK", "LOCAL_RANK")) and not os.environ.get(LAUNCHED)


def begin_rank() -> None:
    """Called when `python -m` begins to import one of the rooms: a pipeline's rank gets what ranks of ours get.

    Python starts over for it, in the same process, as some of the variables are read before its first line: by glibc.
    """
    words = sys.orig_argv
    module = words[words.index("-m") + 1].rpartition(".")[2] if "-m" in words[:-1] else ""
    if module not in PIPELINES or not os.environ.get("RANK") or os.environ.get(LAUNCHED):
        return
    if any(os.environ.get(name) for name in OF_ENGINES):
        stop_with_parent()
    missing = missing_variables(os.environ)
    if missing and "fork" in vars(os):
        os.execve(sys.executable, [sys.executable, *words[1:]], {**os.environ, **missing})
    os.environ.update(missing)  # on Windows, a process that takes the place of this one would be another
    quieten_further_ranks()


def missing_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """What novelgpt.launch would have told a rank besides, which its engine has not.

    Args:
        environment: its variables.
    """
    missing: dict[str, str] = {}
    if not environment.get("LOCAL_RANK"):  # operators of Kubernetes start one process a host, and count hosts alone
        of_slurm = environment.get("SLURM_PROCID") == environment.get("RANK")
        missing["LOCAL_RANK"] = (environment.get("SLURM_LOCALID") if of_slurm else None) or "0"
    here = environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE", "")  # torchrun's name, DeepSpeed's name
    processes = int(here) if here.isdecimal() and int(here) else None
    missing |= process_defaults(environment, processes, visible_gpus(environment))
    programs, path = str(Path(sys.executable).parent), environment.get("PATH", "")
    if programs not in path.split(os.pathsep):  # ninja, by which DeepSpeed builds
        missing["PATH"] = os.pathsep.join(filter(None, (programs, path)))
    return missing


def stop_with_parent() -> None:
    """Where the parent is killed, this process gets SIGTERM: a rank saves and ends instead of running on unseen."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def quieten_further_ranks() -> None:
    """Libraries warn and draw bars in each process: of several on one terminal, the first one's are shown."""
    if not is_given() or os.environ["RANK"] == "0":
        return
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    library = sys.modules.get("transformers.utils.logging")
    if library is not None:
        library.disable_progress_bar()


def problem_of_rank(environment: Mapping[str, str]) -> str | None:
    """What is wrong with a rank's variables; None where nothing is, or this is none."""
    if not all(environment.get(name) for name in ("RANK", "LOCAL_RANK")):
        return None
    for name in MEETING:
        if not environment.get(name):
            return f"RANK={environment['RANK']} says that this is a rank of several, and {name} is not set"
    numbers = {name: environment[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    for name, word in numbers.items():
        if not (word.isascii() and word.isdecimal()):
            return f"{name}={word} is no number"
    if int(numbers["RANK"]) >= int(numbers["WORLD_SIZE"]):
        return f"RANK={numbers['RANK']} is none of WORLD_SIZE={numbers['WORLD_SIZE']}, which count from 0"
    return None


def is_loss_of_a_rank(error: BaseException) -> bool:
    """Whether an error says no more than that another rank has ended, or cannot be reached."""
    return "RANK" in os.environ and isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None


def leave_refusal_to_the_first() -> None:
    """Wait for the end that the engine puts to a rank when the first one has ended, with the same words most likely."""
    if is_given() and os.environ["RANK"] != "0":
        _wait_for_the_end(REFUSED_SECONDS)


def leave_word_to_the_cause() -> None:
    """Wait for the end that the engine puts to a rank when another one has ended, which is about to say why."""
    if is_given():
        _wait_for_the_end(LOST_SECONDS)


def _wait_for_the_end(seconds: float) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    time.sleep(seconds)
