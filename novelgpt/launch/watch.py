"""The ranks of this host while they run: signals are handed on, the first failure ends all, its cause is told."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass
from types import FrameType

from novelgpt.launch.channel import FIRST_HOST, WAIT_SECONDS, Channel, Member
from novelgpt.launch.ranks import Failure, Ranks
from novelgpt.settings.signals import IMPATIENT_SIGNALS, STOP_SIGNALS
from novelgpt.settings.terminal import say, say_text

POLL_SECONDS = 0.05
# When a rank has died, the others fail for lack of it, and say what they know; then they are ended.
GRACE_SECONDS = 3.0
# When a rank has stopped as it should, the others are about to.
STOP_GRACE_SECONDS = 30.0
# For the other hosts to end, and to say why.
FINISH_SECONDS = 20.0
STOPPED_STATUSES = {128 + number for number in STOP_SIGNALS}


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


@dataclass(frozen=True)
class Outcome:
    """How a start of the ranks has ended.

    Attributes:
        status: of the whole, as a shell has it.
        failures: of all hosts, as far as this one knows them.
        stopped: ranks that ended because they were told to.
    """

    status: int
    failures: list[Failure]
    stopped: list[Failure]

    @property
    def lost(self) -> bool:
        """Whether a host is."""
        return any(failure.cause for failure in self.failures)

    @property
    def cause(self) -> Failure:
        """The failure that the others follow from."""
        return min(self.failures, key=Failure.weight)


def watch(ranks: Ranks, channel: Channel, signals: Signals) -> Outcome:
    """Until all is over."""
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
    return Outcome(channel.told or _status(failures, stopped), failures, stopped)


def explain(outcome: Outcome, channel: Channel) -> None:
    """Why the run has ended, where it has not ended well."""
    failures, stopped = outcome.failures, outcome.stopped
    if failures and (not isinstance(channel, Member) or failures[0].who == FIRST_HOST):
        _explain(outcome)  # on the first host alone, as long as there is one
    if stopped and not failures and all(rank.status < 0 for rank in stopped):
        # None had begun to listen, or it would have said so.
        say(f"stopped by {signal.Signals(-stopped[0].status).name} before training began", stderr=True)


def show_last_words(failure: Failure) -> None:
    """What a rank printed last, where that is not on the terminal."""
    if failure.tail:
        say(f"--- {failure.who} printed last:", stderr=True)
        say_text(f"{failure.tail}\n---", stderr=True)


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


def _explain(outcome: Outcome) -> None:
    """The cause on the terminal, last of all. Errors of use that rank 0 has printed stand there already."""
    first = outcome.cause
    alike = [failure for failure in outcome.failures if failure.weight() == first.weight()]
    if first.status == 2:
        if all(failure.tail for failure in alike):
            say_text(first.tail, stderr=True)
        return
    show_last_words(first)
    cause, remedy = first.explain()
    say(f"error: {cause}", f"  fix: {remedy}", stderr=True)
