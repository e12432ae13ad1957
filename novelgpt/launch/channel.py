"""How the launchers of several hosts know of each other: a connection from each to the first host's.

    host 1…                              first host
    Hello ------------------------------> is it one of this run, and its number free?
          <------------------------------ Welcome, or Refused
          <------------------------------ Start: all are there; these are your ranks
    Report, of each rank that fails ----> tells all hosts
          <------------------------------ End, with the status of the run
    Done ------------------------------->

where the run heals (`--max_restarts`), an End that is not final comes first, and after Done
          <------------------------------ Start, once more, or the final End
    Quit, on a signal meanwhile --------> ends the run

`frames` signs what travels, `messages` says what it may be, `door` lets in who knows the secret of the run. A host
counts as lost when its connection ends before it said `Done`, or when what comes from it is wrong; kept-alive
connections end within half a minute where a host falls silent.

The first host listens until its end, and both sides can begin again. `FirstHost.gather` waits for the hosts that have
no connection (one that was lost comes back under its number, as a new `Member`) and for those whose ranks have not
ended, then sends a `Start` to all, which `Member.poll` notes as `started` and `Member.block` returns, each time.
"""

from __future__ import annotations

import select
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Literal

import psutil

from novelgpt.launch.door import Arrival, Door
from novelgpt.launch.frames import Fault, Link
from novelgpt.launch.messages import Done, End, Hello, Message, Quit, Refused, Report, Start, Welcome
from novelgpt.launch.ranks import Block, Failure
from novelgpt.settings.errors import UserError
from novelgpt.settings.signals import STOP_SIGNALS
from novelgpt.settings.terminal import counted, say

WAIT_SECONDS = 600.0  # for all hosts to come
ANSWER_SECONDS = 20.0  # for the first host to answer one that has connected
# For a place to become free: the first host notices within half a minute that the one who had it has fallen silent.
TAKEN_SECONDS = 60.0
LOST_STATUS = 1
FIRST_HOST = "the first host"


class Alone:
    """No other host."""

    told: int | None = None

    def poll(self) -> list[Failure]:
        """Nothing."""
        return []

    def report(self, failures: Iterable[Failure], status: int) -> None:
        """To nobody."""

    def finish(self, seconds: float) -> list[Failure]:
        """At once."""
        return []

    def listen(self) -> None:
        """To nobody."""

    def close(self, status: int) -> None:
        """Nothing."""


