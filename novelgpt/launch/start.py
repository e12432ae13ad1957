"""Start a pipeline: as plain python, through novelgpt.launch with a process a device, or as a rank that is there.

    python -m novelgpt.launch.start pretrain|finetune|finetune_lora|predict [--flag value …]

The one place that decides what a pipeline is started with, for scripts/launch.sh and for `novelgpt`. It reads these
variables, of which some have a second name:

    MODEL=…       --model: a folder, a hub name, or tiny for the small base
    NPROC=…       NPROC_PER_NODE: processes on this host. Default: one a GPU, 1 without
    ZERO=0-3      DeepSpeed ZeRO stage; 0 is plain data parallelism. Default: 0 for one process, 2 for several
    OFFLOAD=1     optimizer states in host memory (ZERO=2), weights too (ZERO=3)
                  Settings of your own, named by --deepspeed or in a file of --config, take the place of both.
    MAX_RESTARTS=N  after a fault, start the run again from its newest checkpoint, N times at most. Default: 0
    HOSTFILE=…    lines of `host slots=N`, for several hosts; the first is this one
    HOSTS=… HOST=… MASTER_ADDR=… MASTER_PORT=…
                  NNODES, NODE_RANK: for several hosts that are started one by one; Slurm says the same itself
    SECRET_FILE=… NOVELGPT_SECRET=…
                  by which these hosts know each other, as do Slurm's; the launcher reads it

Under torchrun, accelerate and others that start the ranks (RANK, LOCAL_RANK, WORLD_SIZE), no further process is
started. An operator that tells each host its number alone (RANK and WORLD_SIZE) is taken at its word, too.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from novelgpt.launch.hosts import is_loopback
from novelgpt.launch.secret import forget_secret
from novelgpt.settings.errors import UserError, exit_on_user_error
from novelgpt.settings.given_ranks import is_alone, number_in, processes_here
from novelgpt.settings.hardware import visible_gpus
from novelgpt.settings.library_settings import process_defaults
from novelgpt.settings.paths import ROOT
from novelgpt.settings.terminal import counted

PIPELINES = ("pretrain", "finetune", "finetune_lora", "predict")
HELP = {"--help", "-h", "--help_all"}
ZERO_SETTINGS = ROOT / "scripts" / "deepspeed"
# Variables of ours, and what other tools call the same.
SYNONYMS = {"NPROC": "NPROC_PER_NODE", "HOSTS": "NNODES", "HOST": "NODE_RANK"}
# How many hosts and which one, by those that tell each host: torchrun's own variables, and what Kubernetes' PyTorchJob
# and Volcano set, which start one process a host.
OF_OPERATORS = (("PET_NNODES", "PET_NODE_RANK"), ("WORLD_SIZE", "RANK"))
# By which accelerate says that it has its own way to share a model out.
OF_ACCELERATE = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")
RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
# All variables that say how something is started, which do not hold for what it starts in turn.
SETTLED = (
    "MODEL", "ZERO", "OFFLOAD", "MAX_RESTARTS", "HOSTFILE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE",
    *SYNONYMS, *SYNONYMS.values(), *RANK, *(name for pair in OF_OPERATORS for name in pair),
)  # fmt: skip


@dataclass(frozen=True)
class Start:
    """What is started.

    Attributes:
        words: of the command line, behind the interpreter.
        variables: that are set, beside those that are there.
    """

    words: list[str]
    variables: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Hosts:
    """Which processes there are to be.

    Attributes:
        processes: on this host.
        several: whether there are more than one on all hosts.
        options: of novelgpt.launch, that say so.
        rank: variables of the only process of this host, where it needs no launcher to meet the others; None elsewhere.
    """

    processes: int
    several: bool
    options: list[str]
    rank: dict[str, str] | None = None


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Start the pipeline that the first word names, in place of this process."""
    words = list(sys.argv[1:] if argv is None else argv)
    start(words[0] if words else "", words[1:])


def start(pipeline: str, words: Sequence[str]) -> NoReturn:
    """Start a pipeline in place of this process, or end as it does.

    Raises:
        UserError: variables say what cannot be.
    """
    environment = {**os.environ, **own_paths(os.environ)}
    chosen = plan_start(pipeline, words, environment, visible_gpus(environment))
    command = [sys.executable, *chosen.words]
    environment |= chosen.variables
    if "novelgpt.launch" not in chosen.words:  # which alone needs it
        forget_secret(environment)
    if "fork" in vars(os):
        sys.stdout.flush()
        os.execve(sys.executable, command, environment)
    # Where there is no fork (Windows), the caller would not wait for a process that takes the place of this one.
    process = subprocess.Popen(command, env=environment)
    while process.poll() is None:
        with suppress(KeyboardInterrupt):  # it has had its own, and says how it ends
            process.wait()
    raise SystemExit(process.returncode if process.returncode >= 0 else 128 - process.returncode)


