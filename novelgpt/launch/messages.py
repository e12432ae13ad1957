"""What launchers of several hosts send each other: a closed set of messages, each validated and signed.

A message travels as one JSON object in a signed frame. To add one, write its model and put it into the union of its
direction; a change of the messages is a new `VERSION`.

Each side starts with a greeting: what it is, its protocol's version, and 32 random bytes. Then come frames: the length
of the body, a signature, the body. The signature is HMAC-SHA256 over the number of the frame in its direction, the
length and the body; its key is the HMAC, under the secret of the run, of the sender ("first" or "member"), the first
host's greeting and the member's. So nothing can be replayed in another place, on another connection or in another run,
and nothing sent back to its sender. The signature is checked before the body is parsed. Bodies are not encrypted.
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
import socket
import struct
from enum import Enum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from novelgpt.launch.hosts import MAX_HOSTS, MAX_PROCESSES
from novelgpt.launch.ranks import TAIL_BYTES

VERSION = 3
# Of a process, as subprocess has it; Windows counts up to 32 bits.
Status = Annotated[int, Field(ge=-64, lt=2**32)]


class LauncherMessage(BaseModel):
    """The base of all messages: strict types, and no other fields."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Hello(LauncherMessage):
    """A host introduces itself. Sent once, before anything else."""

    kind: Literal["hello"] = "hello"
    host: int = Field(ge=1, lt=MAX_HOSTS)
    hosts: int = Field(ge=2, le=MAX_HOSTS)
    processes: int = Field(ge=1, le=MAX_PROCESSES)
    name: str = Field(max_length=255)

    @model_validator(mode="after")
    def _is_one_of_them(self) -> Hello:
        if self.host >= self.hosts:
            raise ValueError(f"host {self.host} of {self.hosts}")
        return self


class Report(LauncherMessage):
    """A rank of this host has failed."""

    kind: Literal["report"] = "report"
    who: str = Field(max_length=300)
    status: Status
    tail: str = Field(max_length=TAIL_BYTES)


class Done(LauncherMessage):
    """All ranks of this host have ended, and all failures are reported."""

    kind: Literal["done"] = "done"


class Quit(LauncherMessage):
    """A signal ends this host at a moment at which its ranks cannot agree with the others: it ends the run."""

    kind: Literal["quit"] = "quit"
    signal: int = Field(ge=1, le=64)


class Welcome(LauncherMessage):
    """This host is accepted, and waits for the others."""

    kind: Literal["welcome"] = "welcome"


class Refused(LauncherMessage):
    """This host is not accepted: its number is taken, or the first host counts another number of `hosts`."""

    kind: Literal["refused"] = "refused"
    reason: Literal["taken", "hosts"]
    hosts: int = Field(ge=2, le=MAX_HOSTS)


class RanksStart(LauncherMessage):
    """All hosts have joined: these are this one's ranks, and where they meet.

    Where the run `heals`, a host whose ranks have ended waits for another `RanksStart` or the final `End`.
    """

    kind: Literal["start"] = "start"
    first_rank: int = Field(ge=1, lt=MAX_HOSTS * MAX_PROCESSES)
    world_size: int = Field(ge=2, le=MAX_HOSTS * MAX_PROCESSES)
    port: int = Field(ge=1, le=65535)
    heals: bool


class End(LauncherMessage):
    """Ranks have failed or are done, with this status: end what still runs. Where it is `final`, the run is over."""

    kind: Literal["end"] = "end"
    status: int = Field(ge=0, lt=2**32)
    final: bool


FromMember = Hello | Report | Done | Quit
FromFirst = Welcome | Refused | RanksStart | End
FROM_MEMBER: TypeAdapter[FromMember] = TypeAdapter(Annotated[FromMember, Field(discriminator="kind")])
FROM_FIRST: TypeAdapter[FromFirst] = TypeAdapter(Annotated[FromFirst, Field(discriminator="kind")])


MAGIC = b"novelgpt"
GREETING = struct.Struct("!8sH32s")  # magic, version, random bytes
HEAD = struct.Struct("!I32s")  # bytes of the body, signature
MAX_BYTES = 1 << 16  # of a body
ROUNDS = 16  # of reading, before others have their turn
SEND_SECONDS = 5.0
KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}  # seconds, seconds, probes
# Sent by a side that cannot verify the other's signature: no body is empty.
UNVERIFIED = HEAD.pack(0, bytes(32))


class LinkFault(Enum):
    """Why a connection is unusable, as the end of "host 1 is gone: "."""

    GONE = "its launcher was killed, or the connection is cut"
    UNKNOWN = "it is not a launcher of this toolkit"
    VERSION = "it runs another version of this toolkit"
    FORGED = "what came from there was not signed with the secret of this run"
    INVALID = "it sent what this version of the toolkit does not know"