class FirstHost:
    """The first host's end: connections to all others.

    Attributes:
        told: always None; see `Member`.
        members: connection of each host that is there, by its number.
        processes: ranks of each host, by its number.
        heals: whether the ranks may be started again.
    """

    told: int | None = None

    def __init__(self, hosts: int, name: str, port: int, secret: bytes, heals: bool = False) -> None:
        """Listen.

        Args:
            hosts: of the run, this one among them.
            name: of this host, as the others know it.
            port: to listen at.
            secret: of the run.
            heals: whether the ranks may be started again.

        Raises:
            UserError: the port is taken.
        """
        self.hosts = hosts
        self.heals = heals
        self._begun = False  # whether the ranks have been started
        self.members: dict[int, Link] = {}
        self.processes: dict[int, int] = {}
        self._names: dict[int, str] = {}
        self._done: set[int] = set()
        self._reports: Counter[int] = Counter()
        self._door = Door(name, port, secret)

    def gather(self, processes: int, port: int, watch: Callable[[], None]) -> Block:
        """Wait for all hosts, tell each its ranks, and return those of this one.

        Args:
            processes: of this host.
            port: where the ranks meet.
            watch: called again and again meanwhile; what it raises ends the waiting.

        Raises:
            UserError: a host did not come in time.
            SystemExit: one was told to end.
        """
        self.processes[0] = processes
        begin = time.monotonic()
        while missing := self._missing():
            watch()
            self.listen(0.05)
            if time.monotonic() - begin > WAIT_SECONDS:
                raise UserError(
                    f"of {self.hosts} hosts, number {', '.join(map(str, missing))} did not come in "
                    f"{WAIT_SECONDS / 60:.0f} minutes",
                    "see what it printed, and whether this host's port is open to it",
                )
        self._reports.clear()
        self._done.clear()
        self._begun = True
        world = sum(self.processes.values())
        address = self.members[1].connection.getsockname()[0]
        for host, link in self.members.items():
            first = sum(self.processes[earlier] for earlier in range(host))
            link.send(Start(first_rank=first, world_size=world, port=port, heals=self.heals))
        return Block(0, processes, world, address, port, interface_of(address))

    def listen(self, seconds: float = 0) -> None:
        """While no ranks run: let hosts in, and tell of those that leave.

        Raises:
            SystemExit: one was told to end, and with it the run.
        """
        for arrival in self._door.arrivals(seconds):
            self._admit(arrival)
        for failure in self._hear(idle=True):
            if failure.status < 0:
                say(f"{failure.who} has left: {failure.cause}", stderr=True)
                raise SystemExit(failure.exit_status)
            if failure.cause:  # and is no word of a rank that ended before
                say(f"{failure.who} has left: {failure.cause}; waiting for it to come back", stderr=True)

    def poll(self) -> list[Failure]:
        """Failures of the other hosts since the last call."""
        for arrival in self._door.arrivals(0):
            self._refuse(arrival)  # not while the run goes on
        return self._hear()

    def report(self, failures: Iterable[Failure], status: int) -> None:
        """Tell all hosts to end with this status."""
        for link in self.members.values():
            link.send(End(status=status, final=not self.heals))

    def finish(self, seconds: float) -> list[Failure]:
        """Wait so long for the others, and take what they still have to say."""
        found = self.poll()
        deadline = time.monotonic() + seconds
        while self.members.keys() - self._done and time.monotonic() < deadline:
            time.sleep(0.05)
            found += self.poll()
        return found

    def close(self, status: int) -> None:
        """The run is over, with this status."""
        for link in self.members.values():
            if self.heals:
                link.send(End(status=status, final=True))
            link.close()
        self._door.close()

    def _missing(self) -> list[int]:
        """Hosts that are not ready: not there, or, after a start, not done with it."""
        if self._begun:
            return [host for host in range(1, self.hosts) if host not in self.members or host not in self._done]
        for host in self._done:
            self.members.pop(host).close()
        self._done.clear()
        return [host for host in range(1, self.hosts) if host not in self.members]

    def _admit(self, arrival: Arrival) -> None:
        hello = arrival.hello
        if hello.hosts != self.hosts or hello.host in self.members:
            return self._refuse(arrival)
        self.members[hello.host], self.processes[hello.host] = arrival.link, hello.processes
        self._names[hello.host] = f"host {hello.host} ({hello.name}, {arrival.address})"
        if self._begun:
            self._done.add(hello.host)
        return arrival.link.send(Welcome())

    def _refuse(self, arrival: Arrival) -> None:
        reason: Literal["taken", "hosts"] = "taken" if arrival.hello.hosts == self.hosts else "hosts"
        arrival.link.send(Refused(reason=reason, hosts=self.hosts))
        arrival.link.close()

    def _hear(self, idle: bool = False) -> list[Failure]:
        """What the members say; those that are lost are no members any more.

        Args:
            idle: whether those count, too, whose ranks have ended.
        """
        found = []
        for host, link in list(self.members.items()):
            for message in link.receive():
                self._reports[host] += 1
                if isinstance(message, Done):
                    self._done.add(host)
                elif isinstance(message, Quit) and self._begun and message.signal in STOP_SIGNALS:
                    self._done.add(host)
                    name = signal.Signals(message.signal).name
                    found.append(Failure(self._names[host], -message.signal, cause=f"it was told to end by {name}"))
                elif isinstance(message, Report) and self._reports[host] <= self.processes[host]:
                    found.append(Failure(message.who, message.status, message.tail))
                else:
                    link.fail(Fault.INVALID)
            if link.fault is not None and (idle or host not in self._done):
                self._done.discard(host)
                found.append(Failure(self._names[host], LOST_STATUS, cause=link.fault.value))
                self.members.pop(host).close()
        return found


class Member:
    """The end of every other host.

    Attributes:
        told: status with which the first host wants the ranks to end; None as long as it does not.
        final: whether the run is over then.
        heals: whether there may be another start.
        started: the first host's word that the ranks shall start, until `block` takes it.
    """

    def __init__(self, address: str, port: int, hello: Hello, secret: bytes, watch: Callable[[], None]) -> None:
        """Connect and say who this is, waiting for the first host to listen.

        Raises:
            UserError: it does not, has another secret, or takes no such host.
        """
        self.told: int | None = None
        self.final = self.heals = False
        self.started: Start | None = None
        self._lost = False
        self.link, messages = _join(address, port, hello, secret, watch)
        self._take(messages)

    def block(self, processes: int, watch: Callable[[], None]) -> Block:
        """The ranks of this host, once all hosts are there.

        Raises:
            UserError: the first host ended.
        """
        while self.started is None:
            watch()
            self._take(self.link.receive())
            if self.link.fault is not None and self.started is None:
                raise UserError(f"the first host is gone: {self.link.fault.value}", "see what it printed")
            time.sleep(0.05)
        start, self.started, self.told = self.started, None, None
        self.heals = start.heals
        own, first = self.link.connection.getsockname()[0], self.link.connection.getpeername()[0]
        return Block(start.first_rank, processes, start.world_size, first, start.port, interface_of(own))

    def poll(self) -> list[Failure]:
        """The loss of the first host; all other failures are the first host's to tell."""
        self._take(self.link.receive())
        if self.link.fault is not None and self.told is None and not self._lost:
            self._lost = True
            return [Failure(FIRST_HOST, LOST_STATUS, cause=self.link.fault.value)]
        return []

    def report(self, failures: Iterable[Failure], status: int) -> None:
        """Tell the first host."""
        for failure in failures:
            self.link.send(Report(who=failure.who, status=failure.status, tail=failure.tail))

    def finish(self, seconds: float) -> list[Failure]:
        """Say that all is said."""
        found = self.poll()
        self.link.send(Done())
        if not self.heals:
            self.link.close()
        return found

    def starts_again(self, watch: Callable[[], None]) -> bool:
        """Wait for the first host's word after a start. False where the run is over, or the first host is gone."""
        while self.started is None and not self.final and self.link.fault is None:
            watch()
            self._take(self.link.receive())
            time.sleep(0.05)
        return self.started is not None

    @property
    def fault(self) -> str:
        """Why nothing comes from the first host any more."""
        return (self.link.fault or Fault.GONE).value

    def quit(self, number: int) -> None:
        """A signal ends this host, and the run with it."""
        self.link.send(Quit(signal=number))

    def close(self, status: int) -> None:
        """End the connection."""
        self.link.close()

    def _take(self, messages: Iterable[Message]) -> None:
        for message in messages:
            if isinstance(message, Start):
                self.started = message
            elif isinstance(message, End):
                self.told, self.final = message.status, message.final
            else:
                self.link.fail(Fault.INVALID)


