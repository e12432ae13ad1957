"""Start a module as the ranks of one run, on this host or on several.

    python -m novelgpt.launch --processes 2 pretrain --train_files book.txt
    python -m novelgpt.launch --hostfile hosts.txt finetune --model MODEL

scripts/launch.sh calls it. A first SIGINT, SIGTERM, SIGHUP or SIGUSR1 is forwarded to the ranks, which save and end;
a second SIGINT or SIGTERM ends them at once. Where a rank dies, the others are ended and the cause is printed; with
--max_restarts, all are started again with the same arguments, with which a run resumes from its newest checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import secrets
import socket
import sys
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from novelgpt.launch.first_host import FirstHost
from novelgpt.launch.hosts import HostPlan, local_addresses, read_hostfile, slurm_plan
from novelgpt.launch.member import Member
from novelgpt.launch.messages import Hello
from novelgpt.launch.ranks import RankBlock
from novelgpt.launch.remotes import Remotes
from novelgpt.launch.restarts import Restarts
from novelgpt.launch.secret import forget_secret, read_secret
from novelgpt.launch.supervise import FINISH_SECONDS, NoOtherHosts, Signals, Starts, follow, lead
from novelgpt.settings.command_parser import CommandParser
from novelgpt.settings.errors import UserError, exit_on_user_error
from novelgpt.settings.remedies import python_module
from novelgpt.settings.terminal import counted, say


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Start the ranks and exit as they do: 0, 2 for an error of use, 128 + a signal's number, or a rank's status."""
    options = _parser().parse_args(argv)
    if "killpg" not in vars(os):
        raise UserError(
            "on this system, several processes or ZeRO cannot be started",
            "train with one process (NPROC=1 ZERO=0); several need Linux or macOS, or WSL 2 on Windows",
        )
    signals = Signals()
    given = forget_secret(os.environ)
    secret = b""  # of a run on one host
    with ExitStack() as stack:
        if options.from_stdin:
            given_plan = json.loads(sys.stdin.readline())
            plan, args = HostPlan(**given_plan["plan"]), given_plan["args"]
            environment, secret = os.environ | given_plan["environment"], bytes.fromhex(given_plan["secret"])
        else:
            args, environment = options.args, dict(os.environ)
            if not args:
                raise UserError("no module to start", python_module("novelgpt.launch --processes 2 pretrain"))
            plan = _plan(options)
            if plan.hosts > 1:
                secret = secrets.token_bytes(32) if options.hostfile is not None else read_secret(*given, options.slurm)
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="novelgpt-ranks-")))
        starts = Starts(args, environment, logs, signals)
        if plan.host > 0:
            hello = Hello(host=plan.host, hosts=plan.hosts, processes=plan.processes, name=socket.gethostname())
            join = partial(Member, plan.address, plan.port + 1, hello, secret, signals.exit_if_received)
            raise SystemExit(follow(starts, join, plan.processes, comes_back=not options.from_stdin))
        restarts = Restarts(options.max_restarts, logs)
        if plan.hosts == 1:
            status = lead(starts, NoOtherHosts(), partial(_single_host, options, plan, restarts), restarts)
        else:
            remotes = Remotes(options.hostfile, plan, args, secret)
            first = FirstHost(plan.hosts, plan.address, plan.port + 1, secret, heals=options.max_restarts > 0)
            status = lead(starts, first, partial(_gather, options, plan, first, remotes, signals, restarts), restarts)
            remotes.wait(FINISH_SECONDS if restarts.number else None)
    raise SystemExit(status)


def _single_host(options: argparse.Namespace, plan: HostPlan, restarts: Restarts) -> RankBlock:
    """Return the ranks of a run on one host. Each start has a port of its own, unless one is named."""
    port = plan.port if restarts.number == 0 else options.port or _free_ports()
    return RankBlock(0, plan.processes, plan.processes, "127.0.0.1", port, grouped=not options.single)


def _gather(
    options: argparse.Namespace,
    plan: HostPlan,
    first: FirstHost,
    remotes: Remotes,
    signals: Signals,
    restarts: Restarts,
) -> RankBlock:
    """Return the ranks of the first host, once all have joined. With a hostfile, a lost launcher is restarted."""

    def watch() -> None:
        signals.exit_if_received()
        if restarts.number == 0:
            remotes.check()
        else:
            remotes.restart(first.members)

    again = restarts.number > 0 and options.hostfile is not None and options.port is None
    block = first.gather(plan.processes, _free_ports() if again else plan.port, watch)
    if restarts.number == 0:
        met = f"{counted(plan.hosts, 'host')}, {counted(block.world_size, 'process')}"
        say(f"{met}, meeting at {block.address} port {block.port}")
    return block


def _plan(options: argparse.Namespace) -> HostPlan:
    """Derive this host's part from the options.

    Raises:
        UserError: they do not fit together.
    """
    if options.single and (options.slurm or options.hostfile or (options.hosts, options.processes) != (1, 1)):
        raise UserError("--single is for one process on one host", "leave it out")
    if options.slurm:
        return slurm_plan(os.environ, options.processes)
    if options.hostfile is not None:
        names = read_hostfile(options.hostfile)
        first = next(iter(names))
        own = len(names) == 1 and first == socket.gethostname()  # which need not lead anywhere
        if not own and not local_addresses(first.split("@")[-1]):
            raise UserError(
                f"{options.hostfile} starts with {first}, which is not this host", "start on the first host of the file"
            )
        return HostPlan(0, len(names), names[first], first.split("@")[-1], options.port or _free_ports())
    if options.hosts > 1 and (not options.address or options.port is None):
        raise UserError("several hosts need a place to meet", "set MASTER_ADDR and MASTER_PORT, the same on all hosts")
    return HostPlan(
        options.host, options.hosts, options.processes, options.address or "", options.port or _free_ports()
    )


def _free_ports() -> int:
    """Return a free port whose next one is free, too; below those of outgoing connections, from 32768 on."""
    for port in random.sample(range(20000, 32000, 2), 100):
        with socket.socket() as first, socket.socket() as second:
            try:
                first.bind(("", port))
                second.bind(("", port + 1))
            except OSError:
                continue
            return port
    raise UserError("this host has no two free ports side by side", "name one: MASTER_PORT=29500")


def _restarts(text: str) -> int:
    if not re.fullmatch("[0-9]{1,4}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of restarts; take 3, for example")
    return int(text)


def _parser() -> CommandParser:
    parser = CommandParser(prog="python -m novelgpt.launch", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="ranks on this host")
    parser.add_argument("--hostfile", type=Path, metavar="FILE", help="lines of `host slots=N`; the first is this host")
    parser.add_argument("--slurm", action="store_true", help="this is a task of a Slurm step, one per host")
    parser.add_argument("--hosts", type=int, default=1, metavar="N", help="hosts that start this, each by itself")
    parser.add_argument("--host", type=int, default=0, metavar="I", help="number of this host, from 0")
    parser.add_argument("--address", metavar="NAME", help="the first host's address")
    parser.add_argument("--port", type=int, metavar="PORT", help="where to meet; the next one is used too")
    parser.add_argument("--max_restarts", type=_restarts, default=0, metavar="N", help="max restarts after faults")
    parser.add_argument("--single", action="store_true", help="one process without a process group")
    parser.add_argument("--from_stdin", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("args", nargs=argparse.REMAINDER, help="module, and its arguments")
    return parser


if __name__ == "__main__":
    main()
