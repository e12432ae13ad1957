"""Ranks that another launcher has started: torchrun, accelerate, deepspeed, Slurm, Kubernetes.

These give a process its number, and leave the rest to it: all ranks print on one terminal, each reports an error that
all have, and one whose launcher is gone keeps training. Standard library only: the first part is settled before
anything else is imported.
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
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from novelgpt.settings.hardware import visible_gpus
from novelgpt.settings.third_party import process_defaults

PIPELINES = ("pretrain", "finetune", "finetune_lora", "predict")
# Set by novelgpt.launch, which keeps its ranks' output and ends them.
LAUNCHED = "NOVELGPT_LAUNCHED"
# Set by torchrun (and accelerate with it) and deepspeed, where a rank's parent ends them all.
OF_ENGINES = ("TORCHELASTIC_RUN_ID", "CROSS_SIZE")
MEETING = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
NUMBERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
# Set when Python starts over, so that it does so once even where something removes variables again.
STARTED_OVER = "NOVELGPT_STARTED_OVER"
PR_SET_PDEATHSIG = 1
# Launchers check their ranks at least every second. Within the first time, rank 0 has printed an error that all have;
# within the second one, a rank has printed its own.
REFUSED_SECONDS = 5.0
LOST_SECONDS = 10.0
# No host or rank has a longer number; nor 00, as 0 is the first one's.
_NUMBER = re.compile("0|[1-9][0-9]{0,6}")
# Messages of gloo, NCCL and the store when the other end of a connection has ended.
_LOST = re.compile(
    r"gloo/transport|connection was likely closed|remote process exited|connection reset|broken pipe", re.I
)


def is_external_rank() -> bool:
    """Whether this process is a rank that another launcher than novelgpt.launch has started."""
    return all(os.environ.get(name) for name in ("RANK", "LOCAL_RANK")) and not os.environ.get(LAUNCHED)


def start_rank() -> None:
    """Give a pipeline's rank the variables that novelgpt.launch sets; called when `python -m` starts to import a room.

    Python starts over for it, in the same process, as glibc reads some of the variables before the first line.
    """
    over = os.environ.pop(STARTED_OVER, None) is not None
    remove_leftovers(os.environ)
    command = sys.orig_argv
    last = command[: len(command) - (len(sys.argv) - 1)][-1]  # NAME after -m, -mNAME or -umNAME
    name = last.partition("m")[2] if last.startswith("-") else last
    module = name.removesuffix(".__main__").rpartition(".")[2]
    if module not in PIPELINES or not os.environ.get("RANK") or os.environ.get(LAUNCHED):
        return
    if any(os.environ.get(name) for name in OF_ENGINES):
        stop_with_parent()
    missing = missing_variables(os.environ)
    if missing and not over and sys.executable and "fork" in vars(os):
        variables = {**os.environ, **missing, STARTED_OVER: "1"}
        os.execve(sys.executable, [sys.executable, *command[1:]], variables)
    os.environ.update(missing)  # on Windows, a process that takes the place of this one would be another
    quieten_further_ranks()


def remove_leftovers(environment: MutableMapping[str, str]) -> None:
    """Remove variables of a rank that are empty, or that only describe a process by itself.

    Container images and other tools leave them behind. Libraries take '' for a number, and wait for other ranks.

    Args:
        environment: from which they are removed.
    """
    for name in (*NUMBERS, *MEETING):
        if environment.get(name) == "":
            del environment[name]
    if is_alone(environment):
        for name in NUMBERS:
            environment.pop(name, None)


def is_alone(environment: Mapping[str, str]) -> bool:
    """Whether the variables describe a single rank, without a place to meet others."""
    return (
        (environment.get("WORLD_SIZE") or "1") == "1"
        and all((environment.get(name) or "0") == "0" for name in ("RANK", "LOCAL_RANK"))
        and not all(environment.get(name) for name in ("MASTER_ADDR", "MASTER_PORT"))
    )


def number_in(value: str | None) -> int | None:
    """Return the number in a variable; None where it is not one that a host, rank or port can have."""
    return int(value) if value is not None and _NUMBER.fullmatch(value) else None


def missing_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that novelgpt.launch would have set for a rank, and its launcher has not.

    Args:
        environment: its variables.
    """
    missing: dict[str, str] = {}
    if not environment.get("LOCAL_RANK"):  # operators of Kubernetes start one process per host, and number hosts only
        of_slurm = environment.get("SLURM_PROCID") == environment.get("RANK")
        missing["LOCAL_RANK"] = (environment.get("SLURM_LOCALID") if of_slurm else None) or "0"
    missing |= process_defaults(environment, processes_here(environment), visible_gpus(environment))
    programs, path = str(Path(sys.executable).parent), environment.get("PATH", "")
    if programs not in path.split(os.pathsep):  # where ninja is, which DeepSpeed builds with
        missing["PATH"] = os.pathsep.join(filter(None, (programs, path)))
    return missing


def processes_here(environment: Mapping[str, str]) -> int | None:
    """Return the number of ranks on this host, by torchrun's variable or DeepSpeed's; None where neither is set."""
    return number_in(environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE")) or None


def stop_with_parent(number: int = signal.SIGTERM) -> None:
    """Get a signal when the parent is killed: by SIGTERM, a rank saves and ends instead of running on unseen."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def quieten_further_ranks() -> None:
    """Silence libraries' warnings and progress bars on all ranks but the first, where they share a terminal."""
    if not is_external_rank() or os.environ["RANK"] == "0":
        return
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    library = sys.modules.get("transformers.utils.logging")
    if library is not None:
        library.disable_progress_bar()


def problem_of_rank(environment: Mapping[str, str]) -> str | None:
    """Return what is wrong with a rank's variables; None where nothing is, or this process is not one."""
    known = "RANK" if environment.get("RANK") else "LOCAL_RANK"
    if not environment.get("LOCAL_RANK") or is_alone(environment):
        return None
    for name in ("RANK", *MEETING):
        if not environment.get(name):
            return f"by {known}={environment[known]}, this is one of several ranks, but {name} is not set"
    numbers = {}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"):
        number = number_in(environment[name])
        if number is None:
            return f"{name}={environment[name]} is not a number"
        numbers[name] = number
    if numbers["RANK"] >= numbers["WORLD_SIZE"]:
        return f"RANK={numbers['RANK']} is not one of WORLD_SIZE={numbers['WORLD_SIZE']}, which count from 0"
    if not 0 < numbers["MASTER_PORT"] < 1 << 16:
        return f"MASTER_PORT={numbers['MASTER_PORT']} is not a port"
    return None


def is_loss_of_a_rank(error: BaseException) -> bool:
    """Whether an error only means that another rank has ended, or cannot be reached."""
    several = os.environ.get("RANK") and os.environ.get("WORLD_SIZE") != "1"
    return bool(several) and isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None


def wait_for_launcher(refused: bool) -> None:
    """Wait for the launcher to end this rank, as another one prints the cause, so that it is not printed by all.

    Args:
        refused: whether the cause is an error of use, which all ranks have most likely, and the first one prints.
    """
    if not is_external_rank() or (refused and os.environ["RANK"] == "0"):
        return
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    time.sleep(REFUSED_SECONDS if refused else LOST_SECONDS)
