"""Start a module as the ranks of one run, on this host or on several.

    python -m novelgpt.launch --processes 2 pretrain --train_files book.txt
    python -m novelgpt.launch --hostfile hosts.txt finetune --model MODEL

scripts/launch.sh calls it. A first SIGINT, SIGTERM, SIGHUP or SIGUSR1 is handed on to the ranks, which save and end;
a second SIGINT or SIGTERM ends them at once. Where a rank dies, the others are ended and the cause is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

from novelgpt.launch.channel import FIRST_HOST, WAIT_SECONDS, Alone, Channel, FirstHost, Member
from novelgpt.launch.hosts import Place, Remote, local_addresses, read_hostfile, shared_environment, slurm_place
from novelgpt.launch.messages import Hello
from novelgpt.launch.ranks import Block, Failure, Ranks
from novelgpt.launch.secret import GivenSecret
from novelgpt.settings.command_parser import CommandParser
from novelgpt.settings.cores import usable_cores
from novelgpt.settings.errors import UserError, exit_on_user_error
from novelgpt.settings.remedies import python_module
from novelgpt.settings.signals import IMPATIENT_SIGNALS, STOP_SIGNALS
from novelgpt.settings.terminal import say, say_text
from novelgpt.settings.units import counted

POLL_SECONDS = 0.05
# When a rank has died, the others fail for lack of it, and say what they know; then they are ended.
GRACE_SECONDS = 3.0
# When a rank has stopped as it should, the others are about to.
STOP_GRACE_SECONDS = 30.0
# For the other hosts to end, and to say why.
FINISH_SECONDS = 20.0
STOPPED_STATUSES = {128 + number for number in STOP_SIGNALS}


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
        channel, block = _meet(place, secret, remotes, signals)
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="novelgpt-ranks-")))
        threads = max(1, usable_cores() // block.processes)
        environment = {"OMP_NUM_THREADS": str(threads)} | environment
        ranks = stack.enter_context(Ranks(block, words, environment, socket.gethostname(), logs))
        status = _watch(ranks, channel, signals)
        for remote in remotes:
            remote.process.wait()
    raise SystemExit(status)


class Signals:
    """Notes the signals that ask for an end. One that was ignored at the start (nohup) stays ignored."""

    def __init__(self) -> None:
        self.received: list[int] = []
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._note)

    def impatient(self) -> bool:
        """Whether the end is wanted at once."""
        return sum(number in IMPATIENT_SIGNALS for number in self.received) > 1

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received.append(number)


def _watch(ranks: Ranks, channel: Channel, signals: Signals) -> int:
    """Until all is over; the exit status of the whole."""
    failures: list[Failure] = []
    stopped: list[Failure] = []
    sent = 0
    deadline = float("inf")
    while ranks.running():
        time.sleep(POLL_SECONDS)
        if signals.impatient():
            say(f"ended at once by a second {signal.Signals(signals.received[-1]).name}", stderr=True)
            return 128 + signals.received[-1]
        for number in signals.received[sent:]:
            ranks.send(number)
            sent += 1
        new = _sort_out(ranks.newly_ended(), signals, stopped)
        others = channel.poll()
        failures += new + others
        if new or others:
            channel.report(new + others, _status(failures, stopped))
        if failures or channel.told is not None:
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        elif stopped:
            deadline = min(deadline, time.monotonic() + STOP_GRACE_SECONDS)
        if time.monotonic() > deadline:
            break
    last = _sort_out(ranks.newly_ended(), signals, stopped)
    ranks.kill()
    failures += last
    if last or stopped:
        channel.report(last, _status(failures, stopped))
    failures += channel.finish(FINISH_SECONDS if failures or stopped else WAIT_SECONDS)
    if failures and (not isinstance(channel, Member) or failures[0].who == FIRST_HOST):
        _explain(failures)  # on the first host alone, as long as there is one
    if stopped and not failures and all(rank.status < 0 for rank in stopped):
        # None had begun to listen, or it would have said so.
        say(f"stopped by {signal.Signals(-stopped[0].status).name} before training began", stderr=True)
    return channel.told or _status(failures, stopped)


def _status(failures: list[Failure], stopped: list[Failure]) -> int:
    if failures:
        return min(failures, key=Failure.weight).exit_status
    return stopped[0].exit_status if stopped else 0


def _sort_out(ended: list[Failure], signals: Signals, stopped: list[Failure]) -> list[Failure]:
    """Failures; those that ended because they were told to go into `stopped`."""
    failures = []
    for rank in ended:
        told = rank.status in STOPPED_STATUSES or -rank.status in signals.received
        if told or (stopped and rank.status == 1):  # others fail for lack of one that stopped
            stopped.append(rank)
        else:
            failures.append(rank)
    return failures


def _explain(failures: list[Failure]) -> None:
    """The cause on the terminal, last of all. Errors of use that rank 0 has printed stand there already."""
    first = min(failures, key=Failure.weight)
    alike = [failure for failure in failures if failure.weight() == first.weight()]
    if first.status == 2:
        if all(failure.tail for failure in alike):
            say_text(first.tail, stderr=True)
        return
    if first.tail:
        say(f"--- {first.who} printed last:", stderr=True)
        say_text(f"{first.tail}\n---", stderr=True)
    cause, remedy = first.explain()
    say(f"error: {cause}", f"  fix: {remedy}", stderr=True)


def _meet(place: Place, secret: bytes, remotes: Sequence[Remote], signals: Signals) -> tuple[Channel, Block]:
    """Find the other hosts, and settle which ranks this one has."""
    if place.hosts == 1:
        return Alone(), Block(0, place.processes, place.processes, "127.0.0.1", place.port)

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


def _parser() -> CommandParser:
    parser = CommandParser(prog="python -m novelgpt.launch", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="ranks on this host")
    parser.add_argument("--hostfile", type=Path, metavar="FILE", help="lines of `host slots=N`; the first is this host")
    parser.add_argument("--slurm", action="store_true", help="this is a task of a Slurm step, one a host")
    parser.add_argument("--hosts", type=int, default=1, metavar="N", help="how many hosts start this, each by itself")
    parser.add_argument("--host", type=int, default=0, metavar="I", help="number of this host, from 0")
    parser.add_argument("--address", metavar="NAME", help="the first host's address")
    parser.add_argument("--port", type=int, metavar="PORT", help="where to meet; the next one is used too")
    parser.add_argument("--from_stdin", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("words", nargs=argparse.REMAINDER, help="module, and the words of its command line")
    return parser


if __name__ == "__main__":
    main()
