"""Start a pipeline: as plain python, by novelgpt.launch with one process per device, or as an already started rank.

    python -m novelgpt.launch.start pretrain|finetune|finetune_lora|predict [--flag value …]

The only place that decides how a pipeline is started, for scripts/launch.sh and for `novelgpt`. It reads these
variables, some of which have a second name:

    MODEL=…       --model: a folder, a hub name, or tiny for the small base
    NPROC=…       NPROC_PER_NODE: processes on this host. Default: one per GPU, 1 without
    ZERO=0-3      DeepSpeed ZeRO stage; 0 is plain data parallelism. Default: 0 for one process, 2 for several
    OFFLOAD=1     optimizer states in host memory (ZERO=2), weights too (ZERO=3)
                  Settings of your own, by --deepspeed or in a file of --config, override both.
    MAX_RESTARTS=N  after a fault, restart the run from its newest checkpoint, at most N times. Default: 0
    HOSTFILE=…    lines of `host slots=N`, for several hosts; the first is this one
    HOSTS=… HOST=… MASTER_ADDR=… MASTER_PORT=…
                  NNODES, NODE_RANK: for several hosts that are started one by one; Slurm sets these itself
    SECRET_FILE=… NOVELGPT_SECRET=…
                  by which these hosts, and Slurm's, authenticate each other; the launcher reads it

Under torchrun, accelerate and others that start the ranks (RANK, LOCAL_RANK, WORLD_SIZE), no further process is
started. Operators that give each host only its number (RANK and WORLD_SIZE) are supported, too.
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
from novelgpt.settings.external_ranks import is_alone, number_in, processes_here
from novelgpt.settings.hardware import visible_gpus
from novelgpt.settings.paths import ROOT
from novelgpt.settings.terminal import counted
from novelgpt.settings.third_party import process_defaults

PIPELINES = ("pretrain", "finetune", "finetune_lora", "predict")
HELP = {"--help", "-h", "--help_all"}
ZERO_SETTINGS = ROOT / "scripts" / "deepspeed"
# Our variables, and their names in other tools.
SYNONYMS = {"NPROC": "NPROC_PER_NODE", "HOSTS": "NNODES", "HOST": "NODE_RANK"}
# Number of hosts and of this one: torchrun's own variables, and those of Kubernetes' PyTorchJob and Volcano, which
# start one process per host.
OF_OPERATORS = (("PET_NNODES", "PET_NODE_RANK"), ("WORLD_SIZE", "RANK"))
# With one of these, accelerate shards the model itself.
OF_ACCELERATE = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")
RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
# All variables that decide how a pipeline is started, which do not apply to what it starts in turn.
SETTLED = (
    "MODEL", "ZERO", "OFFLOAD", "MAX_RESTARTS", "HOSTFILE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE",
    *SYNONYMS, *SYNONYMS.values(), *RANK, *(name for pair in OF_OPERATORS for name in pair),
)  # fmt: skip


@dataclass(frozen=True)
class StartPlan:
    """How a pipeline is started.

    Attributes:
        args: of the interpreter.
        variables: to set in addition.
    """

    args: list[str]
    variables: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Hosts:
    """The processes to start.

    Attributes:
        processes: on this host.
        several: whether there is more than one on all hosts.
        options: of novelgpt.launch.
        rank: variables of the only process of this host, where it can join the others without a launcher; else None.
    """

    processes: int
    several: bool
    options: list[str]
    rank: dict[str, str] | None = None


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Start the pipeline that the first argument names, in place of this process."""
    args = list(sys.argv[1:] if argv is None else argv)
    start(args[0] if args else "", args[1:])


def start(pipeline: str, args: Sequence[str]) -> NoReturn:
    """Start a pipeline in place of this process, or end as it does.

    Raises:
        UserError: variables contradict each other.
    """
    environment = {**os.environ, **own_paths(os.environ)}
    chosen = plan_start(pipeline, args, environment, visible_gpus(environment))
    command = [sys.executable, *chosen.args]
    environment |= chosen.variables
    if "novelgpt.launch" not in chosen.args:  # which alone needs it
        forget_secret(environment)
    if "fork" in vars(os):
        sys.stdout.flush()
        os.execve(sys.executable, command, environment)
    # Where there is no fork (Windows), the caller would not wait for a process that takes the place of this one.
    process = subprocess.Popen(command, env=environment)
    while process.poll() is None:
        with suppress(KeyboardInterrupt):  # it has got its own
            process.wait()
    raise SystemExit(process.returncode if process.returncode >= 0 else 128 - process.returncode)


