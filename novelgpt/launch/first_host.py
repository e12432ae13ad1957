"""The first host's launcher: accepts hosts that know the secret of the run, and nobody else; see `member`.

Strangers cost little: nothing waits for them, few are read at a time, each for a few seconds, and nothing that they
send is parsed.

The first host listens until its end, and each side can start again. `FirstHost.gather` waits for the hosts that are not
connected (a lost one comes back under its number) and for those whose ranks have not ended, then sends each a start.
"""

from __future__ import annotations

import selectors
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

from novelgpt.launch.hosts import interface_of, is_loopback, local_addresses
from novelgpt.launch.member import LOST_STATUS, WAIT_SECONDS
from novelgpt.launch.messages import Done, End, Hello, Link, LinkFault, Quit, RanksStart, Refused, Report, Welcome
from novelgpt.launch.ranks import Failure, RankBlock
from novelgpt.settings.errors import UserError
from novelgpt.settings.signals import STOP_SIGNALS
from novelgpt.settings.terminal import counted, say

MAX_STRANGERS = 64  # that are read at a time
MAX_ACCEPTED = 128  # before others have their turn
QUEUE = 1024  # of connections that are not accepted yet
STRANGER_SECONDS = 10.0  # from the connection to the hello
MAX_LINES = 8  # about hosts that may not join


