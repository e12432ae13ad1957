"""Start a module as the ranks of one run, on this host or on several.

    python -m novelgpt.launch --processes 2 pretrain --train_files book.txt
    python -m novelgpt.launch --hostfile hosts.txt finetune --model MODEL

scripts/launch.sh calls it. A first SIGINT, SIGTERM, SIGHUP or SIGUSR1 is handed on to the ranks, which save and end;
a second SIGINT or SIGTERM ends them at once. Where a rank dies, the others are ended and the cause is printed; with
--max_restarts, all are started again with the same words, by which a run resumes from its newest checkpoint.
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
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from novelgpt.launch.channel import Alone, Channel, FirstHost, Member
from novelgpt.launch.hosts import Place, Remote, local_addresses, read_hostfile, shared_environment, slurm_place
from novelgpt.launch.messages import Hello
from novelgpt.launch.ranks import Block, Ranks
from novelgpt.launch.restarts import Restarts
from novelgpt.launch.secret import GivenSecret
from novelgpt.launch.watch import Signals, explain, watch
from novelgpt.settings.command_parser import CommandParser
from novelgpt.settings.cores import usable_cores
from novelgpt.settings.errors import UserError, exit_on_user_error
from novelgpt.settings.remedies import python_module
from novelgpt.settings.terminal import say
from novelgpt.settings.units import counted


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    """Start the ranks and exit as they do: 0, 2 for an error of use, 128 + a signal's number, or what a rank gave."""
    options = _parser().parse_args(argv)
    if "killpg" not in vars(os):
        raise UserError(
            "on this system, several processes or ZeRO cannot be started",
            "train with one process (NPROC=1 ZERO=0); several need Linux or macOS, or WSL 2 on Windows",
        )
    signals = Signals()
    given = GivenSecret(os.environ)
    secret = b""  # of a run on one host
    with ExitStack() as stack:
        if options.from_stdin:
            plan = json.loads(sys.stdin.readline())
            place, words, environment = Place(**plan["place"]), plan["words"], os.environ | plan["environment"]
            secret = bytes.fromhex(plan["secret"])
        else:
            words, environment = options.words, dict(os.environ)
            if not words:
                raise UserError("no module to start", python_module("novelgpt.launch --processes 2 pretrain"))
            place = _place(options)
            if place.hosts > 1:
                secret = secrets.token_bytes(32) if options.hostfile is not None else given.read(options.slurm)
        remotes: list[Remote] = []
        if options.hostfile is not None and place.hosts > 1:
            remotes = _start_others(options.hostfile, place, words, secret)
        channel, block = _meet(place, secret, remotes, signals, options.single)
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="novelgpt-ranks-")))
        threads = max(1, usable_cores() // block.processes)
        environment = {"OMP_NUM_THREADS": str(threads)} | environment
        status = _run(Starts(block, words, environment, logs, options.port), channel, options.max_restarts, signals)
        for remote in remotes:
            remote.process.wait()
    raise SystemExit(status)


@dataclass
class Starts:
    """What every start of the ranks has.

    Attributes:
        block: which ranks this host has.
        words: module, and the words of its command line.
        environment: of each rank.
        logs: folder for what ranks print.
        port: where they meet, if it was named; else every start has one of its own.
    """

    block: Block
    words: Sequence[str]
    environment: Mapping[str, str]
    logs: Path
    port: int | None


def _run(starts: Starts, channel: Channel, most: int, signals: Signals) -> int:
    """Start the ranks, again after a fault as long as that is allowed; the exit status of the whole."""
    restarts = Restarts(most if isinstance(channel, Alone) else 0, starts.logs)
    block, host = starts.block, socket.gethostname()
    while True:
        with Ranks(block, starts.words, starts.environment, host, starts.logs, restarts.variables()) as ranks:
            outcome = watch(ranks, channel, signals)
        if not restarts.again(outcome, signals):
            explain(outcome, channel)
            return outcome.status
        restarts.wait(signals)
        block = replace(block, port=starts.port or _free_ports())


def _meet(
    place: Place, secret: bytes, remotes: Sequence[Remote], signals: Signals, single: bool
) -> tuple[Channel, Block]:
    """Find the other hosts, and settle which ranks this one has."""
    if place.hosts == 1:
        return Alone(), Block(0, place.processes, place.processes, "127.0.0.1", place.port, grouped=not single)

    def watch() -> None:
        for remote in remotes:
            remote.check()
        if signals.received:
            raise SystemExit(128 + signals.received[0])

    if place.host > 0:
        hello = Hello(host=place.host, hosts=place.hosts, processes=place.processes, name=socket.gethostname())
        member = Member(place.address, place.port + 1, hello, secret, watch)
        return member, member.block(place.processes, watch)
    first = FirstHost(place.hosts, place.address, place.port + 1, secret)
    block = first.gather(place.processes, place.port, watch)
    met = f"{counted(place.hosts, 'host')}, {counted(block.world_size, 'process')}"
    say(f"{met}, meeting at {block.address} port {block.port}")
    return first, block


def _place(options: argparse.Namespace) -> Place:
    """This host's part, from the options.

    Raises:
        UserError: they do not fit together.
    """
    if options.single and (options.slurm or options.hostfile or (options.hosts, options.processes) != (1, 1)):
        raise UserError("--single is for one process on one host", "leave it out")
    if options.slurm:
        return slurm_place(os.environ, options.processes)
    if options.hostfile is not None:
        names = read_hostfile(options.hostfile)
        first = next(iter(names))
        if len(names) > 1 and not local_addresses(first.split("@")[-1]):
            raise UserError(
                f"{options.hostfile} begins with {first}, which is not this host", "start on the first host of the file"
            )
        return Place(0, len(names), names[first], first.split("@")[-1], options.port or _free_ports())
    if options.hosts > 1 and (not options.address or options.port is None):
        raise UserError("several hosts need a place to meet", "set MASTER_ADDR and MASTER_PORT, the same on all hosts")
    return Place(options.host, options.hosts, options.processes, options.address or "", options.port or _free_ports())


def _start_others(hostfile: Path, place: Place, words: Sequence[str], secret: bytes) -> list[Remote]:
    names = read_hostfile(hostfile)
    environment: Mapping[str, str] = shared_environment()
    return [
        Remote(name, Place(host, place.hosts, processes, place.address, place.port), words, environment, secret)
        for host, (name, processes) in enumerate(names.items())
        if host > 0
    ]


def _free_ports() -> int:
    """A port that is free, as is the next one. Not one that systems give to outgoing connections, from 32768 on."""
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
    """A number of restarts, for a parser."""
    if not re.fullmatch("[0-9]{1,4}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of restarts; take 3, for example")
    return int(text)


def _parser() -> CommandParser:
    parser = CommandParser(prog="python -m novelgpt.launch", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="ranks on this host")
    parser.add_argument("--hostfile", type=Path, metavar="FILE", help="lines of `host slots=N`; the first is this host")
    parser.add_argument("--slurm", action="store_true", help="this is a task of a Slurm step, one a host")
    parser.add_argument("--hosts", type=int, default=1, metavar="N", help="how many hosts start this, each by itself")
    parser.add_argument("--host", type=int, default=0, metavar="I", help="number of this host, from 0")
    parser.add_argument("--address", metavar="NAME", help="the first host's address")
    parser.add_argument("--port", type=int, metavar="PORT", help="where to meet; the next one is used too")
    parser.add_argument(
        "--max_restarts", type=_restarts, default=0, metavar="N", help="after a fault, start again so many times"
    )
    parser.add_argument(
        "--single", action="store_true", help="one process that is no rank: it hears nothing of others to meet"
    )
    parser.add_argument("--from_stdin", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("words", nargs=argparse.REMAINDER, help="module, and the words of its command line")
    return parser


if __name__ == "__main__":
    main()