def own_paths(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables by which a process finds this toolkit, and the programs beside its interpreter (ninja).

    And not what has the name of one of its rooms in the folder that the user is in (from Python 3.11 on).
    """
    found = {"PYTHONSAFEPATH": "1"}
    for name, place in {"PYTHONPATH": str(ROOT), "PATH": str(Path(sys.executable).parent)}.items():
        there = environment.get(name, "").split(os.pathsep)
        found[name] = os.pathsep.join(filter(None, [place, *(part for part in there if part != place)]))
    return found


def plan_start(pipeline: str, words: Sequence[str], environment: Mapping[str, str], gpus: int) -> Start:
    """What a pipeline is started with. Reads nothing else but this host's name, and changes nothing.

    Args:
        pipeline: its module.
        words: of the command line, behind the pipeline's name.
        environment: variables; an empty one counts as none.
        gpus: of this host, as far as they are in sight.

    Raises:
        UserError: no such pipeline, or variables say what cannot be.
    """
    if pipeline not in PIPELINES:
        raise UserError(f"no pipeline named {pipeline or '(nothing)'}", f"take {', '.join(PIPELINES)}")
    if HELP.intersection(words):
        return Start(["-m", pipeline, *words])
    model = environment.get("MODEL")
    options = ["--model", model] if model else []  # a --model among the words comes later, and counts
    restarts = _number(environment, "MAX_RESTARTS", "of restarts", least=0) or 0
    healing = ["--max_restarts", str(restarts)] if restarts else []
    if all(environment.get(name) for name in RANK) and not is_alone(environment):
        if restarts:
            raise UserError(
                f"MAX_RESTARTS={restarts} has no effect: this rank was started by something else",
                "unset it, and see whether that starts ranks again (torchrun: --max-restarts)",
            )
        return _as_a_rank(pipeline, [*options, *words], environment, gpus)
    hosts = _hosts(environment, gpus)
    zero = _zero(pipeline, environment, 2 if hosts.several else 0)
    command = [pipeline, *options, *_zero_settings(pipeline, zero, environment), *words]
    # The hosts of a file differ in their numbers of processes: each settles its threads.
    shared = None if environment.get("HOSTFILE") else hosts.processes
    variables = process_defaults(environment, shared, gpus)
    if hosts.rank is not None and not restarts:
        return Start(["-m", *command], variables | hosts.rank)
    if not hosts.several and zero == 0:
        # One process means one device: with several in sight, the Trainer would split every batch among them.
        if gpus > 1:
            variables["CUDA_VISIBLE_DEVICES"] = (environment.get("CUDA_VISIBLE_DEVICES") or "0").split(",")[0]
        launcher = ["novelgpt.launch", "--single", *healing] if healing else []
        return Start(["-m", *launcher, *command], variables)
    processes = ["--processes", str(hosts.processes)]
    return Start(["-m", "novelgpt.launch", *processes, *healing, *hosts.options, *command], variables)


def _as_a_rank(pipeline: str, words: Sequence[str], environment: Mapping[str, str], gpus: int) -> Start:
    """A rank that something else has started; the numbers of processes and hosts are settled."""
    several = environment["WORLD_SIZE"] != "1"
    processes = None if several else _number(environment, "NPROC", "of processes")
    if processes is not None and processes > 1:
        raise UserError(
            f"{processes} processes are asked for, and RANK and WORLD_SIZE=1 say that this is the only rank",
            "unset RANK, LOCAL_RANK and WORLD_SIZE where something has left them behind; else NPROC",
        )
    shared_out = any(environment.get(name, "").lower() in ("1", "true") for name in OF_ACCELERATE)
    zero = _zero(pipeline, environment, 2 if several and not shared_out else 0)
    variables = process_defaults(environment, processes_here(environment), gpus)
    return Start(["-m", pipeline, *_zero_settings(pipeline, zero, environment), *words], variables)


def _hosts(environment: Mapping[str, str], gpus: int) -> _Hosts:
    """Which processes the variables ask for.

    Raises:
        UserError: they contradict each other, or are no numbers.
    """
    processes = _number(environment, "NPROC", "of processes")
    hosts = _number(environment, "HOSTS", "of hosts")
    given = processes or max(1, gpus)
    if given > gpus > 0 and not environment.get("HOSTFILE"):
        raise UserError(
            f"{given} processes are asked for, and {counted(gpus, 'GPU')} in sight: each needs one of its own",
            f"NPROC={gpus}; or, for processes on the CPU, CUDA_VISIBLE_DEVICES=-1",
        )
    port = ["--port", environment["MASTER_PORT"]] if environment.get("MASTER_PORT") else []
    if environment.get("HOSTFILE"):
        return _Hosts(given, True, [*port, "--hostfile", environment["HOSTFILE"]])
    if _slurm_hosts(environment) > 1:
        return _Hosts(given, True, [*port, "--slurm"])
    if hosts is not None:
        host = _number(environment, "HOST", "that a host has", least=0) if hosts > 1 else 0
        address = ["--address", environment["MASTER_ADDR"]] if environment.get("MASTER_ADDR") else []
        options = [*port, *address, "--hosts", str(hosts), "--host", str(host or 0)]
        return _Hosts(given, given > 1 or hosts > 1, options)
    told = _of_an_operator(environment)
    if told is None or told[0] == 1:
        return _Hosts(given, given > 1, port)
    number = number_in(environment.get("PET_NPROC_PER_NODE"))  # which may be a word such as `auto`
    return _told_by_an_operator(*told, processes or number or given, environment)


def _told_by_an_operator(hosts: int, host: int, processes: int, environment: Mapping[str, str]) -> _Hosts:
    """A host that knows how many there are and which it is. With one process, it is a rank that lacks a name."""
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if missing:
        raise UserError(
            f"RANK and WORLD_SIZE say that this is one of {hosts} hosts, and {missing[0]} is not set",
            "set MASTER_ADDR and MASTER_PORT, the same on all hosts; for this host alone, unset WORLD_SIZE",
        )
    address = environment["MASTER_ADDR"]
    if host == 0 and is_loopback(address):  # so operators tell the first host; the others, its name
        address = socket.gethostname()
    meeting = ["--port", environment["MASTER_PORT"], "--address", address]
    options = [*meeting, "--hosts", str(hosts), "--host", str(host)]
    if processes == 1:
        rank = {"RANK": str(host), "WORLD_SIZE": str(hosts), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        return _Hosts(1, True, options, rank)
    return _Hosts(processes, True, options)


def _of_an_operator(environment: Mapping[str, str]) -> tuple[int, int] | None:
    """How many hosts there are, and which this is, where something says both in numbers."""
    for names in OF_OPERATORS:
        hosts, host = (number_in(environment.get(name)) for name in names)
        if hosts is not None and host is not None:
            return hosts, host
    return None


def _number(environment: Mapping[str, str], name: str, what: str, least: int = 1) -> int | None:
    """The number that a variable holds, under either of its names; None where it is not set.

    Raises:
        UserError: it is none, or the names disagree.
    """
    names = [name, SYNONYMS[name]] if name in SYNONYMS else [name]
    given = {known: environment[known] for known in names if environment.get(known)}
    if "NODE_RANK" in given and not given.get("HOST", "0").isdecimal():
        del given["HOST"]  # in which some shells keep the machine's name
    if len(set(given.values())) > 1:
        words = " and ".join(f"{known}={word}" for known, word in given.items())
        raise UserError(f"{words} are two names of one number, and differ", f"unset {' or '.join(names)}")
    for known, word in given.items():
        if not (word.isascii() and word.isdecimal() and len(word) < 5 and least <= int(word)):
            raise UserError(f"{known}={word} is no number {what}", f"{known}=2, for example; the least is {least}")
        return int(word)
    return None


def _slurm_hosts(environment: Mapping[str, str]) -> int:
    return number_in(environment.get("SLURM_STEP_NUM_NODES")) or 1


def _zero(pipeline: str, environment: Mapping[str, str], default: int) -> int:
    """The ZeRO stage."""
    if pipeline == "predict":
        return 0  # whole weights on each device
    word = environment.get("ZERO") or str(default)
    if word not in ("0", "1", "2", "3"):
        raise UserError(f"ZERO={word} is no stage", "take 0, 1, 2 or 3")
    return int(word)


def _zero_settings(pipeline: str, zero: int, environment: Mapping[str, str]) -> list[str]:
    """The option that names DeepSpeed's settings of a stage; nothing without one."""
    offload = environment.get("OFFLOAD") == "1" and pipeline != "predict"
    if offload and zero < 2:
        raise UserError(
            f"OFFLOAD=1 has nothing to move at ZERO={zero}" if zero else "OFFLOAD=1 needs DeepSpeed",
            "take ZERO=2 or ZERO=3",
        )
    if zero == 0:
        return []
    return ["--deepspeed_by_default", str(ZERO_SETTINGS / f"zero{zero}{'_offload' if offload else ''}.json")]


if __name__ == "__main__":
    main()
