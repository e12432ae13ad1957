"""How the launchers of several hosts know of each other: one line of TCP from each to the first host's.

A host whose connection ends before it said that it is done counts as lost; kept-alive connections end within half a
minute where a host falls silent.
"""

from __future__ import annotations

import dataclasses
import json
import socket
import time
from collections.abc import Callable, Iterable
from typing import Any

import psutil

from novelgpt.launch.ranks import Block, Failure
from novelgpt.settings.errors import UserError

WAIT_SECONDS = 600.0  # for all hosts to come
LINE_BYTES = 1 << 16
LOST_STATUS = 1
FIRST_HOST = "the first host"
KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}  # seconds, seconds, probes


class Line:
    """One connection, whose messages are JSON objects, a line each. Nothing waits but `send`."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEP_ALIVE.items():
            if name in vars(socket):
                self.connection.setsockopt(socket.IPPROTO_TCP, vars(socket)[name], value)
        self.connection.settimeout(5.0)
        self.closed = False
        self._rest = b""

    def send(self, **message: Any) -> None:
        """Send it; a connection that is gone is noted, not raised."""
        try:
            self.connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self.closed = True

    def receive(self) -> list[dict[str, Any]]:
        """What has come meanwhile; `closed` is set at the end."""
        self.connection.setblocking(False)
        try:
            while not self.closed and len(self._rest) <= LINE_BYTES:
                data = self.connection.recv(LINE_BYTES)
                self._rest += data
                self.closed = not data
        except BlockingIOError:
            pass
        except OSError:
            self.closed = True
        finally:
            self.connection.settimeout(5.0)
        *lines, self._rest = self._rest.split(b"\n")
        try:
            return [message for message in map(json.loads, lines) if isinstance(message, dict)]
        except ValueError:
            self.closed = True
            return []


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


class FirstHost:
    """The first host's end: lines to all others.

    Attributes:
        told: always None; see `Member`.
    """

    told: int | None = None

    def __init__(self, hosts: int, port: int) -> None:
        """Listen on `port`.

        Raises:
            UserError: it is taken.
        """
        self.hosts = hosts
        self.members: dict[int, Line] = {}
        self.processes: dict[int, int] = {}
        self._names: dict[int, str] = {}
        self._done: set[int] = set()
        try:
            self._listener = socket.create_server(("", port), backlog=hosts)
        except OSError as error:
            raise UserError(f"port {port} of this host cannot be used: {error}", "name another MASTER_PORT") from error
        self._listener.settimeout(0.2)

    def gather(self, processes: int, port: int, watch: Callable[[], None]) -> Block:
        """Wait for all hosts, tell each its ranks, and return those of this one.

        Args:
            processes: of this host.
            port: where the ranks meet.
            watch: called again and again meanwhile; what it raises ends the waiting.

        Raises:
            UserError: a host did not come in time.
        """
        self.processes[0] = processes
        begin = time.monotonic()
        while len(self.members) < self.hosts - 1:
            watch()
            self._accept()
            if time.monotonic() - begin > WAIT_SECONDS:
                missing = [host for host in range(1, self.hosts) if host not in self.members]
                raise UserError(
                    f"of {self.hosts} hosts, number {', '.join(map(str, missing))} did not come in "
                    f"{WAIT_SECONDS / 60:.0f} minutes",
                    "see what it printed, and whether this host's port is open to it",
                )
        self._listener.close()
        world = sum(self.processes.values())
        address = self.members[1].connection.getsockname()[0]
        for host, line in self.members.items():
            first = sum(self.processes[earlier] for earlier in range(host))
            line.send(first_rank=first, world_size=world, port=port)
        return Block(0, processes, world, address, port, interface_of(address))

    def poll(self) -> list[Failure]:
        """Failures of the other hosts since the last call."""
        found = []
        for host, line in self.members.items():
            for message in line.receive():
                found += [Failure(**fields) for fields in message.get("failures", [])]
                if message.get("done"):
                    self._done.add(host)
            if line.closed and host not in self._done:
                self._done.add(host)
                found.append(Failure(f"host {host} ({self._names[host]})", LOST_STATUS))
        return found

    def report(self, failures: Iterable[Failure], status: int) -> None:
        """Tell all hosts to end with this status."""
        for line in self.members.values():
            line.send(end=status)

    def finish(self, seconds: float) -> list[Failure]:
        """Wait so long for the others, and take what they still have to say."""
        found = self.poll()
        deadline = time.monotonic() + seconds
        while len(self._done) < len(self.members) and time.monotonic() < deadline:
            time.sleep(0.05)
            found += self.poll()
        for line in self.members.values():
            line.connection.close()
        return found

    def _accept(self) -> None:
        try:
            connection, (address, *_) = self._listener.accept()
        except TimeoutError:
            return
        line = Line(connection)
        deadline = time.monotonic() + 2
        messages: list[dict[str, Any]] = []
        while not (messages or line.closed) and time.monotonic() < deadline:
            messages = line.receive()
            time.sleep(0.01)
        hello = messages[0] if messages else {}
        host, processes, name = hello.get("host"), hello.get("processes"), str(hello.get("name"))
        known = isinstance(host, int) and 0 < host < self.hosts and host not in self.members
        if not known or not isinstance(processes, int) or hello.get("hosts") != self.hosts:
            connection.close()  # whoever it is, it is none of this run
            return
        assert isinstance(host, int)
        self.members[host], self.processes[host] = line, processes
        self._names[host] = f"{name}, {address}"


class Member:
    """The end of every other host.

    Attributes:
        told: status with which the first host wants this one to end; None as long as it does not.
    """

    def __init__(self, address: str, port: int, hello: dict[str, object], watch: Callable[[], None]) -> None:
        """Connect and say who this is, waiting for the first host to listen.

        Raises:
            UserError: it does not, or takes no such host.
        """
        self.told: int | None = None
        self._lost = False
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            watch()
            try:
                connection = socket.create_connection((address, port), timeout=5)
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"the first host does not answer at {address} port {port}: {error}",
                        "start there too; open the port; or name an address of it that this host can reach",
                    ) from error
                time.sleep(0.5)
        self.line = Line(connection)
        self.line.send(**hello)

    def block(self, processes: int, watch: Callable[[], None]) -> Block:
        """The ranks of this host, once all hosts are there.

        Raises:
            UserError: the first host hung up.
        """
        messages: list[dict[str, Any]] = []
        while not messages:
            watch()
            messages = self.line.receive()
            if self.line.closed and not messages:
                raise UserError(
                    "the first host ended, or has a host of this number already",
                    "see what it printed; each host needs a number of its own, from 0",
                )
            time.sleep(0.05)
        start = messages[0]
        own, first = self.line.connection.getsockname()[0], self.line.connection.getpeername()[0]
        return Block(start["first_rank"], processes, start["world_size"], first, start["port"], interface_of(own))

    def poll(self) -> list[Failure]:
        """The loss of the first host; all other failures are the first host's to tell."""
        for message in self.line.receive():
            self.told = message.get("end", self.told)
        if self.line.closed and self.told is None and not self._lost:
            self._lost = True
            return [Failure(FIRST_HOST, LOST_STATUS)]
        return []

    def report(self, failures: Iterable[Failure], status: int) -> None:
        """Tell the first host."""
        self.line.send(failures=[dataclasses.asdict(failure) for failure in failures])

    def finish(self, seconds: float) -> list[Failure]:
        """Say that all is said."""
        self.line.send(done=True)
        self.line.connection.close()
        return []


Channel = Alone | FirstHost | Member


def interface_of(address: str) -> str | None:
    """The network interface that has an address, such as eth0."""
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in entries):
            return name
    return None
