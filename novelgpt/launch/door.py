"""Where the first host's launcher listens: lets hosts in that know the secret of the run, and nobody else.

Strangers cost little: nothing waits for them, few are heard at a time, each for a few seconds, and nothing of what they
send is looked into.
"""

from __future__ import annotations

import selectors
import socket
import time
from collections import Counter
from dataclasses import dataclass

from novelgpt.launch.frames import Fault, Link
from novelgpt.launch.hosts import is_loopback, local_addresses
from novelgpt.launch.messages import Hello
from novelgpt.settings.errors import UserError
from novelgpt.settings.terminal import counted, say

MOST_STRANGERS = 64  # that are heard at a time
MOST_ACCEPTED = 128  # before others have their turn
QUEUE = 1024  # of connections that are not accepted yet
STRANGER_SECONDS = 10.0  # from the connection to the hello
MOST_LINES = 8  # about those who may not join


@dataclass(frozen=True)
class Arrival:
    """A host that has proved to know the secret: its connection, what it says of itself, and where it comes from."""

    link: Link
    hello: Hello
    address: str


class Door:
    """Listens, without ever waiting for one that has connected.

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
        self._listeners: list[socket.socket] = []
        self._strangers: dict[Link, tuple[str, float]] = {}  # the oldest first: address, when to drop it
        self._dropped = 0
        self._told: set[tuple[str, Fault]] = set()
        try:
            for family, address in listening_addresses(name, port):
                self._listeners.append(socket.create_server(address, family=family, backlog=QUEUE))
        except OSError as error:
            raise UserError(f"port {port} of this host cannot be used: {error}", "name another MASTER_PORT") from error
        for listener in self._listeners:
            listener.setblocking(False)
            self._selector.register(listener, selectors.EVENT_READ)

    def arrivals(self, seconds: float) -> list[Arrival]:
        """Hosts that have come, waiting so long for a sign of any."""
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
        """Listen no more; says how many were sent away."""
        for link in list(self._strangers):
            self._drop(link)
        for listener in self._listeners:
            listener.close()
        self._selector.close()
        if self._dropped:
            times = counted(self._dropped, "connection")
            say(f"port {self._port}: {times} of others than this run's hosts were dropped", stderr=True)

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(MOST_ACCEPTED):
            try:
                connection, (address, *_) = listener.accept()
            except OSError:  # no more, or gone already
                return
            if len(self._strangers) == MOST_STRANGERS:
                # The oldest of the address that has most, so that others are heard beside one that floods.
                crowded = Counter(place for place, _ in self._strangers.values()).most_common(1)[0][0]
                self._drop(next(link for link, (place, _) in self._strangers.items() if place == crowded))
            link = Link(connection, self._secret, first=True)
            self._strangers[link] = address, time.monotonic() + STRANGER_SECONDS
            self._selector.register(connection, selectors.EVENT_READ, link)

    def _hear(self, link: Link) -> list[Arrival]:
        if link not in self._strangers:  # dropped since it was heard
            return []
        messages = link.receive()
        if link.fault is None and len(messages) == 1 and isinstance(messages[0], Hello):
            address, _ = self._strangers.pop(link)
            self._selector.unregister(link.connection)
            return [Arrival(link, messages[0], address)]
        if messages:
            link.fail(Fault.INVALID)
        if link.fault is not None:
            self._drop(link)
        return []

    def _drop(self, link: Link) -> None:
        address, _ = self._strangers.pop(link)
        self._dropped += 1
        line = (address, link.fault or Fault.GONE)
        if line not in self._told and len(self._told) < MOST_LINES and link.fault in (Fault.FORGED, Fault.VERSION):
            self._told.add(line)
            reason = "has another secret" if link.fault is Fault.FORGED else "runs another version of this toolkit"
            say(f"a launcher at {address} {reason}: it may not join", stderr=True)
        if link.fault is Fault.FORGED:
            link.refuse()
        self._selector.unregister(link.connection)
        link.close()


def listening_addresses(name: str, port: int) -> list[tuple[int, tuple[str | int, ...]]]:
    """Family and socket address of each place to listen at: where others find this host under this name.

    Where the name leads to no address of this host (as that of a Kubernetes service does), or only to itself (Debian
    gives a host's own name 127.0.1.1), nothing tells where the others come in: then it is all interfaces.
    """
    places = _at(name, port)
    if any(not is_loopback(str(address[0])) for _, address in places) or (places and is_loopback(name)):
        return places
    leads = "only to this host itself" if places else "to no address of this host"
    say(f"{name} leads {leads}: listening at port {port} of all its interfaces", stderr=True)
    return _at("0.0.0.0", port) + _at("::", port)  # of each kind, as far as this system has it


def _at(name: str, port: int) -> list[tuple[int, tuple[str | int, ...]]]:
    return [(family, (*address[:1], port, *address[2:])) for family, address in local_addresses(name)]
