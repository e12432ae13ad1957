"""The starts of a run's ranks by this host's launcher: the first host decides on each, the others follow it."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from novelgpt.launch.channel import FIRST_HOST, Alone, Channel, FirstHost, Member
from novelgpt.launch.ranks import Block, Ranks
from novelgpt.launch.restarts import Restarts
from novelgpt.launch.watch import Outcome, Signals, explain, watch
from novelgpt.settings.errors import UserError
from novelgpt.settings.hardware import threads_each
from novelgpt.settings.terminal import say


@dataclass(frozen=True)
class Starts:
    """What every start has.

    Attributes:
        words: module, and the words of its command line.
        environment: of each rank.
        logs: folder for what ranks print.
        signals: that ask for an end.
    """

    words: Sequence[str]
    environment: Mapping[str, str]
    logs: Path
    signals: Signals

    def run(self, block: Block, channel: Channel, of_first: Mapping[str, str]) -> Outcome:
        """Start the ranks of this host, and wait for their end.

        Args:
            block: which ranks these are.
            channel: to the other hosts.
            of_first: variables of rank 0 alone.
        """
        environment = {"OMP_NUM_THREADS": str(threads_each(block.processes)), **self.environment}
        with Ranks(block, self.words, environment, socket.gethostname(), self.logs, of_first) as ranks:
            return watch(ranks, channel, self.signals)

    def interrupt(self) -> None:
        """Raise SystemExit where a signal has come."""
        if self.signals.received:
            raise SystemExit(128 + self.signals.received[0])


def lead(starts: Starts, channel: Alone | FirstHost, meet: Callable[[], Block], restarts: Restarts) -> int:
    """On the first host: start the ranks, and again after a fault as long as that is allowed.

    Args:
        starts: what each has.
        channel: to the other hosts.
        meet: waits for all hosts, and says which ranks this one has; called before each start.
        restarts: that may be made.

    Returns:
        The exit status of the run.
    """
    status = 2
    try:
        while True:
            outcome = starts.run(meet(), channel, restarts.variables())
            status = outcome.status
            if not restarts.again(outcome, starts.signals):
                break
            restarts.wait(starts.signals, channel.listen)
    except UserError:
        status = 2
        raise
    except SystemExit as end:
        status = int(end.code or 0)
        raise
    finally:
        channel.close(status)
    explain(outcome, channel)
    return status


def follow(starts: Starts, join: Callable[[], Member], processes: int, comes_back: bool) -> int:
    """On another host: start its ranks whenever the first one says so.

    Args:
        starts: what each has.
        join: connects to the first host, and waits for it.
        processes: of this host.
        comes_back: whether the first host may do so by itself, and know the secret that this one has.

    Returns:
        The exit status of the run.
    """
    member = join()
    while True:
        outcome = starts.run(member.block(processes, starts.interrupt), member, {})
        signals = starts.signals
        unheard = outcome.stopped and all(rank.status < 0 for rank in outcome.stopped)
        if signals.received and (signals.impatient() or unheard):
            member.quit(signals.received[-1])  # the others hear nothing of it from their ranks
        stopped = outcome.stopped and (signals.received or not outcome.lost)
        if signals.impatient() or stopped or not member.heals:
            break
        try:
            while not member.starts_again(starts.interrupt) and not member.final and comes_back:
                say(f"{FIRST_HOST} is gone: {member.fault}; waiting for it to come back", stderr=True)
                member = join()
        except SystemExit:
            member.quit(signals.received[0])
            raise
        if member.started is None:
            break
    member.close(outcome.status)
    explain(outcome, member)
    return member.told if member.final and member.told is not None else outcome.status
