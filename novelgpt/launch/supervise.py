"""The starts of a run's ranks on this host: each is watched to its end; the first host decides on the next one.

While ranks run, signals are forwarded to them, the first failure ends all, and its cause is reported.
"""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from novelgpt.launch.first_host import FirstHost
from novelgpt.launch.member import FIRST_HOST, WAIT_SECONDS, Member
from novelgpt.launch.ranks import Failure, RankBlock, Ranks, show_tail
from novelgpt.launch.restarts import Restarts
from novelgpt.settings.errors import UserError
from novelgpt.settings.hardware import threads_each
from novelgpt.settings.signals import IMPATIENT_SIGNALS, STOP_SIGNALS
from novelgpt.settings.terminal import say, say_text

POLL_SECONDS = 0.05
# When a rank has died, the others fail for lack of it, and print what they know; then they are ended.
GRACE_SECONDS = 3.0
# When a rank has stopped as it should, the others are about to.
STOP_GRACE_SECONDS = 30.0
# For the other hosts to end, and to report why.
FINISH_SECONDS = 20.0
STOPPED_STATUSES = {128 + number for number in STOP_SIGNALS}


class NoOtherHosts:
    """The connections of a run on one host: none. See `FirstHost` for its methods."""

    status: int | None = None

    def poll(self) -> list[Failure]:
        """Return no failures."""
        return []

    def report(self, failures: Iterable[Failure], status: int) -> None:
        """Do nothing."""

    def finish(self, seconds: float) -> list[Failure]:
        """Return no failures, without waiting."""
        return []

    def listen(self) -> None:
        """Do nothing."""

    def close(self, status: int) -> None:
        """Do nothing."""


Connections = NoOtherHosts | FirstHost | Member


class Signals:
    """Notes the signals that ask for an end. One that was ignored at the start (nohup) stays ignored."""

    def __init__(self) -> None:
        self.received: list[int] = []
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._note)

    def impatient(self) -> bool:
        """Whether to end immediately."""
        return sum(number in IMPATIENT_SIGNALS for number in self.received) > 1

    def exit_if_received(self) -> None:
        """Raise SystemExit where a signal has come."""
        if self.received:
            raise SystemExit(128 + self.received[0])

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received.append(number)


@dataclass(frozen=True)
class Starts:
    """What every start has in common.

    Attributes:
        args: module, and the arguments of its command line.
        environment: of each rank.
        logs: folder for what ranks print.
        signals: that ask for an end.
    """

    args: Sequence[str]
    environment: Mapping[str, str]
    logs: Path
    signals: Signals

    def run(self, block: RankBlock, hosts: Connections, of_first: Mapping[str, str]) -> Outcome:
        """Start the ranks of this host, and wait for their end.

        Args:
            block: which ranks these are.
            hosts: the other ones.
            of_first: variables of rank 0 alone.
        """
        environment = {"OMP_NUM_THREADS": str(threads_each(block.processes)), **self.environment}
        with Ranks(block, self.args, environment, socket.gethostname(), self.logs, of_first) as ranks:
            return watch(ranks, hosts, self.signals)


@dataclass(frozen=True)
class Outcome:
    """How a start of the ranks has ended.

    Attributes:
        status: of the whole, as a shell has it.
        failures: of all hosts, as far as this one knows them.
        stopped: ranks that ended because of a signal to all.
    """

    status: int
    failures: list[Failure]
    stopped: list[Failure]

    @property
    def lost(self) -> bool:
        """Whether a host is."""
        return any(failure.cause for failure in self.failures)


def lead(starts: Starts, hosts: NoOtherHosts | FirstHost, meet: Callable[[], RankBlock], restarts: Restarts) -> int:
    """Start the ranks on the first host, and again after a fault as long as that is allowed.

    Args:
        starts: what each has in common.
        hosts: the other ones.
        meet: waits for all hosts, and returns the ranks of this one; called before each start.
        restarts: that may be made.

    Returns:
        The exit status of the run.
    """
    status, signals = 2, starts.signals
    try:
        while True:
            outcome = starts.run(meet(), hosts, restarts.variables())
            status = outcome.status
            # Ranks that lose their launcher stop and save, and all others with them: nobody has asked for that.
            stopped = bool(signals.received or (outcome.stopped and not outcome.lost))
            if not restarts.again(outcome.failures, stopped):
                break
            end = time.monotonic() + restarts.wait_seconds
            while time.monotonic() < end:
                if signals.received:
                    name = signal.Signals(signals.received[0]).name
                    say(f"stopped by {name} between two starts; the same command resumes from there", stderr=True)
                    signals.exit_if_received()
                hosts.listen()
                time.sleep(POLL_SECONDS)
    except UserError:
        status = 2
        raise
    except SystemExit as exit_:
        status = int(exit_.code or 0)
        raise
    finally:
        hosts.close(status)
    explain(outcome, hosts)
    return status