def own_paths(environment: Mapping[str, str]) -> dict[str, str]:
    """Return variables by which a process finds this toolkit, and the programs beside its interpreter (ninja).

    Modules of the same names in the current folder are not imported (from Python 3.11 on).
    """
    found = {"PYTHONSAFEPATH": "1"}
    for name, place in {"PYTHONPATH": str(ROOT), "PATH": str(Path(sys.executable).parent)}.items():
        there = environment.get(name, "").split(os.pathsep)
        found[name] = os.pathsep.join(filter(None, [place, *(part for part in there if part != place)]))
    return found


def plan_start(pipeline: str, args: Sequence[str], environment: Mapping[str, str], gpus: int) -> StartPlan:
    """Decide how a pipeline is started, without side effects.

    Args:
        pipeline: its module.
        args: of its command line.
        environment: variables; an empty one counts as none.
        gpus: visible ones of this host.

    Raises:
        UserError: no such pipeline, or variables contradict each other.
    """
    if pipeline not in PIPELINES:
        raise UserError(f"no pipeline named {pipeline or '(nothing)'}", f"take {', '.join(PIPELINES)}")
    if HELP.intersection(args):
        return StartPlan(["-m", pipeline, *args])
    model = environment.get("MODEL")
    options = ["--model", model] if model else []  # a --model of the command line comes later, and counts
    restarts = _number(environment, "MAX_RESTARTS", "of restarts", least=0) or 0
    restarting = ["--max_restarts", str(restarts)] if restarts else []
    if all(environment.get(name) for name in RANK) and not is_alone(environment):
        if restarts:
            raise UserError(
                f"MAX_RESTARTS={restarts} has no effect: this rank was started by something else",
                "unset it, and see whether that starts ranks again (torchrun: --max-restarts)",
            )
        return _as_a_rank(pipeline, [*options, *args], environment, gpus)
    hosts = _hosts(environment, gpus)
    zero = _zero(pipeline, environment, 2 if hosts.several else 0)
    command = [pipeline, *options, *_zero_settings(pipeline, zero, environment), *args]
    # The hosts of a file differ in their numbers of processes: each settles its threads.
    shared = None if environment.get("HOSTFILE") else hosts.processes
    variables = process_defaults(environment, shared, gpus)
    if hosts.rank is not None and not restarts:
        return StartPlan(["-m", *command], variables | hosts.rank)
    if not hosts.several and zero == 0:
        # One process means one device: with several in sight, the Trainer would split every batch among them.
        if gpus > 1:
            variables["CUDA_VISIBLE_DEVICES"] = (environment.get("CUDA_VISIBLE_DEVICES") or "0").split(",")[0]
        launcher = ["novelgpt.launch", "--single", *restarting] if restarting else []
        return StartPlan(["-m", *launcher, *command], variables)
    processes = ["--processes", str(hosts.processes)]
    return StartPlan(["-m", "novelgpt.launch", *processes, *restarting, *hosts.options, *command], variables)


def _as_a_rank(pipeline: str, args: Sequence[str], environment: Mapping[str, str], gpus: int) -> StartPlan:
    """Plan a rank that another launcher has started."""
    several = environment["WORLD_SIZE"] != "1"
    processes = None if several else _number(environment, "NPROC", "of processes")
    if processes is not None and processes > 1:
        raise UserError(
            f"{processes} processes are requested, but by RANK and WORLD_SIZE=1 this is the only rank",
            "unset RANK, LOCAL_RANK and WORLD_SIZE where something has left them behind; else NPROC",
        )
    sharded = any(environment.get(name, "").lower() in ("1", "true") for name in OF_ACCELERATE)
    zero = _zero(pipeline, environment, 2 if several and not sharded else 0)
    variables = process_defaults(environment, processes_here(environment), gpus)
    return StartPlan(["-m", pipeline, *_zero_settings(pipeline, zero, environment), *args], variables)


