"""Strangers at the port of a first host's launcher, and hosts of its run that misbehave.

The protocol is written here a second time, from its description, so that both are held against each other.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import random
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.launched import PATIENCE

HELLO = {"kind": "hello", "host": 1, "hosts": 3, "processes": 1, "name": "node"}
NESTED = b"[" * 60_000


class Wire:
    """A connection to the first host, on which anything may be sent.

    Args:
        place: address and port of its launcher.
        secret: that this side knows.
        version: of the protocol, that this side says.
        greeting: in place of one of this side's own.

    Attributes:
        sent: all bytes that were sent.
    """

    def __init__(self, place: tuple[str, int], secret: bytes, version: int = 3, greeting: bytes | None = None) -> None:
        self.socket = socket.create_connection(place, timeout=PATIENCE)
        self.secret = secret
        self.greeting = greeting or b"novelgpt" + struct.pack("!H", version) + os.urandom(32)
        self.other = b""
        self.sent = b""

    def put(self, data: bytes) -> Wire:
        """Send bytes; a first host that has hung up already does not matter."""
        self.sent += data
        with contextlib.suppress(OSError):
            self.socket.sendall(data)
        return self

    def greet(self) -> Wire:
        """Exchange greetings."""
        self.other = self.exactly(42)
        return self.put(self.greeting)

    def frame(self, body: bytes, number: int = 0, end: bytes = b"member") -> bytes:
        """A frame, signed as this end of this connection does it by default."""
        key = hmac.new(self.secret, end + self.other + self.greeting, hashlib.sha256).digest()
        signed = struct.pack("!QI", number, len(body)) + body
        return struct.pack("!I", len(body)) + hmac.new(key, signed, hashlib.sha256).digest() + body

    def say(self, message: object, number: int = 0) -> Wire:
        """Send a message as a frame."""
        return self.put(self.frame(json.dumps(message).encode(), number))

    def hear(self, number: int = 0) -> dict[str, object]:
        """The next message of the first host, whose signature is checked."""
        head = self.exactly(36)
        body = self.exactly(struct.unpack("!I", head[:4])[0])
        assert head + body == self.frame(body, number, b"first")
        message: dict[str, object] = json.loads(body)
        return message

    def exactly(self, count: int) -> bytes:
        """So many bytes."""
        read = b""
        while len(read) < count:
            part = self.socket.recv(count - len(read))
            assert part, "the first host has hung up"
            read += part
        return read

    def hung_up(self) -> bool:
        """Wait until the first host ends the connection."""
        with contextlib.suppress(ConnectionError):
            while self.socket.recv(1 << 16):
                pass
        self.socket.close()
        return True


def join(place: tuple[str, int], secret: bytes, **fields: object) -> Wire:
    """Host 1 of three, which has been taken."""
    wire = Wire(place, secret).greet().say(HELLO | fields)
    assert wire.hear() == {"kind": "welcome"}
    return wire


def flood(place: tuple[str, int], count: int, seed: int) -> None:
    """So many connections with random bytes, each ended at once."""
    draw = random.Random(seed)
    greeting = b"novelgpt" + struct.pack("!H", 3) + bytes(32)
    for _ in range(count):
        noise = draw.randbytes(draw.randrange(400))
        kind = draw.randrange(4)
        if kind == 1:
            noise = greeting + noise
        elif kind == 2:
            noise = greeting + struct.pack("!I", draw.choice([0, 1, len(noise), 1 << 16, 1 << 31])) + noise
        elif kind == 3:
            fields = {name: draw.choice([value, -1, 2**70, "", [], {}]) for name, value in HELLO.items()}
            noise = json.dumps(fields).encode() + b"\n" + noise
        with contextlib.suppress(ConnectionError), socket.create_connection(place, timeout=PATIENCE) as connection:
            connection.sendall(noise)


def hostile(place: tuple[str, int], secret: bytes, recorded: Wire) -> Iterator[Wire]:
    """Connections that the first host has to end, made one after the other.

    Args:
        place: of the first host's launcher.
        secret: of the run.
        recorded: a connection on which a host has joined.
    """
    raw: list[bytes] = [
        NESTED, b'{"a":' * 12_000, json.dumps({"host": 1, "hosts": 2, "processes": -1, "name": "x"}).encode() + b"\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
        b"NOVELGPT" + bytes(34), b"SSH-2.0-OpenSSH_9.6\r\n", b"\x00" * 42, recorded.sent,
        recorded.sent[:-1] + b"~", bytes(range(256)) * 300,
    ]  # fmt: skip
    for data in raw:
        yield Wire(place, secret).put(data)
    for version in (0, 1, 4, 65535):
        yield Wire(place, secret, version).greet().say(HELLO)
    after_greeting: list[Callable[[Wire], bytes]] = [
        lambda wire: struct.pack("!I", 0) + bytes(32),
        lambda wire: struct.pack("!I", 2**32 - 1) + bytes(32),
        lambda wire: struct.pack("!I", 2**16 + 1) + bytes(100),
        lambda wire: struct.pack("!I", len(NESTED)) + os.urandom(32) + NESTED,
        lambda wire: recorded.sent[42:],  # what was signed for another connection
        lambda wire: wire.frame(json.dumps(HELLO).encode(), number=1),
        lambda wire: wire.frame(json.dumps(HELLO).encode(), end=b"first"),
        lambda wire: wire.other,
        lambda wire: wire.frame(NESTED),  # from here on, under the right secret
        lambda wire: wire.frame(b"\xff\xfe{}"),
        lambda wire: wire.frame(b'{"kind":"done"}'),
        lambda wire: wire.frame(b'{"kind":"welcome"}'),
        lambda wire: wire.frame(b'{"kind":"hello","host":1,"hosts":3,"processes":NaN,"name":"x"}'),
        lambda wire: wire.frame(json.dumps(HELLO).encode()) + wire.frame(b'{"kind":"done"}', 1),
    ]
    for make in after_greeting:
        wire = Wire(place, secret).greet()
        yield wire.put(make(wire))
    changes: list[dict[str, object]] = [
        {"processes": -1}, {"processes": 0}, {"processes": 10**30}, {"processes": True}, {"processes": "1"},
        {"host": 0}, {"host": 3}, {"host": -1}, {"hosts": 2**63}, {"hosts": 4}, {"name": "x" * 60_000}, {"further": 1},
    ]  # fmt: skip
    for change in changes:
        yield Wire(place, secret).greet().say(HELLO | change)
    mirror = Wire(place, secret)
    mirror.greeting = mirror.exactly(42)  # its own words are sent back
    yield mirror.put(mirror.greeting).put(bytes(36))
    half = Wire(place, secret).greet().put(struct.pack("!I", 100))
    half.socket.shutdown(socket.SHUT_WR)
    yield half
    yield Wire(place, b"the secret of another run").greet().say(HELLO)


def silent(place: tuple[str, int], count: int) -> list[Wire]:
    """Connections on which nothing is said, or nearly nothing."""
    wires = [Wire(place, b"") for _ in range(count)]
    for number, wire in enumerate(wires):
        wire.put(wire.greeting[: number % 42])
    return wires


def attack(place: tuple[str, int], secret: bytes) -> None:
    """All of it against a run that has its hosts, from where this process is."""
    recorded = Wire(place, secret).greet().say(HELLO)
    assert recorded.hear()["kind"] == "refused"
    silent(place, 100)
    flood(place, 2000, seed=3)
    for wire in list(hostile(place, secret, recorded)):
        wire.hung_up()


if __name__ == "__main__":
    attack((sys.argv[1], int(sys.argv[2])), Path(sys.argv[3]).read_bytes().strip())
    print("attacked")
