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
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from novelgpt.launch.channel import Alone, FirstHost, Member
from novelgpt.launch.hosts import Place, local_addresses, read_hostfile, slurm_place
from novelgpt.launch.messages import Hello
from novelgpt.launch.ranks import Block
from novelgpt.launch.remotes import Remotes
from novelgpt.launch.restarts import Restarts
from novelgpt.launch.secret import GivenSecret
from novelgpt.launch.starts import Starts, follow, lead
from novelgpt.launch.watch import FINISH_SECONDS, Signals
from novelgpt.settings.command_parser import CommandParser
from novelgpt.settings.errors import UserError, exit_on_user_error
from novelgpt.settings.remedies import python_module
from novelgpt.settings.terminal import counted, say


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
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="novelgpt-ranks-")))
        starts = Starts(words, environment, logs, signals)
        if place.host > 0:
            hello = Hello(host=place.host, hosts=place.hosts, processes=place.processes, name=socket.gethostname())
            join = partial(Member, place.address, place.port + 1, hello, secret, starts.interrupt)
            raise SystemExit(follow(starts, join, place.processes, comes_back=not options.from_stdin))
        restarts = Restarts(options.max_restarts, logs)
        if place.hosts == 1:
            status = lead(starts, Alone(), partial(_alone, options, place, restarts), restarts)
        else:
            remotes = Remotes(options.hostfile, place, words, secret)
            first = FirstHost(place.hosts, place.address, place.port + 1, secret, heals=options.max_restarts > 0)
            status = lead(starts, first, partial(_gather, options, place, first, remotes, starts, restarts), restarts)
            remotes.wait(FINISH_SECONDS if restarts.number else None)
    raise SystemExit(status)


def _alone(options: argparse.Namespace, place: Place, restarts: Restarts) -> Block:
    """The ranks of a run on one host. Each start has a port of its own, unless one is named."""
    port = place.port if restarts.number == 0 else options.port or _free_ports()
    return Block(0, place.processes, place.processes, "127.0.0.1", port, grouped=not options.single)


def _gather(
    options: argparse.Namespace,
    place: Place,
    first: FirstHost,
    remotes: Remotes,
    starts: Starts,
    restarts: Restarts,
) -> Block:
    """The ranks of the first host, once all are there. With a hostfile, one that was lost is started again."""

    def watch() -> None:
        starts.interrupt()
        if restarts.number == 0:
            remotes.check()
        else:
            remotes.start_again(first.members)

    again = restarts.number > 0 and options.hostfile is not None and options.port is None
    block = first.gather(place.processes, _free_ports() if again else place.port, watch)
    if restarts.number == 0:
        met = f"{counted(place.hosts, 'host')}, {counted(block.world_size, 'process')}"
        say(f"{met}, meeting at {block.address} port {block.port}")
    return block


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
        own = len(names) == 1 and first == socket.gethostname()  # which need not lead anywhere
        if not own and not local_addresses(first.split("@")[-1]):
            raise UserError(
                f"{options.hostfile} begins with {first}, which is not this host", "start on the first host of the file"
            )
        return Place(0, len(names), names[first], first.split("@")[-1], options.port or _free_ports())
    if options.hosts > 1 and (not options.address or options.port is None):
        raise UserError("several hosts need a place to meet", "set MASTER_ADDR and MASTER_PORT, the same on all hosts")
    return Place(options.host, options.hosts, options.processes, options.address or "", options.port or _free_ports())


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