class FirstHost:
    """The connections of the first host to all others.

    Attributes:
        status: always None; see `Member`.
        members: connection of each connected host, by its number.
        processes: ranks of each host, by its number.
        heals: whether the ranks may be started again.
    """

    status: int | None = None

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
        self._listener = Listener(name, port, secret)

    def gather(self, processes: int, port: int, watch: Callable[[], None]) -> RankBlock:
        """Wait for all hosts, send each its ranks, and return those of this one.

        Args:
            processes: of this host.
            port: where the ranks meet.
            watch: called repeatedly meanwhile; what it raises ends the waiting.

        Raises:
            UserError: a host did not join in time.
            SystemExit: a signal ended one.
        """
        self.processes[0] = processes
        started = time.monotonic()
        while missing := self._missing():
            watch()
            self.listen(0.05)
            if time.monotonic() - started > WAIT_SECONDS:
                raise UserError(
                    f"of {self.hosts} hosts, number {', '.join(map(str, missing))} did not join within "
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
            link.send(RanksStart(first_rank=first, world_size=world, port=port, heals=self.heals))
        return RankBlock(0, processes, world, address, port, interface_of(address))

    def listen(self, seconds: float = 0) -> None:
        """Accept hosts, and report those that leave, while no ranks run.

        Raises:
            SystemExit: a signal ended one, and with it the run.
        """
        for arrival in self._listener.arrivals(seconds):
            hello = arrival.hello
            if hello.hosts != self.hosts or hello.host in self.members:
                self._refuse(arrival)
                continue
            self.members[hello.host], self.processes[hello.host] = arrival.link, hello.processes
            self._names[hello.host] = f"host {hello.host} ({hello.name}, {arrival.address})"
            if self._begun:
                self._done.add(hello.host)
            arrival.link.send(Welcome())
        for failure in self._receive(idle=True):
            if failure.status < 0:
                say(f"{failure.who} has left: {failure.cause}", stderr=True)
                raise SystemExit(failure.exit_status)
            if failure.cause:  # and not the late report of a rank
                say(f"{failure.who} has left: {failure.cause}; waiting for it to come back", stderr=True)

    def poll(self) -> list[Failure]:
        """Return failures of the other hosts since the last call."""
        for arrival in self._listener.arrivals(0):
            self._refuse(arrival)  # while ranks run
        return self._receive()

    def report(self, failures: Iterable[Failure], status: int) -> None:
        """Let all hosts end with this status."""
        for link in self.members.values():
            link.send(End(status=status, final=not self.heals))

    def finish(self, seconds: float) -> list[Failure]:
        """Wait up to so many seconds for the others, and return what they still report."""
        found = self.poll()
        deadline = time.monotonic() + seconds
        while self.members.keys() - self._done and time.monotonic() < deadline:
            time.sleep(0.05)
            found += self.poll()
        return found

    def close(self, status: int) -> None:
        """End the run with this status."""
        for link in self.members.values():
            if self.heals:
                link.send(End(status=status, final=True))
            link.close()
        self._listener.close()

    def _missing(self) -> list[int]:
        """Return hosts that are not ready: not connected, or, after a start, not done with it."""
        if not self._begun:
            for host in self._done:
                self.members.pop(host).close()
            self._done.clear()
        ready = self.members.keys() & self._done if self._begun else self.members
        return [host for host in range(1, self.hosts) if host not in ready]

    def _refuse(self, arrival: Arrival) -> None:
        reason: Literal["taken", "hosts"] = "taken" if arrival.hello.hosts == self.hosts else "hosts"
        arrival.link.send(Refused(reason=reason, hosts=self.hosts))
        arrival.link.close()

    def _receive(self, idle: bool = False) -> list[Failure]:
        """Return what the members report; lost ones are removed.

        Args:
            idle: whether those whose ranks have ended count, too.
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
                    found.append(Failure(self._names[host], -message.signal, cause=f"it was ended by {name}"))
                elif isinstance(message, Report) and self._reports[host] <= self.processes[host]:
                    found.append(Failure(message.who, message.status, message.tail))
                else:
                    link.fail(LinkFault.INVALID)
            if link.fault is not None and (idle or host not in self._done):
                self._done.discard(host)
                found.append(Failure(self._names[host], LOST_STATUS, cause=link.fault.value))
                self.members.pop(host).close()
        return found


class Arrival(NamedTuple):
    """A host that has proved to know the secret: its connection, how it introduced itself, and its address."""

    link: Link
    hello: Hello
    address: str


class Listener:
    """Listens for hosts, without ever waiting for a connection.

    Args:
        name: of this host, as the others know it; see `listening_addresses`.
        port: to listen at.
        secret: of the run.

    Raises:
        UserError: the port is taken.
    """

    def __init__(self, name: str, port: int, secret: bytes) -> None:
        self._port = port
        self._secret = secret
        self._selector = selectors.DefaultSelector()
        self._sockets: list[socket.socket] = []
        self._strangers: dict[Link, tuple[str, float]] = {}  # the oldest first: address, when to drop it
        self._dropped = 0
        self._reported: set[tuple[str, LinkFault]] = set()
        try:
            for family, address in listening_addresses(name, port):
                self._sockets.append(socket.create_server(address, family=family, backlog=QUEUE))
        except OSError as error:
            raise UserError(f"port {port} of this host cannot be used: {error}", "name another MASTER_PORT") from error
        for listening in self._sockets:
            listening.setblocking(False)
            self._selector.register(listening, selectors.EVENT_READ)

    def arrivals(self, seconds: float) -> list[Arrival]:
        """Return hosts that have arrived, waiting up to so many seconds."""
        found = []
        for key, _ in self._selector.select(seconds):
            if isinstance(key.data, Link):
                found += self._hear(key.data)
            elif isinstance(key.fileobj, socket.socket):
                self._accept(key.fileobj)
        now = time.monotonic()
        for link in [link for link, (_, deadline) in self._strangers.items() if deadline < now]:
            self._drop(link)
        return found

    def close(self) -> None:
        """Stop listening, and report how many connections were dropped."""
        for link in list(self._strangers):
            self._drop(link)
        for listening in self._sockets:
            listening.close()
        self._selector.close()
        if self._dropped:
            times = counted(self._dropped, "connection")
            say(f"port {self._port}: {times} of others than this run's hosts were dropped", stderr=True)

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(MAX_ACCEPTED):
            try:
                connection, (address, *_) = listening.accept()
            except OSError:  # no more, or gone already
                return
            if len(self._strangers) == MAX_STRANGERS:
                # The oldest of the address that has most, so that others are heard beside one that floods.
                crowded = Counter(place for place, _ in self._strangers.values()).most_common(1)[0][0]
                self._drop(next(link for link, (place, _) in self._strangers.items() if place == crowded))
            link = Link(connection, self._secret, first=True)
            self._strangers[link] = address, time.monotonic() + STRANGER_SECONDS
            self._selector.register(connection, selectors.EVENT_READ, link)

    def _hear(self, link: Link) -> list[Arrival]:
        if link not in self._strangers:  # dropped since it was selected
            return []
        messages = link.receive()
        if link.fault is None and len(messages) == 1 and isinstance(messages[0], Hello):
            address, _ = self._strangers.pop(link)
            self._selector.unregister(link.connection)
            return [Arrival(link, messages[0], address)]
        if messages:
            link.fail(LinkFault.INVALID)
        if link.fault is not None:
            self._drop(link)
        return []

    def _drop(self, link: Link) -> None:
        address, _ = self._strangers.pop(link)
        self._dropped += 1
        fault = link.fault or LinkFault.GONE
        reason = {LinkFault.FORGED: "has another secret", LinkFault.VERSION: "runs another version of this toolkit"}
        if fault in reason and (address, fault) not in self._reported and len(self._reported) < MAX_LINES:
            self._reported.add((address, fault))
            say(f"a launcher at {address} {reason[fault]}: it may not join", stderr=True)
        if fault is LinkFault.FORGED:
            link.refuse()
        self._selector.unregister(link.connection)
        link.close()


def listening_addresses(name: str, port: int) -> list[tuple[int, tuple[str | int, ...]]]:
    """Return family and socket address of each place to listen at: where others find this host under this name.

    Where the name resolves to no address of this host (as that of a Kubernetes service does), or only to loopback
    (Debian gives a host's own name 127.0.1.1), it is unknown where the others connect: then it is all interfaces.
    """
    places = local_addresses(name, port)
    if any(not is_loopback(str(address[0])) for _, address in places) or (places and is_loopback(name)):
        return places
    leads = "only to this host itself" if places else "to no address of this host"
    say(f"{name} leads {leads}: listening at port {port} of all its interfaces", stderr=True)
    return local_addresses("0.0.0.0", port) + local_addresses("::", port)  # of each kind that this system has