Channel = Alone | FirstHost | Member


def _join(
    address: str, port: int, hello: Hello, secret: bytes, watch: Callable[[], None]
) -> tuple[Link, list[Message]]:
    """A connection to the first host, which has proved to know the secret, and what it has said already."""
    place = f"{address} port {port}"
    begin = time.monotonic()
    taken: float | None = None  # since when the place is
    silent = False
    while True:
        watch()
        try:
            link = Link(_connect(address, port), secret, first=False)
        except OSError as error:
            trouble = str(error)
        else:
            messages = _ask(link, hello, watch)
            if messages and isinstance(messages[0], Welcome):
                return link, messages[1:]
            link.close()
            trouble = "ends the connection without a word"
            if messages and isinstance(messages[0], Refused):
                if taken is None and messages[0].reason == "taken":
                    say(f"the first host has a host {hello.host} already; waiting for its place", stderr=True)
                taken = taken or time.monotonic()
                _check_refusal(messages[0], hello, time.monotonic() - taken)
            elif link.fault is not None and link.fault is not Fault.GONE:
                _raise_for(link.fault, place)
            elif not silent:
                silent = True
                say(f"{place} {trouble}, as another service or an older version would; trying again", stderr=True)
        if time.monotonic() - begin > WAIT_SECONDS:
            raise UserError(
                f"the first host does not answer: {place}: {trouble}",
                "start there too; open the port; or name an address of it that this host can reach",
            )
        time.sleep(0.5)


def _connect(address: str, port: int) -> socket.socket:
    connection = socket.create_connection((address, port), timeout=5)
    if connection.getsockname() == connection.getpeername():  # may be so on one machine, where nobody listens yet
        connection.close()
        raise ConnectionRefusedError("nobody listens there")
    return connection


def _ask(link: Link, hello: Hello, watch: Callable[[], None]) -> list[Message]:
    """Say who this is; the answer, or nothing where the connection fails or stays silent."""
    deadline = time.monotonic() + ANSWER_SECONDS
    asked = False
    while link.fault is None and time.monotonic() < deadline:
        watch()
        select.select([link.connection], [], [], 0.05)
        messages = link.receive()
        if messages:
            return messages
        if link.greeted and not asked:
            link.send(hello)
            asked = True
    return []


def _check_refusal(answer: Refused, hello: Hello, waited: float) -> None:
    if answer.reason == "hosts":
        raise UserError(
            f"the first host counts {counted(answer.hosts, 'host')}, this one {hello.hosts}", "say the same on each"
        )
    if waited > TAKEN_SECONDS:
        raise UserError(
            f"the first host has a host {hello.host} already, or its run has begun",
            "see what it printed; each host needs a number of its own, from 0",
        )


def _raise_for(fault: Fault, place: str) -> None:
    if fault is Fault.FORGED:
        raise UserError(
            f"the first host, at {place}, has another secret than this one, or belongs to another run",
            "give all hosts the same SECRET_FILE or NOVELGPT_SECRET, and each run a MASTER_PORT of its own",
        )
    if fault is Fault.UNKNOWN:
        raise UserError(f"what answers at {place} is no launcher of this toolkit", "name another MASTER_PORT")
    raise UserError(f"the first host, at {place}: {fault.value}", "take the same version on all hosts")


def interface_of(address: str) -> str | None:
    """The network interface that has an address, such as eth0."""
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in entries):
            return name
    return None
