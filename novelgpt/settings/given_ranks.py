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
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path

from novelgpt.settings.hardware import visible_gpus
from novelgpt.settings.library_settings import process_defaults

PIPELINES = ("pretrain", "finetune", "finetune_lora", "predict")
# By which novelgpt.launch tells its ranks that it keeps their words, and ends them.
LAUNCHED = "NOVELGPT_LAUNCHED"
# By which torchrun (and accelerate with it) and deepspeed can be told: a rank's parent ends them all.
OF_ENGINES = ("TORCHELASTIC_RUN_ID", "CROSS_SIZE")
MEETING = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
NUMBERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
# Tells a Python that it has started over, so that it does so once even where something takes variables away again.
STARTED_OVER = "NOVELGPT_STARTED_OVER"
PR_SET_PDEATHSIG = 1
# An engine looks after its ranks every second or more often. By the end of the first time, rank 0 has said what all are
# refused for; by that of the second one, a rank that is refused alone has said so.
REFUSED_SECONDS = 5.0
LOST_SECONDS = 10.0
# No host or rank has a longer number; and not 00, as 0 is the first one's name.
_NUMBER = re.compile("0|[1-9][0-9]{0,6}")
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
    over = os.environ.pop(STARTED_OVER, None) is not None
    forget_remains(os.environ)
    words = sys.orig_argv
    module = module_of(words, len(sys.argv) - 1)
    if module not in PIPELINES or not os.environ.get("RANK") or os.environ.get(LAUNCHED):
        return
    if any(os.environ.get(name) for name in OF_ENGINES):
        stop_with_parent()
    missing = missing_variables(os.environ)
    if missing and not over and sys.executable and "fork" in vars(os):
        variables = {**os.environ, **missing, STARTED_OVER: "1"}
        os.execve(sys.executable, [sys.executable, *words[1:]], variables)
    os.environ.update(missing)  # on Windows, a process that takes the place of this one would be another
    quieten_further_ranks()


def module_of(words: Sequence[str], further: int) -> str:
    """The last name of the module that a Python was told to run, by `-m NAME`, `-mNAME` or `-umNAME`.

    Args:
        words: of its command line.
        further: how many of these are the module's own.
    """
    last = words[: len(words) - further][-1]
    name = last.partition("m")[2] if last.startswith("-") else last
    return name.removesuffix(".__main__").rpartition(".")[2]


def forget_remains(environment: MutableMapping[str, str]) -> None:
    """Take out the variables of a rank that are empty, or say no more than that this process is alone.

    Images of containers and other tools leave them behind. Libraries take '' for a number, and wait to meet others.

    Args:
        environment: from which they are taken.
    """
    for name in (*NUMBERS, *MEETING):
        if environment.get(name) == "":
            del environment[name]
    if is_alone(environment):
        for name in NUMBERS:
            environment.pop(name, None)


def is_alone(environment: Mapping[str, str]) -> bool:
    """Whether what is said of ranks is that this is the only one, without a place to meet others."""
    return (
        (environment.get("WORLD_SIZE") or "1") == "1"
        and all((environment.get(name) or "0") == "0" for name in ("RANK", "LOCAL_RANK"))
        and not all(environment.get(name) for name in ("MASTER_ADDR", "MASTER_PORT"))
    )


def number_in(word: str | None) -> int | None:
    """The number that a variable holds; None where it is none, or one that no host, rank or port has."""
    return int(word) if word is not None and _NUMBER.fullmatch(word) else None


def missing_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """What novelgpt.launch would have told a rank besides, which its engine has not.

    Args:
        environment: its variables.
    """
    missing: dict[str, str] = {}
    if not environment.get("LOCAL_RANK"):  # operators of Kubernetes start one process a host, and count hosts alone
        of_slurm = environment.get("SLURM_PROCID") == environment.get("RANK")
        missing["LOCAL_RANK"] = (environment.get("SLURM_LOCALID") if of_slurm else None) or "0"
    missing |= process_defaults(environment, processes_here(environment), visible_gpus(environment))
    programs, path = str(Path(sys.executable).parent), environment.get("PATH", "")
    if programs not in path.split(os.pathsep):  # ninja, by which DeepSpeed builds
        missing["PATH"] = os.pathsep.join(filter(None, (programs, path)))
    return missing


def processes_here(environment: Mapping[str, str]) -> int | None:
    """How many ranks this host has, by torchrun's name or DeepSpeed's; None where it is not said."""
    return number_in(environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE")) or None


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
    said = "RANK" if environment.get("RANK") else "LOCAL_RANK"
    if not environment.get("LOCAL_RANK") or is_alone(environment):
        return None
    for name in ("RANK", *MEETING):
        if not environment.get(name):
            return f"{said}={environment[said]} says that this is a rank of several, and {name} is not set"
    numbers = {}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"):
        number = number_in(environment[name])
        if number is None:
            return f"{name}={environment[name]} is no number"
        numbers[name] = number
    if numbers["RANK"] >= numbers["WORLD_SIZE"]:
        return f"RANK={numbers['RANK']} is none of WORLD_SIZE={numbers['WORLD_SIZE']}, which count from 0"
    if not 0 < numbers["MASTER_PORT"] < 1 << 16:
        return f"MASTER_PORT={numbers['MASTER_PORT']} is no port"
    return None


def is_loss_of_a_rank(error: BaseException) -> bool:
    """Whether an error says no more than that another rank has ended, or cannot be reached."""
    several = os.environ.get("RANK") and os.environ.get("WORLD_SIZE") != "1"
    return bool(several) and isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None


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