class Link:
    """One connection. Nothing waits but a member's `send`; nothing is raised: failures are noted as `fault`.

    The first host sends little. Where the other side's system takes no more of it, nobody reads there.

    Attributes:
        connection: the socket.
        fault: why nothing more comes; None while it works.
    """

    def __init__(self, connection: socket.socket, secret: bytes, first: bool) -> None:
        """Greet.

        Args:
            connection: to the other launcher; the link closes it.
            secret: of the run.
            first: whether this is the first host's end.
        """
        self.connection = connection
        self.fault: LinkFault | None = None
        self._secret = secret
        self._first = first
        self._greeting = GREETING.pack(MAGIC, VERSION, secrets.token_bytes(32))
        self._keys: tuple[bytes, bytes] | None = None  # for what goes out, for what comes in
        self._sent = self._received = 0
        self._rest = bytearray()
        connection.setblocking(False)
        with contextlib.suppress(OSError):  # of one that has hung up
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in KEEP_ALIVE.items():
                if name in vars(socket):
                    connection.setsockopt(socket.IPPROTO_TCP, vars(socket)[name], value)
        self._write(self._greeting)

    @property
    def greeted(self) -> bool:
        """Whether the other side has sent its greeting, without which nothing can be signed."""
        return self._keys is not None

    def send(self, message: LauncherMessage) -> None:
        """Send a signed message."""
        if self._keys is None or self.fault is not None:
            return
        body = message.model_dump_json().encode()
        self._write(HEAD.pack(len(body), _signature(self._keys[0], self._sent, body)) + body)
        self._sent += 1

    def refuse(self) -> None:
        """Tell the other side that its signature is not of this run."""
        self._write(UNVERIFIED)

    def receive(self) -> list[LauncherMessage]:
        """Return what has arrived, in order; nothing after a fault is parsed."""
        messages: list[LauncherMessage] = []
        for _ in range(ROUNDS):
            if self.fault is not None:
                break
            try:
                data = self.connection.recv(MAX_BYTES)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if not data:
                self.fail(LinkFault.GONE)
            self._rest += data
            self._read_greeting()
            while self._read_frame(messages):
                pass
        return messages

    def fail(self, fault: LinkFault) -> None:
        """Note a fault; the first one is kept."""
        self.fault = self.fault or fault

    def close(self) -> None:
        """Close the connection."""
        self.fail(LinkFault.GONE)
        self.connection.close()

    def _read_greeting(self) -> None:
        if self._keys is not None:
            return
        if not MAGIC.startswith(self._rest[: len(MAGIC)]):
            self.fail(LinkFault.UNKNOWN)
        elif len(self._rest) >= GREETING.size:
            other = bytes(self._rest[: GREETING.size])
            del self._rest[: GREETING.size]
            if GREETING.unpack(other)[1] != VERSION:
                self.fail(LinkFault.VERSION)
                return
            both = self._greeting + other if self._first else other + self._greeting
            first, member = (hmac.digest(self._secret, end + both, "sha256") for end in (b"first", b"member"))
            self._keys = (first, member) if self._first else (member, first)

    def _read_frame(self, messages: list[LauncherMessage]) -> bool:
        """Take one frame off what has arrived; whether there was a complete one."""
        if self._keys is None or self.fault is not None or len(self._rest) < HEAD.size:
            return False
        size, signature = HEAD.unpack_from(self._rest)
        if not 0 < size <= MAX_BYTES:
            self.fail(LinkFault.FORGED)
            return False
        if len(self._rest) < HEAD.size + size:
            return False
        body = bytes(self._rest[HEAD.size : HEAD.size + size])
        del self._rest[: HEAD.size + size]
        if not hmac.compare_digest(signature, _signature(self._keys[1], self._received, body)):
            self.fail(LinkFault.FORGED)
            return False
        self._received += 1
        try:
            messages.append((FROM_MEMBER if self._first else FROM_FIRST).validate_json(body))
        except ValidationError:
            self.fail(LinkFault.INVALID)
            return False
        return True

    def _write(self, data: bytes) -> None:
        try:
            if self._first:
                if self.connection.send(data) < len(data):
                    self.fail(LinkFault.GONE)
                return
            self.connection.settimeout(SEND_SECONDS)
            self.connection.sendall(data)
            self.connection.setblocking(False)
        except OSError:
            self.fail(LinkFault.GONE)


def _signature(key: bytes, number: int, body: bytes) -> bytes:
    return hmac.digest(key, struct.pack("!QI", number, len(body)) + body, "sha256")