def follow(starts: Starts, join: Callable[[], Member], processes: int, comes_back: bool) -> int:
    """Start the ranks of another host whenever the first one orders it.

    Args:
        starts: what each has in common.
        join: connects to the first host, and waits for it.
        processes: of this host.
        comes_back: whether the first host may do so by itself, and know the secret that this one has.

    Returns:
        The exit status of the run.
    """
    signals, member = starts.signals, join()
    while True:
        outcome = starts.run(member.block(processes, signals.exit_if_received), member, {})
        unheard = outcome.stopped and all(rank.status < 0 for rank in outcome.stopped)
        if signals.received and (signals.impatient() or unheard):
            member.quit(signals.received[-1])  # the other hosts' ranks do not know of it
        stopped = outcome.stopped and (signals.received or not outcome.lost)
        if signals.impatient() or stopped or not member.heals:
            break
        try:
            while not member.starts_again(signals.exit_if_received) and not member.final and comes_back:
                say(f"{FIRST_HOST} is gone: {member.fault}; waiting for it to come back", stderr=True)
                member = join()
        except SystemExit:
            member.quit(signals.received[0])
            raise
        if member.started is None:
            break
    member.close(outcome.status)
    explain(outcome, member)
    return member.status if member.final and member.status is not None else outcome.status


def watch(ranks: Ranks, hosts: Connections, signals: Signals) -> Outcome:
    """Wait until all ranks of this host have ended; forward signals and failures."""
    failures: list[Failure] = []
    stopped: list[Failure] = []
    sent = 0
    deadline = float("inf")
    while ranks.running():
        time.sleep(POLL_SECONDS)
        if signals.impatient():
            say(f"ended at once by a second {signal.Signals(signals.received[-1]).name}", stderr=True)
            return Outcome(128 + signals.received[-1], [], [])
        for number in signals.received[sent:]:
            ranks.send(number)
            sent += 1
        new = _sort_out(ranks.newly_ended(), signals, stopped) + hosts.poll()
        failures += new
        if new:
            hosts.report(new, _status(failures, stopped))
        if failures or hosts.status is not None:
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        elif stopped:
            deadline = min(deadline, time.monotonic() + STOP_GRACE_SECONDS)
        if time.monotonic() > deadline:
            break
    last = _sort_out(ranks.newly_ended(), signals, stopped)
    ranks.kill()
    failures += last
    if last or stopped:
        hosts.report(last, _status(failures, stopped))
    failures += hosts.finish(FINISH_SECONDS if failures or stopped else WAIT_SECONDS)
    return Outcome(hosts.status or _status(failures, stopped), failures, stopped)


def explain(outcome: Outcome, hosts: Connections) -> None:
    """Print why the run has failed, last of all; errors of use that rank 0 has printed are not repeated."""
    failures, stopped = outcome.failures, outcome.stopped
    if stopped and not failures and all(rank.status < 0 for rank in stopped):
        # None had started to listen, or it would have said so.
        say(f"stopped by {signal.Signals(-stopped[0].status).name} before training began", stderr=True)
    if not failures or (isinstance(hosts, Member) and failures[0].who != FIRST_HOST):
        return  # the first host explains, as long as there is one
    first = min(failures, key=Failure.weight)
    if first.status == 2:
        if all(failure.tail for failure in failures if failure.weight() == first.weight()):
            say_text(first.tail, stderr=True)
        return
    show_tail(first)
    cause, remedy = first.explain()
    say(f"error: {cause}", f"  fix: {remedy}", stderr=True)


def _status(failures: list[Failure], stopped: list[Failure]) -> int:
    if failures:
        return min(failures, key=Failure.weight).exit_status
    return stopped[0].exit_status if stopped else 0


def _sort_out(ended: list[Failure], signals: Signals, stopped: list[Failure]) -> list[Failure]:
    """Return failures; ranks that ended because of a signal to all go into `stopped`."""
    failures = []
    for rank in ended:
        asked = rank.status in STOPPED_STATUSES or -rank.status in signals.received
        if asked or (stopped and rank.status == 1):  # others fail for lack of one that stopped
            stopped.append(rank)
        else:
            failures.append(rank)
    return failures