def _hosts(environment: Mapping[str, str], gpus: int) -> _Hosts:
    """Read from variables which processes are requested.

    Raises:
        UserError: they contradict each other, or are not numbers.
    """
    processes = _number(environment, "NPROC", "of processes")
    hosts = _number(environment, "HOSTS", "of hosts")
    given = processes or max(1, gpus)
    if given > gpus > 0 and not environment.get("HOSTFILE"):
        raise UserError(
            f"{given} processes are requested, and {counted(gpus, 'GPU')} visible: each needs one of its own",
            f"NPROC={gpus}; or, for processes on the CPU, CUDA_VISIBLE_DEVICES=-1",
        )
    port = ["--port", environment["MASTER_PORT"]] if environment.get("MASTER_PORT") else []
    if environment.get("HOSTFILE"):
        return _Hosts(given, True, [*port, "--hostfile", environment["HOSTFILE"]])
    if (number_in(environment.get("SLURM_STEP_NUM_NODES")) or 1) > 1:
        return _Hosts(given, True, [*port, "--slurm"])
    if hosts is not None:
        host = _number(environment, "HOST", "of a host", least=0) if hosts > 1 else 0
        address = ["--address", environment["MASTER_ADDR"]] if environment.get("MASTER_ADDR") else []
        options = [*port, *address, "--hosts", str(hosts), "--host", str(host or 0)]
        return _Hosts(given, given > 1 or hosts > 1, options)
    for names in OF_OPERATORS:
        count, host = (number_in(environment.get(name)) for name in names)
        if count is not None and host is not None:
            if count == 1:
                break
            number = number_in(environment.get("PET_NPROC_PER_NODE"))  # which may be `auto`, too
            return _of_operator(count, host, processes or number or given, environment)
    return _Hosts(given, given > 1, port)


def _of_operator(hosts: int, host: int, processes: int, environment: Mapping[str, str]) -> _Hosts:
    """Plan a host that an operator has given its number. With one process, it is a rank without a local rank."""
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if missing:
        raise UserError(
            f"by RANK and WORLD_SIZE, this is one of {hosts} hosts, but {missing[0]} is not set",
            "set MASTER_ADDR and MASTER_PORT, the same on all hosts; for this host alone, unset WORLD_SIZE",
        )
    address = environment["MASTER_ADDR"]
    if host == 0 and is_loopback(address):  # as operators set it on the first host; on the others, its name
        address = socket.gethostname()
    meeting = ["--port", environment["MASTER_PORT"], "--address", address]
    options = [*meeting, "--hosts", str(hosts), "--host", str(host)]
    if processes == 1:
        rank = {"RANK": str(host), "WORLD_SIZE": str(hosts), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        return _Hosts(1, True, options, rank)
    return _Hosts(processes, True, options)


def _number(environment: Mapping[str, str], name: str, what: str, least: int = 1) -> int | None:
    """Return the number in a variable, under either of its names; None where it is not set.

    Raises:
        UserError: it is not a number, or the names disagree.
    """
    names = [name, SYNONYMS[name]] if name in SYNONYMS else [name]
    given = {known: environment[known] for known in names if environment.get(known)}
    if "NODE_RANK" in given and not given.get("HOST", "0").isdecimal():
        del given["HOST"]  # where some shells keep the machine's name
    if len(set(given.values())) > 1:
        both = " and ".join(f"{known}={value}" for known, value in given.items())
        raise UserError(f"{both} are two names of one number, and differ", f"unset {' or '.join(names)}")
    for known, value in given.items():
        if not (value.isascii() and value.isdecimal() and len(value) < 5 and least <= int(value)):
            raise UserError(f"{known}={value} is not a number {what}", f"{known}=2, for example; at least {least}")
        return int(value)
    return None


def _zero(pipeline: str, environment: Mapping[str, str], default: int) -> int:
    """Return the ZeRO stage."""
    if pipeline == "predict":
        return 0  # full weights on each device
    stage = environment.get("ZERO") or str(default)
    if stage not in ("0", "1", "2", "3"):
        raise UserError(f"ZERO={stage} is not a stage", "take 0, 1, 2 or 3")
    return int(stage)


def _zero_settings(pipeline: str, zero: int, environment: Mapping[str, str]) -> list[str]:
    """Return the option that names DeepSpeed's settings of a stage; nothing without one."""
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
